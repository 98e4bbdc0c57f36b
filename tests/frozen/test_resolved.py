"""A frozen network is resolved once, at freeze: a convolution is a few Python calls, and a backend
that cannot serve the network is named before anything runs.
"""

import copy
import sys
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from miue_fast import BackendError, freeze, models, ops
from miue_fast.dispatch import native
from miue_fast.dispatch.registry import OPS, Op
from miue_fast.frozen.base import Tape
from miue_fast.frozen.convolution import Conv
from miue_fast.ops import convolution

MOST = 8  # Python calls per convolution, forward and for the input gradient
IMAGES = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def small_resnet(**options):
    torch.manual_seed(0)
    return freeze(models.build("small_resnet", 4).eval(), **options)


class Calls:
    """Counts the Python functions that are called inside, all of them and those of each call of
    `inner`, which is counted with them.
    """

    def __init__(self, inner):
        self.inner, self.all, self.each, self.open = inner.__code__, 0, [], None

    def __call__(self, frame, event, arg):
        if event == "call":
            self.all += 1
            if frame.f_code is self.inner:
                self.open = frame
                self.each.append(0)
            if self.open is not None:
                self.each[-1] += 1
        elif event == "return" and frame is self.open:
            self.open = None

    def __enter__(self):
        sys.setprofile(self)
        return self

    def __exit__(self, *error):
        sys.setprofile(None)


@pytest.mark.skipif(native.cpu_missing() is not None, reason=str(native.cpu_missing()))
@torch.no_grad()
def test_a_convolution_is_at_most_eight_python_calls():
    net = small_resnet(backend="cpu")
    count = sum(isinstance(layer, Conv) for layer in net.plan.layers)
    x = IMAGES.contiguous(memory_format=torch.channels_last)
    d = torch.ones_like(net._forward(x, Tape()))
    tape = Tape()
    with Calls(Conv.forward) as forward:
        net._forward(x, tape)
    with Calls(Conv.backward) as backward:
        net._backward(d, tape, False)
    for calls in (forward, backward):
        assert len(calls.each) == count
        assert max(calls.each) <= MOST, calls.each
        assert calls.all / count <= MOST, "with what is between the convolutions"


class Seen(TorchDispatchMode):
    """The names of this package's ops that come through the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "miue_fast":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def test_the_network_calls_implementations_and_the_public_ops_the_dispatcher():
    net = small_resnet()
    with Seen() as seen:
        net.input_grad(torch.ones_like(net.forward(IMAGES)))
    assert seen.names == ["perturbed_input"], "one launch, whose images are normalised"
    x = torch.ones(1, 16, 2, 2).contiguous(memory_format=torch.channels_last)
    weight = torch.ones(16, 16, 1, 1).contiguous(memory_format=torch.channels_last)
    with Seen() as seen:
        y, mask = ops.conv_forward(x, weight)
        ops.conv_input_grad(y, weight, x.shape, mask=mask)
        ops.conv_epilogue_(y)
        ops.conv_grad_epilogue_(y, y)
        delta, images = torch.zeros(2, 1, 16, 2, 2)
        ops.conv_input_grad_step_(delta, None, y, weight, images, alpha=0, eps=0)
    assert seen.names == [
        "conv_forward",
        "conv_input_grad",
        "conv_epilogue_",
        "conv_grad_epilogue_",
        "conv_input_grad_step_",
    ]


def test_nothing_is_chosen_after_the_first_batch_of_a_size(monkeypatch):
    net = small_resnet()
    wanted = net.forward(IMAGES)
    other = net.forward(IMAGES[:, :, :12, :12])
    image_grad = net.input_grad(torch.ones_like(other))

    def refuse(*args, **kwargs):
        raise AssertionError("chosen again")

    monkeypatch.setattr(Op, "resolve", refuse)
    monkeypatch.setattr(Op, "_choose", refuse)
    assert torch.equal(net.forward(IMAGES), wanted)
    again = net.forward(IMAGES[:, :, :12, :12])
    assert torch.equal(again, other) and torch.equal(
        net.input_grad(torch.ones_like(other)), image_grad
    )
    with pytest.raises(AssertionError, match="chosen again"):
        net.refold()
    with pytest.raises(AssertionError, match="chosen again"):
        net.forward(IMAGES[:, :, :8, :8])


def test_a_backend_that_cannot_serve_the_network_is_named_at_freeze():
    for backend in ("cuda", "wgmma"):
        with pytest.raises(BackendError) as error:
            small_resnet(backend=backend)
        text = str(error.value)
        assert text.startswith(
            f"conv_forward: backend {backend!r} cannot serve torch.float32 on cpu (triton: "
        )
        assert "\n" not in text
    with pytest.raises(
        ValueError, match=r"^conv_forward: backend: expected one of auto, .* 'fast'$"
    ):
        small_resnet(backend="fast")


def test_a_backend_that_is_forced_is_the_one_that_runs(monkeypatch):
    """Whatever the others would give: the reference's functions are watched."""
    seen = []
    for name in ("conv_forward", "conv_input_grad", "conv_epilogue_", "conv_grad_epilogue_"):
        reference = OPS[name].reference

        def watched(*args, name=name, fn=reference.fn):
            seen.append(name)
            return fn(*args)

        impls = (*OPS[name].impls[:-1], types.SimpleNamespace(**vars(reference) | {"fn": watched}))
        monkeypatch.setitem(OPS, name, Op(**{**vars(OPS[name]), "impls": impls, "_chosen": {}}))
    net = small_resnet(backend="reference")
    count = sum(isinstance(layer, Conv) for layer in net.plan.layers)
    net.input_grad(torch.ones_like(net.forward(IMAGES)))
    assert seen.count("conv_forward") == seen.count("conv_input_grad") == count
    seen.clear()
    copied = copy.deepcopy(net)
    copied.input_grad(torch.ones_like(copied.forward(IMAGES)))
    assert seen.count("conv_forward") == seen.count("conv_input_grad") == count


def test_on_a_gpu_auto_looks_at_the_size_of_the_images(monkeypatch):
    sizes = []

    def route(op, weight, size, *conv):
        sizes.append((op, list(size), *conv))
        return "reference"

    monkeypatch.setattr(convolution, "_route", route)
    weight = types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    conv = [1, 1], [0, 0], [1, 1], 1
    for name in ("conv_forward", "conv_input_grad"):
        fn = convolution.resolve(name, "auto", weight, [2, 16, 8, 8], *conv)
        assert fn is OPS[name].reference.fn
        assert convolution.resolve(name, "reference", weight, [2, 16, 8, 8], *conv) is fn
    assert sizes == [(name, [2, 16, 8, 8], *conv) for name in ("conv_forward", "conv_input_grad")]


def test_on_meta_the_op_itself_gives_the_shapes():
    y = torch.empty(2, 16, 3, 3, device="meta").contiguous(memory_format=torch.channels_last)
    weight = torch.empty(16, 16, 1, 1, device="meta")
    fn = OPS["conv_forward"].resolve("auto", "meta", torch.float32)
    out, mask = fn(y, weight, None, None, [2, 2], [0, 0], [1, 1], 1, True, True, None)
    assert out.shape == (2, 16, 2, 2) and mask.shape == (16,) and out.device.type == "meta"
