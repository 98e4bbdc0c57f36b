"""The poison step as a CUDA graph wants it, as far as a CPU can show: the graph path is the plain
loop, and a step never waits.
"""

import contextlib
import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from miue_fast import freeze, models
from miue_fast.generation import Options, batches, training
from miue_fast.generation import descent as descent_module
from miue_fast.generation.descent import Descent
from miue_fast.generation.graphs import Captured
from miue_fast.generation.robust import Drawn
from miue_fast.reference import perturbed_input as reference_input
from miue_fast.reference.projected_step import load_images

CLASSES = 4
OPTIONS = Options(epochs=3, train_batch=10, device="cpu")


@pytest.fixture
def case():
    """A frozen network, and images with labels and flips."""
    torch.manual_seed(3)
    model = models.build("small_resnet", CLASSES, width=16, size=16)
    images = torch.randint(256, (24, 3, 16, 16), dtype=torch.uint8)
    model(images / 255)  # running statistics
    return model.eval(), images, torch.arange(24) % CLASSES, torch.rand(24) < 0.5


class OnCpu(Captured):
    """A captured function in its effects: capturing computes nothing, replaying repeats what was
    captured, on the same memory.
    """

    made = 0

    def __init__(self, work, inputs, pool=None, generators=()):
        OnCpu.made += 1
        self.work = work
        stores = [*self.watched(), *(value for value in inputs if value is not None)]
        before = [store.clone() for store in stores]
        super().__init__(work, inputs, pool, generators)
        with torch.no_grad():
            for store, value in zip(stores, before):
                store.copy_(value)

    def replay(self):
        with torch.no_grad():
            outputs, kept = (
                [x] if isinstance(x, torch.Tensor) else x for x in (self.again(), self.result)
            )
            for static, value in zip(kept, outputs):
                static.copy_(value)

    def again(self):
        with torch.enable_grad():
            return self.work(*self.inputs)


class NoGraph:
    def pool(self):
        return "pool"


@pytest.fixture
def cuda(monkeypatch):
    """Code for CUDA that runs here: cuda.watched() gives what a capture must leave as it is, beside
    the graph's inputs.
    """
    monkeypatch.setattr(OnCpu, "made", 0)
    monkeypatch.setattr(descent_module, "Captured", OnCpu)
    monkeypatch.setattr(training, "Captured", OnCpu)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", NoGraph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: Stream)
    for name in ("graph", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *args, **kwargs: contextlib.nullcontext())
    return lambda watched: monkeypatch.setattr(
        OnCpu, "watched", staticmethod(watched), raising=False
    )


class Stream:
    wait_stream = staticmethod(lambda other: None)


def on_graphs(cuda, net, images, options):
    """A Descent that takes the CUDA path."""
    descent = Descent(net, images, torch.zeros(images.shape), options)
    descent.captured = True
    cuda(lambda: [descent.delta])
    return descent


@pytest.mark.parametrize("steps", [1, 3])
def test_the_graph_path_is_the_plain_loop(case, steps, cuda):
    """Two batch sizes, with and without flips, two step sizes, new weights in between."""
    model, images, labels, flip = case
    net, options = freeze(model), Options(steps=steps)
    plain, graphs = (
        Descent(net, images, torch.zeros(images.shape), options),
        on_graphs(cuda, net, images, options),
    )
    assert not plain.captured
    calls = [
        (slice(0, 12), flip, 0.01),
        (slice(12, 24), flip, 0.01),
        (slice(3, 24), flip, 0.01),
        (slice(0, 12), None, 0.01),
        (slice(4, 16), flip, 0.02),
        (slice(0, 12), flip, 0.02),
    ]
    for k, (rows, mirror, alpha) in enumerate(calls):
        index = torch.arange(24)[rows]
        args = labels[index], index, mirror if mirror is None else mirror[rows], alpha
        if k == 4:
            with torch.no_grad():
                model.conv1.weight.mul_(0.9)
            net.refold()
        (one, bad), (other, other_bad) = plain(*args), graphs(*args)
        assert (
            torch.equal(plain.delta, graphs.delta)
            and torch.equal(one, other)
            and torch.equal(bad, other_bad)
        ), k
    assert OnCpu.made == 4, "one capture per batch size, kind of flip and step size"
    for descent in (plain, graphs):
        descent(labels[:12], torch.arange(12), flip[:12], 0.02, eps=0.01)
    assert torch.equal(plain.delta, graphs.delta) and graphs.delta[:12].abs().max() <= 0.01
    assert OnCpu.made == 5, "and per budget"


