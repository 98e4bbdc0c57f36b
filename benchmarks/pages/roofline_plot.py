"""The roofline of a device.py run as a picture: every convolution at B = 512 under the ceilings
that the same run measured.
"""

import matplotlib

from benchmarks.harness import roofline

matplotlib.use("Agg")
from matplotlib import pyplot

COLOURS = {"cudnn, any": "#999999", "cuda": "#1f77b4", "triton": "#d62728", "wgmma": "#2ca02c"}
MARKS = {"forward": "o", "input gradient": "s", "step": "^"}


def draw(record, path):
    """Ceilings that the run did not measure are the ones of docs/roofline.md, dashed."""
    rate = {
        c["name"].split()[1] if c["name"].startswith("GEMM") else c["name"]: c["rate"]
        for c in record["ceilings"]
    }
    figure, axes = pyplot.subplots(figsize=(9, 6))
    reach = [5, 4000]
    for name, slope, colour in (
        ("copy", rate.get("copy"), "black"),
        ("L2 read", rate.get("L2 read"), "grey"),
    ):
        slope, line = (
            (slope, "-") if slope else (roofline.COPY, "--") if name == "copy" else (None, "")
        )
        if slope:
            axes.plot(
                reach,
                [slope * x for x in reach],
                line,
                color=colour,
                linewidth=1,
                label=f"{name}, {slope / 1e12:.2f} TB/s",
            )
    for name in ("fp8", "bf16"):
        top, line = (
            (rate[name], "-")
            if rate.get(name)
            else (roofline.MATRIX, "--")
            if name == "bf16"
            else (None, "")
        )
        if top:
            axes.plot(
                reach, [top, top], line, color="black" if name == "bf16" else "grey", linewidth=1
            )
            axes.annotate(
                f"{name} product, {top / 1e12:.0f} TFLOP/s",
                (reach[0] * 1.1, top * 1.04),
                fontsize=8,
            )
    seen = set()
    for row in record["layer_times"]:
        if row["batch"] == 512 and row["median_s"] and row["implementation"] in COLOURS:
            key = row["implementation"], row["pass"]
            axes.plot(
                row["flop"] / row["bytes"],
                row["flop"] / row["median_s"],
                MARKS[row["pass"]],
                color=COLOURS[row["implementation"]],
                alpha=0.75,
                label=None if key in seen else ", ".join(key),
            )
            seen.add(key)
    where = record["environment"]["gpu"] or "no GPU"
    axes.set(
        xscale="log",
        yscale="log",
        xlim=reach,
        ylim=(1e12, 3e15),
        xlabel="FLOP per byte that the layer must move",
        ylabel="FLOP/s",
        title=f"Convolutions of frozen ResNet-18, B = 512, bf16, {where}",
    )
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(True, which="both", alpha=0.2)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
