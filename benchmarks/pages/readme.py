"""The benchmark section of README.md, and what a run on a GPU leaves behind.

python -m benchmarks.pages.readme [FILE]          # print the tables of a record (default: cpu.json)
python -m benchmarks.pages.readme --readme        # put them into README.md
python -m benchmarks.pages.readme --matrix        # print the op x backend table of README.md
python -m benchmarks.pages.readme --check         # exit code 1 if README.md is not current
python -m benchmarks.pages.readme FILE --plot PNG # the roofline of a device run (needs matplotlib)
python -m benchmarks.pages.readme FILE --write-table    # who is faster there, into the package
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.harness import layers, tables, workloads
from miue_fast.dispatch import measured
from miue_fast.dispatch.registry import OPS

SHIPPED = measured.TABLE
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
# Where the kernels of each backend have really run; changed by hand when that changes.
RUN_ON = {
    "reference": "CPU",
    "cpu": "CPU (generic, AVX2 and AVX-512)",
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


def write_table(record):
    """The faster backend of each layer and loss in the record, into the table that the package
    ships, which this makes if there is none; the other entries stay.
    """
    found = layers.table(record["layer_times"]) | workloads.loss_table(record["rows"])
    if not found:
        return 0
    shipped = json.loads(SHIPPED.read_text()) if SHIPPED.exists() else {}
    shipped[record["environment"]["gpu"]] = shipped.get(record["environment"]["gpu"], {}) | found
    SHIPPED.write_text(json.dumps(shipped, indent=1, sort_keys=True) + "\n")
    measured.forget()
    return len(found)


def section():
    """What stands between the README's markers."""
    files = [tables.RESULTS / "cpu.json", tables.RESULTS / "device.json"]
    parts = [tables.markdown(tables.load(path), details=False) for path in files if path.exists()]
    parts += [
        tables.generation(tables.load(path))
        for path in sorted(tables.RESULTS.glob("generation_*.json"))
    ]
    for path in sorted(
        tables.RESULTS.glob("cpu_*.json")
    ):  # earlier runs on other machines: their targets
        record = tables.load(path)
        parts.append(
            f"Another machine: {tables.environment_line(record['environment'])}\n\n"
            + tables.table(
                ("target", "needed", "measured", ""), tables.target_rows(record["targets"])
            )
        )
    return "\n\n".join(parts) or "No results yet: `make bench`."


def rewritten(text):
    """README text with the section replaced."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"README.md: markers: expected {BEGIN} and {END} once each, in this order")
    return text.split(BEGIN)[0] + f"{BEGIN}\n{section()}\n{END}" + text.split(END)[1]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "file", nargs="?", type=Path, default=tables.RESULTS / "cpu.json", help="the JSON to print"
    )
    parser.add_argument("--readme", action="store_true", help="rewrite the section of README.md")
    parser.add_argument(
        "--check",
        action="store_true",
        help="exit code 1 if README.md does not show the present results",
    )
    parser.add_argument("--matrix", action="store_true", help="print the table of ops and backends")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the roofline of a device.py run"
    )
    parser.add_argument("--write-table", action="store_true", help="take over who is faster")
    options = parser.parse_args(argv)
    if options.matrix:
        print(matrix())
        return 0
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
    readme = tables.ROOT / "README.md"
    if not (options.readme or options.check):
        print(tables.markdown(tables.load(options.file)))
        return 0
    text = readme.read_text()
    if options.check:
        current = rewritten(text) == text
        print(
            "README.md is current"
            if current
            else "README.md is stale: run `python -m benchmarks.pages.readme --readme`"
        )
        return 0 if current else 1
    readme.write_text(rewritten(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
