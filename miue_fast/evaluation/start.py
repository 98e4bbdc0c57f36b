"""Where a victim starts and what part of its data is poisoned: pretrained weights, poison ratio,
classes without poison.
"""

import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from ..data.files import read_bytes
from ..data.images import one_line
from ..data.poison import PT_ERRORS, SAFETENSORS_ERRORS
from ..data.torchfile import read_torch
from ..support.messages import describe, fail

MAX_STATE = 1 << 33  # bytes of a victim's weights; ViT-H takes 2.5e9


def read_state(init: Any) -> dict[str, torch.Tensor]:
    """A state dict (name -> tensor) from one, or from a .safetensors file or a .pt file
    (torch.save; read as plain data).
    """
    if isinstance(init, str | os.PathLike):
        path = Path(init)
        if not path.exists():
            fail(
                "evaluate",
                "init",
                "a state dict, or a .safetensors or .pt file of one",
                f"{path} (no such file)",
            )
        try:
            if path.suffix == ".safetensors":
                init = safetensors.torch.load(read_bytes(path, MAX_STATE))
            else:
                init = read_torch(path, MAX_STATE)
        except (*PT_ERRORS, *SAFETENSORS_ERRORS) as error:
            fail(
                "evaluate", "init", "a state dict", f"a damaged or foreign file ({one_line(error)})"
            )
    if (
        not isinstance(init, dict)
        or not init
        or not all(isinstance(value, torch.Tensor) for value in init.values())
    ):
        fail("evaluate", "init", "a state dict (name -> tensor)", describe(init))
    return init


def start_from(network: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Puts pretrained weights into a fresh network. Its last linear layer keeps its own where the
    number of classes differs. Errors: ValueError: the weights are of another network.
    """
    own = network.state_dict()
    heads = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    head = f"{heads[-1]}." if heads else "-"
    for name in [*own, *state]:
        if name not in own or name not in state:
            fail(
                "evaluate",
                "init",
                "the weights of this victim (same network, same width)",
                f"{'no' if name not in state else 'also a'} {name}",
            )
        given, wanted = state[name], own[name]
        if given.shape != wanted.shape and not (
            name.startswith(head) and given.shape[1:] == wanted.shape[1:]
        ):
            fail("evaluate", "init", f"{name} {list(wanted.shape)}", list(given.shape))
    kept = any(state[name].shape != own[name].shape for name in own if name.startswith(head))
    network.load_state_dict(
        {name: own[name] if kept and name.startswith(head) else state[name] for name in own}
    )


def class_numbers(
    unseen: str | int | Iterable[str | int] | None, classes: Iterable[str]
) -> list[int]:
    """Indices, in order and once each, of classes given by name or index; some class must be left
    to poison.
    """
    if unseen is None:
        return []
    names = list(classes)
    found = set()
    for item in [unseen] if isinstance(unseen, str | int) else unseen:
        number = names.index(item) if item in names else item
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < len(names):
            fail("evaluate", "unseen", f"names or indices of the {len(names)} classes", repr(item))
        found.add(number)
    if len(found) >= len(names):
        fail("evaluate", "unseen", "fewer than all classes", f"{len(found)} of {len(names)}")
    return sorted(found)


def poisoned_rows(
    labels: torch.Tensor, ratio: float, unseen: Collection[int], seed: int
) -> torch.Tensor:
    """bool [N]: of every class that is not in `unseen`, a share `ratio` of its images (rounded, at
    least one), drawn with the seed.
    """
    draw = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero()[:, 0]
        order = torch.randperm(len(rows), generator=draw)
        if label not in unseen:
            mask[rows[order[: max(1, round(ratio * len(rows)))]]] = True
    return mask
