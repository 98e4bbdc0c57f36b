"""What every fused layer is made of: the tape between forward and input gradient, the sums of
gradients, and the base class.

Values are numbered; 0 is the network's input. 4-D activations are channels-last. A layer with
`relu` leaves the bits of its result's ReLU in `tape.masks`; whoever delivers the last part of that
value's gradient applies them (`Gradients`).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..dispatch.registry import OPS
from ..ops.conv_epilogue import mask_bytes
from ..support.messages import fail

NHWC = torch.channels_last


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type that sums have: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer is; the CPU where it has none."""
    return next(iter([*model.parameters(), *model.buffers()]), torch.empty(0)).device


def dense(x: torch.Tensor) -> torch.Tensor:
    """x in the layout of activations: channels-last in four dimensions, else contiguous."""
    return x.contiguous(memory_format=NHWC) if x.dim() == 4 else x.contiguous()


def spread(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in their common shape, dense."""
    shape = torch.broadcast_shapes(a.shape, b.shape)
    return dense(a.expand(shape)), dense(b.expand(shape))


def gather(grad: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The gradient of what was spread from `shape`: the sum over the copies."""
    return grad if grad.shape == shape else dense(grad.sum_to_size(shape))


def keep(holder: object, name: str, value: torch.Tensor) -> None:
    """Sets a tensor of a refold. Where there is one it is written in place, so that captured graphs
    stay right.
    """
    there = getattr(holder, name, None)
    if there is None:
        setattr(holder, name, value.clone(memory_format=torch.preserve_format))
    else:
        there.copy_(value)


def scale_and_shift(
    norms: Iterable[Any], channels: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The composition of affine maps per channel (`Norm` and `Arithmetic` of `constants.py`) as
    x * scale + shift, both [channels] or more in float64.
    """
    scale = torch.ones(channels, dtype=torch.float64, device=device)
    shift = torch.zeros(channels, dtype=torch.float64, device=device)
    for norm in norms:
        a, b = norm.read(device)
        scale, shift = scale * a, shift * a + b
    return scale, shift


@dataclass
class Tape:
    """What one chunk of images leaves behind for its input gradient: ReLU bits, pool positions and
    shapes, but no activations.
    """

    masks: dict[int, torch.Tensor] = field(default_factory=dict)  # value -> bits
    kept: dict[int, Any] = field(default_factory=dict)  # a layer's value -> what its gradient needs
    sizes: dict[int, torch.Size] = field(default_factory=dict)  # value -> shape

    def bytes(self) -> int:
        """The memory of the tensors that are kept."""
        kept = [t for t in self.kept.values() if isinstance(t, torch.Tensor)]
        return sum(t.numel() * t.element_size() for t in [*self.masks.values(), *kept])


class Gradients:
    """The sum of the parts of every value's gradient; the last part applies the value's ReLU bits.

    parts: how many parts each value's gradient has. epilogue: the network's `conv_grad_epilogue_`.
    sums: value -> (the sum so far, whether nobody else looks at its memory).
    """

    def __init__(self, tape: Tape, parts: dict[int, int], epilogue: Callable) -> None:
        self.masks, self.left, self.epilogue = tape.masks, dict(parts), epilogue
        self.sums: dict[int, tuple[torch.Tensor, bool]] = {}

    def due(self, value: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The addend and the mask (or None) for a layer that adds and masks its part by itself. It
        puts the sum, in memory of its own, into `sums`.
        """
        left = self.left[value] = self.left[value] - 1
        addend = self.sums.pop(value, None)
        return addend and addend[0], None if left else self.masks.get(value)

    def add(self, value: int, part: torch.Tensor, owned: bool) -> None:
        """owned: nobody else looks at the memory of `part`."""
        left = self.left[value] = self.left[value] - 1
        mask = None if left else self.masks.get(value)
        there, there_owned = self.sums.get(value, (None, False))
        if there is not None or mask is not None:
            if not owned and there is not None and there_owned:
                part, there = there, part
            elif not owned:
                part = part.clone(memory_format=torch.preserve_format)
            self.epilogue(part, there, mask)
            owned = True
        self.sums[value] = part, owned


@dataclass(eq=False)
class Layer:
    """A step of the network: `inputs` are the values that it reads, `out` is the one it makes.

    name: of the module or operation that it came from. relu: whether its result goes through one.
    """

    name: str
    inputs: list[int]
    out: int
    relu: bool = False

    def __getstate__(self) -> dict[str, Any]:
        """A copy chooses its implementations anew: it may be on another machine."""
        return {k: v for k, v in vars(self).items() if k not in ("epilogue", "calls", "packed")}

    def refold(
        self, dtype: torch.dtype, device: torch.device, input_scale: torch.Tensor | None = None
    ) -> None:
        """Reads the model's present weights into this layer's tensors, in place. input_scale: what
        the network's input is multiplied with, for the first layer.
        """

    def resolve(self, backend: str, device: torch.device, dtype: torch.dtype) -> None:
        """Chooses the implementations that this layer calls. Errors: BackendError."""
        self.epilogue = OPS["conv_epilogue_"].resolve(backend, device.type, dtype)

    def forward(self, tape: Tape, *inputs: Any, **named: Any) -> torch.Tensor:
        """The value that this layer makes of the values it reads, one tensor each."""
        raise NotImplementedError

    def backward(self, tape: Tape, grad: torch.Tensor, owned: bool, gradients: Gradients) -> None:
        """Hands the parts of the inputs' gradients to `gradients`. grad: of the layer's value;
        owned: nobody else looks at its memory.
        """
        raise NotImplementedError

    def same(self, what: str, then: object, now: object) -> None:
        """ValueError if a property of the module is not what it was when it was frozen."""
        if then != now:
            fail(
                "freeze",
                "model",
                f"{what} of {self.name} as they were frozen, {then}",
                f"{now}; call freeze again",
            )

    def finish(
        self,
        tape: Tape,
        y: torch.Tensor,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """y with its epilogue, in place; it leaves the ReLU's bits on the tape."""
        mask = None
        if self.relu:
            size = mask_bytes(y.numel())
            mask = tape.masks[self.out] = torch.empty(size, dtype=torch.uint8, device=y.device)
        if self.relu or bias is not None or residual is not None:
            self.epilogue(y, bias, residual, self.relu, mask)
        return y


def consumers(layers: Sequence[Layer], out: int) -> dict[int, int]:
    """How often each value is read; the features, which are value `out`, count once."""
    uses = {out: 1}
    for layer in layers:
        for value in layer.inputs:
            uses[value] = uses.get(value, 0) + 1
    return uses
