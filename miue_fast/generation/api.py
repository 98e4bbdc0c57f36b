"""The two public functions of generation: a whole data set, or one batch of your own loop."""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import data as datasets
from ..dispatch import checks
from ..frozen import AutogradNet, FrozenNet, find_layer, frozen_form
from ..support import calls, messages
from ..support.draws import Draws
from . import batches, prepare, store
from .descent import Descent, check_finite
from .folder import open_folder, remove_run
from .options import Options
from .prepare import check_labels
from .presets import DEFAULT, choose
from .run import BiLevelRun


@dataclass(repr=False)
class Result:
    """delta: float32 [N, C, H, W] on the CPU, within +-eps. history: one dict per epoch, as in
    metrics.csv, with None for what an epoch without a poison step does not have; empty for an
    objective without a network.
    """

    delta: torch.Tensor
    dataset: datasets.Dataset
    history: list[dict[str, Any]]
    options: Options

    def __repr__(self) -> str:
        o = self.options
        return (
            f"Result(delta={list(self.delta.shape)}, objective={o.objective!r}, "
            f"eps={255 * o.eps:.3g}/255, epochs={len(self.history)})"
        )


@calls.ordinary()
@torch.enable_grad()  # whatever the caller runs in
def generate(
    data: Any,
    out: str | os.PathLike[str] | None = None,
    *,
    preset: str = DEFAULT.name,
    model: str | nn.Module | Callable[[int], nn.Module] | None = None,
    feature: str | None = None,
    device: str | torch.device | None = None,
    resume: bool = True,
    overwrite: bool = False,
    progress: bool = True,
    tensorboard: bool = False,
    **options: Any,
) -> Result:
    """One perturbation per image such that a network trained on image + perturbation does not
    generalise (MI-UE, ICLR 2026).

    Args:
        data: a `Dataset`, or what `data.load` of this package takes (a folder, an .npz file,
            (images, labels)).
        out: folder for poison.safetensors, manifest.json, metrics.csv and the checkpoint; None
            writes nothing.
        preset: a name of `generation.PRESETS`; **options change single fields of `Options`.
        model: a name of `models.NETWORKS`, an nn.Module (trained in place: no other thread may use
            it meanwhile), or a callable: number of classes -> nn.Module. It takes images
            [B, C, H, W] on the [0, 1] scale and normalises them itself. None: the objective's own,
            "resnet18", or for the objective linear "linear".
        feature: name of the layer whose flattened output the objective looks at; None: for
            objectives on features that of a named model, else "avgpool"; for objectives on logits
            "fc", or the last nn.Linear of a model of your own.
        resume: go on from the checkpoint in `out`, if there is one; False refuses a folder that has
            one.
        overwrite: start again, replacing what an earlier run left in `out`.
        tensorboard: also write event files to out/tensorboard.

    Returns: a Result. Memory on the device: images (uint8), delta (options.delta_dtype) and one
        network launch. Out of memory halves network_chunk, never the contrastive batch. The same
        call on the same machine, versions and threads gives the same bits, also when it was killed
        and resumed.
    Errors: ValueError, OSError, BackendError, Interrupted; `out` then holds the last whole epoch.
    """
    calls.default_dtype("generate")
    wanted = choose(preset, {**({} if device is None else {"device": device}), **options})
    objective = wanted.chosen
    model = objective.source("generate", model)
    with contextlib.ExitStack() as held:
        keep = None
        if out is not None:
            held.enter_context(datasets.only_writer(datasets.check_writable(Path(out))))
            keep = open_folder(Path(out), resume, overwrite, wanted)
        if tensorboard and keep is None:
            messages.fail("generate", "tensorboard", "an output folder to write to", "out=None")
        dataset = data if isinstance(data, datasets.Dataset) else datasets.load(data)
        check_labels("generate", dataset.labels, len(dataset.images), torch.device("cpu"))
        if keep and dataset.root is not None:
            datasets.check_outside(keep.parent, dataset.root)
        objective.check("generate", wanted, len(dataset.classes))
        if objective.outputs is None:
            return _without_network(dataset, wanted, keep, overwrite)
        on, wanted = wanted.place, wanted.resolved(len(dataset.images))
        held.enter_context(
            calls.deterministic_cudnn() if on.type == "cuda" else contextlib.nullcontext()
        )
        with prepare.board(keep, tensorboard) as board:
            draws = Draws("generate", batches.derive(wanted.seed, 0, "network"))
            network = prepare.source_network(model, dataset, wanted, draws).to(on)
            held.enter_context(calls.borrowed("generate", network))
            layer = feature or objective.layer(model if isinstance(model, str) else network)
            find_layer("generate", network, layer)
            draws.drew = False
            with draws:
                network, layout = prepare.in_layout(network, wanted, dataset, on)
                wanted = replace(wanted, channels_last=layout)
                prepare.probe(
                    network, layer, dataset, on, logits_wanted=objective.outputs == "logits"
                )
            run = BiLevelRun(
                network,
                layer,
                dataset,
                wanted,
                keep,
                prepare.name_of(model),
                overwrite,
                resume,
                None if isinstance(model, str) else draws,
            )
            if keep and keep.exists() and not overwrite:
                run.resume()
            delta = run.finish(progress, board)
            return Result(delta, dataset, run.history, wanted)


