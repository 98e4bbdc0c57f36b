"""Reads a traced graph: every operation becomes a layer that is not fused yet, or a constant."""

import operator
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from ..support.messages import fail
from .base import Layer, device_of
from .constants import Arithmetic, Attribute, Call, Norm, flat
from .convolution import Conv
from .fuse import Slice
from .layers import Add, Affine, AvgPool, Concat, Flatten, Linear, MaxPool
from .trace import NotLowered


@dataclass
class Cell:
    """What a traced name stands for: a numbered value. A later in-place operation gives the same
    cell another value.
    """

    value: int
    shared: bool = False  # a view of another cell, or viewed by one


BATCH = object()  # the traced size of the batch dimension
# torch.add, operator.add, Tensor.add and their like have the same name.
ARITHMETIC = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "truediv": operator.truediv,
    "div": operator.truediv,
}


def _two(value):
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


class Reader:
    """Reads one traced operation after the other into `layers` that are not fused yet.

    constants: tensors of the graph that are no attribute of the model, by the name of their node.
    env: what each node stands for, a `Cell` or a constant.
    """

    def __init__(self, model: nn.Module, constants: dict[str, Any]) -> None:
        self.model, self.constants = model, constants
        self.modules = dict(model.named_modules())
        self.env: dict[fx.Node, Any] = {}
        self.layers: list[Layer] = []
        self.values = 0
        self.device = device_of(model)

    def read(self, node: fx.Node) -> None:
        """Adds the layer of this node, if it is one. NotLowered where there is no such layer."""
        if node.op == "placeholder":
            if node.args or self.env:
                which = "a second" if self.env else "an optional"
                raise NotLowered(f"{node.name}: {which} input")
            self.env[node] = Cell(0, shared=True)
        elif node.op == "get_attr":
            kept = self.constants.get(node.target)
            self.env[node] = Attribute(self.model, str(node.target)) if kept is None else kept
        elif node.op == "output":
            raise NotLowered("the model's end comes before its features")
        else:
            args = fx.map_arg(node.args, lambda n: self.env[n])
            kwargs = fx.map_arg(node.kwargs, lambda n: self.env[n])
            if not any(isinstance(a, Cell) for a in flat((args, kwargs))):
                self.env[node] = self._constant(node, args, kwargs)
            elif node.op == "call_module":
                self.env[node] = self._module(node, self.modules[node.target], args, kwargs)
            else:
                self.env[node] = self._function(node, args, kwargs)

    def _constant(self, node, args, kwargs):
        if node.op == "call_module" or any(a is BATCH for a in flat((args, kwargs))):
            if node.target is operator.getitem and args[1] == 0:
                return BATCH
            raise NotLowered(f"{node.name}: computed from the batch size or by a module")
        return Call(node.target, args, kwargs)

    def _emit(self, kind, node, inputs, inplace=None, **fields):
        """A new layer; `inplace`: the cell whose memory PyTorch overwrites."""
        self.values += 1
        self.layers.append(
            kind(
                str(node.target) if node.op == "call_module" else node.name,
                inputs,
                self.values,
                **fields,
            )
        )
        if inplace is None:
            return Cell(self.values)
        if inplace.shared:
            raise NotLowered(f"{node.name}: in place on a view or on the input")
        inplace.value = self.values
        return inplace

    def _relu(self, node, cell, inplace):
        return self._emit(Add, node, [cell.value], cell if inplace else None, relu=True)

    def _sum(self, node, a, b, inplace):
        if not (isinstance(a, Cell) and isinstance(b, Cell)):
            return self._affine(node, a, b, operator.add, inplace)
        return self._emit(Add, node, [a.value, b.value], a if inplace else None)

    def _affine(self, node, a, b, target, inplace=False):
        """x + c, x - c, c - x, x * c, x / c with c a number or one number per channel."""
        cell, constant, left = (a, b, True) if isinstance(a, Cell) else (b, a, False)
        if (inplace and not left) or (target is operator.truediv and not left):
            raise NotLowered(f"{node.name}: a constant on the left of {target.__name__}")

        norm = Arithmetic(node.name, target, constant, left)
        scale, _ = norm.read(self.device)
        fixed = bool((scale != 0).all() and scale.isfinite().all())
        return self._emit(
            Affine,
            node,
            [cell.value],
            cell if inplace else None,
            norms=[norm],
            channels=len(scale),
            constant=fixed,
        )

    def _view(self, node, cell, kind, **fields):
        out = self._emit(kind, node, [cell.value], **fields)
        cell.shared = out.shared = True
        return out

    def _module(self, node, m, args, kwargs):
        kind = type(m)
        (x,) = args if len(args) == 1 and not kwargs and isinstance(args[0], Cell) else (None,)
        if x is None:
            raise NotLowered(f"{node.target}: a {kind.__name__} with other inputs than one tensor")
        if kind is nn.Conv2d and m.padding_mode == "zeros" and not isinstance(m.padding, str):
            return self._emit(Conv, node, [x.value], module=m)
        if kind is nn.Linear:
            return self._emit(Linear, node, [x.value], module=m)
        if kind in (nn.BatchNorm2d, nn.BatchNorm1d) and m.running_mean is not None:
            return self._emit(Affine, node, [x.value], norms=[Norm(m)], channels=m.num_features)
        if kind is nn.ReLU:
            return self._relu(node, x, m.inplace)
        if kind is nn.Identity or isinstance(m, (nn.modules.dropout._DropoutNd,)):
            return x
        if kind is nn.MaxPool2d:
            window = m.kernel_size, m.stride, m.padding, m.dilation
            return self._max_pool(node, x, *window, m.ceil_mode, m.return_indices)
        if kind is nn.AvgPool2d and m.divisor_override is None:
            return self._avg_pool(
                node, x, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad
            )
        if kind is nn.AdaptiveAvgPool2d:
            return self._adaptive(node, x, m.output_size)
        if kind is nn.Flatten and (m.start_dim, m.end_dim) == (1, -1):
            return self._view(node, x, Flatten)
        raise NotLowered(f"{node.target}: {m}".split("\n")[0])

    def _max_pool(
        self,
        node,
        x,
        kernel_size,
        stride=None,
        padding=0,
        dilation=1,
        ceil_mode=False,
        return_indices=False,
    ):
        kernel = _two(kernel_size)
        if _two(dilation) != (1, 1) or return_indices or kernel[0] * kernel[1] > 256:
            raise NotLowered(
                f"{node.name}: max pooling with dilation, indices or a window of more than 256"
            )
        return self._emit(
            MaxPool,
            node,
            [x.value],
            kernel=kernel,
            stride=_two(stride or kernel),
            padding=_two(padding),
            ceil=ceil_mode,
        )

    def _avg_pool(
        self,
        node,
        x,
        kernel_size,
        stride=None,
        padding=0,
        ceil_mode=False,
        count_include_pad=True,
        divisor_override=None,
    ):
        if divisor_override is not None:
            raise NotLowered(f"{node.name}: average pooling with divisor_override")
        kernel = _two(kernel_size)
        return self._emit(
            AvgPool,
            node,
            [x.value],
            kernel=kernel,
            stride=_two(stride or kernel),
            padding=_two(padding),
            ceil=ceil_mode,
            count_padding=count_include_pad,
        )

    def _adaptive(self, node, x, output_size):
        size = _two(output_size)
        if None in size:
            raise NotLowered(f"{node.name}: adaptive pooling to {size}")
        return self._emit(AvgPool, node, [x.value], stride=size)

    def _function(self, node, args, kwargs):
        name = node.target if node.op == "call_method" else node.target.__name__
        x = args[0] if args else kwargs.get("input")
        rest, kwargs = args[1:], {k: v for k, v in kwargs.items() if k != "input"}
        plain = not rest and not kwargs
        base = name.rstrip("_")
        if base in ("iadd", "isub", "imul", "itruediv"):  # Python's in-place operators
            base = base[1:]
        inplace = name != base
        if base in ARITHMETIC and len(rest) == 1 and not kwargs:
            if base == "add":
                return self._sum(node, x, rest[0], inplace)
            if not isinstance(x, Cell) or not isinstance(rest[0], Cell):
                return self._affine(node, x, rest[0], ARITHMETIC[base], inplace)
        if not isinstance(x, Cell) and name not in ("cat", "concat"):
            raise NotLowered(f"{node.name}: {name}")
        if name in ("relu", "relu_") and not rest and set(kwargs) <= {"inplace"}:
            return self._relu(node, x, name == "relu_" or kwargs.get("inplace", False))
        if name in ("cat", "concat"):
            dim = rest[0] if rest else kwargs.get("dim", kwargs.get("axis", 0))
            if dim == 1 and all(isinstance(c, Cell) for c in x):
                return self._emit(Concat, node, [c.value for c in x])
        if name == "flatten" and (*rest, *kwargs.values()) in ((1,), (1, -1)):
            return self._view(node, x, Flatten)
        if name in ("view", "reshape") and not kwargs:
            shape = (
                tuple(rest[0]) if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest
            )
            if (
                len(shape) == 2
                and isinstance(shape[1], int)
                and (shape[0] is BATCH or (shape[0] == -1 and shape[1] > 0))
            ):
                return self._view(node, x, Flatten, expected=shape[1])
        if (
            (name == "size" and rest == (0,))
            or (name == "getattr" and rest == ("shape",))
            or (name == "size" and plain)
        ):
            return BATCH  # only [0] of it is read; see _constant
        if name == "contiguous" and not rest:
            return x
        if "dropout" in name:
            if (*rest, kwargs.get("training", True))[min(1, len(rest))]:
                fail(
                    "freeze",
                    "model",
                    "no active dropout (pass training=self.training)",
                    f"{node.name}: {name} with training=True",
                )
            return x
        if node.target is F.avg_pool2d:
            return self._avg_pool(node, x, *rest, **kwargs)
        if node.target is F.max_pool2d:
            return self._max_pool(node, x, *rest, **kwargs)
        if name == "adaptive_avg_pool2d":
            return self._adaptive(node, x, *rest, **kwargs)
        if name == "mean":
            dims = _two(rest[0] if rest else kwargs.get("dim", ()))
            keep = rest[1] if len(rest) > 1 else kwargs.get("keepdim", False)
            if sorted(d % 4 for d in dims) == [2, 3]:
                cell = self._emit(AvgPool, node, [x.value], stride=(1, 1))
                return cell if keep else self._view(node, cell, Flatten)
        if name == "getitem":
            return self._slice(node, x, rest[0])
        raise NotLowered(f"{node.name}: {name}")

    def _slice(self, node, x, index):
        """x[:, :, ::k, ::k]"""
        index = index if isinstance(index, tuple) else (index,)
        plain = all(isinstance(s, slice) and s.start in (None, 0) and s.stop is None for s in index)
        steps = [s.step or 1 for s in index] if plain else []
        if len(steps) == 4 and steps[:2] == [1, 1] and steps[2] == steps[3]:
            return self._view(node, x, Slice, step=steps[2])
        raise NotLowered(f"{node.name}: a slice other than [:, :, ::k, ::k]")
