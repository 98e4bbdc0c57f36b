"""What a call of this library does not take over from its caller's thread, and what two threads may
not share.
"""

import contextlib
import threading
from collections.abc import Generator

import torch

from .messages import fail

_guard = threading.Lock()
_borrowed: dict[
    int, list[int]
] = {}  # id of a module -> [its thread, how often that thread has borrowed it]
_cudnn: list = []  # [how many runs want deterministic cuDNN, the caller's flags]


@contextlib.contextmanager
def ordinary() -> Generator[None, None, None]:
    """Switches to the library's own precision and to ordinary tensors: no autocast, no inference
    mode. It is a context or a decorator, and concerns this thread alone.
    """
    on = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
    for device in on:
        torch.set_autocast_enabled(device, False)
    try:
        with torch.inference_mode(False):
            yield
    finally:
        for device in on:
            torch.set_autocast_enabled(device, True)


class Turn:
    """Lets one thread at a time use an object that keeps state: `with turn:` surrounds every call,
    and a second thread is refused at once. A copy has a turn of its own. Errors: ValueError.
    """

    def __init__(self, op: str) -> None:
        self.op, self.lock = op, threading.RLock()

    def __reduce__(self):
        return Turn, (self.op,)

    def __enter__(self):
        if not self.lock.acquire(blocking=False):
            fail(
                self.op,
                "thread",
                "one thread at a time",
                "a call while another thread's runs; give each thread an object of its own",
            )

    def __exit__(self, *error):
        self.lock.release()


@contextlib.contextmanager
def borrowed(op: str, model: torch.nn.Module) -> Generator[None, None, None]:
    """Keeps other threads away from all modules of a model while a call changes its modes or
    weights. Errors: ValueError.
    """
    me, modules = threading.get_ident(), [id(module) for module in model.modules()]
    with _guard:
        if any(_borrowed.get(module, (me,))[0] != me for module in modules):
            fail(
                op,
                "model",
                "one thread at a time",
                "a model that a call in another thread works on; give each its own (copy.deepcopy)",
            )
        for module in modules:
            _borrowed.setdefault(module, [me, 0])[1] += 1
    try:
        yield
    finally:
        with _guard:
            for module in modules:
                _borrowed[module][1] -= 1
                if not _borrowed[module][1]:
                    del _borrowed[module]


@contextlib.contextmanager
def deterministic_cudnn() -> Generator[None, None, None]:
    """Makes cuDNN deterministic meanwhile. Its flags belong to the process: the first of several
    simultaneous runs sets them, and the last one puts them back.
    """
    cudnn = torch.backends.cudnn
    with _guard:
        if not _cudnn:
            _cudnn[:] = 0, (cudnn.deterministic, cudnn.benchmark)
            cudnn.deterministic, cudnn.benchmark = True, False
        _cudnn[0] += 1
    try:
        yield
    finally:
        with _guard:
            _cudnn[0] -= 1
            if not _cudnn[0]:
                cudnn.deterministic, cudnn.benchmark = _cudnn[1]
                _cudnn.clear()


def default_dtype(op: str) -> None:
    """Raises ValueError unless PyTorch's default dtype, in which networks are made and which
    belongs to the process, is float32.
    """
    if torch.get_default_dtype() != torch.float32:
        got = (
            f"{str(torch.get_default_dtype())[6:]}; "
            "call torch.set_default_dtype(torch.float32) first"
        )
        fail(op, "default dtype", "float32", got)
