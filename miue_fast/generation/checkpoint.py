"""One file per run, replaced whole after every epoch: network, momentum, perturbation, options,
history, sha256.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from ..data import Owned
from ..data.files import open_regular, parse_json, read_bytes
from ..data.images import one_line
from ..data.poison import SAFETENSORS_ERRORS
from ..support.messages import printable
from ..support.written import option

NAME = "checkpoint.safetensors"
FORMAT = "miue_fast checkpoint 1"
MAX_HEADER = 100_000_000  # bytes, safetensors' own limit
# What a run that goes on reads of it, and where it has to be.
KINDS = {
    "fingerprint": str,
    "options": dict,
    "history": list,
    "torch": str,
    "threads": int,
    "epoch": int,
}


def save(
    path: Path, tensors: dict[str, torch.Tensor], header: dict[str, Any], files: Owned | None = None
) -> None:
    """Atomic: on any error (full disk: OSError) the file that was there stays. `header` is JSON and
    carries `epoch`.

    files: the `Owned` of the folder, which need not read the file that is replaced where it wrote
        it.
    """
    text = json.dumps({"format": FORMAT, **header})
    data = safetensors.torch.save(tensors, {"header": text, "sha256": _digest(tensors, text)})
    (files or Owned(path.parent)).write({path.name: lambda stream: stream.write(data)})


def load(path: Path, most: int = 1 << 40) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, header). ValueError, one line, if the file is not a checkpoint of this version or a
    single bit of it changed.

    The file is read once, at most `most` bytes of it; what is checked is what is returned.
    """
    try:
        content = read_bytes(path, most)
        tensors = safetensors.torch.load(content)
        metadata = _metadata(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except (OSError, *SAFETENSORS_ERRORS) as error:
        raise _corrupt(path, one_line(error)) from None
    if not {"header", "sha256"} <= set(metadata):
        raise ValueError(f"{path}: expected a {FORMAT}, got another safetensors file; move it away")
    if _digest(tensors, metadata["header"]) != metadata["sha256"]:
        raise _corrupt(path, "its sha256 does not match")
    return tensors, _header(path, metadata)


def _header(path, metadata):
    try:
        header = parse_json(metadata["header"], strict=False)  # a loss may be NaN
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, one_line(error)) from None
    found = header.get("format") if isinstance(header, dict) else None
    if found != FORMAT:
        raise ValueError(
            f"{path}: expected a {FORMAT}, got {printable(repr(found), most=60)}; move it away"
        )
    return header


def check_header(path: Path, header: dict[str, Any]) -> None:
    """Raises ValueError if a run cannot go on from it: a key is missing or of another type."""
    for key, kind in KINDS.items():
        if not isinstance(header.get(key), kind) or isinstance(header[key], bool):
            raise _corrupt(path, f"{key} is {printable(repr(header.get(key)), most=60)}")
    rows = header["history"]
    if (
        not rows
        or len(rows) != header["epoch"]
        or not all(isinstance(row, dict) and row.keys() == rows[0].keys() for row in rows)
    ):
        raise _corrupt(path, "history is no list of one entry per epoch")
    if not all(
        isinstance(value, int | float | str | None) for row in rows for value in row.values()
    ):
        raise _corrupt(path, "history holds more than numbers")


def saved_epoch(path: Path) -> int:
    """The last epoch in the file, 0 without a file. Reads the header only. Errors: as
    `load`."""
    if not path.exists():
        return 0
    epoch = _saved_header(path).get("epoch")
    if type(epoch) is not int:
        raise _corrupt(path, f"epoch is {printable(repr(epoch), most=60)}")
    return epoch


def _saved_header(path):
    try:
        with open_regular(path) as file:
            metadata = _metadata(file.read(min(int.from_bytes(file.read(8), "little"), MAX_HEADER)))
    except (OSError, ValueError, RecursionError) as error:
        raise _corrupt(path, one_line(error)) from None
    return _header(path, {"header": "{}", **metadata})


def unfinished(path: Path) -> bool:
    """Whether the file is the checkpoint of a run that has epochs to go: what else lies beside it
    is of a run that this one replaces.
    """
    if not path.is_file():
        return False
    header = _saved_header(path)
    check_header(path, header)
    return header["epoch"] < header["options"].get("epochs", 0)


def room(network: nn.Module, delta: torch.Tensor) -> int:
    """More bytes than any checkpoint of this network and perturbation takes."""
    state = sum(value.nbytes for value in _state(network).values())
    return (1 << 30) + 4 * (delta.nbytes + state)


def _metadata(text):
    """The texts in the header of a safetensors file."""
    header = parse_json(text, strict=False)
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    return (
        metadata
        if isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
        else {}
    )


def _corrupt(path, why):
    return ValueError(
        f"{path}: expected a readable checkpoint, got a corrupt file ({why}); move it away"
    )


def _digest(tensors, text):
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def gather(
    network: nn.Module, optimizer: torch.optim.Optimizer, delta: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The run's state as contiguous CPU tensors. Parameter k of the optimiser has its momentum
    under momentum.k.
    """
    tensors = {"delta": delta.cpu()}
    for name, value in _state(network).items():
        tensors[f"model.{name}"] = _plain(value)
    for k, parameter in enumerate(_parameters(optimizer)):
        momentum = (
            optimizer.state[parameter].get("momentum_buffer")
            if parameter in optimizer.state
            else None
        )
        if momentum is not None:
            tensors[f"momentum.{k}"] = _plain(momentum)
    return tensors


def restore(
    path: Path,
    tensors: dict[str, torch.Tensor],
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    delta: torch.Tensor,
) -> None:
    """Puts `gather`'s tensors back, in the memory formats of this run. ValueError if the network or
    the data has another shape.
    """
    state = {
        name.removeprefix("model."): value
        for name, value in tensors.items()
        if name.startswith("model.")
    }
    own = _state(network)
    if {k: (v.shape, v.dtype) for k, v in state.items()} != {
        k: (v.shape, v.dtype) for k, v in own.items()
    }:
        raise ValueError(
            f"{path}: expected a checkpoint of this model, got one with other layers; "
            f"set {option('overwrite', True)} to start again"
        )
    found = tensors.get("delta", torch.empty(0))
    if found.shape != delta.shape or found.dtype != delta.dtype:
        raise ValueError(
            f"{path}: expected a checkpoint of {delta.dtype} {list(delta.shape)}, "
            f"got {found.dtype} {list(found.shape)}"
        )
    for k, parameter in enumerate(_parameters(optimizer)):
        if tensors.get(f"momentum.{k}", parameter).shape != parameter.shape:
            raise _corrupt(path, f"momentum.{k} of another shape")
    persistent = network.state_dict().keys()
    network.load_state_dict({name: value for name, value in state.items() if name in persistent})
    for name, buffer in network.named_buffers():
        if name not in persistent:
            buffer.copy_(state[name])
    for k, parameter in enumerate(_parameters(optimizer)):
        if f"momentum.{k}" in tensors:
            optimizer.state[parameter]["momentum_buffer"] = (
                torch.empty_like(parameter).copy_(tensors[f"momentum.{k}"]).detach()
            )
    delta.copy_(found)


def _state(network):
    """The state dict and the buffers that are not part of it: training may change those too."""
    return {**dict(network.named_buffers()), **network.state_dict()}


def _parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def _plain(tensor):
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
