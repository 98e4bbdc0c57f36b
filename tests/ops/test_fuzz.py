"""Every op agrees with its definition on any valid input (hypothesis; MIUE_FUZZ cases per op, 2,000
by default).

Hypothesis makes the choices of a case and gives a seed, torch makes the data. Cases are the same in
every run; nothing is stored."""

import os

import pytest
import torch
from _support import DEVICES, OPS, assert_same_bits, available, check, check_shrinks, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import samples

FUZZ = settings(
    max_examples=int(os.environ.get("MIUE_FUZZ", "2000")),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


class Choose:
    """The choices of `samples.Choose`, made by hypothesis."""

    def __init__(self, draw):
        self.draw = draw

    def integer(self, low, high):
        return self.draw(st.integers(low, high))

    def number(self, low, high):
        return self.draw(st.floats(low, high))

    def flag(self):
        return self.draw(st.booleans())

    def order(self, count):
        return self.draw(st.permutations(range(count)))

    def one_of(self, *options):
        return options[self.draw(st.integers(0, len(options) - 1))]

    def generator(self):
        return torch.Generator().manual_seed(self.draw(st.integers(0, 2**31)))


@st.composite
def cases(draw, case):
    return case(Choose(draw))


def layout(tensor):
    return [step for step, size in zip(tensor.stride(), tensor.shape) if size > 1]


def check_pointwise(op, args, impls):
    """Every implementation, the reference too, gives the bits and the memory layout of the
    formula, in memory of its own.
    """
    expected = (samples.of(op.name).formula or (lambda *a: run(op, op.reference.fn, a)))(*args)
    for impl in impls:
        got = run(op, impl.fn, args)
        assert_same_bits([g.cpu() for g in got], [e.cpu() for e in expected])
        assert [layout(g) for g in got if g.numel()] == [layout(e) for e in expected if e.numel()]
        if not op.mutates:
            given = [a.data_ptr() for a in args if isinstance(a, torch.Tensor) and a.numel()]
            out = impl.fn(*args)
            assert not any(x.data_ptr() in given for x in (out if type(out) is tuple else (out,)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPS)
def test_fuzz(name, device):
    op = OPS[name]

    @FUZZ
    @given(cases(samples.of(name).case))
    def check_case(args):
        args = tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in args)
        here = available(op, device, op.dtype_of(*args))
        impls = [impl for impl in here if not impl.refuses(*args)]
        if op.kind == "pointwise":
            check_pointwise(op, args, impls)
        elif op.kind == "loss":
            check_shrinks(op, args, *check(op, args, impls[:-1]))
        else:
            check(op, args, impls[:-1])

    check_case()
