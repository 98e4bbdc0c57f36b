"""Every op and who can serve it. Dispatch, parity tests, benchmarks, `info` and the README table
all read OPS.
"""

import functools
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch.autograd.graph import increment_version

LIB = torch.library.Library("miue_fast", "DEF")
OPS: dict[str, "Op"] = {}
BACKENDS = ("auto", "triton", "cuda", "wgmma", "cpu", "reference")
# What an op is decides how its results are judged: "pointwise" ops give the bits of the reference
# on every backend; losses, convolutions and statistics are held to a tolerance around their float64
# oracle. Tests and benchmarks read it instead of lists of names.
KINDS = ("pointwise", "loss", "convolution", "statistics")
log = logging.getLogger("miue_fast")


class BackendError(RuntimeError):
    """This machine cannot do what was asked: a backend is missing, or its driver failed."""


@dataclass(frozen=True)
class Impl:
    """One implementation of an op. `fn` takes the schema's arguments without `backend`."""

    backend: str
    fn: Callable
    devices: frozenset
    dtypes: frozenset
    missing: Callable[[], str | None]  # why it is not available here, or None
    refuses: Callable = lambda *args: (
        None
    )  # the arguments of fn -> why it does not take them (then fn raises BackendError), or None


@dataclass(frozen=True)
class Op:
    name: str
    schema: str
    impls: tuple[Impl, ...]  # in order of preference; the last is the reference
    kind: str  # one of KINDS
    truth: Callable  # float64 oracle, same arguments
    dtype_of: Callable  # the dtype that dispatch looks at, from the arguments
    mutates: tuple[int, ...]  # positions of the arguments written in place
    # the schema's arguments -> the backend that "auto" takes for them on a GPU; None: the first
    # that can
    route: Callable | None
    _chosen: dict = field(default_factory=dict)

    @property
    def reference(self) -> Impl:
        return self.impls[-1]

    @property
    def exact(self) -> bool:
        """Whether every implementation must give the bits of the reference."""
        return self.kind == "pointwise"

    def choose(self, backend: str, device: str, dtype: torch.dtype) -> Impl:
        """The implementation that serves (device, dtype); BackendError lists every backend with its
        reason.
        """
        key = (backend, device, dtype)
        if key not in self._chosen:
            self._chosen[key] = self._choose(*key)
        return self._chosen[key]

    def resolve(self, backend: str, device: str, dtype: torch.dtype) -> Callable:
        """The function that a caller may keep and call in place of this op, with its arguments
        without `backend`. BackendError as in `choose`.

        Such a caller has done what the op does around an implementation: it has switched autocast
        off, checked its arguments, asked `route` on a GPU, and lets nobody differentiate what is
        written in place. On "meta" the function is the op itself, which gives shapes alone.
        """
        if device == "meta":
            return functools.partial(getattr(torch.ops.miue_fast, self.name), backend=backend)
        return self.choose(backend, device, dtype).fn

    def why_not(self, impl: Impl, device: str, dtype: torch.dtype) -> str | None:
        if device not in impl.devices:
            return f"does not run on {device}"
        if dtype not in impl.dtypes:
            return f"does not take {dtype}"
        return impl.missing()

    def _choose(self, backend, device, dtype):
        if backend not in BACKENDS:
            raise ValueError(
                f"{self.name}: backend: expected one of {', '.join(BACKENDS)}, got {backend!r}"
            )
        reasons = {impl.backend: self.why_not(impl, device, dtype) for impl in self.impls}
        for impl in self.impls:
            if backend in ("auto", impl.backend) and reasons[impl.backend] is None:
                if backend == "auto" and impl is self.reference:
                    log.warning(
                        "%s on %s runs in plain PyTorch (%s)", self.name, device, _listed(reasons)
                    )
                return impl
        raise BackendError(
            f"{self.name}: backend {backend!r} cannot serve {dtype} on {device} "
            f"({_listed(reasons)})"
        )


def _listed(reasons):
    return "; ".join(f"{name}: {reason or 'available'}" for name, reason in reasons.items())


def define(
    schema: str,
    *,
    kind: str,
    reference: Callable,
    fake: Callable,
    dtypes: Iterable[torch.dtype],
    impls: Iterable[Impl] = (),
    truth: Callable | None = None,
    dtype_of: Callable | None = None,
    mutates: Iterable[int] = (),
    route: Callable | None = None,
    check: Callable | None = None,
) -> Op:
    """Registers the op `miue_fast::<name>` and returns its entry in OPS.

    Args:
        schema: PyTorch's schema string; its last argument is `str backend`.
        kind: one of KINDS. ValueError otherwise.
        reference: the PyTorch implementation, with the schema's arguments without `backend`. It
            serves every device and `dtypes`.
        fake: the shapes of the results, with the schema's arguments; see torch.library.
        impls: the other implementations, in order of preference.
        truth: the float64 oracle, with the reference's arguments; the reference itself by default.
        dtype_of: the dtype that dispatch looks at, from the arguments; that of the first one by
            default.
        mutates: the positions of the arguments that are written in place.
        route: the arguments -> the backend that "auto" takes for them on a GPU.
        check: called with the arguments without `backend`, raises where their values or addresses
            are wrong. It runs inside the op, so torch.compile does not trace it.
    """
    name = schema.split("(")[0]
    if kind not in KINDS:
        raise ValueError(f"{name}: kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    plain = Impl(
        "reference", reference, frozenset({"cpu", "cuda", "meta"}), frozenset(dtypes), lambda: None
    )
    op = Op(
        name,
        schema,
        (*impls, plain),
        kind,
        truth or reference,
        dtype_of or (lambda *args: args[0].dtype),
        tuple(mutates),
        route,
    )

    dtype_of, chosen, written = op.dtype_of, op._chosen, op.mutates

    def kernel(device, *args):
        if torch.is_autocast_enabled(device):
            # What an implementation takes from PyTorch keeps the operands' own precision.
            with torch.autocast(device, enabled=False):
                return kernel(device, *args)
        *args, backend = args
        if check:
            check(*args)
        if route and backend == "auto" and device == "cuda":
            backend = route(*args)
        dtype = dtype_of(*args)
        impl = chosen.get((backend, device, dtype)) or op.choose(backend, device, dtype)
        result = impl.fn(*args)
        if written:
            # Otherwise autograd would use what it has saved of them as if nothing had happened.
            changed = [args[position] for position in written if args[position] is not None]
            increment_version([tensor for tensor in changed if not tensor.is_inference()])
        return result

    LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        LIB.impl(name, functools.partial(kernel, key.lower()), key)
    torch.library.register_fake(f"miue_fast::{name}", fake, lib=LIB)
    OPS[name] = op
    return op


FLOATS = frozenset({torch.float32, torch.float16, torch.bfloat16})
DOUBLES = FLOATS | {torch.float64}
