"""The convolutions of benchmarks/results/packed.json as a picture: FLOP/s of every layer under the
ceilings that the same run measured. Winograd's forms take fewer products than the direct form whose
FLOP are counted, and may be above them.
"""

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

DIRECTIONS = "forward", "input gradient", "weight gradient"


def draw(record, path):
    """The layers of every level under the ceilings that the same run measured, as a picture."""
    levels = list(record["ceilings"])
    figure, plots = pyplot.subplots(1, len(levels), figsize=(5 * len(levels), 4.6), sharey=True)
    reach = [2, 3000]
    for level, axes in zip(levels, plots):
        peak = record["ceilings"][level]
        roof = [min(peak["product"], peak["copy"] * x) for x in (2, peak["product"] / peak["copy"])]
        axes.plot(
            [reach[0], peak["product"] / peak["copy"], reach[1]],
            [*roof, peak["product"]],
            color="black",
            linewidth=1,
            label="copy and matrix product of PyTorch",
        )
        for form, colour, label in (
            ("library_s", "#999999", "PyTorch's convolution"),
            ("packed_s", "#1f77b4", "this library's"),
        ):
            for direction, mark in zip(DIRECTIONS, "os^"):
                chosen = [
                    row
                    for row in record["rows"]
                    if (row["level"], row["direction"]) == (level, direction)
                ]
                axes.plot(
                    [row["flops"] / row["bytes"] for row in chosen],
                    [row["flops"] / row[form] for row in chosen],
                    mark,
                    color=colour,
                    alpha=0.75,
                    markersize=5,
                    label=f"{label}, {direction}",
                )
        kind = "bfloat16" if level == "amx" else "float32"
        axes.set(
            xscale="log",
            yscale="log",
            xlim=reach,
            xlabel="FLOP per byte that the layer must move",
            title=f"{level}, {kind}",
        )
        axes.grid(True, which="both", alpha=0.2)
    plots[0].set_ylabel("FLOP/s of the direct form, one thread")
    handles = plots[0].get_legend_handles_labels()
    figure.legend(*handles, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 0))
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)
