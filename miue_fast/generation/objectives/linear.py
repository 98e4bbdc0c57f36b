"""A linear classifier as the source network: the perturbation of a few seconds."""

from ...support.messages import fail, short
from .base import Model, register
from .em import Em


@register
class Linear(Em):
    """Cross-entropy of the true label, of a linear classifier of the pixels. What it makes is a
    pattern per class that any network finds first.
    """

    name = "linear"
    about = "cross-entropy of the true label, of a linear classifier: made in seconds"
    network = "linear"

    def source(self, op: str, model: Model | None) -> Model | str:
        if model is not None and model != self.network:
            got = short(model) if isinstance(model, str) else type(model).__name__
            fail(op, "model", f"none, or {self.network}, for the objective {self.name}", got)
        return self.network
