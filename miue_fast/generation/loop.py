"""The bi-level loop: a model step and a poison step per epoch (docs/method.md)."""

import contextlib
import csv
import hashlib
import io
import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from .. import data as datasets
from .. import models
from ..data import atomic
from ..frozen import find_layer, freeze
from ..ops import projected_step_
from ..support import calls, messages
from ..support.draws import Draws, seeded_globally
from ..support.output import progress_bar
from ..support.written import option, shown
from . import batches, checkpoint
from .network import channels_last
from .objectives import default_layer, on_logits, trains_on_delta
from .options import Options, choose
from .step import Descent, check_finite, check_labels
from .train import Trainer

log = logging.getLogger("miue_fast")
METRICS = "metrics.csv"
_FREE_TO_CHANGE = {
    "network_chunk"
}  # between the two halves of a resumed run: it does not change the objective


class Interrupted(Exception):
    """Ctrl-C. The message says what is saved and how to go on; the command line ends with exit code
    130.
    """


@dataclass
class Result:
    """delta: fp32 [N, C, H, W] on the CPU, within +-eps. history: one dict per epoch, as in
    metrics.csv.
    """

    delta: torch.Tensor
    dataset: datasets.Dataset
    history: list[dict]
    options: Options


@calls.ordinary()
@torch.enable_grad()  # whatever the caller runs in
def generate(
    data,
    out=None,
    *,
    preset="paper",
    model="resnet18",
    feature=None,
    device=None,
    resume=True,
    overwrite=False,
    progress=True,
    tensorboard=False,
    **options,
):
    """One perturbation per image such that a network trained on image + perturbation does not
    generalise (MI-UE, ICLR 2026).

    Args:
        data: a `Dataset`, or what `data.load` of this package takes (a folder, an .npz file,
            (images, labels)).
        out: folder for poison.safetensors, manifest.json, metrics.csv and the checkpoint; None
            writes nothing.
        preset: "paper", "reference" or "paper-text"; **options change single fields of `Options`.
        model: a name of `models.NAMES`, an nn.Module (trained in place: no other thread may use it
            meanwhile), or a callable: number of classes -> nn.Module. It takes images [B, C, H, W]
                on the [0, 1] scale and normalises them itself.
        feature: name of the layer whose flattened output is the features; None: `models.FEATURE` of
            a named model, else "avgpool". For the objectives em and tap: the layer that gives the
            logits; None: "fc", or the last nn.Linear of a model of your own.
        resume: go on from the checkpoint in `out`, if there is one; False refuses a folder that has
            one.
        overwrite: start again, replacing what an earlier run left in `out`.
        tensorboard: also write event files to out/tensorboard.

    Returns: a Result. Memory on the device: images (uint8), delta (options.delta_dtype) and one
        network launch. Out of memory
    halves network_chunk, never the contrastive batch. The same call on the same machine, versions
    and threads gives the same bits, also when it was killed and resumed. Errors: ValueError,
    OSError, BackendError, Interrupted; `out` then holds the last whole epoch.
    """
    calls.default_dtype("generate")
    options = choose(preset, {**({} if device is None else {"device": device}), **options})
    with contextlib.ExitStack() as held:
        if out is not None:
            held.enter_context(datasets.only_writer(datasets.check_writable(Path(out))))
        keep = None if out is None else _open_folder(Path(out), resume, overwrite, options)
        if tensorboard and keep is None:
            messages.fail("generate", "tensorboard", "an output folder to write to", "out=None")
        dataset = data if isinstance(data, datasets.Dataset) else datasets.load(data)
        check_labels("generate", dataset.labels, len(dataset.images), torch.device("cpu"))
        if keep and dataset.root is not None:
            datasets.check_outside(keep.parent, dataset.root)
        if options.objective == "tap" and options.target_shift % len(dataset.classes) == 0:
            messages.fail(
                "generate",
                "target_shift",
                f"no multiple of the {len(dataset.classes)} classes",
                options.target_shift,
            )
        if options.objective == "random":
            return _random(dataset, options, keep, overwrite)
        device = torch.device(options.device)
        held.enter_context(
            calls.deterministic_cudnn() if device.type == "cuda" else contextlib.nullcontext()
        )
        with _board(keep, tensorboard) as board:
            draws = Draws("generate", batches.derive(options.seed, 0, "network"))
            network = _network(model, dataset, options, draws).to(device)
            held.enter_context(calls.borrowed("generate", network))
            feature = feature or default_layer(
                options.objective, model if isinstance(model, str) else network
            )
            find_layer("generate", network, feature)
            draws.drew = False
            with draws:
                network, layout = _in_layout(network, options, dataset, device)
                options = replace(options, channels_last=layout)
                _probe(
                    network, feature, dataset, device, logits_wanted=on_logits(options.objective)
                )
            run = _Run(
                network,
                feature,
                dataset,
                options,
                keep,
                _name(model),
                overwrite,
                resume,
                None if isinstance(model, str) else draws,
            )
            if keep and keep.exists() and not overwrite:
                run.resume()
            return run.finish(progress, board)


