"""One PGD step of CIFAR ResNet-18, whole and in parts: network (features and input gradient), loss, update; three columns.

eager: the published path (contiguous memory, batch norm apart, B x B x D loss, unfused update). strong: folded batch norm, channels-last,
frozen parameters, the best matmul-form loss, in-place update, also under torch.compile. ours: what `generate` runs. Used by bench.py.
"""

import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import measure
import torch
import workloads
from baselines import eager, strong
from torch.nn.utils.fusion import fuse_conv_bn_eval

import miue_fast
from miue_fast import models
from miue_fast.generate import Options
from miue_fast.generate.step import Descent

OP = "pgd_step"
LARGE = 8192
TEMPERATURE, ZETA = 0.1, 0.1


@dataclass
class Case:
    """A trained-looking network, its images, and a poison store."""

    model: torch.nn.Module
    images: torch.Tensor
    labels: torch.Tensor
    delta: torch.Tensor
    flip: torch.Tensor


def case(batch, width=64, side=32):
    torch.manual_seed(1)
    model = models.build("resnet18", workloads.CLASSES, width=width, size=side)
    images = torch.randint(256, (batch, 3, side, side), dtype=torch.uint8)
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model(images[:32] / 255)  # running statistics
    labels = torch.randint(workloads.CLASSES, (batch,))
    return Case(model.eval(), images, labels, torch.zeros(images.shape), torch.rand(batch) < 0.5)


