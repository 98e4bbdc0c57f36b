"""Chooses a generation's settings on training images alone: poisons of the first 300 images of each
class, victims judged on the next 200.

python -m benchmarks.studies.cifar10_settings CIFAR --out benchmarks/results/cifar10_settings.json
python -m benchmarks.studies.cifar10_settings CIFAR --only batch8 --seeds 7 11

The first takes hours on a CPU; the second is one of the settings below. CIFAR has
train/CLASS/*.jpg. The test images are not looked at. Source: small_resnet of width 16. One victim
(small_resnet with crops and flips) per poison.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from benchmarks.harness import machine
from miue_fast import data, generate
from miue_fast.evaluation import run_cell

PER_CLASS, HELD_OUT = 300, 200
LARGER = {"alpha_0": 0.8 / 255, "alpha_K": 0.8 / 255}  # step size
SETTINGS = {
    "batch128": {},  # the preset
    "batch32": {"train_batch": 32},
    "batch32-larger": {"train_batch": 32, **LARGER},
    "batch16": {"train_batch": 16},
    "batch16-larger": {"train_batch": 16, **LARGER},
    "batch8": {"train_batch": 8},
    "batch8-larger": {"train_batch": 8, **LARGER},
}


def split(folder):
    """(the poisoned part, the held-out part) of the training images, by name inside each class."""
    whole = data.load(folder, split="train", per_class=PER_CLASS + HELD_OUT)
    rows = [torch.nonzero(whole.labels == k)[:, 0] for k in range(len(whole.classes))]
    return (
        whole.select(torch.cat([part[chosen] for part in rows]))
        for chosen in (slice(PER_CLASS), slice(PER_CLASS, None))
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, metavar="CIFAR")
    parser.add_argument(
        "--only",
        nargs="+",
        default=list(SETTINGS),
        choices=list(SETTINGS),
        metavar="NAME",
        help=", ".join(SETTINGS),
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[7], help="of the generation")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", type=Path, default=None, help="write the rows as JSON")
    args = parser.parse_args(argv)
    images, held_out = split(args.data)
    rows = []
    for name in args.only:
        for seed in args.seeds:
            begin = time.perf_counter()
            result = generate(
                images,
                model="small_resnet",
                width=16,
                epochs=args.epochs,
                seed=seed,
                progress=False,
                **SETTINGS[name],
            )
            poisoned = data.apply_poison(images.images, result.delta, result.options.eps)
            run = run_cell(
                poisoned,
                images.labels,
                held_out.images,
                held_out.labels,
                len(images.classes),
                seed=0,
            )
            rows.append(
                {
                    "settings": name,
                    **SETTINGS[name],
                    "seed": seed,
                    "held_out": run.test,
                    "train": run.train,
                    "source_loss": result.history[-1]["train_loss"],
                    "poison_loss": result.history[-1]["poison_loss"],
                    "seconds": time.perf_counter() - begin,
                }
            )
            print(
                (
                    f"{name:20} seed {seed:3}: held-out accuracy {100 * run.test:5.1f} %, "
                    f"{rows[-1]['seconds']:.0f} s"
                ),
                flush=True,
            )
    if args.out:
        record = {
            "format": 1,
            "kind": "cifar10_settings",
            "environment": machine.environment(),
            "rows": rows,
        }
        data.write_file(
            args.out, lambda file: file.write((json.dumps(record, indent=1) + "\n").encode())
        )


if __name__ == "__main__":
    main()