class _Run:
    def __init__(
        self,
        network,
        feature,
        dataset,
        options,
        keep,
        name,
        overwrite=False,
        resumes=True,
        draws=None,
    ):
        self.draws, self.draws_in_eval = draws, draws is not None and draws.drew
        self.network, self.feature, self.dataset, self.options, self.keep, self.name = (
            network,
            feature,
            dataset,
            options,
            keep,
            name,
        )
        self.printed = hashlib.sha256(repr(network).encode()).hexdigest()
        self.overwrite, self.resumes = overwrite, resumes
        # what `keep` names is another run's, until the first epoch of this one is saved
        self.replaces = overwrite
        self.files = datasets.Owned(keep.parent) if keep else None
        device = torch.device(options.device)
        self.images, self.labels = dataset.images.contiguous().to(device), dataset.labels.to(device)
        rows = len(dataset.classes) if options.classwise else len(self.images)
        self.delta = torch.zeros(
            (rows, *self.images.shape[1:]), dtype=getattr(torch, options.delta_dtype), device=device
        )
        self.trainer = Trainer(
            network,
            self.images,
            self.labels,
            self.delta if trains_on_delta(options.objective) else None,
            options,
            draws,
        )
        network.eval()
        net = freeze(
            network,
            feature,
            dtype=getattr(torch, options.dtype),
            chunk=options.network_chunk,
            fused=options.fused,
            fp8=options.fp8,
            channels_last=options.channels_last,
            backend=options.backend,
            channels=self.images.shape[1],
        )
        self.descend = Descent(net, self.images, self.delta, options, len(dataset.classes))
        self.history = []
        self.fingerprint = dataset.fingerprint if keep else None
        if keep:
            self._check_room()

    def _check_room(self):
        """The poison, and a checkpoint beside the one that it replaces."""
        state = sum(
            tensor.nbytes
            for tensor in [
                *self.network.state_dict().values(),
                *self.network.parameters(),
                self.delta,
            ]
        )
        there = self.keep.stat().st_size if self.keep.exists() else 0
        datasets.check_room(
            "generate",
            self.keep.parent,
            2 * state - there + 4 * self.images.numel(),
            "the poison and its checkpoints",
        )

    def resume(self):
        tensors, header = checkpoint.load(self.keep, checkpoint.room(self.network, self.delta))
        checkpoint.check_header(self.keep, header)
        now = self._header()
        if header["fingerprint"] != now["fingerprint"]:
            raise ValueError(
                f"{self.keep}: expected a checkpoint of these images and labels, "
                "got one of another data set; "
                f"choose another folder or set {option('overwrite', True)}"
            )
        before = header["options"]
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
        if len(self.history) < self.options.epochs or _of_another_run(
            self.keep.parent, header
        ):  # killed while it took that one's place
            _remove_run(self.keep.parent, but=(checkpoint.NAME, METRICS))
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

    def finish(self, progress, board):
        o, count = self.options, len(self.images)
        done = len(self.history)
        with progress_bar(
            total=o.epochs * count * (o.steps + 1),
            initial=done * count * (o.steps + 1),
            unit="image-step",
            unit_scale=True,
            disable=not progress,
        ) as bar:
            try:
                if not done and o.random_start:
                    self._random_start()
                for epoch in range(done + 1, o.epochs + 1):
                    bar.set_description(f"epoch {epoch}/{o.epochs}")
                    row = self._epoch(epoch, bar.update)
                    bar.set_postfix(
                        train=f"{row['train_accuracy']:.1f}%", poison=f"{row['poison_loss']:.3g}"
                    )
                    self.history.append(row)
                    self._save()
                    for name, value in row.items():
                        if board is not None and name != "epoch":
                            board.add_scalar(name, value, epoch)
                return self._result()
            except KeyboardInterrupt:
                raise Interrupted(self._interrupted()) from None

    def _epoch(self, epoch, tick):
        o, start = self.options, time.perf_counter()
        if self.draws is not None:
            self.draws.manual_seed(batches.derive(o.seed, epoch, "dropout"))
        train_loss, accuracy = self.trainer.epoch(epoch, tick)
        middle = time.perf_counter()
        with self.draws if self.draws_in_eval else contextlib.nullcontext():
            poison_loss = self._poison_step(epoch, tick)
        if o.alpha(epoch) and not self.delta.any():
            raise ValueError(
                f"generate: epoch {epoch}: delta: expected a perturbation, got zeros: "
                f"every gradient is zero or below half a level of the {o.delta_dtype} store"
            )
        end = time.perf_counter()
        return {
            "epoch": epoch,
            "train_loss": train_loss,
            "train_accuracy": accuracy,
            "poison_loss": poison_loss,
            "alpha": o.alpha(epoch),
            "lr": o.learning_rate(epoch),
            "image_steps_per_s": len(self.images) * o.steps / (end - middle),
            "seconds": end - start,
        }

    def _poison_step(self, epoch, tick):
        """Mean over the images of the last step's loss."""
        o, device, count = self.options, self.images.device, len(self.images)
        order, flips = batches.order_and_flips(count, o.flip, o.seed, epoch, "poison step")
        slices = batches.poison_slices(self.dataset.labels[order], o.batch)
        order, flips = order.to(device), flips.to(device)
        losses = []
        self.descend.net.refold()
        for number, part in enumerate(slices, 1):
            index = order[part]
            loss, bad = self.descend(self.labels[index], index, flips[part], o.alpha(epoch))
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

    def _random_start(self):
        """Uniform noise in +-eps (or its levels), projected so that image + delta stays in [0,
        1].
        """
        o, g = self.options, batches.generator(self.options.seed, 0, "random start")
        for start in range(0, len(self.delta), o.batch):
            rows = slice(start, start + o.batch)
            noise = torch.rand(self.delta[rows].shape, generator=g, dtype=torch.float32) * 2 - 1
            self.delta[rows] = (
                (noise * 127).round().to(torch.int8) if o.delta_dtype == "int8" else noise * o.eps
            )
            if o.classwise:  # no image of its own to stay within
                continue
            still = torch.zeros(noise.shape, device=self.delta.device)
            projected_step_(
                self.delta[rows],
                None,
                still,
                self.images[rows],
                alpha=0.0,
                eps=o.eps,
                backend=o.backend,
            )

    def _result(self):
        o = self.options
        delta = self.delta.float()
        if self.delta.dtype == torch.int8:
            delta *= o.eps / 127
        delta = delta.clamp_(-o.eps, o.eps).cpu()
        if o.classwise:
            delta = delta[self.dataset.labels]
        _warn_unchanged(delta, o.eps)
        if self.keep:
            datasets.save_poison(self.keep.parent, delta, self.dataset, self._header()["options"])
            self._write_metrics()  # a run may have ended between its last checkpoint and this file
        return Result(delta, self.dataset, self.history, o)

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
            self.replaces = False
            _remove_run(
                self.keep.parent, but=(checkpoint.NAME,)
            )  # nobody may take the replaced run's poison or images for this one's
        self._write_metrics()

    def _write_metrics(self):
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


