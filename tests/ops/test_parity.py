"""Every op x implementation x device x dtype x sample of the registry agrees with the float64
oracle, or bitwise with the reference.
"""

import pytest
import torch
from _support import OPS, assert_same_bits, cases_of, check, check_losses, check_shrinks, run

from tests import samples


@pytest.mark.parametrize("op, impl, device, dtype", cases_of())
def test_parity(op, impl, device, dtype):
    count = 0
    for args in samples.taken(op.name, impl, device, dtype):
        count += 1
        check(op, args, [impl])
    assert count


@pytest.mark.parametrize("name", [name for name in OPS if samples.of(name).formula])
def test_pointwise_reference_is_the_formula(name):
    op = OPS[name]
    for dtype in op.reference.dtypes:
        for args in samples.make(name, "cpu", dtype):
            expected = samples.of(name).formula(*args)
            assert_same_bits(run(op, op.reference.fn, args), expected)


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.kind == "loss"])
def test_loss_reference_is_the_formula(name):
    op = OPS[name]
    for dtype in op.reference.dtypes:
        for args in samples.make(name, "cpu", dtype):
            plain, truth = check_losses(op, args, [])
            check_shrinks(op, args, plain, truth)


@pytest.mark.parametrize("op, impl, device", cases_of("perturbed_input", dtypes=False))
def test_the_input_is_never_the_images_themselves(op, impl, device):
    for shape in [(2, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1)]:
        images = torch.rand(shape, device=device)
        for channels_last in (True, False):
            got = impl.fn(images, None, None, None, [], [], 0.0, torch.float32, channels_last)
            assert torch.equal(got, images) and got.data_ptr() != images.data_ptr()


def by_loops(features, labels, temperature, denominator, normalize_dim):
    """The two losses of docs/method.md, pair by pair in Python numbers."""
    rows, y, count = features.tolist(), labels.tolist(), len(features)
    norm = [max(sum(v * v for v in row) ** 0.5, 1e-8) for row in rows]
    similarity = distance = 0.0
    for i in range(count):
        positive = pool = spread = 0.0
        for j in range(count):
            cosine = sum(a * b for a, b in zip(rows[i], rows[j])) / norm[i] / norm[j]
            weight = torch.tensor(cosine / temperature, dtype=torch.float64).exp().item()
            if y[i] == y[j]:
                positive += weight
                spread += sum((a - b) ** 2 for a, b in zip(rows[i], rows[j])) ** 0.5
            if denominator == "all" or y[i] != y[j]:
                pool += weight
        similarity += torch.tensor(pool / positive, dtype=torch.float64).log().item() / count
        distance += (
            torch.tensor(1 + spread / (len(rows[0]) if normalize_dim else 1), dtype=torch.float64)
            .log()
            .item()
            / count
        )
    return similarity, distance


@pytest.mark.parametrize("normalize_dim", [True, False])
@pytest.mark.parametrize("denominator", ["all", "negatives"])
def test_oracles_are_the_definitions(denominator, normalize_dim):
    gen = torch.Generator().manual_seed(3)
    features, labels = (
        torch.randn(9, 5, generator=gen, dtype=torch.float64),
        torch.randint(3, (9,), generator=gen),
    )
    features[4] = 0
    features[6] = features[7]
    similarity, distance = by_loops(features, labels, 0.1, denominator, normalize_dim)
    torch.testing.assert_close(
        OPS["nt_xent"].truth(features, labels, 0.1, denominator, False)[0].item(), similarity
    )
    torch.testing.assert_close(
        OPS["intra_class_distance"].truth(features, labels, normalize_dim, False)[0].item(),
        distance,
    )
    both = (
        OPS["mi_ue_value_and_grad"]
        .truth(features, labels, 0.1, 0.3, denominator, normalize_dim)[0]
        .item()
    )
    torch.testing.assert_close(both, similarity + 0.3 * distance)
