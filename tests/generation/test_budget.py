"""The budget holds in every written file, exactly."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miue_fast import data


def pairs(levels):
    """Every (pixel, level) pair as images and delta [1, 1, 256, 2 * levels + 1]."""
    x = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 2 * levels + 1)
    q = torch.arange(-levels, levels + 1)[None, :].expand(256, 2 * levels + 1)
    return x.contiguous()[None, None], q[None, None]


@pytest.mark.parametrize("levels", range(17))
def test_every_pixel_and_level(levels):
    x, q = pairs(levels)
    for delta in (q.float() / 255, (q.double() / 255).float(), (q.float() * torch.tensor(1 / 255))):
        y = data.apply_poison(x, delta, levels / 255)
        assert torch.equal(y.long(), (x.long() + q).clamp(0, 255))
        assert (y.long() - x.long()).abs().max() <= levels


def test_whole_levels():
    delta = torch.tensor([-1.0, 1.0]).reshape(1, 1, 1, 2)
    exact = [(eps, k) for k in range(256) for eps in (k / 255, np.float32(k / 255).item())]
    for eps, levels in [*exact, (7.99 / 255, 7), (0.03, 7), (0.0313725, 8)]:
        assert data.quantise(delta, eps).flatten().tolist() == [-levels, levels]


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 16), st.integers(0, 2**32 - 1), st.floats(0.5, 3))
def test_any_delta(levels, seed, excess):
    """Random values, exact half levels and values past eps: nearest level inside the budget, and
    never more.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=generator)
    x[torch.rand(x.shape, generator=generator) < 0.3] = 0
    x[torch.rand(x.shape, generator=generator) < 0.3] = 255
    delta = (torch.rand(x.shape, generator=generator) * 2 - 1) * excess * (levels + 1) / 255
    halves = torch.randint(-2 * levels - 3, 2 * levels + 4, x.shape, generator=generator) / 2 / 255
    delta = torch.where(torch.rand(x.shape, generator=generator) < 0.4, halves, delta)
    q = data.quantise(delta, levels / 255).double()
    exact = (255 * delta.double()).clamp(-levels, levels)
    assert q.abs().max() <= levels
    assert (q - exact).abs().max() <= 0.5 + 1e-5
    y = data.apply_poison(x, delta, levels / 255)
    assert torch.equal(y.double(), (x.double() + q).clamp(0, 255))


def test_half_levels_go_to_even():
    halves = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 7.5, -8.5]).reshape(1, 1, 1, 7) / 255
    exact = halves * 255 == torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 7.5, -8.5])
    q = data.quantise(halves, 16 / 255)
    assert exact.any()
    assert (
        torch.equal(q[exact], (halves * 255).round()[exact].to(torch.int16))
        and (q[exact] % 2 == 0).all()
    )


