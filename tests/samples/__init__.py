"""The inputs of every op: what the tests of the contract, the parity stage of benchmarks/device.py
and the sanitizer study run it on. One file per op or family of ops; each ends in `add(...)`.

An import of these files needs torch and numpy only: the machines that the benchmarks run on have no
pytest and no hypothesis.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from miue_fast.dispatch.registry import OPS, Impl

Args = tuple[Any, ...]  # the schema's arguments without `backend`
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
DOUBLES = (*FLOATS, torch.float64)


class Choose(Protocol):
    """Where a fuzz case takes its choices from; tests/ops/test_fuzz.py gives it hypothesis's."""

    def integer(self, low: int, high: int) -> int: ...
    def number(self, low: float, high: float) -> float: ...
    def flag(self) -> bool: ...
    def order(self, count: int) -> list[int]: ...
    def one_of(self, *options: Any) -> Any: ...
    def generator(self) -> torch.Generator: ...


@dataclass(frozen=True)
class Samples:
    """What is known about the inputs of one op.

    make: (device, dtype) -> argument tuples, at every value at which the function bends. dtype is
        the one that the op's `dtype_of` finds in them.
    case: (choose) -> one argument tuple on the CPU, any valid input: a case of the fuzz test.
    empty: an argument tuple of `make` -> the same with a batch of none.
    public: (backend, batch) -> the results of the op's public call as a user's function has it.
        `batch` is the dictionary of `batch_of`.
    strided: the positions of the tensors that may have any strides.
    formula: for a pointwise op, its definition written a second time, in numpy: the arguments ->
        the list of its outputs. None: the reference is the definition.
    """

    make: Callable[[str, torch.dtype], Iterable[Args]]
    case: Callable[[Choose], Args]
    empty: Callable[[Args], Args]
    public: Callable[[str, dict[str, torch.Tensor]], Any]
    strided: tuple[int, ...] = ()
    formula: Callable[..., list[torch.Tensor]] | None = None


ADDED: dict[str, Samples] = {}


def add(op: str, samples: Samples) -> None:
    """Makes the samples of an op known. KeyError if there is no such op."""
    ADDED[OPS[op].name] = samples


def of(op: str) -> Samples:
    """The samples of an op by its name. KeyError if no file of this folder adds them."""
    if op not in ADDED:
        for module in pkgutil.iter_modules(__path__):
            importlib.import_module(f"{__name__}.{module.name}")
    if op not in ADDED:
        raise KeyError(f"{op} has no samples: add tests/samples/{op}.py")
    return ADDED[op]


def make(op: str, device: str, dtype: torch.dtype) -> Iterable[Args]:
    """The samples of an op."""
    return of(op).make(device, dtype)


def taken(op: str, impl: Impl, device: str, dtype: torch.dtype) -> Iterator[Args]:
    """The samples of an op that an implementation takes."""
    return (args for args in make(op, device, dtype) if not impl.refuses(*args))


def batch_of(count: int, device: str) -> dict[str, torch.Tensor]:
    """The tensors of one batch, from which the public calls are made: features [B, 6], labels [B],
    images, delta and grad [B, 3, 4, 5], index and flip [B], view [B, 3], activations x
    [B, 16, 4, 4].
    """
    gen = torch.Generator().manual_seed(count)
    images = torch.randint(256, (count, 3, 4, 5), generator=gen, dtype=torch.uint8)
    batch = {
        "features": torch.randn(count, 6, generator=gen),
        "labels": torch.randint(3, (count,), generator=gen),
        "images": images,
        "delta": (torch.rand(images.shape, generator=gen) - 0.5) / 20,
        "grad": torch.randn(images.shape, generator=gen),
        "index": torch.randperm(count, generator=gen),
        "flip": torch.rand(count, generator=gen) < 0.5,
        "x": torch.randn(count, 16, 4, 4, generator=gen).contiguous(
            memory_format=torch.channels_last
        ),
        "weight": torch.randn(16, 16, 3, 3, generator=gen) / 12,
        "stem": torch.randn(16, 3, 3, 3, generator=gen),
        "bias": torch.randn(16, generator=gen),
        "view": torch.randint(-2, 3, (count, 3), generator=gen).to(torch.int32),
    }
    batch["grad"][0, 0, 0, 0] = torch.nan
    return {name: value.to(device) for name, value in batch.items()}


def special(tensor: torch.Tensor, gen: torch.Generator, *numbers: float) -> torch.Tensor:
    """Puts each of the numbers into about a tenth of the places."""
    for number in numbers:
        tensor[torch.rand(tensor.shape, generator=gen) < 0.1] = number
    return tensor


def shuffled(tensor: torch.Tensor, order: list[int]) -> torch.Tensor:
    """The same values with the dimensions in memory in another order."""
    back = [order.index(k) for k in range(len(order))]
    return tensor.permute(order).contiguous().permute(back)


def values(tensor: torch.Tensor) -> Any:
    """numpy values in the arithmetic of the pointwise ops: float64 for float64, else float32."""
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return tensor.detach().cpu().to(wide).numpy()
