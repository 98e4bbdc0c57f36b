"""The figures of a report as PNG bytes, drawn from the collected cells alone, and from images where
they are at hand.
"""

import base64
import io
import statistics
import zlib
from collections.abc import Mapping
from typing import Any

import torch

from ..data import Dataset
from ..evaluation.defences.jpeg import Jpeg
from ..plots.evaluation import label, missing, one_per_class, plain_text, shown
from .cells import STANDARD, Cells, gaps
from .schema import PICTURES, SIDE, unpacked

COLOURS = ("#1b7837", "#3b6fb6", "#b8860b", "#7b3294", "#c51b29", "#008080", "#555555", "#d95f02")
NAME = 24  # characters of a poison's name


def draw(report: Mapping[str, Any], sources: Any = None) -> dict[str, bytes]:
    """Draws what can be drawn: {name: PNG bytes}, which is empty without matplotlib (`missing` says
    so). sources: the Sources of the report, for the pictures of images.
    """
    if missing():
        return {}
    cells = Cells(report)
    with plain_text():
        made = {
            "summary": _summary(report, cells),
            "jpeg": _jpeg(cells),
            "gap": _gap(report, cells),
            "scatter": _scatter(report, cells),
            "noise": _noise(report),
        }
        if sources is not None and report["poisons"]:
            made["images"] = _images(report, sources)
    return {name: figure for name, figure in made.items() if figure}


def _figure(width, height):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _png(canvas):
    stream = io.BytesIO()
    canvas.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _colour(cells, poison):
    return COLOURS[cells.order.index(poison) % len(COLOURS)]


def _summary(report, cells):
    found = {p: cells.values(p, cells.main, STANDARD) for p in cells.order}
    found = {poison: values for poison, values in found.items() if values}
    if not found:
        return None
    canvas = _figure(6.4, 0.9 + 0.3 * len(found))
    axis = canvas.subplots()
    for row, (poison, values) in enumerate(found.items()):
        mean = statistics.fmean(values)
        axis.barh(row, mean, height=0.6, color=_colour(cells, poison))
        axis.plot([min(values), max(values)], [row, row], color="#222222", linewidth=1.2)
        axis.annotate(
            f"{mean:.1f}",
            (max(values), row),
            textcoords="offset points",
            xytext=(4, 0),
            va="center",
            fontsize=8,
        )
    axis.axvline(100 / report["classes"], color="#555555", linestyle="--", linewidth=0.9)
    axis.set_yticks(range(len(found)), [label(poison, NAME) for poison in found], fontsize=8)
    axis.invert_yaxis()
    axis.set(xlabel="clean test accuracy, %", xlim=(0, 1.1 * max(map(max, found.values()))))
    axis.grid(axis="x", alpha=0.25)
    return _png(canvas)


def _jpeg(cells):
    qualities = cells.jpeg_qualities(cells.main)[::-1]
    if not qualities:
        return None
    canvas = _figure(6.4, 3.8)
    axis = canvas.subplots()
    for poison in cells.order:
        known = [(q, cells.values(poison, cells.main, Jpeg(q).spec)) for q in qualities]
        known = [(q, values) for q, values in known if values]
        if not known:
            continue
        x, means = [q for q, _ in known], [statistics.fmean(values) for _, values in known]
        axis.plot(
            x,
            means,
            marker="o",
            markersize=4,
            color=_colour(cells, poison),
            label=label(poison, NAME),
        )
        axis.fill_between(
            x,
            [min(v) for _, v in known],
            [max(v) for _, v in known],
            color=_colour(cells, poison),
            alpha=0.18,
            linewidth=0,
        )
        if (plain := cells.mean(poison, cells.main, STANDARD)) is not None:
            axis.axhline(plain, color=_colour(cells, poison), linewidth=0.9, linestyle=":")
    axis.set(
        xlabel="JPEG quality of the training images (dotted: not compressed)",
        ylabel="clean test accuracy, %",
        ylim=(0, None),
    )
    axis.legend(frameon=False, fontsize=8)
    axis.grid(alpha=0.25)
    return _png(canvas)


