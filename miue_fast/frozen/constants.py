"""What a traced network computes from its weights, buffers and numbers alone: kept as data that
copies and pickles, read anew at every refold."""

import operator
from dataclasses import dataclass

import torch

from .trace import NotLowered


@dataclass(eq=False)
class Attribute:
    """A parameter or buffer of the model, by its name."""

    model: torch.nn.Module
    path: str

    def read(self):
        return operator.attrgetter(self.path)(self.model)


@dataclass(eq=False)
class Call:
    """A function (or method, by its name) of constants."""

    target: object
    args: tuple
    kwargs: dict

    @torch.no_grad()
    def read(self):
        args, kwargs = value_of(self.args), value_of(self.kwargs)
        return (
            getattr(args[0], self.target)(*args[1:], **kwargs)
            if isinstance(self.target, str)
            else self.target(*args, **kwargs)
        )


@dataclass(eq=False)
class Norm:
    """A batch norm in eval mode: x * scale + shift per channel."""

    module: torch.nn.Module

    def read(self, device):
        norm = self.module
        a = torch.rsqrt(norm.running_var.double() + norm.eps)
        a = a if norm.weight is None else a * norm.weight.detach().double()
        b = -norm.running_mean.double() * a
        return a.to(device), (b if norm.bias is None else b + norm.bias.detach().double()).to(
            device
        )


@dataclass(eq=False)
class Arithmetic:
    """x + c, x - c, c - x, x * c, x / c with c a number or one number per channel, as x * scale +
    shift.
    """

    name: str
    target: object  # operator.add, sub, mul or truediv
    constant: object
    left: bool  # whether x is

    def read(self, device):
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


def value_of(nested):
    """The same with what its constants have for values now."""
    if isinstance(nested, (tuple, list)):
        return type(nested)([value_of(item) for item in nested])
    if isinstance(nested, dict):
        return {k: value_of(v) for k, v in nested.items()}
    return nested.read() if isinstance(nested, (Attribute, Call)) else nested


def flat(nested):
    if isinstance(nested, (tuple, list)):
        return [leaf for item in nested for leaf in flat(item)]
    if isinstance(nested, dict):
        return flat(list(nested.values()))
    return [nested]
