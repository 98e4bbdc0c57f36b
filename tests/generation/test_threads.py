"""Threads: nobody else notices a trace or a run, and what is for one thread at a time refuses the
second with one line.
"""

import threading
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from miue_fast import data, freeze, generate, models, perturb
from miue_fast.evaluation import run_cell
from miue_fast.frozen.trace import Tracer
from miue_fast.generation import Options
from miue_fast.generation.descent import Descent
from miue_fast.generation.training import Trainer
from miue_fast.support import calls

IMAGES = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(6) % 2


def resnet(seed=0):
    torch.manual_seed(seed)
    return models.build("small_resnet", 4).eval()


class Paused(nn.Module):
    """A network whose forward waits in the middle, once, until another thread has done what it has
    to do.
    """

    fused = True

    def __init__(self):
        super().__init__()
        self.conv, self.avgpool = nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1)
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(4, 2)

    def forward(self, x):
        x = self.conv(x)
        if PAUSE is not None:
            PAUSE()
        x = torch.relu(x) if self.fused else torch.sigmoid(x)
        return self.fc(self.drop(self.avgpool(x).flatten(1)))


class Unfused(Paused):
    fused = False


PAUSE = None


def elsewhere(work):
    """What `work` returns or raises in another thread."""
    found = []

    def run():
        try:
            found.append(work())
        except Exception as error:  # noqa: BLE001 - it is looked at by the test
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    return found[0] if found else TimeoutError()


@pytest.fixture
def pause(monkeypatch):
    """pause(work): the next forward of a Paused network has `work` done in another thread; the
    outcome is in the list.
    """

    def once(work):
        outcome = []

        def wait():
            monkeypatch.setattr(f"{__name__}.PAUSE", None)
            outcome.append(elsewhere(work))

        monkeypatch.setattr(f"{__name__}.PAUSE", wait)
        return outcome

    return once


# ---- tracing


def test_a_trace_is_not_noticed_by_another_thread(pause):
    """In the middle of it: an unrelated model, the same model, the process's functions."""
    model, other = (
        Paused().eval(),
        nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(784, 2)
        ),
    )
    before = (
        nn.Module.__call__,
        nn.Module.__getattr__,
        F.relu,
        vars(model).copy(),
        dict(vars(model.conv)),
    )

    def bystander():
        assert (nn.Module.__call__, nn.Module.__getattr__, F.relu) == before[
            :3
        ] and not torch.fx._symbolic_trace._is_fx_tracing_flag
        assert (
            torch.is_tensor(other(IMAGES))
            and torch.is_tensor(model(IMAGES))
            and isinstance(model.conv.weight, nn.Parameter)
        )
        return "fine"

    outcome = pause(bystander)
    assert freeze(model).fused and outcome == ["fine"]
    assert vars(model) == before[3] and vars(model.conv) == before[4]


def test_bystanders_of_many_traces():
    """As it was seen: 75 % of the calls of an unrelated model raised NameError."""
    other, model, stop, errors = resnet(1), resnet(), threading.Event(), []

    def bystander():
        while not stop.is_set():
            try:
                other(IMAGES[:1])
            except Exception as error:  # noqa: BLE001
                errors.append(error)

    thread = threading.Thread(target=bystander)
    thread.start()
    until = time.monotonic() + 2
    while time.monotonic() < until:
        freeze(model)
    stop.set()
    thread.join()
    assert not errors


def test_many_threads_trace_at_once():
    models_of = [resnet(seed) for seed in range(4)]
    wanted, got = [freeze(m).forward(IMAGES) for m in models_of], [None] * 4

    def work(k):
        for _ in range(5):
            got[k] = freeze(models_of[k]).forward(IMAGES)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert (
        all(torch.equal(a, b) for a, b in zip(wanted, got))
        and not Tracer(models_of[0], "avgpool", True).twins
    )


# ---- one thread at a time


def refused(outcome, words):
    return isinstance(outcome, ValueError) and words in str(outcome) and "\n" not in str(outcome)


BUSY = "thread: expected one thread at a time, got a call while another thread's runs"


