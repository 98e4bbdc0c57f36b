"""The fused layers of a FrozenNet: what each computes, what it keeps between forward and input
gradient, and its input gradient.

Values are numbered; 0 is the network's input. 4-D activations are channels-last. A layer with
`relu` leaves the bits of its result's ReLU in `tape.masks`; whoever delivers the last part of that
value's gradient applies them (`Gradients`)."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from ..ops import conv_epilogue_, conv_forward, conv_grad_epilogue_, conv_input_grad
from ..ops.conv_epilogue import mask_bytes
from ..ops.convolution import out_size, quantised
from ..support.messages import fail

NHWC = torch.channels_last


def wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def device_of(model):
    return next(iter([*model.parameters(), *model.buffers()]), torch.empty(0)).device


@dataclass
class Tape:
    """What one chunk of images leaves behind for its input gradient: ReLU bits, pool positions,
    shapes. No activations.
    """

    masks: dict = field(default_factory=dict)  # value -> bits
    kept: dict = field(default_factory=dict)  # layer's value -> what its gradient needs
    sizes: dict = field(default_factory=dict)  # value -> shape

    def bytes(self):
        tensors = [
            *self.masks.values(),
            *(t for t in self.kept.values() if isinstance(t, torch.Tensor)),
        ]
        return sum(t.numel() * t.element_size() for t in tensors)


class Gradients:
    """Sums the parts of every value's gradient; the last part applies the value's ReLU bits."""

    def __init__(self, tape, parts, backend):
        self.tape, self.left, self.backend = tape, dict(parts), backend
        self.sums, self.owned = {}, {}

    def _mask(self, value):
        self.left[value] -= 1
        return None if self.left[value] else self.tape.masks.get(value)

    def compute(self, value, fn):
        """fn(addend, mask) -> the sum of its own part and the addend, masked, in memory of its
        own.
        """
        self.sums[value] = fn(self.sums.pop(value, None), self._mask(value))
        self.owned[value] = True

    def add(self, value, part, owned):
        """`owned`: nobody else looks at the memory of `part`."""
        mask, there = self._mask(value), self.sums.get(value)
        if there is not None or mask is not None:
            if not owned:
                if there is not None and self.owned[value]:
                    part, there = there, part
                else:
                    part = part.clone(memory_format=torch.preserve_format)
            conv_grad_epilogue_(part, there, mask, backend=self.backend)
            owned = True
        self.sums[value], self.owned[value] = part, owned

    def take(self, value):
        return self.sums.pop(value), self.owned.pop(value)


@dataclass(eq=False)
class Layer:
    name: str  # of the module or operation it came from
    inputs: list[int]
    out: int
    relu: bool = False

    def refold(self, dtype, device):
        """Reads the model's present weights into this layer's tensors, in place."""

    def _same(self, what, then, now, value=None):
        if then != now:
            fail(
                "freeze",
                "model",
                f"{what} of {self.name} as they were frozen, {then}",
                f"{now}; call freeze again",
            )
        return value

    def _finish(self, tape, y, bias, residual, backend):
        mask = None
        if self.relu:
            mask = tape.masks[self.out] = torch.empty(
                mask_bytes(y.numel()), dtype=torch.uint8, device=y.device
            )
        if self.relu or bias is not None or residual is not None:
            conv_epilogue_(y, bias, residual, relu=self.relu, mask=mask, backend=backend)
        return y


def scale_and_shift(norms, channels, device):
    """The composition of affine maps per channel (batch norms in eval mode and constants), in
    float64: x * scale + shift.
    """
    scale, shift = (
        torch.ones(channels, dtype=torch.float64, device=device),
        torch.zeros(channels, dtype=torch.float64, device=device),
    )
    for norm in norms:
        a, b = norm.read(device)
        scale, shift = scale * a, shift * a + b
    return scale, shift


def _keep(holder, name, value):
    """The tensor of a refold: written in place where there is one, so that captured graphs stay
    right.
    """
    there = getattr(holder, name, None)
    if there is None:
        setattr(holder, name, value.clone(memory_format=torch.preserve_format))
    else:
        there.copy_(value)


@dataclass(eq=False)
class Conv(Layer):
    """relu(conv(inputs[0]) * scale + shift + inputs[1])"""

    module: torch.nn.Module = None
    pick: int = (
        1  # only every pick-th pixel of the input is looked at (a slice before a 1x1 convolution)
    )
    norms: list = field(
        default_factory=list
    )  # of `constants.py`: (scale, shift) per output channel
    fp8: bool = False  # e4m3 operands, each tensor with a scale of its own

    def __post_init__(self):
        self.geometry, self.shape = self._geometry(), list(self.module.weight.shape)

    def _geometry(self):
        m = self.module
        return {
            "stride": [self.pick * s for s in m.stride],
            "padding": list(m.padding),
            "dilation": list(m.dilation),
            "groups": m.groups,
        }

    def refold(self, dtype, device, input_scale=None):
        self._same("geometry", self.geometry, self._geometry())
        w = self._same(
            "weights",
            self.shape,
            list(self.module.weight.shape),
            self.module.weight.detach().double(),
        )
        scale, shift = scale_and_shift(self.norms, len(w), w.device)
        if self.module.bias is not None:
            shift = shift + self.module.bias.detach().double() * scale
        w = w * scale[:, None, None, None]
        _keep(self, "bias", shift.to(wide(dtype)))
        if self.fp8:
            w, weight_scale = quantised(w)
            _keep(self, "weight_scale", weight_scale)
            _keep(self, "weight", w.contiguous(memory_format=NHWC))
            _keep(
                self, "back_weight", w.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
            )  # as the Triton kernel reads it
            return
        _keep(self, "weight", w.to(dtype).contiguous(memory_format=NHWC))
        if input_scale is None:
            self.back_weight = self.weight
        else:
            _keep(
                self,
                "back_weight",
                (w * input_scale[:, None, None]).to(dtype).contiguous(memory_format=NHWC),
            )

    def _operand(self, x):
        """The values that are multiplied with the weights, and the scale of the products."""
        if not self.fp8:
            return x, None
        x, scale = quantised(x)
        return x, scale * self.weight_scale

    def forward(self, tape, x, residual=None, *, backend):
        tape.sizes[self.inputs[0]] = x.shape
        x, scale = self._operand(x)
        rest = {"scale": scale, "backend": backend, **self.geometry}
        if residual is not None and list(residual.shape) != out_size(
            x.shape, self.weight, **self.geometry
        ):  # a sum that broadcasts
            y, _ = conv_forward(x, self.weight, self.bias, relu=False, want_mask=False, **rest)
            tape.kept[self.out] = y.shape
            tape.sizes[self.inputs[1]] = residual.shape
            y, residual = spread(y, residual)
            return self._finish(tape, y.clone(memory_format=NHWC), None, residual, backend)
        y, mask = conv_forward(
            x, self.weight, self.bias, residual, relu=self.relu, want_mask=self.relu, **rest
        )
        if self.relu:
            tape.masks[self.out] = mask
        return y

    def backward(self, tape, grad, owned, gradients):
        whole = grad
        if self.out in tape.kept:
            grad = gather(whole, tape.kept[self.out])
        grad, scale = self._operand(grad)

        def fn(addend, mask):
            size = list(tape.sizes[self.inputs[0]])
            rest = {"scale": scale, "backend": gradients.backend, **self.geometry}
            return conv_input_grad(grad, self.back_weight, size, addend, mask, **rest)

        gradients.compute(self.inputs[0], fn)
        if len(self.inputs) == 2:
            apart = self.out in tape.kept
            gradients.add(
                self.inputs[1],
                gather(whole, tape.sizes[self.inputs[1]]) if apart else whole,
                owned and not apart,
            )


@dataclass(eq=False)
class Linear(Layer):
    """relu(inputs[0] W^T * scale + shift), [B, D]"""

    module: torch.nn.Module = None
    norms: list = field(default_factory=list)

    def __post_init__(self):
        self.shape = list(self.module.weight.shape)

    def refold(self, dtype, device):
        w = self._same(
            "weights",
            self.shape,
            list(self.module.weight.shape),
            self.module.weight.detach().double(),
        )
        scale, shift = scale_and_shift(self.norms, len(w), w.device)
        if self.module.bias is not None:
            shift = shift + self.module.bias.detach().double() * scale
        _keep(self, "weight", (w * scale[:, None]).to(dtype))
        _keep(self, "bias", shift.to(wide(dtype)))

    def forward(self, tape, x, *, backend):
        if x.dim() != 2 or x.shape[1] != self.weight.shape[1]:
            fail(
                "FrozenNet",
                "images",
                f"a size that gives {self.name} {self.weight.shape[1]} values per image",
                list(x.shape[1:]),
            )
        return self._finish(tape, F.linear(x, self.weight), self.bias, None, backend)

    def backward(self, tape, grad, owned, gradients):
        gradients.add(self.inputs[0], grad @ self.weight, True)


@dataclass(eq=False)
class Affine(Layer):
    """relu(inputs[0] * scale + shift) per channel: a batch norm that no convolution comes before"""

    norms: list = field(default_factory=list)
    channels: int = 1  # 1: one number for all
    constant: bool = False  # of numbers that training does not change

    def refold(self, dtype, device):
        pair = scale_and_shift(self.norms, self.channels, device)
        scale, shift = (v[:, None, None].to(wide(dtype)) for v in pair)
        _keep(self, "scale", scale)
        _keep(self, "shift", shift)

    def forward(self, tape, x, *, backend):
        flat = x.dim() == 2
        scale, shift = (v.flatten() if flat else v for v in (self.scale, self.shift))
        y = dense(torch.addcmul(shift, x.to(scale.dtype), scale).to(x.dtype))
        tape.sizes[self.inputs[0]] = x.shape  # one channel may become several
        return self._finish(tape, y, None, None, backend)

    def backward(self, tape, grad, owned, gradients):
        scale = self.scale.flatten() if grad.dim() == 2 else self.scale
        gradients.add(
            self.inputs[0], gather((grad * scale).to(grad.dtype), tape.sizes[self.inputs[0]]), True
        )


@dataclass(eq=False)
class Add(Layer):
    """relu(inputs[0] + inputs[1]), where no convolution takes the sum into its epilogue; with one
    input: a ReLU of its own
    """

    def forward(self, tape, x, other=None, *, backend):
        if other is not None and other.shape != x.shape:
            tape.kept[self.out] = x.shape, other.shape
            x, other = spread(x, other)
        return self._finish(
            tape,
            x.clone(memory_format=NHWC if x.dim() == 4 else torch.contiguous_format),
            None,
            other,
            backend,
        )

    def backward(self, tape, grad, owned, gradients):
        shapes = tape.kept.get(self.out, [grad.shape] * len(self.inputs))
        for value, shape in zip(self.inputs, shapes):
            gradients.add(value, gather(grad, shape), owned and len(self.inputs) == 1)


@dataclass(eq=False)
class Concat(Layer):
    def forward(self, tape, *parts, backend):
        for value, part in zip(self.inputs, parts):
            tape.sizes[value] = part.shape
        y = torch.cat(parts, 1)
        return self._finish(
            tape, y.contiguous(memory_format=NHWC) if y.dim() == 4 else y, None, None, backend
        )

    def backward(self, tape, grad, owned, gradients):
        start = 0
        for value in self.inputs:
            stop = start + tape.sizes[value][1]
            part = grad[:, start:stop].clone(
                memory_format=NHWC if grad.dim() == 4 else torch.contiguous_format
            )
            gradients.add(value, part, True)
            start = stop


@dataclass(eq=False)
class MaxPool(Layer):
    """Keeps the place of the maximum inside its window: one byte per result."""

    kernel: tuple = ()
    stride: tuple = ()
    padding: tuple = ()
    ceil: bool = False

    def _corner(self, shape, width, device):
        """Index of each window's corner in its plane; it may lie outside, before the first
        pixel.
        """
        top, left = (
            torch.arange(n, device=device) * s - p
            for n, s, p in zip(shape[2:], self.stride, self.padding)
        )
        return top[:, None], left[None, :]

    def forward(self, tape, x, *, backend):
        tape.sizes[self.inputs[0]] = x.shape
        y, index = F.max_pool2d(
            x, self.kernel, self.stride, self.padding, 1, self.ceil, return_indices=True
        )
        top, left = self._corner(y.shape, x.shape[3], x.device)
        place = (index // x.shape[3] - top) * self.kernel[1] + index % x.shape[3] - left
        tape.kept[self.out] = place.to(torch.uint8)
        return self._finish(tape, y.contiguous(memory_format=NHWC), None, None, backend)

    def backward(self, tape, grad, owned, gradients):
        size, place = tape.sizes[self.inputs[0]], tape.kept[self.out].long()
        top, left = self._corner(grad.shape, size[3], grad.device)
        index = (place // self.kernel[1] + top) * size[3] + place % self.kernel[1] + left
        x = torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=NHWC)
        back = torch.ops.aten.max_pool2d_with_indices_backward
        gradients.add(
            self.inputs[0],
            dense(back(grad, x, self.kernel, self.stride, self.padding, [1, 1], self.ceil, index)),
            True,
        )


@dataclass(eq=False)
class AvgPool(Layer):
    """`kernel` None: adaptive, to `stride` pixels."""

    kernel: tuple | None = None
    stride: tuple = ()
    padding: tuple = ()
    ceil: bool = False
    count_padding: bool = True

    def forward(self, tape, x, *, backend):
        tape.sizes[self.inputs[0]] = x.shape
        if self.kernel is None:
            y = F.adaptive_avg_pool2d(x, self.stride)
        else:
            y = F.avg_pool2d(
                x, self.kernel, self.stride, self.padding, self.ceil, self.count_padding
            )
        return self._finish(tape, dense(y), None, None, backend)

    def backward(self, tape, grad, owned, gradients):
        size = tape.sizes[self.inputs[0]]
        if self.kernel is None and tuple(self.stride) == (1, 1):
            part = (grad / (size[2] * size[3])).expand(size)
        else:
            x = torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=NHWC)
            if self.kernel is None:
                part = torch.ops.aten._adaptive_avg_pool2d_backward(grad, x)
            else:
                back = torch.ops.aten.avg_pool2d_backward
                part = back(
                    grad,
                    x,
                    self.kernel,
                    self.stride,
                    self.padding,
                    self.ceil,
                    self.count_padding,
                    None,
                )
        gradients.add(self.inputs[0], dense(part), True)


@dataclass(eq=False)
class Flatten(Layer):
    """[B, C, H, W] -> [B, C H W] in PyTorch's order"""

    expected: int = -1

    def forward(self, tape, x, *, backend):
        tape.sizes[self.inputs[0]] = x.shape
        y = x.flatten(1)
        if self.expected not in (-1, y.shape[1]):
            fail(
                "FrozenNet",
                "images",
                f"a size that gives {self.name} {self.expected} values per image",
                y.shape[1],
            )
        return self._finish(
            tape,
            y.contiguous() if not self.relu else y.clone(memory_format=torch.contiguous_format),
            None,
            None,
            backend,
        )

    def backward(self, tape, grad, owned, gradients):
        gradients.add(self.inputs[0], dense(grad.view(tape.sizes[self.inputs[0]])), owned)


def dense(x):
    return x.contiguous(memory_format=NHWC) if x.dim() == 4 else x.contiguous()


def spread(a, b):
    """Both in their common shape, dense."""
    shape = torch.broadcast_shapes(a.shape, b.shape)
    return dense(a.expand(shape)), dense(b.expand(shape))


def gather(grad, shape):
    """The gradient of what was spread from `shape`: the sum over the copies."""
    return grad if grad.shape == shape else dense(grad.sum_to_size(shape))
