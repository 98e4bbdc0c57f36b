"""From a module to fused layers: its forward is traced, every operation becomes a layer, and layers
are fused where they meet.

What has no layer raises NotLowered with the name of the first such thing; `freeze` then keeps
PyTorch's autograd."""

import operator
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import fx, nn

from ..support.draws import NoDraws
from ..support.messages import fail
from .constants import Arithmetic, Attribute, Call, Norm, flat
from .layers import Add, Affine, AvgPool, Concat, Conv, Flatten, Layer, Linear, MaxPool, device_of
from .trace import NotLowered, Tracer


@dataclass
class Plan:
    """layers in order of execution; `norms`: affine maps of the input (its normalisation); `out`:
    the features' value; `places`: where in the model the modules are that were run for it."""

    layers: list
    norms: list
    out: int
    places: list


@dataclass
class Cell:
    """What a traced name stands for: a numbered value; a later in-place operation gives the same
    cell another value.
    """

    value: int
    shared: bool = False  # a view of another cell, or viewed by one


BATCH = object()  # the traced size of the batch dimension


@dataclass(eq=False)
class Slice(Layer):
    step: int = 1


def lower(model, feature):
    """The Plan of a model in eval mode up to the output of the layer called `feature`. The model is
    only read.
    """
    with NoDraws(_noise):
        return _lower(model, feature)


def _noise(name):
    """Numbers that were drawn here would be drawn once, for ever."""
    raise NotLowered(f"{name}: random numbers in eval mode")


def _lower(model, feature):
    tracer, graph = _traced(model, feature)
    if len(tracer.found) != 1:
        fail(
            "freeze",
            "feature",
            "a layer that runs once per forward pass",
            f"{feature!r}, which ran {len(tracer.found)} times",
        )
    if not isinstance(tracer.found[0], fx.Proxy):
        fail(
            "freeze",
            "feature",
            "a layer with one tensor as its output",
            f"{feature!r}: {type(tracer.found[0]).__name__}",
        )
    reader = _Reader(model, tracer.constants)
    for node in graph.nodes:
        reader.read(node)
        if node is tracer.found[0].node:
            break
    node = tracer.found[0].node
    if any(_overwrites(user, node, reader.modules) for user in node.users):
        fail(
            "freeze",
            "feature",
            "a layer whose output is not changed in place",
            f"{feature!r}; choose the layer after it",
        )
    out = reader.env[node]
    if not isinstance(out, Cell):
        raise NotLowered(f"{feature}: not a tensor of activations")
    return _fuse(reader.layers, out.value, _places(model, tracer.ran))


def _traced(model, feature):
    for buffers in (True, False):
        tracer = Tracer(model, feature, buffers)
        try:
            return tracer, tracer.run()
        except NotLowered:
            raise
        # The user's forward runs here, with stand-ins for tensors: it may raise anything.
        except Exception as error:  # noqa: BLE001
            said = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    raise NotLowered(f"torch.fx cannot trace it ({said})")


def _places(model, modules):
    """(parent, name, module, whether it ran) of these modules and of all that contain them; the
    model itself has no parent.
    """
    ran, found = {id(module) for module in modules}, {(id(model), ""): (None, "", model, True)}
    for path, module in model.named_modules(remove_duplicate=False):
        steps = path.split(".") if path and id(module) in ran else []
        parent = model
        for name in steps:
            child = parent.get_submodule(name)
            found[id(parent), name] = parent, name, child, id(child) in ran
            parent = child
    return list(found.values())


def _overwrites(user, node, modules):
    if user.args[:1] != (node,):
        return False
    if user.op == "call_module":
        return getattr(modules[user.target], "inplace", False)
    name = user.target if isinstance(user.target, str) else user.target.__name__
    return (
        name.endswith("_")
        or name in ("iadd", "isub", "imul", "itruediv")
        or user.kwargs.get("inplace", False)
    )


def _two(value):
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


