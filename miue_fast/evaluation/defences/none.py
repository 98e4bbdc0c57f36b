"""No defence: standard training with crop and flip."""

from dataclasses import dataclass

from .base import Defence, Stage, register


@register
@dataclass(frozen=True)
class NoDefence(Defence):
    """Changes nothing."""

    name = "none"
    stage = Stage.ONCE
