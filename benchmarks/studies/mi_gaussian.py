"""The four estimators of sliced mutual information on Gaussians whose mutual information is known.

python -m benchmarks.studies.mi_gaussian --out benchmarks/results/mi_gaussian.json

It takes about two minutes of one thread.

x is normal in D dimensions and y = rho x + sqrt(1 - rho^2) noise, so every slice has the
correlation rho. In dimension 1 there is one direction only, so a cell takes many samples of one
slice; in dimension 8 a few samples of 8; in dimension 64 one sample of many. The error is that of
the mean, and its standard error over samples and slices says how much of it is chance."""

import argparse
import sys
import time
from pathlib import Path

import torch

from benchmarks.harness import machine, tables
from miue_fast.analysis import gaussian_sliced_mi, mutual_information, slice_directions

RESULT = tables.RESULTS / "mi_gaussian.json"
POINTS = [("histogram", 2000), ("histogram", 20000), ("kde", 2000), ("knn", 2000), ("mine", 2000)]
CORRELATIONS = (0.5, 0.7, 0.9)
SAMPLES = {1: (24, 1), 8: (6, 8), 64: (1, 48)}  # per dimension: samples, slices of each


def gaussian(points, width, rho, seed):
    """(x, y) float32 [points, width]"""
    draw = torch.Generator().manual_seed(seed)
    x, noise = (torch.randn(points, width, generator=draw) for _ in range(2))
    return x, rho * x + (1 - rho**2) ** 0.5 * noise


def cell(estimator, width, rho, points, samples, slices):
    """One row: closed form over the same directions, estimate, relative error and its standard
    error, seconds per slice.
    """
    found, exact, eye = [], [], torch.eye(width)
    started = time.perf_counter()
    for seed in range(samples):
        x, y = gaussian(points, width, rho, seed)
        found.append(mutual_information(x, y, estimator, slices=slices, seed=seed).per_slice)
        exact.append(
            gaussian_sliced_mi(
                eye, eye, rho * eye, slice_directions(width, width, slices, seed=seed)[0]
            )
        )
    seconds = time.perf_counter() - started
    error = torch.cat(found) / torch.cat(exact) - 1
    return {
        "estimator": estimator,
        "points": points,
        "dimension": width,
        "rho": rho,
        "samples": samples,
        "slices": slices,
        "closed_form": torch.cat(exact).mean().item(),
        "estimate": torch.cat(found).mean().item(),
        "error": error.mean().item(),
        "error_stderr": (error.std() / len(error) ** 0.5).item(),
        "seconds_per_slice": seconds / len(error),
    }


def markdown(record):
    def text(row):
        return (
            row["estimator"],
            row["points"],
            row["dimension"],
            row["rho"],
            f"{row['closed_form']:.4f}",
            f"{row['estimate']:.4f}",
            f"{100 * row['error']:+.1f} % ({100 * row['error_stderr']:.1f})",
            tables.seconds(row["seconds_per_slice"]),
        )

    head = (
        "estimator",
        "N",
        "dimension",
        "rho",
        "closed form, nats",
        "estimate",
        "error (standard error)",
        "time per slice",
    )
    return tables.table(head, [text(row) for row in record["rows"]])


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="few points and slices: whether it runs"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    environment = machine.environment()
    rows = []
    for estimator, points in POINTS:
        for width, (samples, slices) in SAMPLES.items():
            size = (
                (points // 10, min(samples, 2), min(slices, 2))
                if args.quick
                else (points, samples, slices)
            )
            rows += [cell(estimator, width, rho, *size) for rho in CORRELATIONS]
    record = {
        "format": tables.FORMAT,
        "kind": "mi",
        "quick": args.quick,
        "environment": environment,
        "rows": rows,
    }
    print(markdown(record))
    if args.out:
        tables.save(record, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
