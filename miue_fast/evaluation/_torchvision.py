"""The only importer of torchvision, an optional extra (`miue_fast[defences]`).

torchvision's Python part registers shape rules for its operators `nms` and `qnms` when it is
imported. A torchvision wheel built for CUDA does not load its native part beside a CPU-only torch,
so the operators are unknown and the import ends in "operator torchvision::nms does not exist". The
image transforms need none of them: where that happens, the two operators are declared (without an
implementation, so that a call of them is still an error) and the import is repeated."""

import importlib
import importlib.util
from typing import Any

import torch

from ..dispatch.registry import BackendError

_DETECTION = ("nms", "qnms")
_declared = []  # the library object: its declarations live as long as it does


def missing() -> str | None:
    """Why there is no torchvision here, or None."""
    if importlib.util.find_spec("torchvision") is None:
        return (
            "this defence needs torchvision: pip install 'miue_fast[defences]' "
            "(the torchvision release that matches your torch)"
        )
    return None


def transforms() -> Any:
    """The module torchvision.transforms.v2. Errors: BackendError, with the command that installs
    it.
    """
    if reason := missing():
        raise BackendError(reason)
    try:
        return importlib.import_module("torchvision.transforms.v2")
    except RuntimeError as error:
        if "torchvision::" not in str(error) or _declared:
            raise BackendError(
                f"torchvision does not fit torch {torch.__version__}: {error}"
            ) from error
    _declared.append(torch.library.Library("torchvision", "FRAGMENT"))
    for name in _DETECTION:
        _declared[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("torchvision.transforms.v2")
