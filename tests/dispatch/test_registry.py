"""The registry is the contract: schemas, order, reasons, choice, and one signature per op in every
backend.
"""

import inspect
import logging

import pytest
import torch
from _support import OPS, cases_of

import miue_fast
from miue_fast import BackendError
from miue_fast.dispatch.registry import BACKENDS, KINDS, Impl, Op, define
from tests import samples

ALL = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


def test_the_ops():
    assert {op.kind for op in OPS.values()} == set(KINDS)
    assert all(callable(getattr(miue_fast.ops, name)) for name in OPS)


def test_an_op_has_one_of_the_kinds():
    with pytest.raises(ValueError, match=r"^odd: kind: expected one of pointwise, .*, got 'new'$"):
        define("odd(Tensor x) -> Tensor", kind="new", reference=None, fake=None, dtypes=())
    assert "odd" not in OPS


@ALL
def test_implementations(op):
    names = [impl.backend for impl in op.impls]
    assert names == [b for b in BACKENDS if b in names] and names[-1] == "reference"
    assert op.reference.missing() is None
    for impl in op.impls:
        assert impl.dtypes <= op.reference.dtypes and impl.devices <= op.reference.devices


@ALL
def test_schema(op):
    schema = getattr(torch.ops.miue_fast, op.name).default._schema
    assert schema.arguments[-1].name == "backend"
    written = tuple(
        k
        for k, a in enumerate(schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
    )
    assert written == op.mutates
    assert [p for p in inspect.signature(op.reference.fn).parameters] == [
        a.name for a in schema.arguments[:-1]
    ]


@ALL
def test_samples_cover_the_input(op):
    for dtype in op.reference.dtypes:
        found = list(samples.make(op.name, "cpu", dtype))
        assert all(op.dtype_of(*args) == dtype for args in found)
        assert len(found) >= 9
        strided = [args[k] for args in found for k in samples.of(op.name).strided]
        assert any(not tensor.is_contiguous() for tensor in strided) or not strided


def test_an_op_without_samples_says_where_they_go():
    with pytest.raises(KeyError, match=r"scaled has no samples: add tests/samples/scaled\.py"):
        samples.of("scaled")


@pytest.mark.parametrize("op, impl, device", cases_of(dtypes=False))
def test_a_backend_asked_for_is_the_one_that_runs(op, impl, device):
    for dtype in impl.dtypes:
        assert op.choose(impl.backend, device, dtype) is impl


def fake_op(*impls):
    return Op("thing", "", impls, "pointwise", None, None, (), None)


def impl(backend, missing=None, dtypes=(torch.float32,), devices=("cpu",)):
    return Impl(backend, None, frozenset(devices), frozenset(dtypes), lambda: missing)


def test_auto_takes_the_first_that_can():
    first, second, plain = (
        impl("cuda", devices=["cuda"]),
        impl("cpu", dtypes=[torch.float16]),
        impl("reference", dtypes=[torch.float32, torch.float16]),
    )
    op = fake_op(first, second, plain)
    assert op.choose("auto", "cpu", torch.float16) is second
    assert op.choose("auto", "cpu", torch.float32) is plain
    assert op.choose("auto", "cuda", torch.float32) is first
    assert op.choose("reference", "cpu", torch.float16) is plain


def test_falling_back_to_the_reference_is_said_once(caplog):
    op = fake_op(impl("cpu", missing="no compiler"), impl("reference"))
    with caplog.at_level(logging.WARNING, logger="miue_fast"):
        op.choose("auto", "cpu", torch.float32)
        op.choose("auto", "cpu", torch.float32)
    assert [r.getMessage() for r in caplog.records] == [
        "thing on cpu runs in plain PyTorch (cpu: no compiler; reference: available)"
    ]


def test_a_refusal_lists_every_backend_with_its_reason():
    op = fake_op(
        impl("triton", devices=["cuda"]),
        impl("cuda", dtypes=[torch.float16]),
        impl("cpu", missing="no compiler"),
        impl("reference"),
    )
    for backend in ("triton", "cuda", "cpu"):
        with pytest.raises(BackendError) as error:
            op.choose(backend, "cpu", torch.float32)
        assert str(error.value) == (
            f"thing: backend {backend!r} cannot serve torch.float32 on cpu "
            "(triton: does not run on cpu; cuda: does not take torch.float32; "
            "cpu: no compiler; reference: available)"
        )


def test_an_unknown_backend_is_a_value_error():
    with pytest.raises(
        ValueError,
        match=(
            r"^nt_xent: backend: expected one of auto, triton, cuda, wgmma, cpu, "
            r"reference, got 'fast'$"
        ),
    ):
        miue_fast.nt_xent(torch.eye(2), torch.tensor([0, 1]), backend="fast")
