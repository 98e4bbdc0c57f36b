"""The generated sections of README.md and of docs/, and what a run on a GPU leaves behind.

python -m benchmarks.pages.readme [FILE]          # print the tables of a record (default: cpu.json)
python -m benchmarks.pages.readme --readme        # rewrite every generated section
python -m benchmarks.pages.readme --check         # exit code 1 if one of them is not current
python -m benchmarks.pages.readme FILE --plot PNG # the roofline of a device run (needs matplotlib)
python -m benchmarks.pages.readme FILE --write-table    # who is faster there, into the package
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness import layers, tables, workloads
from benchmarks.pages import full_size, networks, protection, strength
from miue_fast.dispatch import measured
from miue_fast.dispatch.registry import OPS

SHIPPED = measured.TABLE
# Where the kernels of each backend have really run; changed by hand when that changes.
RUN_ON = {
    "reference": "CPU",
    "cpu": "CPU (generic, AVX2, AVX-512, AMX)",
    "triton": "interpreter on the CPU; compiled for sm_80 and sm_90; **never on a GPU**",
    "cuda": "host shim on the CPU; compiled for sm_80 and sm_90a; **never on a GPU**",
    "wgmma": "host shim on the CPU; compiled for sm_90a; **never on a GPU**",
}
DTYPES = {
    "float64": "f64",
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "float8_e4m3fn": "e4m3",
    "int8": "int8",
}
# The rows of the README, the whole step first.
SPEED = (
    "PGD step ResNet-18 B=512",
    "nt_xent B=512 D=512",
    "class_covariance B=8192 D=512 K=10",
    "perturbed_input 512x3x32x32 channels-last",
    "projected_step 512x3x32x32",
)
TRAINED_ON = {
    "clean": "clean images",
    "random": "random noise of the same budget",
    "mi-ue": "**MI-UE**",
    "em": "error-minimising noise (em)",
}
DEFENCES = {
    "none": "no defence",
    "jpeg:quality=90": "JPEG, quality 90",
    "jpeg:quality=60": "JPEG, quality 60",
    "adversarial:eps=4:steps=3:step=2": "adversarial training, 4/255",
}


def matrix():
    """The op x backend table: the dtypes that each implementation of the registry takes, and where
    the kernels of that backend have really run.
    """
    rows = []
    for name, op in OPS.items():
        taken = {impl.backend: {str(d)[6:] for d in impl.dtypes} for impl in op.impls}
        cells = [" ".join(v for k, v in DTYPES.items() if k in taken.get(b, ())) for b in RUN_ON]
        rows.append((f"`{name}`", *cells))
    return tables.table(("op", *RUN_ON), [*rows, ("*has run on*", *RUN_ON.values())])


def write_table(record: dict) -> int:
    """Puts the faster backend of each layer and loss of the record into the table that the package
    ships, which this makes if there is none, and returns how many there are. The other entries
    stay.
    """
    found = layers.table(record["layer_times"]) | workloads.loss_table(record["rows"])
    if not found:
        return 0
    shipped = json.loads(SHIPPED.read_text()) if SHIPPED.exists() else {}
    shipped[record["environment"]["gpu"]] = shipped.get(record["environment"]["gpu"], {}) | found
    SHIPPED.write_text(json.dumps(shipped, indent=1, sort_keys=True) + "\n")
    measured.forget()
    return len(found)


def result() -> str:
    """What victims learn: the four rows of the README, from the evidence report's cells."""
    cells = json.loads((tables.RESULTS / "report_cifar10_jpeg.json").read_text())["cells"]
    rows = []
    for poison, name in TRAINED_ON.items():
        row = [name]
        for defence in DEFENCES:
            found = [
                100 * cell["test"]
                for cell in cells
                if (cell["poison"], cell["defence"], cell["victim"])
                == (poison, defence, "small_resnet")
            ]
            spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
            row.append(f"{statistics.mean(found):.1f}{spread}")
        rows.append(row)
    return tables.table(("trained on", *DEFENCES.values()), rows)


