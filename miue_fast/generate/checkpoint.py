"""One file per run, replaced whole after every epoch: network, momentum, perturbation, options, history, sha256."""

import hashlib
import json

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from .._written import option
from ..data import Owned

NAME = "checkpoint.safetensors"
FORMAT = "miue_fast checkpoint 1"


def save(path, tensors, header, files=None):
    """Atomic: on any error (full disk: OSError) the file that was there stays. `header` is JSON and carries `epoch`.

    files: the `Owned` of the folder, which need not read the file that is replaced where it wrote it.
    """
    text = json.dumps({"format": FORMAT, **header})
    data = safetensors.torch.save(tensors, {"header": text, "sha256": _digest(tensors, text)})
    (files or Owned(path.parent)).write({path.name: lambda stream: stream.write(data)})


def load(path):
    """(tensors, header). ValueError, one line, if the file is not a checkpoint of this version or a single bit of it changed."""
    try:
        tensors = safetensors.torch.load_file(path)
        metadata = _metadata(path)
    except SafetensorError as error:
        raise _corrupt(path, error) from None
    if not {"header", "sha256"} <= set(metadata):
        raise ValueError(f"{path}: expected a {FORMAT}, got another safetensors file; move it away")
    if _digest(tensors, metadata["header"]) != metadata["sha256"]:
        raise _corrupt(path, "its sha256 does not match")
    header = json.loads(metadata["header"])
    found = header.get("format") if isinstance(header, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path}: expected a {FORMAT}, got {found!r}; move it away")
    return tensors, header


def saved_epoch(path):
    """Last epoch in the file, 0 without a file. Reads the header only."""
    return json.loads(_metadata(path)["header"])["epoch"] if path.exists() else 0


def unfinished(path):
    """Whether the file is the checkpoint of a run that has epochs to go: what else lies beside it is of a run that this one replaces."""
    if not path.is_file():
        return False
    header = load(path)[1]
    return header["epoch"] < header["options"]["epochs"]


def _metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def _corrupt(path, why):
    return ValueError(f"{path}: expected a readable checkpoint, got a corrupt file ({why}); move it away")


def _digest(tensors, text):
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def gather(model, optimizer, delta):
    """The run's state as contiguous CPU tensors. Parameter k of the optimiser has its momentum under momentum.k."""
    tensors = {"delta": delta.cpu()}
    for name, value in _state(model).items():
        tensors[f"model.{name}"] = _plain(value)
    for k, parameter in enumerate(_parameters(optimizer)):
        momentum = optimizer.state[parameter].get("momentum_buffer") if parameter in optimizer.state else None
        if momentum is not None:
            tensors[f"momentum.{k}"] = _plain(momentum)
    return tensors


def restore(path, tensors, model, optimizer, delta):
    """Puts `gather`'s tensors back, in the memory formats of this run. ValueError if the network or the data has another shape."""
    state = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    own = _state(model)
    if {k: (v.shape, v.dtype) for k, v in state.items()} != {k: (v.shape, v.dtype) for k, v in own.items()}:
        raise ValueError(
            f"{path}: expected a checkpoint of this model, got one with other layers; set {option('overwrite', True)} to start again"
        )
    if tensors["delta"].shape != delta.shape or tensors["delta"].dtype != delta.dtype:
        raise ValueError(f"{path}: expected a checkpoint of {delta.dtype} {list(delta.shape)}, got {list(tensors['delta'].shape)}")
    persistent = model.state_dict().keys()
    model.load_state_dict({name: value for name, value in state.items() if name in persistent})
    for name, buffer in model.named_buffers():
        if name not in persistent:
            buffer.copy_(state[name])
    for k, parameter in enumerate(_parameters(optimizer)):
        if f"momentum.{k}" in tensors:
            optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(tensors[f"momentum.{k}"]).detach()
    delta.copy_(tensors["delta"])


def _state(model):
    """The state dict and the buffers that are not part of it: training may change those too."""
    return {**dict(model.named_buffers()), **model.state_dict()}


def _parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def _plain(tensor):
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
