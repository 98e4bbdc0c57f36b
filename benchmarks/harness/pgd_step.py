"""One PGD step of CIFAR ResNet-18, whole and in parts: network (features and input gradient), loss,
update; three columns.

eager: the published path (contiguous memory, batch norm apart, B x B x D loss, unfused update).
strong: folded batch norm, channels-last, frozen parameters, the best matmul-form loss, in-place
update, also under torch.compile and in bfloat16. ours: what `generate` runs, in bfloat16 where
`dtype="auto"` is that. Used by bench.py; gpu_step.py runs the same paths on a GPU."""

import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch.nn.utils.fusion import fuse_conv_bn_eval

import miue_fast
from benchmarks.baselines import eager, strong
from benchmarks.harness import measure, workloads
from miue_fast import models, ops
from miue_fast.dispatch.precision import compute_dtype
from miue_fast.generation import Options
from miue_fast.generation.descent import Descent

OP = "pgd_step"
LARGE = 8192
TEMPERATURE, ZETA = 0.1, 0.1
STEPS = 10  # of a batch, where a path runs them together
AGREEING = {"float32": 0.999, "bfloat16": 0.9}  # least share of equal signs, by compute type


@dataclass
class Case:
    """A trained-looking network, its images, and a poison store."""

    model: torch.nn.Module
    images: torch.Tensor
    labels: torch.Tensor
    delta: torch.Tensor
    flip: torch.Tensor


def case(batch, width=64, side=32, device="cpu"):
    torch.manual_seed(1)
    model = models.build("resnet18", workloads.CLASSES, width=width, size=side)
    images = torch.randint(256, (batch, 3, side, side), dtype=torch.uint8)
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model(images[:32] / 255)  # running statistics
    labels = torch.randint(workloads.CLASSES, (batch,))
    flip = torch.rand(batch) < 0.5
    return Case(
        model.eval().to(device),
        *(t.to(device) for t in (images, labels, torch.zeros(images.shape), flip)),
    )