def _warn_unchanged(delta, eps):
    """A published image has 8 bits: what rounds to zero there protects nothing."""
    unchanged = int((~datasets.quantise(delta, eps).flatten(1).any(1)).sum())
    if unchanged:
        log.warning(
            (
                "%d of %d images stay as they are: their perturbation is zero, "
                "or below half a level of 8-bit images"
            ),
            unchanged,
            len(delta),
        )


def _random(dataset, options, keep, overwrite):
    """Signs of a generator of the seed, one set per image, or per class; no network, no
    checkpoint.
    """
    rows = (
        dataset.select([int((dataset.labels == k).nonzero()[0]) for k in dataset.labels.unique()])
        if options.classwise
        else dataset
    )
    delta = datasets.random_noise(rows, options.eps, options.seed, kind="sign")
    if options.classwise:
        delta = delta[dataset.labels.unique(return_inverse=True)[1]]
    _warn_unchanged(delta, options.eps)
    if keep:
        if overwrite:
            _remove_run(keep.parent)
        datasets.save_poison(keep.parent, delta, dataset, options.as_dict())
    return Result(delta, dataset, [], options)


def _remove_run(folder, but=()):
    """Removes what an earlier run left in `folder` and what it exported there, but for the files of
    the names `but`.

    What other commands wrote into the same folder (reports and their cells, evaluations, exports
    under names of the user's own) stays.
    The manifest goes last: it tells a run that was killed here whose files are left.
    """
    images = folder / datasets.IMAGES
    datasets.Owned(images).remove(datasets.exported_files(images))
    run = (checkpoint.NAME, METRICS, *datasets.EXPORTS.values(), *datasets.POISON_FILES)
    datasets.Owned(folder).remove(name for name in run if name not in but)


