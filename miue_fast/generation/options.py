"""Every option of a generation, and the two schedules."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from ..dispatch import checks, precision
from ..dispatch.registry import BACKENDS
from ..support import messages, ranges
from .objectives import OBJECTIVES, Objective
from .objectives.mi_ue import MiUe
from .robust import Robust
from .robust import read as read_robust

_STORES = ("float32", "float16", "int8")
_ALL_OPS = tuple(
    name for name in BACKENDS if name != "wgmma"
)  # it serves two ops; auto takes it where it is measured


BATCHES = 390  # of the model step in an epoch of 50,000 images, and where train_batch is None


@dataclass(frozen=True)
class Options:
    """The options of the method (docs/method.md). Sizes are on the [0, 1] image scale, as 8/255.

    Errors: ValueError on creation, one line each. Which options only one objective reads is said by
    that objective (`objectives/`).
    """

    objective: str = MiUe.name  # what the poison step lowers: a name of `OBJECTIVES`
    # one perturbation per class, from the sum of its images' gradients, instead of one per image
    classwise: bool = False
    target_shift: int = 1  # images of class y are pushed towards class y + target_shift
    zeta: float = 0.1  # weight of the within-class distance
    denominator: str = "all"  # of nt_xent: "all" pairs, or "negatives" (cross-class pairs only)
    normalize_dim: bool = True  # 1/D inside the distance term
    temperature: float = 0.1
    eps: float = 8 / 255  # L-inf budget
    # budget of the first epoch, which rises linearly to eps in the last one; None: eps in all
    eps_0: float | None = None
    alpha_0: float = 0.2 / 255  # step size of the first epoch
    alpha_K: float | None = None  # where the step size anneals to; None: 4 / (255 * steps)
    steps: int = 10  # sign steps per poison batch and epoch
    epochs: int = 100
    poison_every: int = 1  # a poison step after every so many epochs, and after the last one
    batch: int = 512  # images per contrastive batch
    # images per batch of the model step; None: what gives about 390 batches an epoch, from 8 to
    # 128 images
    train_batch: int | None = 128
    lr: float = 0.1
    mixed: float = 0.0  # share of the images without perturbation in the loss of the model step
    # L-inf budget of an attack on the images of the model step, which is trained on what it finds,
    # and the attack's sign steps, each of 2.5 * attack / attack_steps
    attack: float = 0.0
    attack_steps: int = 5
    momentum: float = 0.9
    weight_decay: float = 1e-4
    seed: int = 7
    flip: float = 0.5  # probability of a horizontal flip
    # random changes of image + delta in each poison step, and cells of the perturbation: names of
    # `robust.TRANSFORMS`, separated by commas
    robust: str = ""
    eot: int = 1  # gradients that are averaged in a poison step, each of its own draw of `robust`
    random_start: bool = False  # start from uniform noise in +-eps instead of 0
    width: int | None = None  # filters of a built-in network's first stage; None: its own
    network_chunk: int | None = (
        None  # images per network launch, >= 2; None: whole batches. Does not change the objective
    )
    device: str | None = None  # None: "cuda" if there is one, else "cpu"
    # compute type of the network: float32, bfloat16 or float16 (autocast; weights stay float32), or
    # auto: bfloat16 where the device has matrix units for it, else float32
    dtype: str = "float32"
    delta_dtype: str = "float32"  # poison store: float32, float16, or int8 levels of eps / 127
    # memory format of the network while it trains; None: channels-last (1.5x on a CPU) where
    # oneDNN is right, see `prepare.channels_last`
    channels_last: bool | None = None
    # the frozen network as fused layers (`freeze`), CUDA graphs on a GPU; False: PyTorch's
    # autograd, call by call
    fused: bool = True
    fp8: bool = False  # the fused layers multiply e4m3 values; with dtype bfloat16. See `freeze`
    backend: str = "auto"  # of the ops

    def __post_init__(self) -> None:
        for name in ("steps", "epochs", "eot", "poison_every", "attack_steps"):
            ranges.whole("option", name, getattr(self, name))
        ranges.whole("option", "batch", self.batch, 2)
        checks.seed("option", self.seed)
        optional = ("train_batch", 2), ("network_chunk", 2), ("width", 1, ranges.WIDEST)
        for name, *limits in optional:
            if getattr(self, name) is not None:
                ranges.whole("option", name, getattr(self, name), *limits)
        ranges.budget("option", "eps", self.eps)
        if self.eps_0 is not None:
            ranges.budget("option", "eps_0", self.eps_0)
            self._number("eps_0", lambda v: v <= self.eps, f"at most eps = {self.eps:g}")
        self._number(
            "weight_decay",
            lambda v: 0 <= v <= ranges.LARGEST,
            f"a number from 0 to {ranges.LARGEST:g}",
        )
        for name in ("alpha_0",) if self.alpha_K is None else ("alpha_0", "alpha_K"):
            ranges.budget("option", name, getattr(self, name), zero=True)
        ranges.positive("option", "lr", self.lr)
        self._number("momentum", lambda v: 0 <= v < 1, "a number in [0, 1)")
        self._number("mixed", lambda v: 0 <= v <= 1, "a share from 0 to 1")
        ranges.budget("option", "attack", self.attack, zero=True)
        self._number("flip", lambda v: 0 <= v <= 1, "a probability from 0 to 1")
        if self.alpha_0 == 0 == self.last_alpha:
            messages.fail(
                "option",
                "alpha_0 and alpha_K",
                "one of them > 0 (nothing would be learnt)",
                "0 and 0",
            )
        for name, known in (
            ("objective", OBJECTIVES),
            ("dtype", precision.CHOICES),
            ("delta_dtype", _STORES),
            ("backend", _ALL_OPS),
        ):
            if isinstance(getattr(self, name), torch.dtype):
                object.__setattr__(self, name, str(getattr(self, name))[6:])
            value = getattr(self, name)
            if not isinstance(value, str) or value not in known:
                messages.fail("option", name, f"one of {', '.join(known)}", messages.short(value))
        for name in ("classwise", "random_start", "fused", "fp8"):
            ranges.switch("option", name, getattr(self, name))
        if self.channels_last is not None:
            ranges.switch("option", "channels_last", self.channels_last)
        if not read_robust(self.robust).draws and self.eot > 1:
            messages.fail(
                "option",
                "eot",
                "1 where robust draws nothing (the same gradient again)",
                messages.short(self.eot),
            )
        for objective in OBJECTIVES.values():
            objective.check_options(self)
        if self.fp8 and self.dtype != "bfloat16":
            messages.fail(
                "option", "fp8", "False without dtype bfloat16", f"True with {self.dtype}"
            )
        if self.classwise and self.delta_dtype == "int8":
            messages.fail(
                "option",
                "delta_dtype",
                "float32 or float16 with classwise",
                messages.short(self.delta_dtype),
            )
        object.__setattr__(self, "device", checks.device("option", self.device))

    def _number(self, name: str, good: Callable[[float], bool], expected: str) -> None:
        ranges.number("option", name, getattr(self, name), good, expected)

    @property
    def chosen(self) -> Objective:
        """The objective that `objective` names."""
        return OBJECTIVES[self.objective]

    @property
    def transforms(self) -> Robust:
        """The transforms that `robust` names."""
        return read_robust(self.robust)

    @property
    def place(self) -> torch.device:
        """The device that `device` names; None: a GPU if there is one."""
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def last_alpha(self) -> float:
        """The step size that the annealing ends at."""
        return 4 / (255 * self.steps) if self.alpha_K is None else self.alpha_K

    def alpha(self, epoch: int) -> float:
        """Step size of epoch 1..epochs: linear from alpha_0 towards alpha_K."""
        return (self.epochs - epoch + 1) / self.epochs * (
            self.alpha_0 - self.last_alpha
        ) + self.last_alpha

    def poisons(self, epoch: int) -> bool:
        """Whether epoch 1..epochs has a poison step."""
        return epoch % self.poison_every == 0 or epoch == self.epochs

    def budget(self, epoch: int) -> float:
        """L-inf budget of epoch 1..epochs: linear from eps_0 to eps."""
        if self.eps_0 is None or epoch == self.epochs:
            return self.eps
        left = (self.epochs - epoch) / (self.epochs - 1)
        return self.eps - left * (self.eps - self.eps_0)

    def learning_rate(self, epoch: int) -> float:
        """Learning rate of epoch 1..epochs: a cosine from lr towards 1e-5 lr."""
        return self.lr * (
            1e-5 + (1 - 1e-5) * 0.5 * (1 + math.cos(math.pi * (epoch - 1) / self.epochs))
        )

    def resolved(self, count: int) -> "Options":
        """A copy for `count` images on `place`: train_batch is a number, and dtype not auto."""
        batch = self.train_batch or min(128, max(8, round(count / BATCHES)))
        dtype = precision.compute_dtype(self.dtype, self.place)
        return replace(self, train_batch=batch, dtype=dtype)

    def with_(self, changes: Mapping[str, Any]) -> "Options":
        """A copy with `changes`. Errors: ValueError; for an unknown name it lists the options."""
        known = [field.name for field in fields(self)]
        for name in changes:
            if name not in known:
                messages.fail(
                    "generate", "option", f"one of {', '.join(known)}", messages.short(name)
                )
        return replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        """The options as JSON values, by name."""
        return asdict(self)