class _Reader:
    """One traced operation after the other, into layers that are not fused yet."""

    def __init__(self, model, constants):
        self.model, self.constants = model, constants
        self.modules = dict(model.named_modules())
        self.env, self.layers, self.values = {}, [], 0
        self.device = device_of(model)

    def read(self, node):
        if node.op == "placeholder":
            if node.args or self.env:
                raise (
                    NotLowered(f"{node.name}: a second input")
                    if self.env
                    else NotLowered(f"{node.name}: an optional input")
                )
            self.env[node] = Cell(0, shared=True)
        elif node.op == "get_attr":
            kept = self.constants.get(node.target)
            self.env[node] = Attribute(self.model, node.target) if kept is None else kept
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
            return self._max_pool(
                node,
                x,
                m.kernel_size,
                m.stride,
                m.padding,
                m.dilation,
                m.ceil_mode,
                m.return_indices,
            )
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
        # torch.add, operator.add, Tensor.add and the like carry the same name; `i...` is Python's
        # in-place operator
        arithmetic = {
            "add": operator.add,
            "sub": operator.sub,
            "mul": operator.mul,
            "truediv": operator.truediv,
            "div": operator.truediv,
        }
        base = (
            name.rstrip("_").removeprefix("i")
            if name in ("iadd", "isub", "imul", "itruediv")
            else name.rstrip("_")
        )
        inplace = name.endswith("_") or base != name.rstrip("_")
        if base in arithmetic and len(rest) == 1 and not kwargs:
            if base == "add":
                return self._sum(node, x, rest[0], inplace)
            if not isinstance(x, Cell) or not isinstance(rest[0], Cell):
                return self._affine(node, x, rest[0], arithmetic[base], inplace)
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
        if name in ("avg_pool2d", "max_pool2d", "boolean_dispatch", "fn"):
            pool = (
                self._avg_pool
                if node.target is F.avg_pool2d
                else self._max_pool
                if node.target is F.max_pool2d
                else None
            )
            if pool:
                return pool(node, x, *rest, **kwargs)
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


def consumers(layers, out):
    """How often each value is read; the features count once."""
    uses = {out: 1}
    for layer in layers:
        for value in layer.inputs:
            uses[value] = uses.get(value, 0) + 1
    return uses


def _fuse(layers, out, places):
    needed = {out}
    for layer in reversed(layers):
        if layer.out in needed:
            needed |= set(layer.inputs)
    layers = [layer for layer in layers if layer.out in needed]
    uses = consumers(layers, out)
    made, fused, norms = {}, [], []

    def only(value, *kinds):
        """The layer that makes `value` for one reader, if it is of one of the kinds and open for
        fusion.
        """
        maker = made.get(value)
        return (
            maker
            if isinstance(maker, kinds)
            and uses[value] == 1
            and not maker.relu
            and len(maker.inputs) == 1
            else None
        )

    for layer in layers:
        if isinstance(layer, Affine):
            maker = only(layer.inputs[0], Conv, Linear, Affine)
            if maker:
                maker.norms.extend(layer.norms)
                if isinstance(maker, Affine):
                    maker.channels, maker.constant = (
                        max(maker.channels, layer.channels),
                        maker.constant and layer.constant,
                    )
                maker.out = layer.out
                made[layer.out] = maker
                continue
        elif isinstance(layer, Add) and layer.relu:
            maker = made.get(layer.inputs[0])
            if (
                maker
                and uses[layer.inputs[0]] == 1
                and not maker.relu
                and not isinstance(maker, Slice)
            ):
                maker.relu, maker.out = True, layer.out
                made[layer.out] = maker
                continue
        elif isinstance(layer, Add):
            a, b = layer.inputs
            makers = (
                [
                    (fused.index(m), m, other)
                    for m, other in ((only(a, Conv), b), (only(b, Conv), a))
                    if m
                ]
                if a != b
                else []
            )
            # the later convolution takes the other branch as its residual, and moves to where both
            # are there
            if makers:
                _, maker, other = max(makers, key=lambda entry: entry[0])
                fused.remove(maker)
                maker.inputs, maker.out = [*maker.inputs, other], layer.out
                fused.append(maker)
                made[layer.out] = maker
                continue
        elif isinstance(layer, Conv) and isinstance(made.get(layer.inputs[0]), Slice):
            cut = made[layer.inputs[0]]
            if layer.module.kernel_size != (1, 1) or any(layer.module.padding):
                raise NotLowered(f"{layer.name}: a slice before a convolution other than 1x1")
            layer = replace(layer, inputs=list(cut.inputs), pick=cut.step)
            uses = {**uses, cut.inputs[0]: uses[cut.inputs[0]] + 1, cut.out: uses[cut.out] - 1}
        fused.append(layer)
        made[layer.out] = layer
    for cut in [layer for layer in fused if isinstance(layer, Slice)]:
        if uses[cut.out]:
            raise NotLowered(f"{cut.name}: a slice that is not followed by a 1x1 convolution")
        fused.remove(cut)
    first = [layer for layer in fused if 0 in layer.inputs]
    if len(first) == 1 and isinstance(first[0], Affine) and first[0].constant and not first[0].relu:
        norms, value = first[0].norms, first[0].out
        fused.remove(first[0])
        for layer in fused:
            layer.inputs = [0 if v == value else v for v in layer.inputs]
        out = 0 if out == value else out
    end = Flatten("features", [out], max([out, *(layer.out for layer in layers)]) + 1)
    return Plan([*fused, end], norms, end.out, places)