def folded(model, dtype=torch.float32):
    """A copy with batch norms folded into the convolutions, frozen, channels-last: what PyTorch's
    own tools give.
    """
    import copy

    net = copy.deepcopy(model).requires_grad_(False)
    for block in net.modules():
        for conv, norm in (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")):
            if isinstance(getattr(block, norm, None), torch.nn.BatchNorm2d):
                setattr(block, conv, fuse_conv_bn_eval(getattr(block, conv), getattr(block, norm)))
                setattr(block, norm, torch.nn.Identity())
    net = net.to(dtype=dtype, memory_format=torch.channels_last)
    net.mean, net.inv_std = model.mean, model.inv_std
    return net


def features_of(model, x):
    """The network without its classifier. Pixels are float32 and normalised as such, whatever the
    network computes in.
    """
    x = ((x - model.mean) * model.inv_std).to(model.conv1.weight.dtype)
    x = torch.nn.functional.relu(model.bn1(model.conv1(x)))
    return model.avgpool(model.layers(x)).flatten(1)


class ByAutograd:
    """network(x, d) -> (features, input gradient), loss, update, and the whole step, in plain
    PyTorch.

    compiled: torch.compile's mode for the network ("default"), or None. graphs: it can be captured
        in a CUDA graph.
    """

    steps = 1

    def __init__(
        self, model, loss, gather, update, *, channels_last=False, compiled=None, graphs=False
    ):
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.features, self.graphs = partial(features_of, model), graphs
        if compiled:
            self.features = torch.compile(
                self.features,
                dynamic=False,
                **({} if compiled == "default" else {"mode": compiled}),
            )
        self.loss, self.gather, self.update = loss, gather, update

    def network(self, x, d):
        x = x.detach().contiguous(memory_format=self.layout).requires_grad_()
        f = self.features(x)
        return f.detach(), torch.autograd.grad(f, x, d.to(f.dtype))[0]

    def value_and_grad(self, features, labels):
        return self.loss(features, labels, TEMPERATURE, ZETA, "all", True)

    def move(self, c, index, delta, grad):
        self.update(delta, index, grad, c.images, c.flip, workloads.ALPHA, workloads.EPS, None)

    def step(self, c, index, delta):
        x = (
            (self.gather(c.images, index, c.flip) + delta[index])
            .contiguous(memory_format=self.layout)
            .requires_grad_()
        )
        f = self.features(x)
        _, d = self.value_and_grad(f.detach(), c.labels[index])
        self.move(c, index, delta, torch.autograd.grad(f, x, d)[0])


class AttackLibrary(ByAutograd):
    """PGD as attack libraries write it: a loop on the adversarial images, out of place, with a loss
    that is handed in.
    """

    def step(self, c, index, delta):
        images = self.gather(c.images, index, c.flip)
        adversarial = images + delta[index]
        for _ in range(self.steps):
            adversarial = adversarial.detach().requires_grad_()
            f, labels = self.features(adversarial), c.labels[index]
            loss = strong._nt_xent_loss(f, labels, TEMPERATURE) + ZETA * strong._distance_loss(
                f, labels, True
            )
            (grad,) = torch.autograd.grad(loss, adversarial, retain_graph=False, create_graph=False)
            adversarial = adversarial.detach() - workloads.ALPHA * grad.sign()
            noise = torch.clamp(adversarial - images, -workloads.EPS, workloads.EPS)
            adversarial = torch.clamp(images + noise, 0, 1)
        delta[index] = (adversarial - images).detach()


class Ours:
    """On CUDA the step captures and replays its own graph; `steps` of them are one call."""

    steps, graphs = 1, True

    def __init__(self, model, chunk=None, dtype=torch.float32, backend="auto", fp8=False):
        self.net = miue_fast.freeze(model, chunk=chunk, dtype=dtype, backend=backend, fp8=fp8)
        self.options = Options(
            steps=1,
            temperature=TEMPERATURE,
            zeta=ZETA,
            eps=workloads.EPS,
            dtype=str(dtype)[6:],
            backend=backend,
            fp8=fp8,
        )
        self.descent = None

    def network(self, x, d):
        return self.net.forward(x), self.net.input_grad(d)

    def value_and_grad(self, features, labels):
        return ops.mi_ue_value_and_grad(
            features, labels, TEMPERATURE, ZETA, backend=self.options.backend
        )

    def move(self, c, index, delta, grad):
        ops.projected_step_(
            delta,
            index,
            grad,
            c.images,
            c.flip,
            alpha=workloads.ALPHA,
            eps=workloads.EPS,
            backend=self.options.backend,
        )

    def step(self, c, index, delta):
        if self.descent is None or self.descent.delta is not delta:
            self.descent = Descent(self.net, c.images, delta, self.options)
        self.descent.options = replace(self.options, steps=self.steps)
        self.descent(c.labels[index], index, c.flip, workloads.ALPHA)


def paths(c, quick):
    """{name: (role, object)} on the CPU."""
    best = strong.PATHS["mi_ue_value_and_grad"]
    own = folded(c.model)
    update = strong._gather, strong._step_in_store
    half, closed = folded(c.model, torch.bfloat16), best["closed form"]
    made = {
        "eager": (
            "eager",
            ByAutograd(c.model, eager.mi_ue_value_and_grad, eager._gather, eager.projected_step_),
        )
    }
    for name, net in (("", own), (", bfloat16", half)):
        plain = ByAutograd(net, closed, *update, channels_last=True)
        made[f"folded, channels-last{name}"] = "strong", plain
        if not quick:
            compiled = ByAutograd(
                net, best["closed form, compiled"], *update, channels_last=True, compiled="default"
            )
            made[f"folded, channels-last, compiled{name}"] = "strong", compiled
    made["cpu"] = "ours", Ours(c.model)
    if compute_dtype("auto", torch.device("cpu")) == "bfloat16":
        made["cpu, bfloat16"] = "ours", Ours(c.model, dtype=torch.bfloat16)
    return made


def blank(workload, name, role):
    empty = (
        "reason",
        "error_of_allowed",
        "median_s",
        "p10_s",
        "p90_s",
        "rate",
        "extra_bytes",
        "extra_bytes_reason",
        "agreement",
    )
    return {
        "workload": workload,
        "op": OP,
        "implementation": name,
        "role": role,
        "samples": 0,
        "times_ours": {},
        **dict.fromkeys(empty),
    }


def names(batch):
    return f"network ResNet-18 B={batch}", f"PGD step ResNet-18 B={batch}"


def run(*, quick, budget):
    """The rows of the network alone and of the whole step, with how far the deltas agree; and how
    much of our step is convolution.
    """
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
                row["reason"] = f"failed: {measure.first_line(error)}"
            continue
        reference = delta.clone() if reference is None else reference
        agreement = agreeing(delta, reference)
        needed = AGREEING["bfloat16" if name.endswith("bfloat16") else "float32"]
        if agreement < needed:
            for row in both:
                row["reason"] = (
                    f"refused: {agreement:.4%} of the signs of delta agree with fp32 "
                    f"autograd, {needed:.1%} needed"
                )
            continue
        both[1]["agreement"] = agreement
        calls[network][name] = lambda path=path: path.network(x, d)
        calls[step][name] = lambda path=path, store=delta: path.step(c, index, store)
    for workload, group in calls.items():
        timed = measure.interleaved(group, measure.cpu_clock, budget, 3 if quick else 9)
        mine = [row for row in rows if row["workload"] == workload]
        measure.enter(mine, timed)
        for row in mine:
            row["rate"] = row["median_s"] and batch / row["median_s"]
    rows.sort(key=lambda row: row["workload"] != network)
    return {"rows": rows, "convolution_share": convolution_share(calls[step].get("cpu"))}


def agreeing(delta, reference):
    """Share of the signs."""
    return (delta.sign() == reference.sign()).double().mean().item()


def convolution_share(call):
    """Share of one step of ours that PyTorch's convolutions take."""
    if call is None:
        return None
    started = time.perf_counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    total = time.perf_counter() - started
    inside = sum(
        e.cpu_time_total
        for e in profile.key_averages()
        if e.key in ("aten::convolution", "aten::convolution_backward")
    )
    return inside * 1e-6 / total


def memory(name, batch):
    """(bytes, seconds) of one network call in this fresh process, after a small first one. The
    weights that a frozen network keeps packed are counted: no other form has them.
    """
    c = case(batch)
    small = case(16)
    x, d = c.images / 255, torch.randn(batch, 512) / batch
    path = paths(c, True)[name][1]
    path.network(small.images / 255, torch.randn(16, 512))
    Path("/proc/self/clear_refs").write_text("5")
    before = measure.status("VmHWM")
    started = time.perf_counter()
    kept = path.network(x, d)
    taken, grown = time.perf_counter() - started, measure.status("VmHWM") - before
    del kept
    return grown + (path.net.packed_bytes if isinstance(path, Ours) else 0), taken
