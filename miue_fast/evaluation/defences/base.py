"""What a defence is, how it is read from a text, and the table of those there are."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NoReturn, TypeVar

import torch
from torch import nn

from ...dispatch.registry import BackendError
from ...models import Recipe
from ...support.messages import fail
from ...support.named import Named
from ...support.spec import Spec
from ...support.spec import option as option
from .. import _torchvision


class Stage(enum.IntEnum):
    """When a defence acts, in the order in which reports list them."""

    ONCE = 0  # on the whole training set, before training
    BATCH = 1  # on every batch
    ATTACK = 2  # on every batch, by an attack that the victim is also tested with


@dataclass(frozen=True)
class Defence(Spec):
    """A defence with its options, which are its fields. The first one may be written without its
    name: `jpeg:10` is `jpeg:quality=10`.

    name: what the text begins with. stage: when it acts. tests: whether the test images are
    prepared too; mostly they stay as they are, because these defences are about what is done to
    training data. torchvision: whether that package is needed.
    Random numbers come from torch's global generator, which a cell replaces by its own (`Draws`).
    Errors on creation: ValueError: an option is out of range.
    """

    stage: ClassVar[Stage]
    tests: ClassVar[bool] = False
    torchvision: ClassVar[bool] = False

    @classmethod
    def refuse(cls, what: str, expected: str, got: str) -> NoReturn:
        fail("defence", what, expected, got)

    def misfit(self, shape: Sequence[int], num_classes: int) -> tuple[str, object] | None:
        """(what is expected, what there is) where images of `shape` [C, H, W] of so many classes
        cannot be defended; else None.
        """
        return None

    def check(self, shape: Sequence[int], num_classes: int) -> None:
        """Judges images of `shape` [C, H, W] of so many classes. Errors: ValueError."""
        if reason := self.misfit(shape, num_classes):
            fail("defence", self.spec, *reason)

    def recipe(self, usual: Recipe) -> Recipe:
        """How a victim with this defence is trained, where it is usually trained by `usual`."""
        return usual

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """[C, H, W] of the images that the victim trains on, where they come as `shape`; another
        one than that needs `tests`.
        """
        return tuple(shape)

    def prepare(self, images: torch.Tensor, labels: torch.Tensor, seed: int) -> torch.Tensor:
        """What becomes of the whole set, uint8 [N, C, H, W], once and on the CPU, before
        training: images of `shape`.
        """
        return images

    def batch(
        self, network: nn.Module, images: torch.Tensor, labels: torch.Tensor, num_classes: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(images, targets) that a step trains on instead of float images [B, C, H, W] on [0, 1],
        after crop and flip, and labels [B]. Targets are labels [B] or shares of the classes
        [B, num_classes].
        """
        return images, labels

    def robust(
        self, network: nn.Module, images: torch.Tensor, labels: torch.Tensor, batch: int = 500
    ) -> float | None:
        """Top-1 accuracy (0 to 1) on uint8 images [N, C, H, W] under the attack that the victim was
        trained against; None where there is no attack.
        """
        return None


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    """Float values of 255 as uint8, rounded and clamped."""
    return images.round().clamp(0, 255).to(torch.uint8)


DEFENCES: Named[type[Defence]] = Named()
Given = TypeVar("Given", bound=type[Defence])


def register(kind: Given) -> Given:
    """Adds the class of a defence, a frozen dataclass, to `DEFENCES` under its name; a class
    decorator. Errors: ValueError where the name is taken.
    """
    DEFENCES.add(kind)
    return kind


def defence(spec: str | Defence) -> Defence:
    """The Defence that a text names: a name of `DEFENCES`, then options as `:value` (the first one
    only) or `:option=value`. A Defence comes back as it is.

    Errors: ValueError: an unknown name or option, a value out of range; BackendError: the defence
    needs torchvision and there is none.
    """
    if isinstance(spec, Defence):
        return spec
    name, *parts = spec.split(":") if isinstance(spec, str) else [spec]
    kind = DEFENCES.choose("defence", "name", name)
    made = kind.read(parts)
    if kind.torchvision and (reason := _torchvision.missing()):
        raise BackendError(f"{name}: {reason}")
    return made
