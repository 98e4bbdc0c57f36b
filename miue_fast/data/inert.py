"""Pickles of numpy arrays read as plain data: an interpreter of pickle opcodes in which no name is
ever imported or called.

`pickle.Unpickler` with a strict `find_class` runs nothing either, but eight bytes with a large memo
index make it allocate gigabytes, and a dictionary key of tuples nested 100,000 deep overflows the C
stack while it is hashed. Here a global is only a name, REDUCE knows five of them, keys are small
integers, text or bytes (large integers can be chosen so that all of them hash alike, and every
insertion walks past all others), and everything that is built is smaller than a fixed multiple of
the file."""

import math
import pickle
import pickletools
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np

MAX_OPCODES = (
    4_000_000  # about 24 per array; each one costs a microsecond or two and at most 100 bytes
)
# opcodes of a file of any size; a larger one has four bytes for each, or is made of nothing else
SMALL = 100_000
MAX_BYTES = 1 << 30  # of a pickle; CIFAR-10 takes 154 MB as int8, 614 MB as float32
MAX_KEY = 1 << 32  # below 2^61 integers hash to themselves
DTYPES = frozenset({"i1", "i2", "i4", "i8", "u1", "f2", "f4", "f8"})
ERRORS = (
    pickle.UnpicklingError,
    ValueError,
    TypeError,
    LookupError,
    OverflowError,
    MemoryError,
)  # of `loads` on hostile bytes

PUSHED = frozenset(
    {
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "LONG4",
        "FLOAT",
        "BINFLOAT",
        "STRING",
        "BINSTRING",
        "SHORT_BINSTRING",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "BYTEARRAY8",
        "UNICODE",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
    }
)
FRESH = {
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "NEWTRUE": lambda: True,
    "NEWFALSE": bool,
    "NONE": lambda: None,
}
SHORT_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def refused(what: str) -> pickle.UnpicklingError:
    return pickle.UnpicklingError(f"refused {what}")


def _short(value):
    """A name, a text, or a type: never the text of a nested value."""
    return str(value)[:80] if isinstance(value, str) else f"a {type(value).__name__.lstrip('_')}"


def _is_key(value):
    return type(value) in (str, bytes) or (type(value) is int and 0 <= value < MAX_KEY)


class Name(str):
    """A global that the pickle names. It is never looked up and stays text."""


class _Dtype:
    """Stands for numpy.dtype."""

    __slots__ = ("code", "order")

    def __init__(self, code, *_):
        if type(code) is not str or code not in DTYPES:
            raise refused(f"the dtype {_short(code)}")
        self.code, self.order = code, "="

    def build(self, _, order, *__):
        if type(order) is not str or order not in ("<", ">", "=", "|"):
            raise refused("a dtype of unknown byte order")
        self.order = order


class Array:
    """Stands for a numpy.ndarray and holds what the pickle says about it; `numpy()` makes the
    array.
    """

    __slots__ = ("axes", "dtype", "fortran", "raw", "shape")

    def __init__(self):
        self.axes = self.raw = None

    def build(self, _, shape: Any, dtype: Any, fortran: Any, raw: Any) -> None:
        if type(dtype) is not _Dtype or type(raw) not in (bytes, bytearray):
            raise refused("an array without plain bytes")
        if (
            type(shape) is not tuple
            or len(shape) > 4
            or not all(type(side) is int and 0 < side <= len(raw) for side in shape)
        ):
            raise refused("an array whose shape is not 0 to 4 positive integers within its bytes")
        declared = math.prod(shape) * int(dtype.code[1])
        if declared != len(raw):
            raise refused(f"an array that declares {declared} bytes and holds {len(raw)}")
        self.shape, self.dtype, self.fortran, self.raw = shape, dtype, bool(fortran), raw

    def numpy(self) -> np.ndarray:
        """A read-only array on the bytes of the file; no copy."""
        if self.raw is None:
            raise refused("an array without content")
        values = np.frombuffer(self.raw, np.dtype(self.dtype.code).newbyteorder(self.dtype.order))
        values = values.reshape(self.shape, order="F" if self.fortran else "C")
        return values if self.axes is None else values.transpose(self.axes)


def loads(raw: bytes) -> Any:
    """The value of a pickle (bytes, protocol 0 to 5): numbers, text, bytes, list, tuple, dict and
    `Array`. Numpy scalars become numbers.

    At most 4,000,000 opcodes are run, fewer for a small file. Memory is bounded by them and by a
    small multiple of len(raw), whatever sizes the pickle declares. Errors: one of ERRORS, whose
    text names what was refused.
    """
    return Machine(len(raw)).run(raw)