def _open_folder(folder, resume, overwrite, options):
    """The checkpoint's path in a folder that can be written. Refuses to replace anything unless
    asked, and what others wrote anyway.

    A run goes on from its checkpoint; the objective random has none, and makes the same poison
    again."""
    atomic.sweep(folder)
    path = folder / checkpoint.NAME
    if path.is_dir():
        messages.fail("generate", "out", "no folder under the name of the checkpoint", str(path))
    mine = (
        [checkpoint.NAME] if overwrite else []
    )  # one that a run goes on from proves itself when it is read
    files = datasets.Owned(folder)
    files.check("generate", [*mine, *datasets.POISON_FILES, METRICS])
    for part in [files, datasets.Owned(folder / datasets.IMAGES)] if overwrite else [files]:
        part.check_access("generate")
    if overwrite or (resume and options.objective != "random" and path.exists()):
        return path
    if (
        resume
        and options.objective == "random"
        and not path.exists()
        and _made_with(folder, options)
    ):
        return path
    for name in (checkpoint.NAME, *datasets.POISON_FILES, METRICS):
        if (folder / name).exists():
            told = (
                f"expected an empty folder or a run to resume, got {folder / name}; "
                f"set {option('overwrite', True)} to replace it"
            )
            raise ValueError(f"generate: out: {told}")
    return path


def _made_with(folder, options):
    """Whether the poison in `folder` is one of these options."""
    try:
        return datasets.load_poison(folder)[1]["options"] == options.as_dict()
    except ValueError:  # none, or someone else's
        return False


