"""How many images are computed at a time, and what happens when memory runs out."""

import logging
from collections.abc import Callable

import torch

from ..dispatch.registry import BackendError
from ..support.written import option, shown

log = logging.getLogger("miue_fast")
# Images per launch on a CPU. It bounds the memory of the activations; launches of 16 to 256 images
# take the same time (docs/performance-notes.md).
CPU_CHUNK = 64


class Chunks:
    """How many images enter the network in one launch.

    A launch that runs out of memory is repeated with half as many images; the contrastive batch
    and the objective stay as they are. No launch has fewer than `least` images: PyTorch's CPU
    libraries take other algorithms, which round differently, for a single image and for a strided
    input gradient of fewer than three images per thread. From `least` on the result is that of the
    whole batch up to rounding. It is the same bit by bit where the libraries take one algorithm for
    all batch sizes (with AVX-512 they were seen to do so; with AVX2, MKL and oneDNN do not).
    """

    def __init__(self, size: int, least: int = 2) -> None:
        self.size, self.least = max(size, least), least

    def halve(self, count: int) -> None:
        """Launches are half as large from now on. count: the images of the launch that found too
        little memory. Errors: BackendError where no smaller launch is allowed.
        """
        if count < 2 * self.least:
            raise BackendError(
                f"out of memory with {count} images per network launch: "
                f"use a smaller model, or {option('delta_dtype', 'float16')} or int8"
            )
        self.size = (count + 1) // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        log.warning(
            "out of memory: %s is now %d (the contrastive batch and the objective do not change)",
            shown("generate", "network_chunk"),
            self.size,
        )

    def each(self, rows: slice, work: Callable[[slice], None]) -> None:
        """Calls work(part) for parts of `rows` in order, so that each row comes once. A tail of
        fewer than `least` rows joins the launch before it.
        """
        start = rows.start
        while start < rows.stop:
            stop = start + self.size
            part = slice(start, rows.stop if stop + self.least > rows.stop else stop)
            if self.attempt(part, work):
                start = part.stop

    def attempt(self, part: slice, work: Callable[[slice], None]) -> bool:
        """Calls work(part). False if it ran out of memory: then launches are half as large from now
        on.
        """
        try:
            work(part)
            return True
        except torch.OutOfMemoryError:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                # No memory can be given back during a capture: its caller halves the launches and
                # captures again.
                raise
        # This is outside the handler, where the exception no longer holds the memory.
        self.halve(part.stop - part.start)
        return False