@pytest.mark.parametrize("robust", ["crop", "crop,grid:4"])
def test_each_replay_has_its_own_view(case, cuda, robust):
    """The crops of a step are inputs of the graph and not part of it."""
    model, images, labels, flip = case
    net, options = freeze(model), Options(steps=3, robust=robust)
    plain, graphs = (
        Descent(net, images, torch.zeros(images.shape), options),
        on_graphs(cuda, net, images, options),
    )
    for batch, rows in enumerate([slice(0, 12), slice(12, 24), slice(3, 15)]):
        index = torch.arange(24)[rows]
        draws = partial(batches.step_generator, 7, 1, batch)
        args = labels[index], index, flip[rows], 0.01, draws
        (one, bad), (other, other_bad) = plain(*args), graphs(*args)
        assert torch.equal(plain.delta, graphs.delta), batch
        assert torch.equal(one, other) and torch.equal(bad, other_bad)
    assert OnCpu.made == 1


class Scaled(torch.nn.Module):
    """A network whose input normalisation is trained."""

    def __init__(self, body):
        super().__init__()
        self.body, self.gain, self.avgpool = (
            body,
            torch.nn.Parameter(torch.tensor(2.0)),
            body.avgpool,
        )

    def forward(self, x):
        return self.body((x - 0.25) * self.gain)


def test_a_trained_normalisation_is_read_again(case, cuda):
    """After a refold the step uses the new one, captured or not."""
    model, images, labels, flip = case
    model.normalize = False
    model = Scaled(model).eval()
    net = freeze(model, "body.avgpool")
    assert net.stem is not None and net.std == [0.5] * 3
    zeros = torch.zeros(images.shape)
    args = labels, torch.arange(24), flip, 0.01
    plain, graphs = (
        Descent(net, images, zeros.clone(), Options(steps=2)),
        on_graphs(cuda, net, images, Options(steps=2)),
    )
    plain(*args), graphs(*args)
    with torch.no_grad():
        model.gain.fill_(0.5)
    net.refold()
    fresh = Descent(freeze(model, "body.avgpool"), images, plain.delta.clone(), Options(steps=2))
    for descent in (plain, graphs, fresh):
        descent(*args)
    assert torch.equal(plain.delta, fresh.delta) and torch.equal(graphs.delta, fresh.delta)
    assert OnCpu.made == 2, "a real graph repeats the numbers that it was captured with"
    with torch.no_grad():
        model.gain.fill_(0.0)
    with pytest.raises(
        ValueError,
        match="freeze: model: expected an input normalisation with finite scales other than 0",
    ):
        net.refold()


def test_not_a_number_is_counted_in_a_replay(case, cuda):
    model, images, labels, flip = case
    with torch.no_grad():
        model.conv1.weight.fill_(torch.nan)
    graphs = on_graphs(cuda, freeze(model), images, Options(steps=3))
    for _ in range(2):
        _, bad = graphs(labels, torch.arange(24), flip, 0.01)
        assert bad.tolist() == [3, 3 * images.numel()]


def test_out_of_memory_in_a_capture_halves_the_launch_and_captures_anew(case, cuda, monkeypatch):
    model, images, labels, flip = case
    net = freeze(model, chunk=24)
    net.chunk.least = 2
    plain = Descent(net, images, torch.zeros(images.shape), Options(steps=2))
    graphs = on_graphs(cuda, net, images, Options(steps=2))
    plain(labels, torch.arange(24), flip, 0.01)
    real, failing = net._forward, []

    def forward(x, tape):
        if failing and len(x) > 12:
            raise torch.OutOfMemoryError
        return real(x, tape)

    monkeypatch.setattr(net, "_forward", forward)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(failing))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    @contextlib.contextmanager
    def capture(graph, pool, capture_error_mode):
        assert capture_error_mode == "thread_local"  # what other threads do meanwhile is no error
        failing.append(graph)
        try:
            yield
        finally:
            failing.clear()

    monkeypatch.setattr(torch.cuda, "graph", capture)
    graphs(labels, torch.arange(24), flip, 0.01)
    assert net.chunk.size == 12 and OnCpu.made == 2
    assert torch.equal(plain.delta, graphs.delta)