def _gap(report, cells):
    estimators = report["setting"]["analysis"]["estimators"]
    victims = [v for v in cells.victims if any(cells.analyses(p, v) for p in cells.order)]
    found = {(v, e): gaps(cells, v, cells.analysed(v, e)) for v in victims[:1] for e in estimators}
    found = {key: pairs for key, pairs in found.items() if pairs}
    if not found:
        return None
    canvas = _figure(3.1 * len(found) + 0.6, 3.2)
    for axis, ((_, estimator), pairs) in zip(
        canvas.subplots(1, len(found), squeeze=False)[0], found.items()
    ):
        middle = (min(i for i, _ in pairs.values()) + max(i for i, _ in pairs.values())) / 2
        for poison, (information, accuracy) in pairs.items():
            axis.scatter(information, accuracy, color=_colour(cells, poison))
            side, away = ("right", -5) if information > middle else ("left", 5)
            axis.annotate(
                label(poison, NAME),
                (information, accuracy),
                textcoords="offset points",
                xytext=(away, 3),
                ha=side,
                fontsize=8,
            )
        axis.set(xlabel="MI gap to clean, nats", ylabel="accuracy gap, points")
        axis.set_title(estimator, fontsize=9)
        axis.margins(0.25)
        axis.grid(alpha=0.25)
    return _png(canvas)


def _scatter(report, cells):
    """Two principal components of the features of poisoned training images, first seed, by
    class.
    """
    chosen: dict[str, dict[str, Any]] = {}
    for cell in report["cells"]:
        if "scatter" in cell.get("analysis", {}):
            chosen.setdefault(cell["poison"], cell["analysis"])
    if not chosen:
        return None
    canvas = _figure(2.4 * len(chosen), 2.6)
    for axis, (poison, found) in zip(
        canvas.subplots(1, len(chosen), squeeze=False)[0], chosen.items()
    ):
        points = torch.tensor(found["scatter"])
        axis.scatter(
            points[:, 0], points[:, 1], c=found["scatter_labels"], cmap="tab10", s=5, linewidths=0
        )
        axis.set(xticks=[], yticks=[])
        axis.set_title(label(poison, NAME), fontsize=9)
    return _png(canvas)


def _grid(rows, titles):
    canvas = _figure(0.95 * max(map(len, rows.values())) + 1.2, 1.0 * len(rows) + 0.3)
    for k, (line, (name, pictures)) in enumerate(
        zip(canvas.subplots(len(rows), len(titles), squeeze=False), rows.items())
    ):
        for axis, picture, title in zip(line, pictures, titles):
            axis.imshow(shown(picture), interpolation="nearest", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            if not k:
                axis.set_title(label(title, 10), fontsize=7)
        line[0].set_ylabel(label(name, NAME), fontsize=8)
    return _png(canvas)


def _chosen(clean):
    rows = one_per_class(clean.labels, PICTURES)
    return rows, [clean.classes[int(clean.labels[k])][:100] for k in rows]


def thumbnails(clean: Dataset, images: torch.Tensor) -> dict[str, Any]:
    """The perturbations of eight images of a poison in a form that JSON can hold: pixel levels of
    1/255, and every k-th pixel of images larger than 64.
    """
    rows, titles = _chosen(clean)
    step = -(-max(images.shape[-2:]) // SIDE)
    levels = (
        images[rows, :, ::step, ::step].to(torch.int16) - clean.images[rows, :, ::step, ::step]
    ).contiguous()
    packed = base64.b64encode(zlib.compress(levels.numpy().astype("<i2").tobytes(), 9)).decode()
    return {"titles": titles, "shape": list(levels.shape), "levels": packed}


def _noise(report):
    """Draws perturbations alone, with the largest change of each poison at full contrast."""
    pictures, titles = {}, []
    for entry in report["poisons"]:
        if found := entry.get("pictures"):
            titles, delta = found["titles"], unpacked(found).float()
            pictures[entry["name"]] = (0.5 + delta / (2 * max(float(delta.abs().max()), 1))).clamp(
                0, 1
            )
    return _grid(pictures, titles) if pictures else None


def _images(report, sources):
    rows, titles = _chosen(sources.clean)
    made = ["clean", *(entry["name"] for entry in report["poisons"])]
    return _grid({name: sources.images(name)[1][rows].float() / 255 for name in made}, titles)
