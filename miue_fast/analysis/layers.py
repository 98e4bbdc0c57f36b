"""Mutual information and covariance layer by layer (depth of a network), and network by network
(depth of models).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..dispatch.checks import INTEGERS
from ..dispatch.checks import images as check_images
from ..ops import perturbed_input
from ..support.calls import ordinary
from ..support.messages import describe, fail
from .covariance import CovarianceSummary, class_covariance_summary
from .mutual_information import MutualInformation, check_estimators, mutual_information


@dataclass(frozen=True)
class LayerRow:
    """One layer: number of features, sliced MI of clean and poisoned ones by estimator,
    class-conditional covariance of each.
    """

    layer: str
    width: int
    mutual_information: dict[str, MutualInformation]
    clean: CovarianceSummary
    poisoned: CovarianceSummary

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings and None only, for JSON."""
        return {
            "layer": self.layer,
            "width": self.width,
            "mutual_information": {
                name: found.to_dict() for name, found in self.mutual_information.items()
            },
            "clean": self.clean.to_dict(),
            "poisoned": self.poisoned.to_dict(),
        }


def block_names(model: torch.nn.Module) -> list[str]:
    """Names of the model's children in order, with the members of every nn.Sequential in its place
    (and of those inside it).
    """
    names = []
    for name, child in model.named_children():
        names += (
            [f"{name}.{inner}" for inner in block_names(child)]
            if isinstance(child, nn.Sequential)
            else [name]
        )
    return names