def trainer(case, captures, options=OPTIONS):
    """A Trainer of a network of its own, on the CPU's path or on that of CUDA."""
    model, images, labels, _ = case
    model = copy.deepcopy(model)
    delta = torch.linspace(-0.03, 0.03, images.numel()).view(images.shape)
    made = training.Trainer(model, images, labels, delta, options)
    made.captures = captures
    made.optimizer = torch.optim.SGD(
        model.parameters(),
        torch.full((), options.lr),
        options.momentum,
        weight_decay=options.weight_decay,
        fused=True,
    )
    return made


def state(of):
    momenta = [
        of.optimizer.state[p]["momentum_buffer"]
        for p in of.network.parameters()
        if p in of.optimizer.state
    ]
    return [*of.network.state_dict().values(), *momenta]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_captured_model_step_is_the_plain_one(case, cuda, dtype):
    """Three epochs with a schedule of the learning rate; 24 images in batches of 10, 10 and 4."""
    options = replace(OPTIONS, dtype=dtype)
    plain, graphs = trainer(case, False, options), trainer(case, True, options)
    cuda(lambda: state(graphs))
    done = []
    for number in (1, 2, 3):
        assert plain.epoch(number, lambda images: None) == graphs.epoch(number, done.append)
    assert done == [10, 10, 4] * 3
    assert OnCpu.made == 1, "one capture for the whole run: the learning rate is not part of it"
    assert len(state(plain)) > 20
    for one, other in zip(state(plain), state(graphs), strict=True):
        assert torch.equal(one, other)


def test_a_network_that_cannot_be_captured_trains_all_the_same(case, cuda, monkeypatch, caplog):
    plain, graphs = trainer(case, False), trainer(case, True)
    cuda(lambda: state(graphs))

    def refuse(*args, **kwargs):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    for number in (1, 2):
        assert plain.epoch(number, lambda images: None) == graphs.epoch(number, lambda images: None)
    assert all(torch.equal(*pair) for pair in zip(state(plain), state(graphs), strict=True))
    told = [record.message for record in caplog.records if "cannot be captured" in record.message]
    assert told == [
        (
            "the model step runs call by call: it cannot be captured in a CUDA graph "
            "(operation not permitted when stream is capturing)"
        )
    ]


def test_the_learning_rate_on_the_device_is_the_schedule(case, cuda):
    graphs = trainer(case, True)
    cuda(lambda: state(graphs))
    (group,) = graphs.optimizer.param_groups
    kept = group["lr"]
    for number in (1, 3):
        graphs.epoch(number, lambda images: None)
        assert group["lr"] is kept and kept.item() == pytest.approx(OPTIONS.learning_rate(number))


