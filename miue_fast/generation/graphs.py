"""A CUDA graph of a function on inputs of its own: captured once, replayed with other values."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch


class Captured:
    """What `work(*inputs)` launches, as one CUDA graph; nothing is computed yet.

    inputs: tensors or None; they are the graph's memory. `work` must have run before, so that what
        it compiles, loads and allocates once is there, and must not wait for the device.
    pool: the memory pool of another graph, to share it. generators: the ones on the device that
        `work` draws from.
    Errors: RuntimeError where work cannot be captured, torch.OutOfMemoryError among them.
    """

    def __init__(
        self,
        work: Callable[..., Any],
        inputs: Sequence[torch.Tensor | None],
        pool: Any = None,
        generators: Iterable[torch.Generator] = (),
    ):
        self.inputs = inputs
        self.graph = torch.cuda.CUDAGraph()
        for generator in generators:
            self.graph.register_generator_state(generator)
        # Other threads may use the device as they like meanwhile.
        apart = torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local")
        # A capture that fails does not leave its stream: the outer context does.
        with torch.cuda.stream(torch.cuda.current_stream()), apart:
            self.result = work(*inputs)

    @property
    def pool(self) -> Any:
        """The memory pool of this graph."""
        return self.graph.pool()

    def load(self, given: Iterable[torch.Tensor | None]) -> None:
        """Copies new values into the graph's inputs."""
        for static, value in zip(self.inputs, given):
            if static is not None and value is not None:
                static.copy_(value)

    def replay(self) -> None:
        """Launches the graph."""
        self.graph.replay()
