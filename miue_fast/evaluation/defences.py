"""What a victim's owner may do against a poison, from a short text: `defence("jpeg:10")`,
`defence("adversarial:4:steps=3")`.

| text | when | what |
|---|---|---|
| none | | standard training: crop and flip |
| grayscale | once, test images too | luma in all channels |
| bit-depth[:bits=2] | once | 2**bits levels |
| jpeg[:quality=10] | once | Pillow's JPEG, 4:2:0 |
| gaussian-blur[:sigma=1] | once | in pixels |
| orthogonal-projection[:components=classes-1] | once | without the linearly separating directions |
| cutout[:size=half the width] | every batch | one black square |
| cutmix, mixup | every batch | alpha = 1 |
| gaussian-noise[:std=8] | every batch | std / 255 |
| ueraser[:draws=1] | every batch | strong augmentation, UEraser-style |
| adversarial[:eps=8][:steps=10][:step=2] | every batch | \
PGD, eps and step of 255; clean and robust accuracy |

Test images stay as they are, because ISS and the others are about what is done to training data;
grayscale is the exception: a network that saw grey images only is asked about grey images.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

from ..dispatch.registry import BackendError
from ..support.messages import fail, short
from . import augment, preprocess
from ._torchvision import missing
from .adversarial import Attack


@dataclass(frozen=True)
class Defence:
    """spec: the text with every option written out. prepare: (images, labels, seed) -> images,
    uint8, once, on the CPU, before training.
    tests: whether the test images are prepared too. batch: (model, images, labels, classes) ->
        (images, targets), at every step.
    attack: the one that the victim is trained against and tested with. fits: (shape, classes) ->
        None, or why they cannot be defended."""

    spec: str
    prepare: Callable | None = None
    tests: bool = False
    batch: Callable | None = None
    attack: Attack | None = None
    fits: Callable | None = None

    def check(self, shape, classes):
        """Images [C, H, W] of so many classes. Errors: ValueError."""
        if self.fits and (reason := self.fits(shape, classes)):
            fail("defence", self.spec, *reason)


@dataclass(frozen=True)
class _Number:
    default: float | None
    low: float
    high: float
    whole: bool = True

    def read(self, name, option, text):
        try:
            value = int(text) if self.whole else float(text)
        except ValueError:
            value = None
        if value is None or not self.low <= value <= self.high:
            kind = "a whole number" if self.whole else "a number"
            fail(
                "defence",
                f"{option} of {name}",
                f"{kind} from {self.low} to {self.high}",
                repr(text),
            )
        return value


def _once(function, fits=None, tests=False):
    return lambda **options: {
        "prepare": functools.partial(function, **options),
        "fits": fits and fits(**options),
        "tests": tests,
    }


def _batch(function, fits=None):
    return lambda **options: {
        "batch": functools.partial(function, **options),
        "fits": fits and fits(**options),
    }


def _adversarial(eps, steps, step):
    if steps * step < eps:
        fail(
            "defence",
            "steps * step of adversarial",
            f"at least eps = {eps:g}, or the attack cannot use its budget",
            f"{steps * step:g}",
        )
    attack = Attack(eps / 255, steps, step / 255)
    return {"batch": attack.batch, "attack": attack}


def _colour():
    return lambda shape, classes: None if shape[0] == 3 else ("images of three channels", shape[0])


def _square(size):
    return lambda shape, classes: (
        None
        if (size or 0) <= min(shape[1:])
        else (f"a square within {shape[2]} x {shape[1]}", size)
    )


def _kernel(sigma):
    widest = preprocess.blur_width(sigma)
    return lambda shape, classes: (
        None
        if widest // 2 < min(shape[1:])
        else (f"a kernel ({widest} pixels) that fits {shape[2]} x {shape[1]}", f"sigma {sigma:g}")
    )


def _directions(components):
    return lambda shape, classes: (
        None
        if (components or 0) < classes
        else (f"1 to {classes - 1} components, for {classes} classes", components)
    )


# Name -> options (the first may be given without its name), whether torchvision is needed, the
# Defence's fields from the options.
_TABLE = {
    "none": ({}, False, dict),
    "grayscale": ({}, False, _once(preprocess.grayscale, _colour, tests=True)),
    "bit-depth": ({"bits": _Number(2, 1, 7)}, False, _once(preprocess.bit_depth)),
    "jpeg": ({"quality": _Number(10, 10, 95)}, False, _once(preprocess.jpeg)),
    "gaussian-blur": (
        {"sigma": _Number(1.0, 0.1, 10, False)},
        True,
        _once(preprocess.gaussian_blur, _kernel),
    ),
    "orthogonal-projection": (
        {"components": _Number(None, 1, 10_000)},
        False,
        _once(preprocess.orthogonal_projection, _directions),
    ),
    "cutout": ({"size": _Number(None, 1, 10_000)}, False, _batch(augment.cutout, _square)),
    "cutmix": ({"alpha": _Number(1.0, 0.01, 100, False)}, True, _batch(augment.cutmix)),
    "mixup": ({"alpha": _Number(1.0, 0.01, 100, False)}, True, _batch(augment.mixup)),
    "gaussian-noise": (
        {"std": _Number(8.0, 0.1, 128, False)},
        False,
        _batch(augment.gaussian_noise),
    ),
    "ueraser": ({"draws": _Number(1, 1, 20)}, True, _batch(augment.ueraser)),
    "adversarial": (
        {
            "eps": _Number(8.0, 0.1, 64, False),
            "steps": _Number(10, 1, 200),
            "step": _Number(2.0, 0.01, 64, False),
        },
        False,
        _adversarial,
    ),
}
NAMES = tuple(_TABLE)


def defence(spec):
    """The Defence that a text names: a name of `NAMES`, then options as `:value` (the first one
    only) or `:option=value`.

    A Defence comes back as it is. Errors: ValueError: an unknown name or option, a value out of
    range; BackendError: the defence needs torchvision and there is none.
    """
    if isinstance(spec, Defence):
        return spec
    name, *parts = spec.split(":") if isinstance(spec, str) else [spec]
    if not isinstance(name, str) or name not in _TABLE:
        fail("defence", "name", f"one of {', '.join(NAMES)}", short(name))
    numbers, needs_torchvision, make = _TABLE[name]
    options = {option: number.default for option, number in numbers.items()}
    given = set()
    for place, part in enumerate(parts):
        option, equals, text = part.rpartition("=")
        option = option if equals else next(iter(numbers), "") if place == 0 else ""
        if option not in numbers or option in given:
            fail(
                "defence",
                f"option of {name}",
                f"each at most once of {', '.join(f'{o}=' for o in numbers) or 'none'}",
                repr(part),
            )
        options[option] = numbers[option].read(name, option, text)
        given.add(option)
    if needs_torchvision and (reason := missing()):
        raise BackendError(f"{name}: {reason}")
    written = [f"{option}={value:g}" for option, value in options.items() if value is not None]
    return Defence(":".join([name, *written]), **make(**options))
