"""What every form of a frozen network has: two calls, for one thread at a time."""

import contextlib
import threading
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import nn

from ..support.calls import Turn, ordinary
from ..support.messages import describe, fail
from .base import device_of
from .chunks import Chunks


class Frozen:
    """What the fused network and the one in autograd share. Both compute in launches of `chunk`;
    whoever calls `run` and `back` holds `alone()` from the one to the other.

    It copies and pickles without what waits for an `input_grad`.
    """

    fused: bool
    reason: str | None  # why it is not fused
    dtype: torch.dtype
    chunk: Chunks
    mean: list[float] | None = None
    std: list[float] | None = None
    stem: Any = None
    channels: int | None = None
    # What `back` needs of the last `run`, until then, and the thread that called it.
    tapes: Any = None
    load: Any = None
    graph: Any = None
    count: int | None = None
    thread: int | None = None
    _WAITING = ("tapes", "load", "graph", "count", "thread")

    def __init__(self, model: nn.Module) -> None:
        self.model, self.device, self.turn = model, device_of(model), Turn("FrozenNet")

    @property
    def step_stem(self) -> Any:
        """The layer whose input gradient the projected step takes along; None: there is none."""
        return None

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in self._WAITING}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.device = device_of(self.model)  # torch.load may have moved it

    def forget(self) -> None:
        """Nothing waits for its `back` any more."""
        vars(self).update(dict.fromkeys(self._WAITING))

    @contextlib.contextmanager
    def alone(self) -> Generator[None, None, None]:
        """No other thread's calls, and nothing of this thread's modes. Errors: ValueError."""
        with self.turn, ordinary():
            yield

    def check(self) -> None:
        """ValueError if the model's structure is no longer that of this object."""
        raise NotImplementedError

    def refold(self) -> None:
        """Takes over the model's present weights."""
        raise NotImplementedError

    def run(self, count: int, load: Callable[[slice], torch.Tensor]) -> torch.Tensor:
        """The features [count, D] of the network inputs that `load(rows)` gives for slices of
        range(count).
        """
        raise NotImplementedError

    def back(
        self, grad: torch.Tensor, take: Callable[[slice, torch.Tensor], None], *, stem: bool = False
    ) -> None:
        """Calls take(rows, gradient of the network input) for each launch of the last `run`."""
        raise NotImplementedError

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """`run` on checked images on the [0, 1] scale."""
        raise NotImplementedError

    def normalisation(self, channels: int) -> tuple[list[float] | None, list[float] | None]:
        """(mean, std) of the input, each a list of `channels` numbers, or None where the network
        normalises its input itself.
        """
        mean, std = (v * channels if v and len(v) == 1 else v for v in (self.mean, self.std))
        return mean, std

    def forward(self, images: torch.Tensor) -> torch.Tensor:
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

    def input_grad(self, grad: torch.Tensor) -> torch.Tensor:
        """d loss / d images [B, C, H, W] (compute dtype) for the images of the last `forward`,
        which this thread called; one call per forward. Errors: ValueError."""
        wanted = torch.is_grad_enabled()
        with self.alone():
            if self.count is None:
                fail(
                    "input_grad",
                    "grad",
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
            tensor = isinstance(grad, torch.Tensor)
            if (
                not tensor
                or grad.dim() != 2
                or len(grad) != self.count
                or grad.device != self.device
            ):
                got = list(grad.shape) if tensor else describe(grad)
                fail(
                    "input_grad",
                    "grad",
                    f"[{self.count}, D] on {self.device}, like the features",
                    got,
                )
            if grad.requires_grad and wanted:
                fail(
                    "input_grad",
                    "grad",
                    "no gradient required (detach them)",
                    "a tensor that requires one",
                )
            out: list[torch.Tensor] = []
            self.back(grad.detach(), lambda rows, grad: out.append(grad))
            return torch.cat(out) if len(out) != 1 else out[0]

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return self.forward(images)


def check_images(
    images: torch.Tensor, device: torch.device, channels: int | None, gradients: bool
) -> torch.Tensor:
    """The images on the [0, 1] scale. gradients: whether the caller has gradients enabled."""
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