def test_truncation_is_only_for_comparison():
    """What existing scripts do: it can exceed the budget by a level and shifts the mean by about
    half a level.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(20, 236, (50, 3, 32, 32), dtype=torch.uint8, generator=generator)
    delta = (torch.rand(x.shape, generator=generator) * 2 - 1) * 8 / 255
    change = {
        r: data.apply_poison(x, delta, 8 / 255, rounding=r).double() - x
        for r in ("nearest", "truncate")
    }
    assert change["nearest"].abs().max() == 8 and change["nearest"].mean().abs() < 0.05
    assert -0.6 < change["truncate"].mean() < -0.4
    x, q = pairs(8)
    assert (
        data.apply_poison(x, q.float() / 255, 8 / 255, rounding="truncate").long() - x.long()
    ).abs().max() == 9
    with pytest.raises(ValueError, match="rounding"):
        data.apply_poison(x, q.float() / 255, 8 / 255, rounding="up")


@pytest.mark.parametrize("image_format", ["png", "webp", "tiff", "bmp"])
@pytest.mark.parametrize("levels", [1, 8, 16])
def test_files_keep_every_pair(tmp_path, image_format, levels):
    x, q = pairs(levels)
    images = x.expand(4, 3, -1, -1).contiguous()
    delta = torch.stack(
        [q[0].expand(3, -1, -1).float() / 255, torch.rand(3, *x.shape[2:]) * 2 - 1] * 2
    )
    clean = data.Dataset(images, torch.tensor([0, 1, 0, 1]), ["a", "b"], list("wxyz"))
    assert (
        data.export_folder(
            clean, delta, tmp_path / "out", eps=levels / 255, image_format=image_format
        )
        == 4
    )
    report = data.verify(clean, tmp_path / "out", eps=levels / 255)
    assert report.ok and report.count == 4 and report.max_linf == levels, report
    back = data.load(tmp_path / "out")
    order = [
        back.names.index(f"{'ab'[k % 2]}/{'wxyz'[k]}{data.export.FORMATS[image_format][0]}")
        for k in range(4)
    ]
    assert torch.equal(back.images[order], data.apply_poison(images, delta, levels / 255))
    assert torch.equal(back.images[order[0]].long(), (images[0].long() + q[0]).clamp(0, 255))


def test_jpeg_breaks_the_budget_and_is_refused(tmp_path):
    clean = data.shapes(20)
    delta = data.random_noise(clean, 8 / 255, 0, kind="sign")
    with pytest.raises(ValueError, match="allow_lossy"):
        data.export_folder(clean, delta, tmp_path / "out", eps=8 / 255, image_format="jpeg")
    assert not (tmp_path / "out").exists()
    data.export_folder(
        clean, delta, tmp_path / "out", eps=8 / 255, image_format="jpeg", allow_lossy=True
    )
    report = data.verify(clean, tmp_path / "out", eps=8 / 255)
    assert (
        not report.ok and report.max_linf > 8 and len(report.problems) == 20 == report.problem_count
    )


@pytest.mark.parametrize("full", [(32, 32), (57, 91), (200, 33), (7, 5)])
def test_other_sizes_stay_within_the_budget(tmp_path, full):
    """Full-size originals, poison made at 32 pixels: enlarged or shrunk, never more than eps."""
    from PIL import Image

    random = np.random.default_rng(0)
    for label in "ab":
        (tmp_path / "clean" / label).mkdir(parents=True)
        for k in range(3):
            Image.fromarray(random.integers(0, 256, (*full, 3), dtype=np.uint8)).save(
                tmp_path / "clean" / label / f"{k}.png"
            )
    clean = data.load(tmp_path / "clean", size=32)
    delta = data.random_noise(clean, 8 / 255, 1, kind="sign") * 1.5
    data.export_folder(clean, delta, tmp_path / "out", eps=8 / 255)
    for reference in (clean, tmp_path / "clean"):
        report = data.verify(reference, tmp_path / "out", eps=8 / 255)
        assert report.ok and report.count == 6 and 0 < report.max_linf <= 8, report
    assert not data.verify(clean, tmp_path / "out", eps=1 / 255).ok
    with Image.open(tmp_path / "out/a/0.png") as image:
        assert image.size == full[::-1]


def test_enlarged_delta_is_bilinear(tmp_path):
    """A ramp in delta stays a ramp at four times the size, away from the borders."""
    from PIL import Image

    for label in "ab":
        (tmp_path / "clean" / label).mkdir(parents=True)
        Image.new("RGB", (64, 64), (128, 128, 128)).save(tmp_path / "clean" / label / "x.png")
    clean = data.load(tmp_path / "clean", size=16)
    ramp = torch.linspace(-15, 15, 16).expand(2, 3, 16, 16) / 255
    data.export_folder(clean, ramp, tmp_path / "out", eps=16 / 255)
    row = data.load(tmp_path / "out").images[0, 0, 30].double() - 128
    wanted = (torch.arange(64) + 0.5) / 4 * 2 - 16
    assert (row - wanted)[2:-2].abs().max() <= 0.5


@pytest.mark.parametrize("kind, spread", [("uniform", 1 / 3), ("sign", 1.0)])
def test_random_noise(kind, spread):
    clean = data.shapes(200)
    noise = data.random_noise(clean, 8 / 255, 3, kind=kind)
    assert noise.dtype == torch.float32 and noise.shape == clean.images.shape
    assert noise.abs().max() <= np.float32(8 / 255) and noise.mean().abs() < 0.01 * 8 / 255
    assert abs(noise.square().mean() / (8 / 255) ** 2 - spread) < 0.01
    assert torch.equal(noise, data.random_noise(clean, 8 / 255, 3, kind=kind))
    assert not torch.equal(noise, data.random_noise(clean, 8 / 255, 4, kind=kind))
    with pytest.raises(ValueError, match="kind"):
        data.random_noise(clean, 8 / 255, 3, kind="gaussian")


@pytest.mark.parametrize("eps", [-0.1, 8, float("nan"), "8/255", None])
def test_bad_eps(eps):
    with pytest.raises(ValueError, match="eps"):
        data.apply_poison(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.zeros(1, 3, 2, 2), eps)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.0])
def test_bad_delta(value):
    with pytest.raises(ValueError, match=r"delta: expected finite values in \[-1, 1\]"):
        data.quantise(torch.full((1, 3, 2, 2), value), 8 / 255)