def _without_network(dataset, options, keep, overwrite):
    """The Result of an objective that trains no network; there is no checkpoint."""
    delta = options.chosen.perturbation(dataset, options)
    store.warn_unchanged(delta, options.eps)
    if keep:
        if overwrite:
            remove_run(keep.parent)
        datasets.save_poison(keep.parent, delta, dataset, options.as_dict())
    return Result(delta, dataset, [], options)


@calls.ordinary()  # whatever the loop around it runs in
def perturb(
    model: nn.Module | FrozenNet | AutogradNet,
    images: torch.Tensor,
    labels: torch.Tensor,
    delta: torch.Tensor,
    *,
    steps: int = 10,
    alpha: float,
    eps: float = 8 / 255,
    temperature: float = 0.1,
    zeta: float = 0.1,
    denominator: str = "all",
    normalize_dim: bool = True,
    feature: str = "avgpool",
    flip: torch.Tensor | None = None,
    network_chunk: int | None = None,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
    fused: bool = True,
    fp8: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """The poison step of one batch, for people with their own loop: `steps` projected sign steps on
    `delta`.

    Args:
        model: any nn.Module that takes [B, C, H, W] on the [0, 1] scale and normalises its input
            itself. It is frozen (`freeze`) as it is in eval mode, and only read; where it has no
            fused form it runs itself, its mode and requires_grad are put back, and a second thread
            with the same model is refused. Or what `freeze` returned, for many batches of one
            model: then feature, network_chunk, dtype, fp8 and channels_last are its own.
        images: [B, C, H, W] uint8 or float32 in [0, 1], on the model's device.
        labels: [B], any integer dtype, at least two classes.
        delta: [B, C, H, W] float32, float16 or int8 levels of eps / 127 (0 to begin with). Not
            changed.
        alpha: step size, eps: L-inf budget, both on the [0, 1] scale.
        temperature, zeta, denominator, normalize_dim: of the loss, see `mi_ue_value_and_grad`.
        feature: name of the layer whose (flattened) output is the features.
        flip: bool [B] or None: images that are mirrored along W; delta is not.
        network_chunk: images per network launch, >= 2; the objective is that of the whole batch all
            the same.
        dtype: compute type of the network: torch.float32 (None), bfloat16 or float16. fp8: with
            bfloat16 (None), see `freeze`.
        channels_last: memory format of the network's input where it runs in autograd; fused=False:
            let it (see `freeze`).

    Returns: the new delta, same shape and dtype, within +-eps (float16: eps rounded to it) and
        images + delta within [0, 1] (before the flip: the flipped image). Deterministic as far as
        the model is.
    Errors: ValueError (also for NaN or Inf), BackendError.
    """
    op = "perturb"
    options = Options(
        steps=steps,
        eps=eps,
        temperature=temperature,
        zeta=zeta,
        denominator=denominator,
        normalize_dim=normalize_dim,
        network_chunk=network_chunk,
        dtype=str(dtype).removeprefix("torch.") if dtype else "bfloat16" if fp8 else "float32",
        channels_last=channels_last,
        fused=fused,
        fp8=fp8,
        backend=backend,
    )
    checks.step_sizes(op, alpha, eps)
    checks.images(op, images)
    checks.same_store(op, delta, images)
    batch = len(images)
    labels = check_labels(op, labels, batch, images.device)
    flip = checks.selection(op, None, flip, batch, images.device)
    if images.is_floating_point() and not ((images >= 0) & (images <= 1)).all():
        messages.fail(op, "images", "numbers from 0 to 1", "others, or NaN")
    if delta.is_floating_point() and not delta.isfinite().all():
        messages.fail(op, "delta", "finite numbers", "NaN or Inf")
    if not isinstance(model, (nn.Module, FrozenNet, AutogradNet)):
        messages.fail(op, "model", "an nn.Module, or what `freeze` returned", type(model).__name__)
    device = (
        next(model.parameters(), images).device if isinstance(model, nn.Module) else model.device
    )
    if device != images.device:
        messages.fail(op, "images", f"the model's device {device}", images.device)
    delta = delta.detach().clone()
    if isinstance(model, nn.Module):
        frozen = frozen_form(
            model,
            feature,
            dtype=getattr(torch, options.dtype),
            chunk=network_chunk,
            fused=fused,
            fp8=fp8,
            channels_last=channels_last,
            backend=backend,
            channels=images.shape[1],
        )
    else:
        frozen = model
    _, bad = Descent(frozen, images, delta, options)(
        labels, torch.arange(batch, device=images.device), flip, alpha
    )
    check_finite(op, bad, "check the model's weights")
    return delta
