"""What is made before the first epoch: the network, its memory format, and a trial of it."""

import contextlib
import logging
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import models
from ..data import Dataset
from ..dispatch import checks
from ..frozen import freeze
from ..support import messages
from ..support.draws import Draws, seeded_globally
from .options import Options

log = logging.getLogger("miue_fast")


def check_labels(op: str, labels: torch.Tensor, count: int, device: torch.device) -> torch.Tensor:
    """Labels [count] of at least two classes, as int64 on `device`: one image or one class has a
    gradient of exactly zero. Errors: ValueError.
    """
    if (
        not isinstance(labels, torch.Tensor)
        or labels.dtype not in checks.INTEGERS
        or labels.shape != (count,)
    ):
        messages.fail(op, "labels", f"an integer tensor [{count}]", messages.describe(labels))
    if labels.device != device:
        messages.fail(op, "labels", f"device {device}", labels.device)
    if count < 2:
        messages.fail(op, "images", "two or more (a single one has a zero gradient)", count)
    if (labels == labels[0]).all():
        messages.fail(
            op, "labels", "two or more classes (one class has a zero gradient)", "one class"
        )
    return labels.to(torch.int64).contiguous()


def source_network(
    model: str | nn.Module | Callable[[int], nn.Module],
    dataset: Dataset,
    options: Options,
    draws: Draws,
) -> nn.Module:
    """The network that `generate`'s argument `model` stands for, with weights that can be trained.
    Errors: ValueError.
    """
    num_classes, (channels, height, width) = len(dataset.classes), dataset.images.shape[1:]
    if isinstance(model, str):
        models.NETWORKS.choose("generate", "model", model, ", an nn.Module or a callable")
        with draws:
            network: Any = models.build(
                model, num_classes, width=options.width, size=min(height, width), channels=channels
            )
    elif isinstance(model, nn.Module):
        network = model
    else:
        with seeded_globally(draws, options.place):
            network = model(num_classes) if callable(model) else model
    if not isinstance(network, nn.Module):
        messages.fail(
            "generate",
            "model",
            "a name, an nn.Module or a callable that returns one",
            type(network).__name__,
        )
    if not any(parameter.requires_grad for parameter in network.parameters()):
        messages.fail("generate", "model", "parameters to train (requires_grad)", "none")
    if any(tensor.is_inference() for tensor in [*network.parameters(), *network.buffers()]):
        messages.fail(
            "generate",
            "model",
            "ordinary tensors as weights",
            "tensors that were made in torch.inference_mode",
        )
    for name, value in network.state_dict().items():
        if not isinstance(value, torch.Tensor):
            messages.fail(
                "generate", "model", "a state_dict of tensors", f"{name}: {type(value).__name__}"
            )
    return network


def name_of(model: object) -> str:
    """What checkpoints call the argument `model`: its name, or that of its class or function."""
    if isinstance(model, str):
        return model
    kind = type(model) if isinstance(model, nn.Module) else model
    return getattr(kind, "__qualname__", type(model).__qualname__)


def channels_last(op: str, network: nn.Module, wanted: bool | None, device: torch.device) -> bool:
    """The memory format to train in: `wanted`, or True where None.

    On the CPU, oneDNN (issue 6035, open) writes past its buffer in the weight gradient of a
    channels-last strided 1x1 convolution with fewer than 16 channels: such a network keeps the
    other format. (The frozen network has no weight gradient.) Errors: ValueError where such a
    network is asked for it.
    """
    layers = (m for m in network.modules() if isinstance(m, nn.Conv2d))
    unsafe = device.type == "cpu" and any(
        m.kernel_size == (1, 1) and m.stride != (1, 1) and m.in_channels // m.groups < 16
        for m in layers
    )
    if wanted and unsafe:
        messages.fail(
            op,
            "channels_last",
            (
                "False for strided 1x1 convolutions with fewer than 16 channels on a CPU "
                "(oneDNN issue 6035)"
            ),
            True,
        )
    return not unsafe if wanted is None else wanted


def in_layout(
    network: nn.Module, options: Options, dataset: Dataset, device: torch.device
) -> tuple[nn.Module, bool]:
    """The network in the memory format it trains in, and whether that is channels-last. Where
    options.channels_last asks for nothing, a network whose forward fails in that format (`.view` of
    a channels-last activation does) keeps the other one.
    """
    wanted = channels_last("generate", network, options.channels_last, device)
    if wanted:
        network = models.in_format(network, torch.channels_last)
    if wanted and options.channels_last is None:
        try:
            with torch.no_grad():
                network.eval()(
                    dataset.images[:2].to(device, memory_format=torch.channels_last) / 255
                )
        except RuntimeError as error:
            log.info(
                "the network trains in contiguous memory: channels-last fails (%s)",
                str(error).splitlines()[0],
            )
            return models.in_format(network, torch.contiguous_format), False
    return network, wanted


def probe(
    network: nn.Module, feature: str, dataset: Dataset, device: torch.device, *, logits_wanted: bool
) -> None:
    """Sends two images through the network, so that what cannot work is said before the work
    starts. Errors: ValueError.
    """
    x = dataset.images[:2].to(device) / 255
    num_classes = len(dataset.classes)
    network.eval()
    with torch.no_grad():
        try:
            logits = network(x)
            outputs = freeze(network, feature, fused=False).forward(x)
        except RuntimeError as error:
            messages.fail(
                "generate",
                "model",
                f"a network for images {list(x.shape[1:])}",
                f"an error: {str(error).splitlines()[0]}",
            )
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or logits.shape[1] < num_classes:
        messages.fail("generate", "model", f"logits [2, {num_classes}]", messages.describe(logits))
    if logits_wanted and (
        outputs.shape != logits.shape
        or not torch.allclose(outputs, logits.to(outputs.dtype), rtol=1e-3, atol=1e-4)
    ):
        messages.fail(
            "generate",
            "feature",
            "the layer that gives the logits",
            f"{feature!r} ({messages.describe(outputs)})",
        )


@contextlib.contextmanager
def board(keep: Path | None, wanted: bool) -> Generator[Any]:
    """A tensorboard writer beside the checkpoint `keep`, or None where it is not wanted. Errors:
    ValueError without the package.
    """
    if not wanted or keep is None:
        yield None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            f"generate: tensorboard: expected the package tensorboard, got {error}; "
            "pip install tensorboard"
        ) from None
    with SummaryWriter(str(keep.with_name("tensorboard"))) as writer:
        yield writer