@pytest.mark.parametrize("fused", [True, False])
def test_the_gradient_belongs_to_the_thread_of_the_last_forward(fused):
    net = freeze(resnet(), fused=fused)
    features = net.forward(IMAGES)
    assert refused(
        elsewhere(lambda: net.input_grad(features)),
        "input_grad: thread: expected the one that called forward last",
    )
    wanted = net.input_grad(features)
    net.forward(IMAGES)
    assert torch.equal(
        elsewhere(lambda: net.input_grad(net.forward(IMAGES))), wanted
    )  # nobody waits for a thread that never asks
    with pytest.raises(ValueError, match="a forward before each input_grad"):
        net.input_grad(features)


@pytest.mark.parametrize("fused", [True, False])
def test_calls_at_the_same_time_are_refused(fused):
    net = freeze(resnet(), fused=fused)
    with net.alone():
        for call in (
            lambda: net.forward(IMAGES),
            lambda: net.input_grad(torch.ones(6, 32)),
            lambda: net.refold() if fused else net(IMAGES),
        ):
            assert refused(elsewhere(call), f"FrozenNet: {BUSY}")
        net.forward(IMAGES)  # the same thread's own calls are not
    assert torch.is_tensor(elsewhere(lambda: net.forward(IMAGES)))


def test_eight_threads_and_one_net_give_right_results_or_the_refusal():
    """As it was seen: 10 of 240 results were wrong."""
    net = freeze(resnet())
    inputs = [
        torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(k)) for k in range(8)
    ]
    wanted = [net.input_grad(net.forward(x)).clone() for x in inputs]
    wrong, right, told = [], [], []

    def work(k):
        for _ in range(30):
            try:
                (
                    right
                    if torch.equal(net.input_grad(net.forward(inputs[k])), wanted[k])
                    else wrong
                ).append(k)
            except ValueError as error:
                told.append(str(error))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert not wrong and right and len(right) + len(told) == 240
    assert all(
        "one thread at a time" in t
        or "the one that called forward last" in t
        or "a forward before each" in t
        for t in told
    )


def stores():
    images = (IMAGES * 255).byte()
    return images, torch.zeros(IMAGES.shape)


def test_descents_and_trainers_refuse_a_second_thread():
    images, delta = stores()
    net = freeze(resnet())
    options = Options(steps=1, batch=6, epochs=1, train_batch=6)
    first, second = (Descent(net, images, delta, options) for _ in range(2))
    arguments = LABELS, torch.arange(6), None, 0.001
    with first.turn:
        assert refused(elsewhere(lambda: first(*arguments)), f"Descent: {BUSY}")
    with net.alone():
        assert refused(elsewhere(lambda: second(*arguments)), f"FrozenNet: {BUSY}")
    model = resnet()
    trainer, other = (Trainer(model, images, LABELS, delta, options) for _ in range(2))
    with trainer.turn:
        assert refused(elsewhere(lambda: trainer.epoch(1, lambda n: None)), f"Trainer: {BUSY}")
    with calls.borrowed("test", model.layers):  # a part of it is enough
        assert refused(
            elsewhere(lambda: other.epoch(1, lambda n: None)),
            "generate: model: expected one thread at a time",
        )
    assert elsewhere(lambda: other.epoch(1, lambda n: None))[0] > 0


def step(model, **options):
    return perturb(
        model, IMAGES, LABELS, torch.zeros_like(IMAGES), steps=2, alpha=0.01, eps=0.03, **options
    )


def test_two_perturb_of_one_model_that_is_fused(pause):
    """It is only read: both are right, and its mode is never another one."""
    torch.manual_seed(0)
    model = Paused().train()
    wanted = step(model)
    outcome = pause(lambda: (model.training, model.conv.training, step(model)))
    assert torch.equal(step(model), wanted)
    assert outcome[0][:2] == (True, True) and torch.equal(outcome[0][2], wanted)
    assert all(module.training for module in model.modules())


def test_two_perturb_of_one_model_that_is_not_fused(pause):
    """It runs itself, in eval mode: the second is refused, the first is right, and the modes are
    put back.
    """
    torch.manual_seed(0)
    model = Unfused().train()
    wanted = step(model, fused=False)
    outcome = pause(lambda: step(model, fused=False))
    assert torch.equal(step(model, fused=False), wanted)
    assert refused(
        outcome[0],
        (
            "FrozenNet: model: expected one thread at a time, "
            "got a model that a call in another thread works on"
        ),
    )
    assert all(module.training for module in model.modules()) and all(
        p.requires_grad for p in model.parameters()
    )
    assert not calls._borrowed


# ---- whole runs