class Machine:
    """The interpreter. A subclass may know other calls and `persistent` objects, and may change
    what `build` does.
    """

    def __init__(self, size: int, calls: Mapping[str, Callable[..., Any]] | None = None) -> None:
        self.calls = CALLS if calls is None else calls
        self.stack, self.below, self.memo = [], [], {}
        self.size, self.encoded = size, 0

    def run(self, raw: bytes | BinaryIO) -> Any:
        """Runs the pickle and returns its value. raw: bytes, or a binary stream, which is then left
        behind the end of the pickle.
        """
        most = min(MAX_OPCODES, SMALL + self.size // 4)
        for count, (opcode, argument, _) in enumerate(pickletools.genops(raw)):
            if count == most:
                raise refused(f"more than {most} opcodes")
            name = opcode.name
            if name in PUSHED:
                self.stack.append(argument)
            elif name in FRESH:
                self.stack.append(FRESH[name]())
            elif name == "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
                if type(argument) is not int or not 0 <= argument < self.size:
                    raise refused("a memo index larger than the file")
                self.memo[argument] = self.stack[-1]
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                if argument not in self.memo:
                    raise refused("an unknown memo index")
                self.stack.append(self.memo[argument])
            elif name in SHORT_TUPLES:
                self.stack.append(
                    tuple([self.stack.pop() for _ in range(SHORT_TUPLES[name])][::-1])
                )
            elif name == "MARK":
                self.below.append(self.stack)
                self.stack = []
            elif name in STEPS:
                STEPS[name](self, argument)
            elif name not in ("PROTO", "FRAME", "STOP"):
                raise refused(f"the opcode {name}")
        (result,) = self.stack
        return result

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def marked(self) -> list[Any]:
        """Takes and returns what was pushed since the last MARK."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def append(self, items: Any) -> None:
        if type(self.stack[-1]) is not list:
            raise refused(f"items for a {type(self.stack[-1]).__name__}")
        self.stack[-1].extend(items)

    def dictionary(self) -> None:
        items = self.marked()
        self.stack.append({})
        self.update(items)

    def update(self, items: Any) -> None:
        if type(self.stack[-1]) is not dict or not all(map(_is_key, items[::2])):
            raise refused(
                f"a dict whose keys are not integers from 0 to {MAX_KEY - 1}, text or bytes"
            )
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise refused("a name that is not text")
        # numpy 2 moved its private modules
        full = f"{module}.{name}".replace("numpy._core.", "numpy.core.")
        if full not in self.calls and full != "numpy.ndarray":
            raise refused(f"{module}.{name}")
        self.stack.append(Name(full))

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(function) is not Name or function not in self.calls or type(arguments) is not tuple:
            raise refused(f"a call of {_short(function)}")
        self.stack.append(self.calls[function](self, *arguments))

    def persistent(self, told: Any) -> Any:
        """The object behind a persistent id."""
        raise refused("a persistent id")

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) not in (Array, _Dtype) or type(state) is not tuple:
            raise refused(f"a state for {_short(target)}")
        if type(target) is Array and type(state[-1]) is str:  # bytes as Python 2 writes them
            state = (*state[:-1], self.encode(state[-1], "latin1"))
        target.build(*state)

    def encode(self, text: Any, encoding: Any) -> bytes:
        """Bytes as protocols 0 to 2 write them. A memoised text could be encoded again and again:
        the sum is bounded by the file.
        """
        if type(text) is not str or encoding != "latin1":
            raise refused("an encoding other than latin1")
        self.encoded += len(text)
        if self.encoded > self.size:
            raise refused("more encoded bytes than the file has")
        return text.encode("latin1")

    def array(self, raw: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> "Array":
        """An array of protocol 5. The order is "C", "F", or "K", which means C and then transposed
        by `axes`.
        """
        result = Array()
        result.build(1, shape, dtype, order == "F", raw)
        permutation = (
            type(axes) is tuple
            and all(type(axis) is int for axis in axes)
            and len(axes) == len(shape)
            and set(axes) == set(range(len(shape)))
        )
        if order not in ("C", "F") and not (order == "K" and permutation):
            raise refused("an array of unknown order")
        result.axes = axes if order == "K" else None
        return result

    def scalar(self, dtype: Any, raw: Any) -> Any:
        return self.array(raw, dtype, (), "C").numpy().item()


STEPS = {
    "POP": lambda machine, _: machine.stack.pop(),
    "POP_MARK": lambda machine, _: machine.marked(),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.marked())),
    "LIST": lambda machine, _: machine.push(machine.marked()),
    "APPEND": lambda machine, _: machine.append([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.marked()),
    "DICT": lambda machine, _: machine.dictionary(),
    "SETITEM": lambda machine, _: machine.update([machine.stack.pop(), machine.stack.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.update(machine.marked()),
    "GLOBAL": lambda machine, argument: machine.name(*argument.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.name(
        *[machine.stack.pop(), machine.stack.pop()][::-1]
    ),
    "REDUCE": lambda machine, _: machine.call(),
    "BUILD": lambda machine, _: machine.build(),
    "BINPERSID": lambda machine, _: machine.push(machine.persistent(machine.stack.pop())),
}
CALLS = {
    "numpy.core.multiarray._reconstruct": lambda machine, *_: Array(),
    "numpy.core.multiarray.scalar": Machine.scalar,
    "numpy.core.numeric._frombuffer": Machine.array,
    "numpy.dtype": lambda machine, *arguments: _Dtype(*arguments),
    "_codecs.encode": Machine.encode,
}
