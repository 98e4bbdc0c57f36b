"""Gives a run random numbers from generators of its own, also in code that asks for PyTorch's
global ones: networks and torchvision.

The global generators belong to every thread of the process: a run that drew from them would change
the numbers of its neighbours, and they would change its own.
"""

import contextlib
import threading
from collections.abc import Callable, Generator

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .messages import fail

_guard = threading.Lock()


class Draws(TorchDispatchMode):
    """Within `with draws:` the random operations of this thread take their numbers from
    `draws.generator(device)`, in the order in which PyTorch's own generators would have given
    them. Nothing global is touched, and no other thread.

    An operation that takes no generator is refused, and so is one in the backward pass within
    `backward_of` (ValueError).
    """

    def __init__(self, op: str, seed: int) -> None:
        super().__init__()
        self.op, self.seed, self.generators, self.drew = op, seed, {}, False

    def generator(self, device: torch.device | str) -> torch.Generator:
        """The run's generator of a device, seeded when it is first used, as `torch.manual_seed`
        seeds all of them.
        """
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if device not in self.generators:
            self.generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self.generators[device]

    def manual_seed(self, seed: int) -> None:
        self.seed = seed
        for generator in self.generators.values():
            generator.manual_seed(seed)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (
            torch.Tag.nondeterministic_seeded not in func.tags
            or kwargs.get("generator") is not None
        ):
            return func(*args, **kwargs)
        taking = _taking_a_generator(func)
        options = {argument.name: argument.default_value for argument in func._schema.arguments}
        options.update(zip(options, args))
        options.update(kwargs)
        if taking is None and func is not torch.ops.aten.native_dropout.default:
            if options.get("dropout_p", options.get("dropout")) == 0:
                return func(*args, **kwargs)
            fail(self.op, "model", "random operations that take a generator", func.name())
        self.drew = True
        like = next((value for value in args if isinstance(value, torch.Tensor)), None)
        generator = self.generator(
            like.device if like is not None else options.get("device") or "cpu"
        )
        return (
            _dropout(*args, generator=generator)
            if taking is None
            else taking(*args, **{**kwargs, "generator": generator})
        )


_TAKING = {}


def _taking_a_generator(func):
    """The overload of a random operation that has an argument `generator`, or None."""
    if func not in _TAKING:
        packet, name = func.overloadpacket, func._overloadname
        named = "generator" if name == "default" else f"{name}_generator"
        own = any(argument.name == "generator" for argument in func._schema.arguments)
        _TAKING[func] = (
            func if own else getattr(packet, named) if named in packet.overloads() else None
        )
    return _TAKING[func]


def _dropout(x, p, train, *, generator):
    """What `native_dropout` gives, which takes no generator."""
    kept = torch.empty_like(x, dtype=torch.bool).bernoulli_(
        1 - p if train else 1, generator=generator
    )
    return x * kept * (0.0 if p == 1 else 1 / (1 - p)) if train else x.clone(), kept


class NoDraws(TorchDispatchMode):
    """`refuse(name)` is called in place of a random operation of this thread, and raises."""

    def __init__(self, refuse: Callable[[str], object]) -> None:
        super().__init__()
        self.refuse = refuse

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if torch.Tag.nondeterministic_seeded in func.tags and _taking_a_generator(func) is not None:
            self.refuse(func.name())
        return func(*args, **(kwargs or {}))


def backward_of(draws: Draws | None) -> contextlib.AbstractContextManager:
    """A context for the backward pass of a step that may have drawn numbers. Activation
    checkpointing would draw again there, and get other values, so it is refused.
    """
    if draws is None or not draws.drew:
        return contextlib.nullcontext()
    return NoDraws(
        lambda name: fail(
            draws.op, "model", "no random numbers in the backward pass (checkpointed dropout)", name
        )
    )


@contextlib.contextmanager
def seeded_globally(draws: Draws, device: torch.device) -> Generator[None, None, None]:
    """A context in which a callable makes a network and may seed as it likes. PyTorch's global
    generators start from the seed of `draws`, for one thread of this library at a time, and are
    put back afterwards; `draws` goes on from where the generator of the CPU ended.
    """
    gpus = (
        range(torch.cuda.device_count())
        if device.type == "cuda" or torch.cuda.is_initialized()
        else ()
    )
    with _guard, torch.random.fork_rng(list(gpus)):
        torch.random.default_generator.manual_seed(draws.seed)
        if gpus:
            torch.cuda.manual_seed_all(draws.seed)
        yield
        draws.generator("cpu").set_state(torch.get_rng_state())
