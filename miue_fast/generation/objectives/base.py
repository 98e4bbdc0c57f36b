"""What an objective is, and the table of those there are."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import nn

from ... import models
from ...data import Dataset
from ...support.messages import fail
from ...support.named import Named

Model = TypeVar("Model")  # a name, a network, or a callable that makes one


class Objective:
    """A loss of the source network's outputs that the perturbation lowers, and its gradient.

    name: what `Options.objective` and `--objective` call it. about: a few words for help texts.
    outputs: what the loss is computed from: the "features" of a layer, the "logits", or None where
        no network is trained; such an objective has `perturbation` instead of `value_and_grad`.
    trains_on_delta: whether the source network is trained on image + delta, else on the image.
    network: the source network where the caller names none, a name of `models.NETWORKS`.
    ops: the ops that `value_and_grad` calls. Where one of them has no kernel the poison step is not
        captured in a CUDA graph, because a reference may wait for the device.
    options: the fields of `Options` that only this objective reads, each with its help text. An
        objective with settings of its own that are no fields is registered as an instance of them.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    outputs: ClassVar[Literal["features", "logits"] | None]
    trains_on_delta: ClassVar[bool] = True
    network: ClassVar[str] = "resnet18"
    ops: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[Mapping[str, str]] = {}

    def check_options(self, options: Any) -> None:
        """Judges the values of its own options, whatever the data. Errors: ValueError."""

    def check(self, op: str, options: Any, num_classes: int) -> None:
        """Judges whether the options fit the data set. `op` begins the message. Errors:
        ValueError.
        """

    def source(self, op: str, model: Model | None) -> Model | str:
        """The argument `model` of `generate`, or its default where it is None. `op` begins the
        message. Errors: ValueError where the objective is for another network only.
        """
        return self.network if model is None else model

    def layer(self, model: str | nn.Module) -> str:
        """The name of the layer whose output the loss is computed from, where the caller names
        none. `model` is a name of `models.NETWORKS` or a network. Errors: ValueError where a
        network has no such layer.
        """
        if self.outputs == "features":
            known = isinstance(model, str) and model in models.NETWORKS
            return models.NETWORKS[model].feature if known else "avgpool"
        if isinstance(model, str):
            return "fc"
        linear = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
        if not linear:
            fail(
                "generate",
                "feature",
                "the name of the layer that gives the logits (the model has no nn.Linear)",
                None,
            )
        return linear[-1]

    def value_and_grad(
        self, outputs: torch.Tensor, labels: torch.Tensor, num_classes: int, options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, d loss / d outputs) of a batch, without autograd and without waiting for the
        device.

        outputs: [B, D] features or [B, >= num_classes] logits. labels: int64 [B] below
        num_classes. options: the `Options` of the run. The loss is a scalar in float32; the
        gradient has the shape of the outputs.
        """
        raise NotImplementedError

    def perturbation(self, dataset: Dataset, options: Any) -> torch.Tensor:
        """delta, float32 [N, C, H, W] within +-options.eps, of an objective without outputs."""
        raise NotImplementedError


OBJECTIVES: Named[Objective] = Named()
Given = TypeVar("Given", bound=type[Objective] | Objective)


def register(objective: Given) -> Given:
    """Adds an objective, a class or an instance, to `OBJECTIVES` under its name; also a class
    decorator. Errors: ValueError where the name is taken.
    """
    OBJECTIVES.add(objective() if isinstance(objective, type) else objective)
    return objective
