"""A frozen network as fused layers: features of a batch, and the input gradient of those features,
in chunks of images.
"""

import contextlib
import logging
import threading

import torch

from ..dispatch.registry import BackendError
from ..ops import perturbed_input
from ..support.calls import Turn, ordinary
from ..support.messages import describe, fail
from ..support.written import option, shown
from .layers import NHWC, Conv, Gradients, Tape, _keep, device_of, scale_and_shift, wide
from .lower import consumers
from .trace import changed_calls, hooks_of_all_modules

log = logging.getLogger("miue_fast")
# images per launch on a CPU: bounds the activations; 16 to 256 take the same time
# (docs/performance-notes.md)
CPU_CHUNK = 64


class Chunks:
    """How many images enter the network at once. Running out of memory halves this and never the
    contrastive batch.

    Never fewer than `least`: PyTorch gives one image, and a strided input gradient of fewer than
        three images per thread, to other
    algorithms on the CPU, which round differently. From `least` on the result is that of the whole
    batch up to rounding: bitwise where the libraries take one algorithm for all batch sizes (seen
        with AVX-512; with AVX2, MKL and oneDNN do not).
    """

    def __init__(self, size, least=2):
        self.size, self.least = max(size, least), least

    def halve(self, count):
        if count < 2 * self.least:
            raise BackendError(
                f"out of memory with {count} images per network launch: "
                f"use a smaller model, or {option('delta_dtype', 'float16')} or int8"
            )
        self.size = (count + 1) // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        log.warning(
            "out of memory: %s is now %d (the contrastive batch and the objective do not change)",
            shown("generate", "network_chunk"),
            self.size,
        )

    def each(self, rows, work):
        """work(part) over `rows`, in order, each row once. A short tail joins the launch before
        it.
        """
        start = rows.start
        while start < rows.stop:
            stop = start + self.size
            part = slice(start, rows.stop if stop + self.least > rows.stop else stop)
            if self.attempt(part, work):
                start = part.stop

    def attempt(self, part, work):
        """Whether work(part) found the memory it needs; else launches are half as large from now
        on.
        """
        try:
            work(part)
            return True
        except torch.OutOfMemoryError:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                # memory cannot be given back here: whoever captures halves, and captures anew
                raise
        # handled here, where the exception no longer holds the memory
        self.halve(part.stop - part.start)
        return False


class Frozen:
    """What both forms share. A subclass has `run(count, load) -> features` and `back(d_features,
    take)`, in launches of `chunk`; who calls them holds `alone()` from `run` to `back`.

    Copies and pickles without what waits for an `input_grad`.
    """

    mean = std = stem = channels = None
    tapes = load = graph = count = thread = (
        None  # of the last `run`, until its `back`: what that needs, and which thread's it was
    )
    _WAITING = ("tapes", "load", "graph", "count", "thread")

    def __init__(self, model):
        self.model, self.device, self.turn = model, device_of(model), Turn("FrozenNet")

    def __getstate__(self):
        return {k: v for k, v in vars(self).items() if k not in self._WAITING}

    def __setstate__(self, state):
        vars(self).update(state)
        self.device = device_of(self.model)  # torch.load may have moved it

    def forget(self):
        """Nothing waits for its `back` any more."""
        vars(self).update(dict.fromkeys(self._WAITING))

    @contextlib.contextmanager
    def alone(self):
        """No other thread's calls, and nothing of this thread's modes. Errors: ValueError."""
        with self.turn, ordinary():
            yield

    def check(self):
        """ValueError if the model's structure is no longer that of this object."""

    def normalisation(self, channels):
        """(mean, std) of the input, lists of `channels` numbers; (None, None) where the network
        does it itself.
        """
        return tuple(v * channels if v and len(v) == 1 else v for v in (self.mean, self.std))

    def forward(self, images):
        """Features [B, D] of images [B, C, H, W], uint8 or floats on the [0, 1] scale; the network
        normalises them. Errors: ValueError.

        Their gradient is `input_grad`'s: images that require one are refused while gradients are
        enabled."""
        wanted = torch.is_grad_enabled()
        with self.alone():
            self.check()
            images = check_images(images, self.device, self.channels, wanted)
            features = self.features(images)
            self.thread = threading.get_ident()
            return features

    def input_grad(self, d_features):
        """d loss / d images [B, C, H, W] (compute dtype) for the images of the last `forward`,
        which this thread called; one call per forward. Errors: ValueError."""
        wanted = torch.is_grad_enabled()
        with self.alone():
            if self.count is None:
                fail(
                    "input_grad",
                    "d_features",
                    "a forward before each input_grad",
                    "none since the last one",
                )
            if self.thread != threading.get_ident():
                fail(
                    "input_grad",
                    "thread",
                    "the one that called forward last",
                    "another; give each thread an object of its own",
                )
            tensor = isinstance(d_features, torch.Tensor)
            if (
                not tensor
                or d_features.dim() != 2
                or len(d_features) != self.count
                or d_features.device != self.device
            ):
                got = list(d_features.shape) if tensor else describe(d_features)
                fail(
                    "input_grad",
                    "d_features",
                    f"[{self.count}, D] on {self.device}, like the features",
                    got,
                )
            if d_features.requires_grad and wanted:
                fail(
                    "input_grad",
                    "d_features",
                    "no gradient required (detach them)",
                    "a tensor that requires one",
                )
            out = []
            self.back(d_features.detach(), lambda rows, slope: out.append(slope))
            return torch.cat(out) if len(out) != 1 else out[0]

    def __call__(self, images):
        return self.forward(images)


