"""Existing MI-UE scripts change an import: nt_xent(x, y, t=0.1) and l2sim(x, y) work as called
there.
"""

import torch

from miue_fast import intra_class_distance, l2sim, nt_xent

FEATURES = torch.randn(12, 6, generator=torch.Generator().manual_seed(1)).relu()
LABELS = torch.arange(12) % 4


def test_temperature_as_t_by_name_by_position_and_by_default():
    expected = nt_xent(FEATURES, LABELS, temperature=0.1)
    for loss in (
        nt_xent(FEATURES, LABELS, t=0.1),
        nt_xent(FEATURES, LABELS, 0.1),
        nt_xent(FEATURES, LABELS),
    ):
        assert torch.equal(loss, expected)
    assert not torch.equal(nt_xent(FEATURES, LABELS, t=0.5), expected)


def test_l2sim_is_the_distance():
    assert torch.equal(l2sim(FEATURES, LABELS), intra_class_distance(FEATURES, LABELS))


def test_the_loop_of_a_script():
    x = FEATURES.clone().requires_grad_()
    loss = nt_xent(x, LABELS, t=0.1) + 0.1 * l2sim(x, LABELS)
    loss.backward()
    assert (
        loss.shape == ()
        and x.grad.shape == x.shape
        and x.grad.isfinite().all()
        and x.grad.abs().max() > 0
    )


def test_labels_of_any_integer_dtype_and_layout():
    expected = nt_xent(FEATURES, LABELS), l2sim(FEATURES, LABELS)
    for labels in [LABELS.to(d) for d in (torch.uint8, torch.int8, torch.int16, torch.int32)] + [
        LABELS.repeat_interleave(2)[::2],
        LABELS - 9,
    ]:
        assert torch.equal(nt_xent(FEATURES, labels), expected[0]) and torch.equal(
            l2sim(FEATURES, labels), expected[1]
        )
