"""The figure of a poison: images, amplified perturbations, poisoned images, and the accuracy curves
of the victims.
"""

import contextlib
import importlib.util
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch

from .. import data
from ..dispatch.registry import BackendError
from ..support.messages import fail, printable

COLOURS = {"clean": "#1b7837", "poisoned": "#c51b29", "random noise": "#3b6fb6"}


def missing() -> str | None:
    """Why no figure can be drawn here, or None."""
    if importlib.util.find_spec("matplotlib") is None:
        return "figure not drawn: pip install 'miue_fast[plot]'"
    return None


def check_suffix(path: Path) -> None:
    """ValueError if `path` does not end in a format that matplotlib writes."""
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.lower()[1:] not in kinds:
        fail("figure", "path", f"a file name ending in {', '.join(kinds)}", str(path))


@contextlib.contextmanager
def plain_text() -> Generator[None, None, None]:
    """A context in which text in figures stands as it is, also between two $ and whatever the
    user's matplotlibrc says.
    """
    import matplotlib

    with matplotlib.rc_context(
        {"text.parse_math": False, "text.usetex": False, "axes.formatter.use_mathtext": False}
    ):
        yield


def label(name: str, most: int) -> str:
    """Makes a name fit for a figure: one line of at most `most` characters. matplotlib leaves names
    out of a legend that begin with an underscore, so these get a space in front.
    """
    return f"{' ' * name.startswith('_')}{printable(name[:most], most=None)}"[:most]


def figure(
    table: Any, clean: data.Dataset, poisoned: torch.Tensor, path: str | Path, *, columns: int = 6
) -> Path:
    """Draws the figure as a PNG, or in the format that the suffix of `path` names.

    Args:
        table: the Table of `evaluate`. Curves are means over the seeds, and bands go from the
            smallest to the largest.
        clean: the clean images.
        poisoned: uint8 [N, C, H, W] in the same order (`poisoned_images` gives them).
        path: a new name, or a figure that this package wrote there (`miue-files.sha256` beside it
            says so).
        columns: how many images are shown, of as many classes as there are.

    Returns the path. Errors: ValueError, also for a file that belongs to somebody else;
    BackendError without matplotlib; OSError where the file cannot be written.
    """
    path = Path(path)
    if reason := missing():
        raise BackendError(reason)
    from matplotlib.figure import Figure

    if poisoned.shape != clean.images.shape or poisoned.dtype != torch.uint8:
        fail(
            "figure",
            "poisoned",
            f"uint8 {list(clean.images.shape)}",
            f"{poisoned.dtype} {list(poisoned.shape)}",
        )
    data.check_owned("figure", [path])
    chosen = one_per_class(clean.labels, columns)
    with plain_text(), tempfile.TemporaryDirectory() as folder:
        canvas = Figure(figsize=(1.25 * len(chosen) + 5.6, 4.6), dpi=150, layout="constrained")
        left, right = canvas.subfigures(
            1, 2, squeeze=False, width_ratios=(1.25 * len(chosen) + 0.7, 4.9)
        )[0]
        _images(left, clean, poisoned, chosen)
        _curves(right, table)
        drawn = Path(folder) / f"figure{path.suffix}"
        canvas.savefig(drawn)
        content = drawn.read_bytes()
    data.write_owned({path: lambda file: file.write(content)})
    return path


def one_per_class(labels: torch.Tensor, columns: int) -> list[int]:
    """Positions of images: first the first one of every class, then the second one of every class,
    and so on.
    """
    rank = torch.zeros_like(labels)
    for label in labels.unique():
        here = labels == label
        rank[here] = torch.arange(int(here.sum()))
    return torch.argsort(rank * (labels.max() + 1) + labels, stable=True)[:columns].tolist()


def shown(image: torch.Tensor) -> Any:
    """An image [C, H, W] on the [0, 1] scale as matplotlib wants it: [H, W, 3]. Grey images are
    repeated, and further channels are left out.
    """
    image = image.expand(3, -1, -1) if image.shape[0] < 3 else image[:3]
    return image.permute(1, 2, 0).numpy()


def _images(part, clean, poisoned, chosen):
    before, after = clean.images[chosen].float() / 255, poisoned[chosen].float() / 255
    gain = 0.5 / max(float((after - before).abs().max()), 1 / 255)
    rows = {
        "clean": before,
        f"perturbation\nx {gain:.0f}": (0.5 + (after - before) * gain).clamp(0, 1),
        "poisoned": after,
    }
    axes = part.subplots(3, len(chosen), squeeze=False)
    for line, (name, pictures) in zip(axes, rows.items()):
        for axis, picture in zip(line, pictures):
            axis.imshow(shown(picture), interpolation="nearest", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(name, fontsize=9)
    for axis, position in zip(axes[0], chosen):
        axis.set_title(label(clean.classes[int(clean.labels[position])], 12), fontsize=8)


def _curves(part, table):
    axes = part.subplots(2, 1, sharex=True)
    epochs = table.options["epochs"]
    for axis, title, kind in zip(
        axes,
        ("accuracy on its own training images", "accuracy on clean test images"),
        ("train", "test"),
    ):
        for name, runs in table.rows.items():
            curves = 100 * torch.tensor([getattr(run, f"{kind}_curve") for run in runs])
            mean = curves.mean(0)
            at = range(
                epochs - len(mean) + 1, epochs + 1
            )  # without test curves there is the last epoch only
            axis.plot(
                at,
                mean,
                color=COLOURS[name],
                linewidth=1.8,
                label=f"{name} ({mean[-1]:.0f} %)",
                marker="o",
                markersize=2.5,
            )
            if len(runs) > 1:
                axis.fill_between(
                    at, curves.amin(0), curves.amax(0), color=COLOURS[name], alpha=0.18, linewidth=0
                )
        axis.axhline(100 / table.options["classes"], color="grey", linewidth=0.9, linestyle=":")
        axis.set(ylim=(0, 102), ylabel="%")
        axis.set_title(title, fontsize=9, loc="left")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.legend(
            fontsize=7.5,
            frameon=False,
            loc="upper left",
            bbox_to_anchor=(1.0, 1.0),
            title="victim trained on",
            title_fontsize=7.5,
        )
    axes[1].set_xlabel("epoch (dotted: chance)", fontsize=8)
    axes[1].xaxis.get_major_locator().set_params(integer=True)
