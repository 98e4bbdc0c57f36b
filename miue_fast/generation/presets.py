"""The published readings of the method, and settings for use, as options."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..support.named import Named
from .options import Options


@dataclass(frozen=True)
class Preset:
    """A set of options with a name. about: what it is for, in a few words."""

    name: str
    about: str
    options: Options


PRESETS: Named[Preset] = Named()
DEFAULT = PRESETS.add(
    Preset("paper", "the authors' program with the zeta that the paper states", Options())
)
PRESETS.add(
    Preset(
        "published",
        "the published program's own defaults, whose distance term has weight 0",
        Options(zeta=0.0),
    )
)
PRESETS.add(
    Preset(
        "paper-text",
        "the formulas as the paper's text states them: the denominator has other classes only, and "
        "the distance is not divided by the feature width",
        Options(denominator="negatives", normalize_dim=False),
    )
)
_FAST = Options(
    denominator="negatives",  # pairs of a class go on attracting each other once they are close
    steps=2,
    alpha_0=1 / 255,
    epochs=32,
    train_batch=None,
    robust="crop",
    dtype="auto",
)
PRESETS.add(
    Preset("fast", "few large steps against random crops: the shortest way to a poison", _FAST)
)
PRESETS.add(
    Preset(
        "publish",
        "the same on a grid of 4 x 4 pixels, for images that are compressed or resized later",
        replace(_FAST, robust="crop,grid:4"),
    )
)


def choose(preset: str, changes: Mapping[str, Any]) -> Options:
    """The options of a preset with `changes`, and a device. Errors: ValueError."""
    options = PRESETS.choose("generate", "preset", preset).options.with_(changes)
    return replace(options, device=str(options.place))
