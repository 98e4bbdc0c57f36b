"""JPEG against libjpeg and against float64 with another text; the gradient against the transpose of
the linear map.
"""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from _support import OPS, available, cases_of
from PIL import Image

import miue_fast
from miue_fast.reference import jpeg_round_trip as reference

SIZES = [(32, 32), (33, 47), (8, 8), (1, 1), (40, 3), (5, 64), (18, 34)]
SUBSAMPLING = {"4:2:0": 2, "4:4:4": 0}  # Pillow's numbers
FORWARD = pytest.mark.parametrize("op, impl, device", cases_of("jpeg_round_trip", dtypes=False))
GRADIENT = pytest.mark.parametrize(
    "op, impl, device", cases_of("jpeg_round_trip_grad", dtypes=False)
)
TO_YCC = torch.tensor(
    [
        [0.299, 0.587, 0.114],
        [-0.299 / 1.772, -0.587 / 1.772, 0.5],
        [0.5, -0.587 / 1.402, -0.114 / 1.402],
    ],
    dtype=torch.float64,
)


def pictures(height, width, *, noise=0.0, count=12):
    """Smooth pictures in whole levels, or with noise as photographs have it; float64."""
    gen = torch.Generator().manual_seed(height * 100 + width)
    coarse = torch.rand(count, 3, height // 6 + 2, width // 6 + 2, generator=gen).double()
    x = F.interpolate(coarse, (height, width), mode="bicubic")
    x = x + noise * torch.randn(x.shape, generator=gen)
    return (x.clamp(0, 1) * 255).round() / 255


def by_pillow(images, quality, chroma):
    """(pixels [B, 3, H, W], the two tables) of libjpeg."""
    found = []
    for image in (images * 255).round().byte():
        file = io.BytesIO()
        picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0)))
        picture.save(file, "JPEG", quality=quality, subsampling=SUBSAMPLING[chroma])
        with Image.open(file) as decoded:
            tables = decoded.quantization
            found.append(torch.from_numpy(np.array(decoded)).permute(2, 0, 1))
    return torch.stack(found).double(), tables


@pytest.mark.parametrize("quality", [1, 10, 49, 50, 75, 99, 100])
def test_the_steps_are_those_of_libjpeg(quality):
    tables = by_pillow(pictures(16, 16, count=1), quality, "4:2:0")[1]
    ours = np.reshape(reference.quantisation(quality), (2, 64))
    assert [list(tables[k]) for k in (0, 1)] == ours.tolist()


def whole(x):
    return (x + 0.5).floor()


def coded_in_integers(plane, steps):
    """The coefficients in eighths, halves away from zero, and whole samples."""
    blocks = reference.padded(plane, -plane.shape[-2] % 8, -plane.shape[-1] % 8)
    height, width = blocks.shape[-2:]
    blocks = blocks.unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8)).transpose(-2, -3)
    cosines = torch.tensor(reference.COSINES, dtype=plane.dtype)
    steps = torch.tensor(steps, dtype=plane.dtype)
    times = whole(cosines @ blocks @ cosines.T * 8) / 8 / steps
    times = (times.abs() + 0.5).floor() * times.sign()
    blocks = cosines.T @ (times * steps) @ cosines
    samples = blocks.transpose(-2, -3).reshape(*plane.shape[:-2], height, width)
    return whole(samples[..., : plane.shape[-2], : plane.shape[-1]]).clamp(-128, 127)


