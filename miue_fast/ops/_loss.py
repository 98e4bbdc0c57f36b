"""What the three loss ops share: fake outputs, the autograd rule and the float64 oracle."""

from collections.abc import Callable
from typing import Any

import torch

from ..dispatch import checks, native
from ..dispatch.measured import faster_loss
from ..dispatch.registry import LIB


def fake(
    features: torch.Tensor, labels: torch.Tensor | None, *args: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The shapes of (loss, grad) as the kernels return them: float32 (float64 for float64); grad is
    empty when the op's `want_grad`, the last argument but `backend`, is False.
    """
    want_grad = args[-2] if isinstance(args[-2], bool) else True
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    loss = torch.empty((), dtype=wide, device=features.device)
    return loss, torch.empty(
        features.shape if want_grad else (0,), dtype=wide, device=features.device
    )


def route(op: str) -> Callable[..., str]:
    """The `route` of a loss for `define`: "cuda" where the measured table says that it is faster on
    this GPU, else "auto", the first backend that can serve the call.
    """
    return lambda features, *args: (
        "cuda" if faster_loss(op, features) == "cuda" and not native.cuda_missing() else "auto"
    )


def truth(formula: Callable[..., torch.Tensor], drop: int) -> Callable[..., Any]:
    """The float64 oracle of a loss: the value of `formula` and its gradient by autograd.

    drop: 1 if the op's last argument is `want_grad`, which the formula does not take, else 0.
    """

    def oracle(features, labels, *args):
        leaf = features.detach().double().requires_grad_()
        kept, want_grad = (args[:-1], args[-1]) if drop else (args, True)
        with torch.enable_grad():
            loss = formula(leaf, labels, *kept)
        if not want_grad:
            return loss.detach(), leaf.new_empty(0)
        (grad,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), grad

    return oracle


def differentiable_in_features(name: str) -> Callable[..., torch.Tensor]:
    """The op returns its gradient beside its value; backward only scales it. Second derivatives are
    refused.

    Half-precision features get theirs rounded after the scale, so that loss scaling lifts it out of
    their underflow. Returns the differentiable loss, a function of the op's arguments without
    `want_grad`."""

    def setup(ctx, inputs, output):
        if not inputs[-2]:
            raise RuntimeError(
                f"{name}: called with want_grad=False on features that require a gradient"
            )
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[0], output[1])
        ctx.unused = len(inputs) - 1

    def backward(ctx, grad_loss, _):
        features, grad = ctx.saved_tensors
        return torch.ops.miue_fast.scaled_gradient(grad, grad_loss, features), *(
            [None] * ctx.unused
        )

    torch.library.register_autograd(f"miue_fast::{name}", backward, setup_context=setup, lib=LIB)
    op = getattr(torch.ops.miue_fast, name)

    # when it is wanted: torch.compiler.disable loads sympy, which changes the caller's warnings
    made = []

    def transformed():
        if not made:
            made.append(
                torch.compiler.disable(
                    _transformed(op).apply,
                    reason=f"{name} under torch.func runs in eager mode only",
                )
            )
        return made[0]

    def scalar(features, *args):
        if checks.transformed():
            return transformed()(features, *args)[0]
        *args, backend = args
        return op(features, *args, features.requires_grad and torch.is_grad_enabled(), backend)[0]

    return scalar


def _transformed(op):
    """`op` for torch.func and forward-mode derivatives, which its own autograd rule does not reach.
    Arguments: without `want_grad`.
    """

    def call(features, *args):
        *args, backend = args
        return op(features, *args, True, backend)

    class Transformed(torch.autograd.Function):
        forward = staticmethod(call)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.mark_non_differentiable(output[1])
            ctx.save_for_backward(inputs[0], output[1])
            ctx.save_for_forward(inputs[0], output[1])
            ctx.unused = len(inputs) - 1

        @staticmethod
        def backward(ctx, *grads):
            features, grad = ctx.saved_tensors
            return _Once.apply(grad, grads[0], features), *([None] * ctx.unused)

        @staticmethod
        def jvp(ctx, *tangents):
            features, grad = ctx.saved_tensors
            return (
                _Once.apply(grad, grad.new_ones(()), features.to(grad.dtype)) * tangents[0]
            ).sum(), None

        @staticmethod
        def vmap(info, in_dims, *args):
            rows = [
                [a if d is None else a.select(d, k) for a, d in zip(args, in_dims)]
                for k in range(info.batch_size)
            ]
            return tuple(torch.stack(parts) for parts in zip(*(call(*row) for row in rows))), (0, 0)

    return Transformed


def _no_second_derivative(ctx, *_):
    raise RuntimeError(
        "miue_fast: nt_xent and intra_class_distance can be differentiated once only"
    )


class _Once(torch.autograd.Function):
    """A gradient times a number, in the features' dtype; it has no derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad, scale, features):
        return (grad * scale).to(features.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    backward = jvp = staticmethod(_no_second_derivative)


LIB.define(
    "scaled_gradient(Tensor grad, Tensor scale, Tensor features) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIB.impl(
    "scaled_gradient",
    lambda grad, scale, features: (grad * scale).to(features.dtype),
    "CompositeExplicitAutograd",
)
torch.library.register_fake(
    "miue_fast::scaled_gradient",
    lambda grad, scale, features: grad.new_empty(grad.shape, dtype=features.dtype),
    lib=LIB,
)
torch.library.register_autograd("miue_fast::scaled_gradient", _no_second_derivative, lib=LIB)