def folded(model):
    """A copy with batch norms folded into the convolutions, frozen, channels-last: what PyTorch's own tools give."""
    import copy

    net = copy.deepcopy(model).requires_grad_(False)
    for block in net.modules():
        for conv, norm in (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")):
            if isinstance(getattr(block, norm, None), torch.nn.BatchNorm2d):
                setattr(block, conv, fuse_conv_bn_eval(getattr(block, conv), getattr(block, norm)))
                setattr(block, norm, torch.nn.Identity())
    return net.to(memory_format=torch.channels_last)


def features_of(model, x):
    """The network without its classifier."""
    x = (x - model.mean) * model.inv_std
    x = torch.nn.functional.relu(model.bn1(model.conv1(x)))
    return model.avgpool(model.layers(x)).flatten(1)


class ByAutograd:
    """network(x, d) -> (features, input gradient), and the whole step, in plain PyTorch."""

    def __init__(self, model, channels_last, loss, gather, update, compiled=False):
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.features = partial(features_of, model)
        if compiled:
            self.features = torch.compile(self.features, dynamic=False)
        self.loss, self.gather, self.update = loss, gather, update

    def network(self, x, d):
        x = x.contiguous(memory_format=self.layout).detach().requires_grad_()
        f = self.features(x)
        return f.detach(), torch.autograd.grad(f, x, d)[0]

    def step(self, c, index, delta):
        x = (self.gather(c.images, index, c.flip) + delta[index]).contiguous(memory_format=self.layout).requires_grad_()
        f = self.features(x)
        _, d = self.loss(f.detach(), c.labels[index], TEMPERATURE, ZETA, "all", True)
        grad = torch.autograd.grad(f, x, d)[0]
        self.update(delta, index, grad, c.images, c.flip, workloads.ALPHA, workloads.EPS, None)


class Ours:
    def __init__(self, model, chunk=None):
        self.net = miue_fast.freeze(model, chunk=chunk)

    def network(self, x, d):
        return self.net.forward(x), self.net.input_grad(d)

    def step(self, c, index, delta):
        descent = Descent(self.net, c.images, delta, Options(steps=1, temperature=TEMPERATURE, zeta=ZETA, eps=workloads.EPS))
        descent(c.labels[index], index, c.flip, workloads.ALPHA)


def paths(c, quick):
    """{name: (role, object)}"""
    best = strong.PATHS["mi_ue_value_and_grad"]
    plain = ByAutograd(c.model, False, eager.mi_ue_value_and_grad, eager._gather, eager.projected_step_)
    own = folded(c.model)
    tuned = ByAutograd(own, True, best["closed form"], strong._gather, strong._step_in_store)
    made = {"eager": ("eager", plain),
            "folded, channels-last": ("strong", tuned)}  # fmt: skip
    if not quick:
        compiled = ByAutograd(own, True, best["closed form, compiled"], strong._gather, strong._step_in_store, compiled=True)
        made["folded, channels-last, compiled"] = ("strong", compiled)
    return made | {"cpu": ("ours", Ours(c.model))}


def blank(workload, name, role):
    empty = ("reason", "error_of_allowed", "median_s", "p10_s", "p90_s", "rate", "extra_bytes", "extra_bytes_reason", "agreement")
    return {"workload": workload, "op": OP, "implementation": name, "role": role, "samples": 0, **dict.fromkeys(empty)}


def names(batch):
    return f"network ResNet-18 B={batch}", f"PGD step ResNet-18 B={batch}"


def run(*, quick, budget):
    """The rows of the network alone and of the whole step, with how far the deltas agree; and how much of our step is convolution."""
    batch, width, side = (16, 8, 16) if quick else (512, 64, 32)
    c = case(batch, width, side)
    network, step = names(batch)
    x, index = c.images / 255, torch.arange(batch)
    d = torch.randn(batch, 8 * width, generator=torch.Generator().manual_seed(2)) / batch
    made, rows, calls, reference = paths(c, quick), [], {network: {}, step: {}}, None
    for name, (role, path) in made.items():
        print(f"{step}: {name} ...", file=sys.stderr, flush=True)
        both = [blank(network, name, role), blank(step, name, role)]
        rows += both
        delta = torch.zeros_like(c.delta)
        try:
            with measure.time_limit(measure.COMPILE_LIMIT * 3):
                path.step(c, index, delta)
        except (RuntimeError, TimeoutError) as error:
            for row in both:
                row["reason"] = f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
            continue
        reference = delta.clone() if reference is None else reference
        agreement = (delta.sign() == reference.sign()).double().mean().item()
        if agreement < 0.999:
            for row in both:
                row["reason"] = f"refused: {agreement:.4%} of the signs of delta agree with fp32 autograd, 99.9 % needed"
            continue
        both[1]["agreement"] = agreement
        calls[network][name] = lambda path=path: path.network(x, d)
        calls[step][name] = lambda path=path, store=delta: path.step(c, index, store)
    for workload, group in calls.items():
        timed = measure.interleaved(group, measure.cpu_clock, budget, 3 if quick else 9)
        for row in rows:
            if row["workload"] == workload and row["implementation"] in timed:
                row |= measure.spread(timed[row["implementation"]])
                row["rate"] = batch / row["median_s"]
    rows.sort(key=lambda row: row["workload"] != network)
    return {"rows": rows, "convolution_share": convolution_share(calls[step].get("cpu"))}


def convolution_share(call):
    """Share of one step of ours that PyTorch's convolutions take."""
    if call is None:
        return None
    started = time.perf_counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    total = time.perf_counter() - started
    inside = sum(e.cpu_time_total for e in profile.key_averages() if e.key in ("aten::convolution", "aten::convolution_backward"))
    return inside * 1e-6 / total


def memory(name, batch):
    """(bytes, seconds) of one network call in this fresh process, after a small first one."""
    c = case(batch)
    small = case(16)
    x, d = c.images / 255, torch.randn(batch, 512) / batch
    path = paths(c, True)[name][1] if name != "cpu" else Ours(c.model)
    path.network(small.images / 255, torch.randn(16, 512))
    Path("/proc/self/clear_refs").write_text("5")
    before = measure._status("VmHWM")
    started = time.perf_counter()
    kept = path.network(x, d)
    taken, grown = time.perf_counter() - started, measure._status("VmHWM") - before
    del kept
    return grown, taken
