"""Views, cells and their transposes: <A x, y> = <x, A' y> in float64, by autograd, and by the ops
themselves on every backend.
"""

import pytest
import torch
from _support import OPS, available

import miue_fast
from miue_fast.ops.perturbed_input import transposed_view
from miue_fast.reference.projected_step import cell_sums, transposed, viewed
from tests.samples.projected_step import views

SHAPES = [(7, 2, 6, 9), (9, 3, 8, 8), (5, 1, 1, 5), (6, 3, 4, 1)]


def tensors(shape, seed=0):
    gen = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(shape, generator=gen, dtype=torch.float64) for _ in range(2))
    return x, y, views(gen, shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_view_has_its_transpose(shape):
    x, y, view = tensors(shape)
    back = viewed(y, transposed(view))
    torch.testing.assert_close((viewed(x, view) * y).sum(), (x * back).sum(), rtol=1e-13, atol=0)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(viewed(leaf, view), leaf, y)
    assert torch.equal(grad, back)
    assert torch.equal(transposed(transposed(view)), view)
    assert torch.equal(transposed_view(view), transposed(view).int())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [2, 3, 4, 9])
def test_the_sum_over_cells_is_its_own_transpose(shape, size):
    x, y, _ = tensors(shape, size)
    there, back = (cell_sums(each, min(size, max(shape[2:]))) for each in (x, y))
    torch.testing.assert_close((there * y).sum(), (x * back).sum(), rtol=1e-12, atol=1e-12)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(cell_sums(leaf, min(size, max(shape[2:]))), leaf, y)
    torch.testing.assert_close(grad, back, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", available(OPS["projected_step_"]), ids=lambda impl: impl.backend)
@pytest.mark.parametrize("grid", [1, 2, 3])
def test_the_step_goes_against_the_gradient_of_what_is_seen(impl, grid):
    """The gradient of <perturbed_input, y> by autograd is what `projected_step_` has to descend.
    Whole numbers, so that no sum is rounded, and cells of a zero sum stay.
    """
    shape, gen = (40, 3, 8, 11), torch.Generator().manual_seed(grid)
    images = torch.full(shape, 0.5)
    y, view = torch.randint(-1, 2, shape, generator=gen), views(gen, shape)
    delta = torch.zeros(shape, dtype=torch.float64).requires_grad_()
    (grad,) = torch.autograd.grad(viewed(images + delta, view), delta, y.double())
    if grid > 1:
        leaf = torch.zeros(shape, dtype=torch.float64).requires_grad_()
        (grad,) = torch.autograd.grad(cell_sums(leaf, grid), leaf, grad)
    got, rest = torch.zeros(shape), {"view": view, "grid": grid, "backend": impl.backend}
    miue_fast.projected_step_(got, None, y.float(), images, alpha=0.25, eps=0.5, **rest)
    assert torch.equal(got, (-0.25 * grad.sign()).float())
    assert 0.05 < (grad == 0).double().mean() < 0.95


@pytest.mark.parametrize("impl", available(OPS["perturbed_input"]), ids=lambda impl: impl.backend)
def test_the_view_moves_image_and_delta_together(impl):
    """Down 1, right 2, mirrored: by hand. `flip` mirrors the image under its delta, as ever."""
    images = torch.arange(6.0).view(1, 1, 2, 3)
    delta = torch.tensor([[[[0.5, 0, 0], [0, 0, 0.25]]]])

    def seen(flip, *view):
        view = torch.tensor([view], dtype=torch.int32)
        flip = torch.tensor([flip])
        out = miue_fast.perturbed_input(
            images, delta, flip=flip, view=view, mean=[1], std=[0.5], backend=impl.backend
        )
        return (out / 2 + 1)[0, 0].tolist()

    assert seen(False, 0, 0, 0) == [[0.5, 1, 2], [3, 4, 5.25]]
    assert seen(False, 0, 0, 1) == [[2, 1, 0.5], [5.25, 4, 3]]
    assert seen(False, 1, 2, 1) == [[0, 0, 0], [0, 0, 2]]
    assert seen(False, -1, -1, 0) == [[4, 5.25, 0], [0, 0, 0]]
    assert seen(True, 0, 0, 0) == [[2.5, 1, 0], [5, 4, 3.25]]
    assert seen(True, 0, 0, 1) == [[0, 1, 2.5], [3.25, 4, 5]]


@pytest.mark.parametrize("impl", available(OPS["projected_step_"]), ids=lambda impl: impl.backend)
def test_cells_step_as_one(impl):
    """The sum over a cell decides, one NaN stops its cell, and border cells are smaller. NaN are
    counted one by one, and not where the view leaves them out.
    """
    grad = torch.zeros(1, 1, 3, 5)
    grad[0, 0, 0] = torch.tensor([5, -2, torch.nan, 1, -1])
    grad[0, 0, 1] = torch.tensor([-1, -1, 9, 9, 1])
    grad[0, 0, 2] = torch.tensor([0, 0, 3, -4, torch.inf])
    delta, count = torch.zeros(1, 1, 3, 5), torch.zeros(1, dtype=torch.int64)
    rest = {"alpha": 0.25, "eps": 0.5, "nonfinite": count, "backend": impl.backend}
    miue_fast.projected_step_(delta, None, grad, torch.full_like(delta, 0.5), grid=2, **rest)
    first = [-0.25, -0.25, 0, 0, 0]
    assert delta[0, 0].tolist() == [first, first, [0, 0, 0.25, 0.25, -0.25]]
    assert count.item() == 2
    up = torch.tensor([[-1, 0, 0]], dtype=torch.int32)
    miue_fast.projected_step_(
        delta.zero_(), None, grad, torch.full_like(delta, 0.5), view=up, grid=2, **rest
    )
    above = [-0.25, -0.25, 0, 0, 0.25]
    assert delta[0, 0].tolist() == [above, above, [0.25, 0.25, -0.25, -0.25, -0.25]]
    assert count.item() == 3
