"""A whole epoch of `generate` (model step and poison step, data on the GPU) at CIFAR-10's size, and
a contrastive batch of everything.
"""

import sys
import time

import torch

from benchmarks.harness import measure, workloads
from miue_fast import freeze, models
from miue_fast.data import Dataset
from miue_fast.generation import Options
from miue_fast.generation.descent import Descent
from miue_fast.generation.prepare import in_layout
from miue_fast.generation.run import BiLevelRun
from miue_fast.support.calls import deterministic_cudnn

COUNT, SIDE, WIDTH, CHUNK = 50_000, 32, 64, 4096
EPOCHS = 2  # timed, after one that compiles
COMMON = {"dtype": "bfloat16", "epochs": 100}
EPOCH, WHOLE = "epoch of ResNet-18", "poison step of ResNet-18, one contrastive batch"


def count(quick):
    return 4096 if quick else COUNT


def blanks(quick, reason=None):
    n = count(quick)
    empty = dict.fromkeys(
        (
            "first_s",
            "median_s",
            "p10_s",
            "p90_s",
            "train_s",
            "poison_s",
            "image_steps_per_s",
            "peak_bytes",
        )
    )
    for name in (
        f"{EPOCH}, {n} images, bf16, batches of 512 and 128",
        f"{WHOLE} of {n}, bf16, network_chunk {CHUNK}",
    ):
        yield {"name": name, "images": n, "reason": reason, "samples": 0, **empty}


def run(quick, deadline, emit):
    for row, work in zip(blanks(quick), (_epochs, _whole)):
        print(f"{row['name']} ...", file=sys.stderr, flush=True)
        measure.free()
        if measure.GPU == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            with deterministic_cudnn():
                row |= work(count(quick), deadline)
        except (RuntimeError, ValueError) as error:  # also a diverged training
            row["reason"] = f"failed: {measure.first_line(error)}"
        else:
            row["peak_bytes"] = torch.cuda.max_memory_allocated() if measure.GPU == "cuda" else 0
        emit(row)


def dataset(n):
    generator = workloads.random("cpu", 1)
    images = torch.randint(256, (n, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    labels = torch.arange(n) % workloads.CLASSES
    return Dataset(
        images, labels, [str(k) for k in range(workloads.CLASSES)], [f"{k:08d}" for k in range(n)]
    )


def network(data, options):
    torch.manual_seed(1)
    made = models.build("resnet18", workloads.CLASSES, width=WIDTH, size=SIDE).to(measure.GPU)
    return in_layout(made, options, data, torch.device(measure.GPU))[0]


def _epochs(n, deadline):
    data, options = dataset(n), Options(device=measure.GPU, channels_last=True, **COMMON)
    runs = BiLevelRun(network(data, options), "avgpool", data, options, None, "resnet18")
    found, first = [], None
    for number in range(1, EPOCHS + 2):
        begun = time.monotonic()
        measured = runs.epoch(number, lambda images: None)
        if first is None:
            first = measured["seconds"]
        else:
            found.append(measured)
        if time.monotonic() + (time.monotonic() - begun) > deadline:
            break
    if not found:
        return {
            "first_s": first,
            "reason": f"{measure.LATE}; the first epoch, which compiles, took {first:.1f} s",
        }
    poison = [n * options.steps / row["image_steps_per_s"] for row in found]
    train = [row["seconds"] - p for row, p in zip(found, poison)]
    rate = measure.spread([row["image_steps_per_s"] for row in found])["median_s"]
    return {
        "first_s": first,
        **measure.spread([row["seconds"] for row in found]),
        "train_s": measure.spread(train)["median_s"],
        "poison_s": measure.spread(poison)["median_s"],
        "image_steps_per_s": rate,
    }


def _whole(n, deadline):
    """Three steps after a first one: the contrastive batch is all images, the network takes CHUNK
    at once.
    """
    if time.monotonic() > deadline:
        return {"reason": measure.LATE}
    data, options = (
        dataset(n),
        Options(
            device=measure.GPU, channels_last=True, batch=n, network_chunk=CHUNK, steps=1, **COMMON
        ),
    )
    model = network(data, options).eval()
    images, labels = data.images.to(measure.GPU), data.labels.to(measure.GPU)
    index = torch.randperm(n, generator=workloads.random("cpu", 2)).to(measure.GPU)
    flip = torch.zeros(n, dtype=torch.bool, device=measure.GPU)
    descent = Descent(
        freeze(model, dtype=torch.bfloat16, chunk=CHUNK),
        images,
        torch.zeros(images.shape, device=measure.GPU),
        options,
    )

    def step():
        return descent(labels[index], index, flip, workloads.ALPHA)

    first = measure.gpu_clock(step, 1)
    found = measure.spread([measure.gpu_clock(step, 1) for _ in range(3)])
    return {
        "first_s": first,
        **found,
        "poison_s": found["median_s"],
        "image_steps_per_s": n / found["median_s"],
    }
