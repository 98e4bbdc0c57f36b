"""The bi-level loop: a model step and a poison step per epoch, saved after each."""

import contextlib
import csv
import hashlib
import io
import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import data as datasets
from ..frozen import freeze
from ..support.draws import Draws
from ..support.output import progress_bar
from ..support.written import option, shown
from . import batches, checkpoint, store
from .descent import Descent, check_finite
from .folder import METRICS, of_another_run, remove_run
from .options import Options
from .training import Trainer

log = logging.getLogger("miue_fast")
# May differ between the two halves of a resumed run, because it does not change the objective.
_FREE_TO_CHANGE = {"network_chunk"}


class Interrupted(Exception):
    """Ctrl-C. The message says what is saved and how to go on; the command line ends with exit code
    130.
    """


class BiLevelRun:
    """One generation: the network that is trained, the perturbation that is made against it, and
    what of both is saved.

    network: on options.device, in its memory format; trained in place. feature: the layer whose
        output the objective looks at. keep: path of the checkpoint, or None: nothing is saved.
    name: what checkpoints call the network. overwrite, resumes: the arguments of `generate`.
    draws: what a network of the caller's own takes its random numbers from; None: it has none.
    """

    def __init__(
        self,
        network: nn.Module,
        feature: str,
        dataset: datasets.Dataset,
        options: Options,
        keep: Path | None,
        name: str,
        overwrite: bool = False,
        resumes: bool = True,
        draws: Draws | None = None,
    ):
        self.draws, self.draws_in_eval = draws, draws is not None and draws.drew
        self.network, self.feature, self.dataset = network, feature, dataset
        self.options, self.keep, self.name = options, keep, name
        self.printed = hashlib.sha256(repr(network).encode()).hexdigest()
        self.overwrite, self.resumes = overwrite, resumes
        # What `keep` names is another run's, until the first epoch of this one is saved.
        self.replaces = overwrite
        device = options.place
        self.images, self.labels = dataset.images.contiguous().to(device), dataset.labels.to(device)
        self.delta = store.empty(dataset, options, device)
        self.trainer = Trainer(
            network,
            self.images,
            self.labels,
            self.delta if options.chosen.trains_on_delta else None,
            options,
            draws,
        )
        network.eval()
        frozen = freeze(
            network,
            feature,
            dtype=getattr(torch, options.dtype),
            chunk=options.network_chunk,
            fused=options.fused,
            fp8=options.fp8,
            channels_last=bool(options.channels_last),
            backend=options.backend,
            channels=self.images.shape[1],
        )
        self.descend = Descent(frozen, self.images, self.delta, options, len(dataset.classes))
        self.history: list[dict[str, Any]] = []
        self.fingerprint = dataset.fingerprint if keep else None
        self.files = None
        if keep:
            self.files = datasets.Owned(keep.parent)
            self._check_room(keep)

    def _check_room(self, keep):
        """Room for the poison, and for a checkpoint beside the one that it replaces."""
        weights = [*self.network.state_dict().values(), *self.network.parameters(), self.delta]
        state = sum(tensor.nbytes for tensor in weights)
        there = keep.stat().st_size if keep.exists() else 0
        datasets.check_room(
            "generate",
            keep.parent,
            2 * state - there + 4 * self.images.numel(),
            "the poison and its checkpoints",
        )

    def resume(self) -> None:
        """Goes on from the checkpoint. Errors: ValueError: it is of other data or options, or
        damaged.
        """
        assert self.keep is not None and self.files is not None
        tensors, header = checkpoint.load(self.keep, checkpoint.room(self.network, self.delta))
        checkpoint.check_header(self.keep, header)
        now = self._header()
        if header["fingerprint"] != now["fingerprint"]:
            raise ValueError(
                f"{self.keep}: expected a checkpoint of these images and labels, "
                "got one of another data set; "
                f"choose another folder or set {option('overwrite', True)}"
            )
        # A checkpoint of before an option was there ran with its default.
        before = {**Options().as_dict(), **header["options"]}
        told = [
            f"{shown('generate', k)} = {before.get(k)!r} (now {v!r})"
            for k, v in now["options"].items()
            if before.get(k) != v
        ]
        if told:
            raise ValueError(
                f"{self.keep}: expected a checkpoint of the same options, got {', '.join(told)}; "
                f"repeat them, choose another folder or set {option('overwrite', True)}"
            )
        checkpoint.restore(self.keep, tensors, self.network, self.trainer.optimizer, self.delta)
        self.files.adopt(checkpoint.NAME)
        self.history = header["history"]
        # A run that was killed while it took another one's place has the other's poison beside it.
        if len(self.history) < self.options.epochs or of_another_run(self.keep.parent, header):
            remove_run(self.keep.parent, but=(checkpoint.NAME, METRICS))
        if header.get("network", now["network"]) != now["network"]:
            log.warning(
                "resumed with a model that prints differently: "
                "options of its layers (dropout, ...) may have changed"
            )
        for what in ("torch", "threads"):
            if header[what] != now[what]:
                log.warning(
                    "resumed with another %s (%s, was %s): the result may differ in its last bits",
                    what,
                    now[what],
                    header[what],
                )

    def finish(self, progress: bool, board: Any) -> torch.Tensor:
        """Runs the epochs that are left and returns the perturbation, float32 [N, C, H, W] on the
        CPU. board: a tensorboard writer or None. Errors: as for `generate`.
        """
        o, done = self.options, len(self.history)
        with progress_bar(
            total=self._work(o.epochs),
            initial=self._work(done),
            unit="image-step",
            unit_scale=True,
            disable=not progress,
        ) as bar:
            try:
                if not done and o.random_start:
                    store.start_randomly(self.delta, self.images, o)
                for number in range(done + 1, o.epochs + 1):
                    bar.set_description(f"epoch {number}/{o.epochs}")
                    row = self.epoch(number, bar.update)
                    loss = row["poison_loss"]
                    bar.set_postfix(
                        train=f"{row['train_accuracy']:.1f}%",
                        poison="-" if loss is None else f"{loss:.3g}",
                    )
                    self.history.append(row)
                    self._save()
                    for name, value in row.items():
                        if board is not None and name != "epoch" and value is not None:
                            board.add_scalar(name, value, number)
                return self._result()
            except KeyboardInterrupt:
                raise Interrupted(self._interrupted()) from None

    def _work(self, epochs):
        """The image-steps of the first epochs: one per image of a model step, options.steps per
        image of a poison step.
        """
        o = self.options
        poisons = sum(o.poisons(number) for number in range(1, epochs + 1))
        return len(self.images) * (epochs + o.steps * poisons)

    def epoch(self, number: int, tick: Callable[[int], object]) -> dict[str, Any]:
        """One model step and, where options.poison_every wants it, one poison step, without saving
        anything. Returns the row of metrics.csv; what only a poison step has is None without one.
        `tick(images done)` is called after each batch. Errors: ValueError.
        """
        o, start = self.options, time.perf_counter()
        if self.draws is not None:
            self.draws.manual_seed(batches.derive(o.seed, number, "dropout"))
        train_loss, accuracy = self.trainer.epoch(number, tick)
        middle, poisons, poison_loss = time.perf_counter(), o.poisons(number), None
        with (self.draws if self.draws_in_eval else None) or contextlib.nullcontext():
            if poisons:
                poison_loss = self.poison_step(number, tick)
        if poisons and o.alpha(number) and not self.delta.any():
            raise ValueError(
                f"generate: epoch {number}: delta: expected a perturbation, got zeros: "
                f"every gradient is zero or below half a level of the {o.delta_dtype} store"
            )
        end = time.perf_counter()
        return {
            "epoch": number,
            "train_loss": train_loss,
            "train_accuracy": accuracy,
            "poison_loss": poison_loss,
            "alpha": o.alpha(number) if poisons else None,
            "lr": o.learning_rate(number),
            "image_steps_per_s": len(self.images) * o.steps / (end - middle) if poisons else None,
            "seconds": end - start,
        }

    def poison_step(self, epoch: int, tick: Callable[[int], object]) -> float:
        """options.steps steps on every contrastive batch, against the network as it is now.
        Returns the mean over the images of the last step's loss. Errors: ValueError.
        """
        o, device, count = self.options, self.images.device, len(self.images)
        order, flips = batches.order_and_flips(count, o.flip, o.seed, epoch, "poison step")
        slices = batches.poison_slices(self.dataset.labels[order], o.batch)
        order, flips = order.to(device), flips.to(device)
        losses = []
        self.descend.network.refold()
        for number, part in enumerate(slices, 1):
            index = order[part]
            draws = partial(batches.step_generator, o.seed, epoch, number)
            loss, bad = self.descend(
                self.labels[index], index, flips[part], o.alpha(epoch), draws, o.budget(epoch)
            )
            check_finite(
                f"generate: epoch {epoch}, batch {number} of {len(slices)} of the poison step",
                bad,
                (
                    f"lower {shown('generate', 'lr')} ({o.lr}) "
                    f"or use {shown('generate', 'dtype')} float32"
                ),
            )
            losses.append(loss * len(index))
            tick(len(index) * o.steps)
        return float(torch.stack(losses).sum()) / count

    def _result(self):
        delta = store.finished(self.delta, self.dataset.labels, self.options)
        store.warn_unchanged(delta, self.options.eps)
        if self.keep:
            datasets.save_poison(self.keep.parent, delta, self.dataset, self._header()["options"])
            self._write_metrics()  # a run may have ended between its last checkpoint and this file
        return delta

    def _header(self):
        options = {k: v for k, v in self.options.as_dict().items() if k not in _FREE_TO_CHANGE}
        return {
            "epoch": len(self.history),
            "options": {"model": self.name, "feature": self.feature, **options},
            "fingerprint": self.fingerprint,
            "network": self.printed,
            "history": self.history,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }

    def _save(self):
        if self.keep is None:
            return
        checkpoint.save(
            self.keep,
            checkpoint.gather(self.network, self.trainer.optimizer, self.delta),
            self._header(),
            self.files,
        )
        if self.replaces:
            # Nobody may take the replaced run's poison or images for this one's.
            self.replaces = False
            remove_run(self.keep.parent, but=(checkpoint.NAME,))
        self._write_metrics()

    def _write_metrics(self):
        assert self.files is not None
        table = io.StringIO()
        writer = csv.DictWriter(table, self.history[0])
        writer.writeheader()
        writer.writerows(self.history)
        self.files.write({METRICS: lambda stream: stream.write(table.getvalue().encode())})

    def _interrupted(self):
        if self.keep is None:
            return "interrupted: nothing is saved (no output folder)"
        epoch = 0 if self.replaces else checkpoint.saved_epoch(self.keep)
        if not epoch:
            return f"interrupted: no epoch was finished, nothing is saved in {self.keep.parent}"
        words = (
            (shown("generate", "overwrite"), self.overwrite),
            (option("resume", False), not self.resumes),
        )
        without = [word for word, there in words if there]
        again = f"the same command{' without ' if without else ''}{' and '.join(without)}"
        return (
            f"interrupted: epoch {epoch} of {self.options.epochs} is saved in {self.keep}; "
            f"{again} goes on from there"
        )