def speed() -> str:
    """The five rows of the README."""
    path = tables.RESULTS / "cpu.json"
    if not path.exists():
        return "No results yet: `make bench`."
    record = tables.load(path)
    parts = [tables.environment_line(record["environment"]), tables.brief(record, SPEED)]
    if share := record.get("pgd_step", {}).get("convolution_share"):
        parts.append(
            f"{share:.0%} of the time of a PGD step in float32 is PyTorch's own convolutions."
        )
    return "\n\n".join(parts)


def benchmarks() -> str:
    """Every table of the present results."""
    files = [tables.RESULTS / "cpu.json", tables.RESULTS / "device.json"]
    parts = [tables.markdown(tables.load(path), details=False) for path in files if path.exists()]
    parts += [
        tables.generation(tables.load(path))
        for path in sorted(tables.RESULTS.glob("generation_*.json"))
    ]
    for path in sorted(tables.RESULTS.glob("cpu_*.json")):  # earlier runs, on other machines
        record = tables.load(path)
        parts.append(
            f"Another machine: {tables.environment_line(record['environment'])}\n\n"
            + tables.table(
                ("target", "needed", "measured", ""), tables.target_rows(record["targets"])
            )
        )
    return "\n\n".join(parts) or "No results yet: `make bench`."


def of(file: str, text: Callable[[dict | None], str]) -> Callable[[], str]:
    """A section made by `text` from the record `file` of the results, or from None without it."""

    def make() -> str:
        path = tables.RESULTS / file
        return text(tables.load(path) if path.exists() else None)

    return make


# Per page the generated sections: what stands between `<!-- NAME:begin -->` and its end.
PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "result": result,
        "strength": of("strength.json", strength.short),
        "speed": speed,
    },
    "docs/benchmarks.md": {
        "protection": of("protection.json", protection.text),
        "strength": of("strength.json", strength.text),
        "bench": benchmarks,
    },
    "docs/performance-notes.md": {"networks": of("networks.json", networks.text)},
    "docs/backends.md": {"matrix": matrix},
    "docs/full-size.md": {"full-size": of("full_size.json", full_size.text)},
}


def rewritten(page: str, text: str) -> str:
    """The text of a page with its sections made anew. ValueError if a marker is not there once."""
    for name, make in PAGES[page].items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise ValueError(
                f"{page}: markers: expected {begin} and {end} once each, in this order"
            )
        text = f"{text.split(begin)[0]}{begin}\n{make()}\n{end}{text.split(end)[1]}"
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "file", nargs="?", type=Path, default=tables.RESULTS / "cpu.json", help="the JSON to print"
    )
    parser.add_argument("--readme", action="store_true", help=f"rewrite {', '.join(PAGES)}")
    parser.add_argument(
        "--check",
        action="store_true",
        help="exit code 1 if one of these does not show the present results",
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the roofline of a device.py run"
    )
    parser.add_argument("--write-table", action="store_true", help="take over who is faster")
    options = parser.parse_args(argv)
    if options.plot or options.write_table:
        record = tables.load(options.file)
        if options.plot:
            from benchmarks.pages import roofline_plot

            roofline_plot.draw(record, options.plot)
        if options.write_table:
            print(
                f"{write_table(record)} layers and losses of {record['environment']['gpu']} "
                f"are in {SHIPPED.name}"
            )
        return 0
    if not (options.readme or options.check):
        print(tables.markdown(tables.load(options.file)))
        return 0
    stale = []
    for page in PAGES:
        path = tables.ROOT / page
        text = path.read_text()
        new = rewritten(page, text)
        if new != text:
            stale.append(page)
            if options.readme:
                path.write_text(new)
    if options.readme:
        return 0
    for page in PAGES:
        print(
            f"{page} is stale: run `python -m benchmarks.pages.readme --readme`"
            if page in stale
            else f"{page} is current"
        )
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