SHAPES = data.shapes(24, seed=0, size=16, classes=2, difficulty=0)
RUN = {"epochs": 2, "steps": 1, "batch": 24, "train_batch": 8, "progress": False, "lr": 0.05}


def noise_in_another_thread(work):
    """work() while another thread draws from, and seeds, PyTorch's global generator."""
    stop = threading.Event()

    def noise():
        while not stop.is_set():
            torch.rand(7)
            torch.manual_seed(4)

    thread = threading.Thread(target=noise)
    thread.start()
    try:
        return work()
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("model", ["small_resnet", "lenet5", "dropout"])
def test_runs_at_once_give_the_bits_of_a_run_alone(model):
    """Each with the seeds of its own, beside a thread that draws from the global generator."""

    def run(seed):
        torch_seeded = Paused().train()
        torch_seeded.load_state_dict(STATE)
        return generate(
            SHAPES, model=torch_seeded if model == "dropout" else model, seed=seed, **RUN
        ).delta

    alone, together = [run(seed) for seed in (1, 2)], {}
    threads = [
        threading.Thread(target=lambda s=seed: together.update({s: run(s)})) for seed in (1, 2)
    ]
    noise_in_another_thread(lambda: ([t.start() for t in threads], [t.join() for t in threads]))
    assert (
        torch.equal(together[1], alone[0])
        and torch.equal(together[2], alone[1])
        and not torch.equal(*alone)
    )


torch.manual_seed(8)
STATE = Paused().state_dict()


def test_the_caller_does_not_notice_a_run():
    torch.manual_seed(77)
    before, flags = (
        torch.get_rng_state(),
        (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
    )
    for model in ("small_resnet", Paused(), lambda classes: Paused()):
        torch.set_rng_state(before)
        generate(SHAPES, model=model, **RUN)
        assert torch.equal(torch.get_rng_state(), before)
    assert flags == (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark)


def test_one_model_in_two_runs_is_refused(pause):
    model = Paused()
    outcome = pause(lambda: generate(SHAPES, model=model, **RUN))
    generate(SHAPES, model=model, **RUN)
    assert refused(outcome[0], "generate: model: expected one thread at a time")


@pytest.mark.parametrize(
    "victim, defence",
    [
        ("small_resnet", "none"),
        ("small_resnet", "adversarial:4:steps=2"),
        (lambda n: Paused(), "cutout:3"),
    ],
)
def test_victims_at_once_are_the_same_victims(victim, defence):
    def cell(seed):
        run = run_cell(
            SHAPES.images,
            SHAPES.labels,
            SHAPES.images.flip(0),
            SHAPES.labels.flip(0),
            2,
            victim=victim,
            epochs=2,
            lr=0.05,
            batch=8,
            seed=seed,
            defence=defence,
            keep_network=True,
        )
        return [run.robust, *run.network.state_dict().values()]

    alone, together = [cell(seed) for seed in (1, 2)], {}
    threads = [
        threading.Thread(target=lambda s=seed: together.update({s: cell(s)})) for seed in (1, 2)
    ]

    def work():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    noise_in_another_thread(work) if isinstance(victim, str) else work()
    for k in (1, 2):
        assert together[k][0] == alone[k - 1][0] and all(
            torch.equal(a, b) for a, b in zip(together[k][1:], alone[k - 1][1:])
        )


def test_one_victim_in_two_cells_is_refused(pause):
    model = Paused()

    def cell():
        return run_cell(
            SHAPES.images,
            SHAPES.labels,
            SHAPES.images.flip(0),
            SHAPES.labels.flip(0),
            2,
            victim=lambda n: model,
            epochs=1,
            lr=0.1,
        )

    outcome = pause(cell)
    assert cell().test >= 0 and refused(
        outcome[0], "evaluate: model: expected one thread at a time"
    )


def test_cudnn_flags_of_overlapping_runs(monkeypatch):
    """The last one to end puts back what the first one found."""
    cudnn = torch.backends.cudnn
    (
        monkeypatch.setattr(cudnn, "deterministic", False),
        monkeypatch.setattr(cudnn, "benchmark", True),
    )
    first, second = calls.deterministic_cudnn(), calls.deterministic_cudnn()
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    assert (cudnn.deterministic, cudnn.benchmark) == (True, False)
    second.__exit__(None, None, None)
    assert (cudnn.deterministic, cudnn.benchmark) == (False, True)
