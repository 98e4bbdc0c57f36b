"""What a traced network computes from its weights, buffers and numbers alone: kept as data that
copies and pickles, read anew at every refold."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..support.messages import fail
from .trace import NotLowered


@dataclass(eq=False)
class Attribute:
    """A parameter or buffer of the model, found by its name."""

    model: nn.Module
    path: str

    def read(self) -> Any:
        return operator.attrgetter(self.path)(self.model)


@dataclass(eq=False)
class Call:
    """A function of constants, or a method, which is given by its name."""

    target: Callable | str
    args: Any
    kwargs: Any

    @torch.no_grad()
    def read(self) -> Any:
        args, kwargs = value_of(self.args), value_of(self.kwargs)
        return (
            getattr(args[0], self.target)(*args[1:], **kwargs)
            if isinstance(self.target, str)
            else self.target(*args, **kwargs)
        )


@dataclass(eq=False)
class Norm:
    """A batch norm in eval mode: x * scale + shift per channel."""

    module: nn.BatchNorm2d | nn.BatchNorm1d

    def read(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        norm, mean, variance = self.module, self.module.running_mean, self.module.running_var
        if mean is None or variance is None:
            fail("freeze", "model", "batch norms with running statistics", "one that lost them")
        a = torch.rsqrt(variance.double() + norm.eps)
        a = a if norm.weight is None else a * norm.weight.detach().double()
        b = -mean.double() * a
        return a.to(device), (b if norm.bias is None else b + norm.bias.detach().double()).to(
            device
        )


@dataclass(eq=False)
class Arithmetic:
    """x + c, x - c, c - x, x * c or x / c as x * scale + shift; c is a number or one number per
    channel.

    target: operator.add, sub, mul or truediv. left: whether x stands on the left.
    """

    name: str
    target: Callable
    constant: object
    left: bool

    def read(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        c = torch.as_tensor(value_of(self.constant), dtype=torch.float64, device=device).detach()
        if c.numel() > 1 and (c.dim() not in (3, 4) or c.numel() != c.shape[-3]):
            raise NotLowered(
                f"{self.name}: a constant of shape {list(c.shape)} (one number, or one per channel)"
            )
        c = c.flatten()
        one, zero = torch.ones_like(c), torch.zeros_like(c)
        if self.target is operator.add:
            return one, c
        if self.target is operator.sub:
            return (one, -c) if self.left else (-one, c)
        return (c, zero) if self.target is operator.mul else (1 / c, zero)


def value_of(nested: Any) -> Any:
    """The same structure with the present values of its constants."""
    if isinstance(nested, (tuple, list)):
        return type(nested)([value_of(item) for item in nested])
    if isinstance(nested, dict):
        return {k: value_of(v) for k, v in nested.items()}
    return nested.read() if isinstance(nested, (Attribute, Call)) else nested


def flat(nested: Any) -> list[Any]:
    """The leaves of nested tuples, lists and dictionaries, in order."""
    if isinstance(nested, (tuple, list)):
        return [leaf for item in nested for leaf in flat(item)]
    if isinstance(nested, dict):
        return flat(list(nested.values()))
    return [nested]