class FrozenNet(Frozen):
    """`forward(images) -> features` and `input_grad(d_features) -> d_images` of a frozen eval-mode
    network. Made by `freeze`.

    Attributes:
        plan: the fused layers. mean, std: the input normalisation that was found at the network's
            start (lists of C numbers), or None.
        dtype: compute type. chunk: images per launch. fused: True. reason: None. fp8: whether the
            convolutions multiply in e4m3.

    Between the two calls only ReLU bits, pool positions and shapes are kept. Deterministic on one
    machine and thread count. The chunk size changes roundings at most (see `Chunks`), and with fp8,
    whose scales are a launch's, the values. One thread at a time: a second one is refused.
    `copy.deepcopy` and pickle take the model along. A model whose layers were replaced or given
    hooks since is refused."""

    fused, reason = True, None

    def __init__(self, model, plan, *, dtype, chunk, backend, fp8=False):
        super().__init__(model)
        self.plan, self.dtype, self.backend, self.fp8 = plan, dtype, backend, fp8
        cpu = self.device.type == "cpu"
        self.chunk = Chunks(
            chunk or (CPU_CHUNK if cpu else 2**62), 4 * torch.get_num_threads() if cpu else 2
        )
        self.parts = consumers(plan.layers, plan.out)
        self.last_use = {value: k for k, layer in enumerate(plan.layers) for value in layer.inputs}
        readers = [layer for layer in plan.layers if 0 in layer.inputs]
        self.stem = (
            readers[0]
            if len(readers) == 1 and isinstance(readers[0], Conv) and readers[0].inputs == [0]
            else None
        )
        self.channels = self.stem.module.in_channels if self.stem and self.stem.pick == 1 else None
        for layer in plan.layers:
            if (
                fp8 and isinstance(layer, Conv) and layer.inputs[0] != 0
            ):  # pixels, and the step on them, keep their precision
                layer.fp8 = True
        self.scale = None
        self.refold()

    def check(self):
        for parent, name, module, ran in self.plan.places:
            if parent is not None and parent._modules.get(name) is not module:
                fail(
                    "FrozenNet",
                    "model",
                    "the layers that were frozen",
                    f"another {name}; call freeze again",
                )
            if ran and (reason := changed_calls(module)):
                fail(
                    "FrozenNet",
                    "model",
                    "the layers as they were frozen",
                    f"{name or 'a model'} with {reason}; call freeze again",
                )
        if hooks_of_all_modules():
            fail(
                "FrozenNet",
                "model",
                "no hooks of all modules (torch.nn.modules.module)",
                "some; freeze it with fused=False",
            )

    def refold(self):
        """Takes over the model's present weights and running statistics, in place and without
        tracing again. Errors: ValueError.
        """
        with self.alone():
            self.check()
            self._refold()

    @torch.no_grad()
    def _refold(self):
        if self.plan.norms:
            scale, shift = scale_and_shift(self.plan.norms, self.channels or 1, self.device)
            if not (scale != 0).all() or not scale.isfinite().all():
                fail(
                    "freeze",
                    "model",
                    "an input normalisation with finite scales other than 0",
                    scale.tolist(),
                )
            self.mean, self.std = (-shift / scale).tolist(), (1 / scale).tolist()
            _keep(self, "scale", scale)
        for layer in self.plan.layers:
            layer.refold(
                self.dtype,
                self.device,
                **({"input_scale": self.scale} if layer is self.stem else {}),
            )
        self.forget()

    @torch.no_grad()
    def run(self, count, load):
        """Features [count, D]. `load(rows)` gives normalised images of those rows: [b, C, H, W],
        channels-last, self.dtype.
        """
        self.forget()
        tapes, features = [], []

        def work(rows):
            tape = Tape()
            features.append(self._forward(load(rows), tape))
            tapes.append((rows, tape))

        self.chunk.each(slice(0, count), work)
        self.tapes, self.load, self.count = tapes, load, count
        return features[0] if len(features) == 1 else torch.cat(features)

    @torch.no_grad()
    def back(self, d_features, take, *, stem=False):
        """Calls take(rows, gradient) for each chunk of the last `run`. With `stem`: the gradient of
        the first convolution's result.

        A chunk that runs out of memory is computed anew from its images, in smaller launches.
        """
        tapes, load = self.tapes, self.load
        self.forget()

        def anew(part):
            tape = Tape()
            self._forward(load(part), tape)
            take(part, self._backward(d_features[part], tape, stem))

        for rows, tape in tapes:
            if not self.chunk.attempt(
                rows,
                lambda part, tape=tape: take(part, self._backward(d_features[part], tape, stem)),
            ):
                self.chunk.each(rows, anew)

    def _forward(self, x, tape):
        values = {0: x}
        for k, layer in enumerate(self.plan.layers):
            inputs = [values[v] for v in layer.inputs]
            values[layer.out] = layer.forward(tape, *inputs, backend=self.backend)
            for v in layer.inputs:
                if self.last_use[v] == k:
                    values.pop(v, None)
        return values[self.plan.out]

    def _backward(self, grad, tape, stem):
        gradients = Gradients(tape, self.parts, self.backend)
        gradients.add(self.plan.out, grad.to(self.dtype).contiguous(), False)
        for layer in reversed(self.plan.layers):
            grad, owned = gradients.take(layer.out)
            if stem and layer is self.stem:
                return grad
            layer.backward(tape, grad, owned, gradients)
        slope, _ = gradients.take(0)
        if self.scale is not None and self.stem is None:
            slope = (slope * self.scale[:, None, None].to(wide(self.dtype))).to(self.dtype)
        return slope

    @torch.no_grad()
    def features(self, images):
        if self.mean is None:
            return self.run(
                len(images), lambda rows: images[rows].to(self.dtype, memory_format=NHWC)
            )
        if self.dtype != torch.float64:
            images = images.to(torch.float32).contiguous()
            mean, std = self.normalisation(images.shape[1])
            return self.run(
                len(images),
                lambda rows: perturbed_input(images[rows], mean=mean, std=std, dtype=self.dtype),
            )
        mean, scale = (
            v[:, None, None] for v in (torch.tensor(self.mean, dtype=torch.float64), self.scale)
        )
        return self.run(
            len(images),
            lambda rows: ((images[rows].double() - mean) * scale).contiguous(memory_format=NHWC),
        )


def check_images(images, device, channels, gradients):
    """The images on the [0, 1] scale. gradients: whether the caller has them enabled."""
    if (
        not isinstance(images, torch.Tensor)
        or images.dim() != 4
        or not (images.is_floating_point() or images.dtype == torch.uint8)
    ):
        fail("FrozenNet", "images", "a uint8 or float tensor [B, C, H, W]", describe(images))
    if images.device != device:
        fail("FrozenNet", "images", f"the model's device {device}", images.device)
    if channels is not None and images.shape[1] != channels:
        fail("FrozenNet", "images", f"{channels} channels", list(images.shape))
    if len(images) < 1:
        fail("FrozenNet", "images", "at least one image", list(images.shape))
    if images.requires_grad and gradients:
        fail(
            "FrozenNet",
            "images",
            "no gradient required (detach them; input_grad gives it)",
            "a tensor that requires one",
        )
    images = images.detach()
    return images / 255 if images.dtype == torch.uint8 else images