def in_integers(images, quality, chroma):
    """The reference with a rounding wherever libjpeg has whole numbers."""
    luma, colour = reference.quantisation(quality)
    height, width = images.shape[2:]
    y, cb, cr = whole(torch.einsum("cd,bdhw->cbhw", TO_YCC, images * 255)).unbind()
    both = torch.stack([cb, cr])
    if chroma == "4:2:0":
        both = reference.halved(reference.padded(both, 0, -width % 16))
        both = (both + torch.tensor([0.25, 0.5]).repeat(both.shape[-1] // 2)).floor()
        both = coded_in_integers(both, colour)[..., : (width + 1) // 2]
        for dim in (-2, -1):
            both = reference.doubled(both, dim, width <= 4)
        both = whole(both[..., :height, :width])
    else:
        both = coded_in_integers(both, colour)
    ycc = torch.cat([coded_in_integers(y - 128, luma)[None] + 128, both])
    return whole(torch.einsum("cd,dbhw->bchw", TO_YCC.inverse(), ycc).clamp(0, 255))


@pytest.mark.parametrize("chroma", SUBSAMPLING)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pillow(size, chroma):
    """Mean differences in levels. libjpeg rounds samples, coefficients and pixels to whole numbers,
    which takes many a coefficient over a half; with its roundings put in there is little left.
    """
    apart, rounded = [], []
    for quality in (10, 30, 60, 75, 90, 95):
        for noise in (0, 0.06):
            images = pictures(*size, noise=noise)
            theirs = by_pillow(images, quality, chroma)[0]
            ours = miue_fast.jpeg_round_trip(images.float(), quality, chroma=chroma)
            apart.append((ours.double() * 255 - theirs).abs().mean())
            rounded.append((in_integers(images, quality, chroma) - theirs).abs().mean())
    apart, rounded = torch.stack(apart).mean(), torch.stack(rounded).mean()
    assert apart < 1.7 and rounded < 0.3, (apart, rounded)


def coefficients(planes, steps):
    """Blocks [..., n, m, 8, 8] of the coefficients in steps, of planes that are padded."""
    cosines = torch.tensor(reference.COSINES, dtype=torch.float64)
    blocks = planes.unfold(-2, 8, 8).unfold(-2, 8, 8)
    return torch.einsum("uk,...kl,vl->...uv", cosines, blocks, cosines) / torch.tensor(steps)


def decoded(times, steps):
    """The planes of coefficients in steps, and whether each image has none near a half."""
    cosines = torch.tensor(reference.COSINES, dtype=torch.float64)
    whole = times.round() * torch.tensor(steps)
    blocks = torch.einsum("uk,...uv,vl->...kl", cosines, whole, cosines)
    planes = blocks.transpose(-2, -3).flatten(-4, -3).flatten(-2).clamp(-128, 127)
    return planes, ((times - times.floor() - 0.5).abs() > 2e-4).flatten(1).all(1)


def repeated(planes, down, right):
    return F.pad(planes, (0, right, 0, down), mode="replicate")


def by_other_text(images, quality, chroma):
    """JPEG in float64 of whole planes, and whether each image has no coefficient near a half."""
    luma, colour = reference.quantisation(quality)
    height, width = images.shape[2:]
    ycc = torch.einsum("cd,bdhw->bchw", TO_YCC, images.double() * 255)
    y, both = ycc[:, :1] - 128, ycc[:, 1:]
    y, sure = decoded(coefficients(repeated(y, -height % 8, -width % 8), luma), luma)
    if chroma == "4:2:0":
        both = F.avg_pool2d(repeated(both, height % 2, -width % 16), 2)
    both = repeated(both, -both.shape[2] % 8, -both.shape[3] % 8)
    both, also = decoded(coefficients(both, colour), colour)
    if chroma == "4:2:0":
        both = both[:, :, : (height + 1) // 2, : (width + 1) // 2]
        both = F.interpolate(both, scale_factor=2, mode="nearest" if width <= 4 else "bilinear")
    ycc = torch.cat([y[:, :, :height, :width] + 128, both[:, :, :height, :width]], 1)
    out = torch.einsum("cd,bdhw->bchw", TO_YCC.inverse(), ycc) / 255
    return out.clamp(0, 1), sure & also


@FORWARD
def test_float64(op, impl, device):
    """Where no coefficient of an image is so near to a half that float32 may round it the other
    way.
    """
    judged = count = 0
    for size in SIZES:
        for quality in (1, 10, 50, 75, 90, 100):
            for chroma in SUBSAMPLING:
                images = pictures(*size, noise=0.06).float()
                wanted, sure = by_other_text(images, quality, chroma)
                got = impl.fn(images.to(device), quality, chroma).cpu().double()
                torch.testing.assert_close(got[sure], wanted[sure], rtol=0, atol=1e-5)
                judged, count = judged + int(sure.sum()), count + len(sure)
    assert judged > count / 2


def linear(images):
    """What 4:2:0 does without roundings and clamps, in float64."""
    height, width = images.shape[2:]
    ycc = torch.einsum("cd,bdhw->bchw", TO_YCC, images)
    both = F.avg_pool2d(repeated(ycc[:, 1:], height % 2, width % 2), 2)
    both = F.interpolate(both, scale_factor=2, mode="nearest" if width <= 4 else "bilinear")
    ycc = torch.cat([ycc[:, :1], both[:, :, :height, :width]], 1)
    return torch.einsum("cd,bdhw->bchw", TO_YCC.inverse(), ycc)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_without_roundings_it_is_the_linear_map(size, monkeypatch):
    """With steps of 2^-10 the coefficients stay what they are. (Pale pictures: nothing is
    clamped.)
    """
    fine = [[[2**-10] * 8] * 8] * 2
    monkeypatch.setattr(reference, "quantisation", lambda quality: fine)
    images = 0.4 + pictures(*size) / 5
    for impl in available(OPS["jpeg_round_trip"]):
        for chroma, wanted in (("4:2:0", linear(images)), ("4:4:4", images)):
            got = impl.fn(images.float(), 50, chroma).double()
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


@GRADIENT
def test_the_gradient_is_the_transpose(op, impl, device):
    """<A x, y> = <x, A'y>, and all of A'y by autograd of the other text."""
    for size in SIZES:
        gen = torch.Generator().manual_seed(3)
        x, y = torch.randn(2, 4, 3, *size, generator=gen, dtype=torch.float64)
        x.requires_grad_()
        (wanted,) = torch.autograd.grad((linear(x) * y).sum(), x)
        for dtype, most in ((torch.float32, 2e-6), (torch.float64, 1e-13)):
            if dtype in impl.dtypes:
                got = impl.fn(y.to(dtype).to(device)).cpu().double()
                torch.testing.assert_close(got, wanted, rtol=0, atol=most * wanted.abs().max())
                torch.testing.assert_close(
                    (linear(x.detach()) * y).sum(), (x.detach() * got).sum(), rtol=most, atol=1e-4
                )


@FORWARD
def test_the_gradient_goes_straight_through(op, impl, device):
    """It is the same for any quality and any images, those that are clamped too."""
    gen = torch.Generator().manual_seed(3)
    grad = torch.randn(2, 3, 18, 21, generator=gen).to(device)
    wanted = miue_fast.ops.jpeg_round_trip_grad(grad)
    for images in (torch.rand(grad.shape, generator=gen), torch.full(grad.shape, 1.5)):
        images = images.to(device).requires_grad_()
        for quality in (1, 60, 100):
            for chroma, expected in (("4:2:0", wanted), ("4:4:4", grad)):
                out = miue_fast.jpeg_round_trip(
                    images, quality, chroma=chroma, backend=impl.backend
                )
                (got,) = torch.autograd.grad(out, images, grad)
                assert torch.equal(got, expected)


@FORWARD
def test_the_autograd_rule(op, impl, device):
    """opcheck and torch.compile, backward included; what it has no derivative for is refused."""
    call = torch.ops.miue_fast.jpeg_round_trip.default
    images = torch.rand(2, 3, 9, 11, device=device, requires_grad=True)
    for chroma in SUBSAMPLING:
        torch.library.opcheck(call, (images, 60, chroma, impl.backend))

    def loss(x):
        return miue_fast.jpeg_round_trip(x, 60, backend=impl.backend).square().sum()

    (wanted,) = torch.autograd.grad(loss(images), images)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(images), images)[0], wanted)
    (grad,) = torch.autograd.grad(loss(images), images, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once only"):
        grad.sum().backward()
    plain = images.detach()
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(loss)(plain)
    with pytest.raises(ValueError, match=r"^jpeg_round_trip: images: expected no derivative in"):
        torch.func.jvp(loss, (plain,), (plain,))


@FORWARD
def test_a_nan_stays_in_its_block(op, impl, device):
    """... of luma, and with the neighbours that its block of chroma is interpolated for."""
    images = torch.rand(1, 3, 32, 32, device=device)
    clean = impl.fn(images, 50, "4:2:0")
    images[0, 1, 3, 3] = torch.nan
    out = impl.fn(images, 50, "4:2:0")
    assert out[..., :16, :16].isnan()[:, [0, 2]].all() and out[..., :8, :8].isnan().all()
    assert torch.equal(out[..., 17:, :], clean[..., 17:, :])
    assert torch.equal(out[..., 17:], clean[..., 17:])