@ordinary()
def layer_features(
    model: torch.nn.Module,
    images: torch.Tensor,
    layers: Sequence[str],
    *,
    pool: bool = True,
    chunk: int = 256,
) -> dict[str, torch.Tensor]:
    """Outputs of named layers of an eval-mode model, {name: [N, D]}, in the model's compute dtype
    and on its device.

    Args:
        model: nn.Module on [0, 1] images (it normalises its input itself), in eval mode. Hooks are
            put on and taken off.
        images: uint8 [N, C, H, W], contiguous, on any device.
        layers: names as in model.named_modules(); each has to run exactly once per forward and give
            one tensor.
        pool: average a convolution's map over its pixels [B, C, H, W] -> [B, C], and tokens [B, T,
            D] -> [B, D]. That is what the network itself does before its classifier, it makes
            widths of layers comparable, and it keeps covariances D x D computable: the first map of
            a ResNet-18 has 65,536 values. False: flattened.
        chunk: images per forward.

    A value that a later operation overwrites in place (`relu_` after a batch norm) is taken before
    that. Errors: ValueError."""
    op = "layer_features"
    _check_model(op, model)
    check_images(op, images, dtypes=frozenset({torch.uint8}))
    if not isinstance(chunk, int) or chunk < 1:
        fail(op, "chunk", "a whole number >= 1", repr(chunk))
    modules = dict(model.named_modules())
    layers = list(layers)
    unknown = [name for name in layers if not name or name not in modules]
    if unknown or not layers:
        fail(
            op,
            "layers",
            f"layers of the model ({', '.join(name for name in modules if name)})",
            unknown or "none",
        )
    if not len(images):
        fail(op, "images", "at least one", 0)
    found, forwards = (
        _outputs(model, images, {name: modules[name] for name in layers}, pool, chunk),
        -(-len(images) // chunk),
    )
    for name, pieces in found.items():
        if len(pieces) != forwards or not isinstance(pieces[0], torch.Tensor):
            got = f"{name}: {len(pieces)} outputs in {forwards} forwards" + (
                f", {describe(pieces[0])}" if pieces else ""
            )
            fail(op, "layers", "layers that run once per forward and give one tensor", got)
    return {name: torch.cat(pieces) for name, pieces in found.items()}


@torch.no_grad()
def _outputs(model, images, modules, pool, chunk):
    """{name: what each call of the module gave}."""
    found = {name: [] for name in modules}

    def keep(name):
        def hook(module, inputs, output):
            if isinstance(output, torch.Tensor) and output.dim() > 2 and pool:
                output = output.mean(1) if output.dim() == 3 else output.flatten(2).mean(2)
            elif isinstance(output, torch.Tensor):
                output = output.flatten(1).clone()
            found[name].append(output)

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    where = next((t.device for t in [*model.parameters(), *model.buffers()]), images.device)
    try:
        for part in images.split(chunk):
            model(perturbed_input(part.to(where).contiguous()))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def analyse_layers(
    model: torch.nn.Module,
    clean: torch.Tensor,
    poisoned: torch.Tensor,
    labels: torch.Tensor,
    layers: Sequence[str] | None = None,
    *,
    estimators: Sequence[str] = ("histogram",),
    pool: bool = True,
    chunk: int = 256,
    **options: Any,
) -> list[LayerRow]:
    """What a poison does to the features of each layer: I(g(X); g(X')) and class-conditional
    covariances; one LayerRow per layer.

    Args:
        model: as for `layer_features`, trained on whatever the question is about.
        clean, poisoned: uint8 [N, C, H, W], row i of one belongs to row i of the other. labels:
            integers [N].
        layers: names in the wanted order; None: those of `block_names(model)` that run exactly once
            per forward and give a tensor.
        estimators: any of "histogram", "kde", "knn", "mine".
        pool, chunk: of `layer_features`. options: of `mutual_information` (slices, seed, bins...),
            for every layer and estimator.

    Memory: the features of one layer at a time would cost a forward each, so those of all layers
        are held, N x D floats each, twice.
    Errors: ValueError.
    """
    op = "analyse_layers"
    _check_model(op, model)
    for name, side in (("clean", clean), ("poisoned", poisoned)):
        check_images(op, side, name, dtypes=frozenset({torch.uint8}))
    if poisoned.shape != clean.shape:
        fail(op, "poisoned", f"shape {list(clean.shape)}", list(poisoned.shape))
    if (
        not isinstance(labels, torch.Tensor)
        or labels.shape != clean.shape[:1]
        or labels.dtype not in INTEGERS
    ):
        fail(op, "labels", f"an integer tensor [{len(clean)}]", describe(labels))
    estimators = [estimators] if isinstance(estimators, str) else list(estimators)
    check_estimators(op, estimators)
    if layers is None:
        modules = dict(model.named_modules())
        once = _outputs(
            model, clean[:1], {name: modules[name] for name in block_names(model)}, pool, chunk
        )
        layers = [
            name
            for name, pieces in once.items()
            if len(pieces) == 1 and isinstance(pieces[0], torch.Tensor)
        ]
    before, after = (
        layer_features(model, side, layers, pool=pool, chunk=chunk) for side in (clean, poisoned)
    )
    rows = []
    for layer in layers:
        x, y = before[layer], after[layer]
        found = {name: mutual_information(x, y, name, **options) for name in estimators}
        summaries = [class_covariance_summary(side, labels.to(side.device)) for side in (x, y)]
        rows.append(LayerRow(layer, x.shape[1], found, *summaries))
    return rows


def analyse_depth(
    models: Mapping[str, tuple[torch.nn.Module, str]],
    clean: torch.Tensor,
    poisoned: torch.Tensor,
    labels: torch.Tensor,
    **options: Any,
) -> dict[str, LayerRow]:
    """`analyse_layers` of one layer per trained model: {name: LayerRow}, in the order given.

    Args:
        models: {name: (model, feature layer)}, for instance linear, mlp2, mlp3, lenet5, vgg11,
            resnet18, each with the layer whose output its classifier reads.
        clean, poisoned, labels, options: as for `analyse_layers`.
    """
    return {
        name: analyse_layers(model, clean, poisoned, labels, [layer], **options)[0]
        for name, (model, layer) in models.items()
    }


def _check_model(op, model):
    if not isinstance(model, nn.Module):
        fail(op, "model", "an nn.Module", type(model).__name__)
    training = [name or "the model" for name, module in model.named_modules() if module.training]
    if training:
        fail(op, "model", "eval mode (call model.eval())", f"training mode ({training[-1]})")