class OneDevice(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        places = {
            t.device.type
            for t in (*args, *(kwargs or {}).values(), out)
            if isinstance(t, torch.Tensor)
        }
        assert len(places) < 2, f"{func}: {places}"
        return out


class NoUploads(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.tensor, torch.as_tensor, torch.from_numpy), f"{func}: cpu data"
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_host_data():
    """Refuses what moves data between host and device. The device is "meta", whose tensors raise by
    themselves where a value is read.
    """
    with OneDevice(), NoUploads():
        yield


def there(tensor):
    """Its like on a device without values."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("store", ["float32", "int8"])
@pytest.mark.parametrize("chunk", [None, 8])
def test_a_step_never_waits_for_the_device(case, dtype, store, chunk):
    """Nothing is read back and nothing is uploaded, so that a step can be captured. (Of the ops
    only what is before their kernels.)
    """
    model, images, labels, flip = case
    net = freeze(model, dtype=getattr(torch, dtype), chunk=chunk)
    assert net.stem is not None
    run(net, images, labels, flip, Options(dtype=dtype, delta_dtype=store), chunk)


def test_a_step_with_crops_and_cells_never_waits_either(case):
    model, images, labels, flip = case
    run(freeze(model), images, labels, flip, Options(robust="crop,grid:4"), None)


def test_an_fp8_step_never_waits_either(case):
    model, images, labels, flip = case
    run(freeze(model, fp8=True), images, labels, flip, Options(dtype="bfloat16", fp8=True), None)


class Pooled(torch.nn.Module):
    """Every other kind of layer, and an input that two of them read."""

    def __init__(self):
        super().__init__()
        self.conv, self.other = torch.nn.Conv2d(3, 16, 3, 1, 1), torch.nn.Conv2d(3, 16, 3, 1, 1)
        self.norm, self.pool, self.mean = (
            torch.nn.BatchNorm2d(32),
            torch.nn.MaxPool2d(3, 2, 1),
            torch.nn.AvgPool2d(2),
        )
        self.fc = torch.nn.Linear(32 * 16, 24)
        self.avgpool = torch.nn.ReLU()

    def forward(self, x):
        x = (x - 0.4) / 0.2
        y = torch.cat([self.conv(x), torch.relu(self.other(x))], 1)
        y = self.mean(self.pool(torch.relu(self.norm(y))))
        return self.avgpool(self.fc((y + y.mean((2, 3), keepdim=True)).flatten(1)))


def test_no_other_layer_waits_either(case):
    _, images, labels, flip = case
    net = freeze(Pooled().eval())
    assert net.fused and net.stem is None and net.scale is not None
    run(net, images, labels, flip, Options(), None)


def run(net, images, labels, flip, options, chunk):
    net.chunk.size, net.chunk.least = chunk or 2**62, 2
    with no_host_data():
        net.device = torch.device("meta")
        for holder in (net, *net.plan.layers):
            for name, value in vars(holder).items():
                if isinstance(value, torch.Tensor):
                    setattr(holder, name, there(value))
        for layer in net.plan.layers:
            if hasattr(layer, "module"):
                layer.module = None  # a step must not look at the model's own weights
        net.resolve()
        images, labels, flip = map(there, (images, labels, flip))
        delta = torch.empty(images.shape, dtype=getattr(torch, options.delta_dtype), device="meta")
        descent = Descent.__new__(Descent)
        descent.robust = options.transforms
        descent.network, descent.images, descent.delta, descent.options, descent.num_classes = (
            net,
            images,
            delta,
            options,
            None,
        )
        loss = descent._step(
            labels,
            torch.empty(24, dtype=torch.int64, device="meta"),
            flip,
            {"alpha": 0.01, "eps": options.eps},
            torch.zeros(2, dtype=torch.int64, device="meta"),
            [
                Drawn(
                    torch.empty(24, 3, dtype=torch.int32, device="meta") if options.robust else None
                )
            ],
        )
    assert loss.device.type == "meta"


def test_a_wait_is_noticed():
    with no_host_data(), pytest.raises(RuntimeError, match=r"item|meta"):
        bool(torch.zeros(2, device="meta").isfinite().all())
    with no_host_data(), pytest.raises(AssertionError, match="cpu"):
        torch.tensor([1.0, 2.0], device="meta")
    with no_host_data(), pytest.raises(AssertionError, match="cpu"):
        torch.zeros(2).to("meta")


def test_the_reference_is_never_captured(case):
    model, images, _, _ = case
    net = freeze(model)
    for backend, kernels in (("auto", True), ("reference", False)):
        assert (
            Descent(
                net, images, torch.zeros(images.shape), replace(Options(), backend=backend)
            )._has_kernels()
            is kernels
        )


def test_refolding_keeps_every_tensor(case):
    """A captured graph holds their addresses."""
    nets = [freeze(case[0], dtype=torch.bfloat16), freeze(Pooled().eval())]
    for net in nets:

        def tensors(net=net):
            holders = (net, *net.plan.layers)
            return {
                (k, name): t.data_ptr()
                for k, h in enumerate(holders)
                for name, t in vars(h).items()
                if isinstance(t, torch.Tensor)
            }

        before = tensors()
        net.refold()
        assert before and tensors() == before


def test_bytes_become_fractions_by_a_true_division():
    """CUDA divides by a number as a product with its reciprocal, which rounds otherwise; by a
    tensor on the device it divides.
    """
    seen = []

    class Divisors(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "div" in str(func):
                seen.append(args[1])
            return func(*args, **(kwargs or {}))

    images = torch.empty(2, 3, 4, 4, dtype=torch.uint8, device="meta")
    with Divisors():
        load_images(images, None, None)
        reference_input.perturbed_input(
            images, None, None, None, [0.5] * 3, [0.25] * 3, 0.0, torch.float32, True
        )
    assert len(seen) == 2 and all(
        isinstance(divisor, torch.Tensor) and divisor.device.type == "meta" for divisor in seen
    )
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(load_images(every, None, None), every.float() / 255)
