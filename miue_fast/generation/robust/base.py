"""What a transform of the poison step is, how a list of them is read from a text, and the table of
those there are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, NoReturn, TypeVar

import torch

from ...support.messages import fail, short
from ...support.named import Named
from ...support.spec import Spec
from ...support.spec import option as option

# New images [B, C, H, W], float32 on [0, 1], from such images; differentiable by autograd.
Change = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Transform(Spec):
    """A random change of image + delta, drawn anew in every poison step; the gradient goes back
    through its exact transpose (or what `change` gives autograd). Its options are its fields.

    name: what the text begins with. about: a few words for help texts. moves: whether it has
    `view`. changes: whether it has `change`; such a transform runs in PyTorch with autograd, and
    the step is then not captured in a CUDA graph. cells: the sign of the gradient is taken over
    cells of so many pixels.
    """

    about: ClassVar[str]
    moves: ClassVar[bool] = False
    changes: ClassVar[bool] = False

    @classmethod
    def refuse(cls, what: str, expected: str, got: str) -> NoReturn:
        fail("option", "robust", f"{what}: {expected}", got)

    @property
    def cells(self) -> int:
        """The width of the cells over which the gradient is summed before its sign."""
        return 1

    def check(self, shape: torch.Size) -> None:
        """Judges images of `shape` [N, C, H, W]. Errors: ValueError."""

    def view(
        self, batch: int, shape: torch.Size, flip: float, generator: torch.Generator
    ) -> torch.Tensor:
        """int32 [batch, 3] on the CPU: the `view` of `perturbed_input` for one step. shape: of the
        images. flip: the probability of a mirrored one.
        """
        raise NotImplementedError

    def change(self, shape: torch.Size, generator: torch.Generator) -> Change | None:
        """What one step does to a batch of images of `shape`; None: it leaves them as they are."""
        raise NotImplementedError


class Drawn(NamedTuple):
    """The random choices of one step. view: int32 [B, 3] or None. changes: in their order, before
    the view.
    """

    view: torch.Tensor | None = None
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True)
class Robust:
    """The transforms of a run in the order of the text. The images change in this order, as a
    published file does before a victim crops it; then they are moved.
    """

    transforms: tuple[Transform, ...] = ()

    @property
    def grid(self) -> int:
        """The width of the cells in which the gradient is summed; 1: every pixel has its own."""
        return max((each.cells for each in self.transforms), default=1)

    @property
    def moves(self) -> bool:
        """Whether there is a view in each step, which mirrors images in place of `flip`."""
        return any(each.moves for each in self.transforms)

    @property
    def changes(self) -> bool:
        """Whether a step may compute new pixels."""
        return any(each.changes for each in self.transforms)

    @property
    def draws(self) -> bool:
        """Whether anything is random."""
        return self.moves or self.changes

    def check(self, shape: torch.Size) -> None:
        """Judges images of `shape` [N, C, H, W]. Errors: ValueError."""
        for each in self.transforms:
            each.check(shape)

    def draw(self, batch: int, shape: torch.Size, flip: float, generator: torch.Generator) -> Drawn:
        """The choices of one step for a batch of images of `shape` [N, C, H, W], on the CPU."""
        view, changes = None, []
        for each in self.transforms:
            if each.moves:
                view = each.view(batch, shape, flip, generator)
            if each.changes and (change := each.change(shape, generator)) is not None:
                changes.append(change)
        return Drawn(view, tuple(changes))


TRANSFORMS: Named[type[Transform]] = Named()
Given = TypeVar("Given", bound=type[Transform])


def register(kind: Given) -> Given:
    """Adds the class of a transform, a frozen dataclass, to `TRANSFORMS` under its name; a class
    decorator. Errors: ValueError where the name is taken.
    """
    TRANSFORMS.add(kind)
    return kind


def read(text: str) -> Robust:
    """The transforms of a comma-separated text: each a name of `TRANSFORMS`, then its options as
    `:value` (the first one only) or `:option=value`. An empty text has none.

    Errors: ValueError: an unknown name or option, a value out of range, a name that is given twice.
    """
    if not isinstance(text, str):
        fail("option", "robust", f"a text such as {', '.join(TRANSFORMS)}", short(text))
    found: list[Transform] = []
    for part in text.split(",") if text.strip() else []:
        name, *values = part.strip().split(":")
        kind = TRANSFORMS.choose("option", "robust", name)
        if any(isinstance(each, kind) for each in found):
            fail("option", "robust", "each transform at most once", f"{name} twice")
        found.append(kind.read(values))
    return Robust(tuple(found))
