"""A model's forward run with stand-ins for tensors, unnoticed by everybody else in the process.

`torch.fx.Tracer.trace` patches `nn.Module.__call__`, `__getattr__` and the globals of wrapped
functions for all threads while it runs. Here the forward runs on twins of the modules instead:
instances of the same classes whose `forward` is this tracer's."""

import copy
import functools
import types
from collections import OrderedDict

import torch
from torch import fx, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_EVERYBODYS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)


class NotLowered(Exception):
    """The message names the first operation that has no fused layer."""


def changed_calls(module: nn.Module) -> str | None:
    """What a call of this module does besides its class's forward, as text, or None."""
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return "hooks"
    return (
        "a forward of its own" if "forward" in vars(module) else None
    )  # its class then says nothing


def hooks_of_all_modules() -> bool:
    """Whether `register_module_forward_hook` and its like are in use in this process."""
    return any(getattr(nn.modules.module, name) for name in _EVERYBODYS)


class Tracer(fx.Tracer):
    """The graph of `model` in eval mode up to its end. The model is only read.

    buffers: whether floating buffers are operands of the graph, as parameters are. Then what is
        computed from them is part of it, but a forward that looks at their values cannot be traced.
    found: what the layer called `feature` returned, one entry for each time that it ran.
    ran: the modules that ran before that.
    constants: tensors of the graph that are no attribute of the model, by the name of their node.
    """

    def __init__(self, model: nn.Module, feature: str, buffers: bool) -> None:
        super().__init__()
        self.model, self.feature, self.buffers = model, feature, buffers
        self.found, self.ran, self.twins = [], [model], {}

    def run(self) -> fx.Graph:
        """Traces the forward. NotLowered where the model's modules are more than their classes say;
        whatever else the user's forward raises comes through.
        """
        if hooks_of_all_modules():
            raise NotLowered("hooks of all modules (torch.nn.modules.module)")
        self._plain(self.model, "the model")
        if type(self.model).__call__ is not nn.Module.__call__ and not isinstance(
            self.model, fx.GraphModule
        ):
            raise NotLowered("the model: a __call__ of its own")
        self.root = self._twin(self.model)
        self.submodule_paths = {module: name for name, module in self.root.named_modules()}
        self.graph, self.tensor_attrs, forward = (
            fx.Graph(tracer_cls=type(self)),
            {},
            type(self.model).forward,
        )
        for path, module in self.model.named_modules():
            self.tensor_attrs.update(
                {
                    v: f"{path}.{k}".lstrip(".")
                    for k, v in vars(module).items()
                    if isinstance(v, torch.Tensor)
                }
            )
        forward, (root, *inputs) = self.create_args_for_root(forward, True)
        self._operands()
        before = set(vars(self.root))
        self.create_node("output", "output", (self.create_arg(forward(root, *inputs)),), {})
        self.constants = {
            k: v
            for k, v in vars(self.root).items()
            if k not in before and not isinstance(v, fx.Proxy)
        }
        return self.graph

    def _operands(self):
        """Parameters, and buffers and other tensors of the modules, that are read as attributes
        become values of the graph.
        """
        read = {}
        for path, module in self.model.named_modules():
            held = module._buffers | vars(module) if self.buffers else {}
            for name, tensor in (held | module._parameters).items():
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    if id(tensor) not in read:
                        read[id(tensor)] = self.create_proxy(
                            "get_attr", f"{path}.{name}".lstrip("."), (), {}
                        )
                    vars(self.twins[id(module)])[name] = read[id(tensor)]

    def call_module(self, m, forward, args, kwargs):
        path = self.path_of_module(m)
        module = self.model.get_submodule(path)
        self._plain(module, path)
        if not self.found:
            self.ran.append(module)
        out = super().call_module(m, forward, args, kwargs)
        if path == self.feature:
            self.found.append(out)
        return out

    @staticmethod
    def _plain(module, path):
        if reason := changed_calls(module):
            raise NotLowered(f"{path}: a module with {reason}")
        if wrapped := _wants_whole(type(module).forward, type(module), set()):
            raise NotLowered(f"{path}: {wrapped}, which torch.fx.wrap keeps whole")

    def _twin(self, value):
        """`value` with twins in place of the model's modules, also inside what holds them; anything
        else is itself.
        """
        if id(value) in self.twins:
            return self.twins[id(value)]
        if isinstance(value, nn.Module):
            twin, state = (
                object.__new__(type(value)),
                vars(value).copy(),
            )  # copied at once: another thread may be using the model
            self.twins[id(value)] = twin
            vars(twin).update(state)  # complete before anything in it leads back here
            vars(twin).update({k: self._twin(v) for k, v in state.items()})
            vars(twin).update(
                {name: OrderedDict() for name in _HOOKS}, training=False, _compiled_call_impl=None
            )
            vars(twin)["forward"] = functools.partial(self._called, twin)
            return twin
        if isinstance(value, (dict, list)):
            twin = self.twins[id(value)] = copy.copy(value)
            for key in list(value) if isinstance(value, dict) else range(len(value)):
                twin[key] = self._twin(value[key])
            return twin
        if type(value) is tuple:
            return tuple(self._twin(v) for v in value)
        if isinstance(value, types.MethodType):
            return types.MethodType(value.__func__, self._twin(value.__self__))
        if type(value) is functools.partial:
            return functools.partial(
                self._twin(value.func), *self._twin(value.args), **self._twin(value.keywords)
            )
        if isinstance(value, types.FunctionType) and value.__closure__:
            return self._twin_of_closure(value)
        return value

    def _twin_of_closure(self, function):
        cells = [self._twin(cell.cell_contents) for cell in function.__closure__]
        if all(new is cell.cell_contents for new, cell in zip(cells, function.__closure__)):
            return function
        twin = types.FunctionType(
            function.__code__,
            function.__globals__,
            function.__name__,
            function.__defaults__,
            tuple(map(types.CellType, cells)),
        )
        twin.__kwdefaults__ = function.__kwdefaults__
        return twin

    def _called(self, twin, *args, **kwargs):
        return self.call_module(twin, functools.partial(type(twin).forward, twin), args, kwargs)


def _wants_whole(function, owner, seen):
    """The name of a function given to `torch.fx.wrap` that this one can reach, or None: a stand-in
    must not enter it.
    """
    code = getattr(function, "__code__", None)
    if (
        code is None
        or code in seen
        or (getattr(function, "__module__", None) or "").split(".")[0] == "torch"
    ):
        return None
    seen.add(code)
    names, scope = _names(code), function.__globals__
    whole = {name for place, name in fx._symbolic_trace._wrapped_fns_to_patch if place == id(scope)}
    for name in names:
        if name in whole:
            return name
        inner = scope.get(name, getattr(owner, name, None))
        if isinstance(inner, types.FunctionType) and (found := _wants_whole(inner, owner, seen)):
            return found
    return None


def _names(code):
    """Globals and attributes that a function's text mentions, inner functions included."""
    return set(code.co_names).union(
        *(_names(c) for c in code.co_consts if isinstance(c, types.CodeType))
    )