def _of_another_run(folder, header):
    """Whether the manifest in `folder` is that of other options or images than a checkpoint's."""
    if not (folder / datasets.POISON_FILES[1]).exists():
        return False
    try:
        found = datasets.read_manifest(folder / datasets.POISON_FILES[1])
    except ValueError:  # not ours to remove
        return False
    return (found["options"], found["fingerprint"]) != (header["options"], header["fingerprint"])


def _network(model, dataset, options, draws):
    classes, (channels, height, width) = len(dataset.classes), dataset.images.shape[1:]
    if isinstance(model, str):
        if model not in models.NAMES:
            messages.fail(
                "generate",
                "model",
                f"{', '.join(models.NAMES)}, an nn.Module or a callable",
                repr(model),
            )
        with draws:
            model = models.build(
                model, classes, width=options.width, size=min(height, width), channels=channels
            )
    elif not isinstance(model, nn.Module):
        with seeded_globally(draws, torch.device(options.device)):
            model = model(classes) if callable(model) else model
        if not isinstance(model, nn.Module):
            messages.fail(
                "generate",
                "model",
                "a name, an nn.Module or a callable that returns one",
                type(model).__name__,
            )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        messages.fail("generate", "model", "parameters to train (requires_grad)", "none")
    if any(tensor.is_inference() for tensor in [*model.parameters(), *model.buffers()]):
        messages.fail(
            "generate",
            "model",
            "ordinary tensors as weights",
            "tensors that were made in torch.inference_mode",
        )
    for name, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor):
            messages.fail(
                "generate", "model", "a state_dict of tensors", f"{name}: {type(value).__name__}"
            )
    return model


def _name(model):
    if isinstance(model, str):
        return model
    kind = type(model) if isinstance(model, nn.Module) else model
    return getattr(kind, "__qualname__", type(model).__qualname__)


def _in_layout(network, options, dataset, device):
    """The network in the memory format it trains in, and whether that is channels-last: where
    nothing is asked for, not if its forward then fails (`.view` of a channels-last activation
    does)."""
    wanted = channels_last("generate", network, options.channels_last, device)
    if wanted:
        network = network.to(memory_format=torch.channels_last)
    if wanted and options.channels_last is None:
        try:
            with torch.no_grad():
                network.eval()(
                    dataset.images[:2].to(device, memory_format=torch.channels_last) / 255
                )
        except RuntimeError as error:
            log.info(
                "the network trains in contiguous memory: channels-last fails (%s)",
                str(error).splitlines()[0],
            )
            return network.to(memory_format=torch.contiguous_format), False
    return network, wanted


def _probe(network, feature, dataset, device, logits_wanted):
    """Two images through the network: what cannot work is said before the work starts."""
    x = dataset.images[:2].to(device) / 255
    classes = len(dataset.classes)
    network.eval()
    with torch.no_grad():
        try:
            logits = network(x)
            outputs = freeze(network, feature, fused=False).forward(x)
        except RuntimeError as error:
            messages.fail(
                "generate",
                "model",
                f"a network for images {list(x.shape[1:])}",
                f"an error: {str(error).splitlines()[0]}",
            )
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or logits.shape[1] < classes:
        messages.fail("generate", "model", f"logits [2, {classes}]", messages.describe(logits))
    if logits_wanted and (
        outputs.shape != logits.shape
        or not torch.allclose(outputs, logits.to(outputs.dtype), rtol=1e-3, atol=1e-4)
    ):
        messages.fail(
            "generate",
            "feature",
            "the layer that gives the logits",
            f"{feature!r} ({messages.describe(outputs)})",
        )


@contextlib.contextmanager
def _board(keep, wanted):
    if not wanted:
        yield None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            f"generate: tensorboard: expected the package tensorboard, got {error}; "
            "pip install tensorboard"
        ) from None
    with SummaryWriter(str(keep.with_name("tensorboard"))) as board:
        yield board
