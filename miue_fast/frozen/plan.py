"""From a module to fused layers: its forward is traced (`trace.py`), every operation is read as a
layer (`read.py`), and layers are fused where they meet (`fuse.py`).
"""

from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from ..support.draws import NoDraws
from ..support.messages import fail
from .base import Layer
from .fuse import fuse
from .read import Cell, Reader
from .trace import NotLowered, Tracer


@dataclass
class Plan:
    """The fused layers of a network.

    layers: in order of execution. norms: affine maps of the input (its normalisation). out: the
    features' value. places: (parent, name, module, whether it ran) of the modules that were run for
    it and of those that contain them; the model itself has no parent.
    """

    layers: list[Layer]
    norms: list[Any]
    out: int
    places: list[tuple[nn.Module | None, str, nn.Module, bool]]


def plan(model: nn.Module, feature: str) -> Plan:
    """The Plan of a model in eval mode up to the output of the layer called `feature`. The model is
    only read. Errors: ValueError; NotLowered names the first operation that has no fused layer.
    """
    with NoDraws(_noise):
        return _plan(model, feature)


def _noise(name):
    """A number that is drawn while the network is traced would be the same in every call."""
    raise NotLowered(f"{name}: random numbers in eval mode")


def _plan(model, feature):
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
    reader = Reader(model, tracer.constants)
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
    layers, norms, out = fuse(reader.layers, out.value)
    return Plan(layers, norms, out, _places(model, tracer.ran))


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
    """`Plan.places` of these modules."""
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
