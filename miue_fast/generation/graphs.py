"""A CUDA graph of a function on inputs of its own: captured once, replayed with other values."""

import torch


class Captured:
    """What `work(*inputs)` launches, as one CUDA graph; nothing is computed yet.

    inputs: tensors or None; they are the graph's memory. `work` must have run before, so that what
        it compiles, loads and allocates once
    is there, and must not wait for the device. pool: of another graph, to share its memory.
    generators: on the device, that `work` draws from. Errors: RuntimeError where work cannot be
        captured, torch.OutOfMemoryError among them.
    """

    def __init__(self, work, inputs, pool=None, generators=()):
        self.inputs = inputs
        self.graph = torch.cuda.CUDAGraph()
        for generator in generators:
            self.graph.register_generator_state(generator)
        apart = torch.cuda.graph(
            self.graph, pool=pool, capture_error_mode="thread_local"
        )  # other threads may use the device as they like
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            apart,
        ):  # a failed capture leaves its stream
            self.result = work(*inputs)

    @property
    def pool(self):
        return self.graph.pool()

    def load(self, given):
        """New values in the graph's inputs."""
        for static, value in zip(self.inputs, given):
            if value is not None:
                static.copy_(value)

    def replay(self):
        self.graph.replay()
