"""The commands of `miue-fast`, each a few lines around the public functions. `main` has the exit
codes; the arguments are in `arguments.py`.
"""

import json
import logging
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import data, models
from ..data.export import FORMATS, LOSSY
from ..dispatch.registry import BackendError
from ..evaluation import check_options, evaluate, poisoned_images
from ..evaluation.start import read_state
from ..frozen import find_layer
from ..generation import Interrupted, generate
from ..generation.checkpoint import NAME as CHECKPOINT
from ..generation.checkpoint import unfinished
from ..generation.folder import METRICS
from ..generation.presets import choose
from ..plots.evaluation import check_suffix, figure
from ..plots.evaluation import missing as figure_missing
from ..support import ranges
from ..support.messages import LONGEST, fail, printable
from ..support.output import say, start_log
from ..support.written import option, written_as
from .arguments import given, parse

RESERVED = {
    *data.POISON_FILES,
    CHECKPOINT,
    METRICS,
    data.LIST,
    data.NOTE,
    "report.json",
}  # no place for an evaluation
NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "Storage size calculation overflowed",
)  # in torch's RuntimeErrors


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    0: done. 1: `verify` found a difference, or `demo` missed its numbers. 2: bad input, or a
    machine that cannot do it, with one line on stderr. 3: done, but some images were unreadable
    (they are listed on stderr). 130: interrupted.
    """
    start_log()
    try:
        args = parse(argv)
        with written_as(args.written):
            _check(args)
            return COMMANDS[args.command](args)
    except Interrupted as told:
        return _complain(told, 130)
    except KeyboardInterrupt:
        return _complain(
            "interrupted: what was finished before is kept; the same command starts again", 130
        )
    except (ValueError, BackendError, OSError) as error:
        return _complain(error, 2)
    except (MemoryError, OverflowError, RuntimeError) as error:
        told = _too_large(error)
        if told is None:
            raise
        return _complain(told, 2)


def _too_large(error):
    """One line about sizes that fit no memory or numbers that fit no type of torch, or None if the
    error is a fault of this program.
    """
    text = (str(error) or "none left").splitlines()[0]
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        sign in text for sign in NO_MEMORY
    ):
        return f"memory: expected enough, got: {text}; choose smaller sizes (width, batch, images)"
    if isinstance(error, OverflowError) or "without overflow" in text:
        return f"numbers: expected such as 32 bits hold, got: {text}; choose smaller ones"
    return None


def _complain(error, code):
    say(f"miue-fast: {_text(error) or type(error).__name__}", error=True)
    return code


def _text(error):
    """An exception's text as one line."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return printable(" ".join(text.split()), most=None)


# the commands


def _check(args):
    """Judges every option, and whether every path can be looked up, before anything is read or
    made.
    """
    for name, value in vars(args).items():
        if isinstance(value, Path):
            ranges.reachable("path", name, value)
    if hasattr(args, "size"):
        data.check_selection(args.size, args.per_class)
    if args.command in CHECKS:
        CHECKS[args.command](args)


def _check_generate(args):
    options = choose(args.preset, given(args))
    _check_lossy("generate", args.export, args)
    if args.export == "pickle":
        data.check_pickle(options.eps)
    if options.chosen.outputs is not None:
        model = options.chosen.source("generate", args.model)
        with torch.device("meta"):  # no memory for its weights
            network = models.build(model, 2, width=options.width, size=args.size or 32)
        if args.feature is not None:
            find_layer("generate", network, args.feature)
        args.weights = sum(tensor.nbytes for tensor in network.state_dict().values())


def _check_export_options(args):
    data.check_system()
    _check_lossy("export", args.format, args)
    if args.format in ("pt", "pickle") and args.rounding != "nearest":
        fail(
            "export",
            "rounding",
            f"'nearest' for {args.format}, which holds the perturbation",
            repr(args.rounding),
        )
    if hasattr(args, "eps"):
        data.budget(args.eps)
        if args.format == "pickle":
            data.check_pickle(args.eps)


def _check_lossy(command, form, args):
    if form in LOSSY and not args.allow_lossy:
        fail(
            command,
            "image_format",
            "a lossless one, or --allow-lossy (JPEG breaks the budget)",
            repr(form),
        )


def _check_evaluate(args):
    names = (
        "victim",
        "epochs",
        "seeds",
        "lr",
        "batch",
        "crop",
        "eps",
        "noise",
        "device",
        "dtype",
        "defence",
        "poison_ratio",
    )
    check_options(**{name: getattr(args, name) for name in names})
    if args.init is not None:
        args.init = read_state(args.init)


def _check_report(args):
    from ..report import check_jobs

    check_jobs(args.jobs)


CHECKS = {
    "generate": _check_generate,
    "export": _check_export_options,
    "verify": lambda args: data.budget(args.eps),
    "evaluate": _check_evaluate,
    "report": _check_report,
    "demo": lambda args: ranges.whole("demo", "seed", args.seed, 0),
}


def _load(args):
    return data.load(args.data, size=args.size, split=args.split, per_class=args.per_class)


def _unreadable(*datasets):
    """Lists what was left out and returns the exit code."""
    left_out = [pair for dataset in datasets for pair in dataset.unreadable]
    for name, reason in left_out:
        say(
            f"miue-fast: unreadable, left out: {printable(f'{name}: {reason}', most=LONGEST)}",
            error=True,
        )
    return 3 if left_out else 0


def _generate(args):
    target = args.out / data.EXPORTS.get(args.export, data.IMAGES)
    replace = args.overwrite or (
        args.resume and any((args.out / name).exists() for name in (CHECKPOINT, *data.POISON_FILES))
    )
    if data.is_tree(args.data):
        data.check_outside(args.out, args.data)
    data.check_writable(args.out)
    dataset = _load(args)
    code = _unreadable(dataset)
    options = given(args)
    _check_export(dataset, target, args, choose(args.preset, options).eps, replace)
    result = generate(
        dataset,
        args.out,
        preset=args.preset,
        model=args.model,
        feature=args.feature,
        resume=args.resume,
        overwrite=args.overwrite,
        progress=not args.quiet,
        tensorboard=args.tensorboard,
        **options,
    )
    say(
        printable(
            (
                f"poison of {len(dataset)} images, "
                f"budget {255 * result.options.eps:.3g}/255: {args.out}"
            ),
            most=None,
        )
    )
    if args.export:
        try:
            _write(
                dataset,
                result.delta,
                target,
                args.export,
                result.options.eps,
                args.allow_lossy,
                "nearest",
                overwrite=replace,
            )
        except KeyboardInterrupt:
            words = [
                word
                for word, there in (
                    ("--overwrite", args.overwrite),
                    ("--no-resume", not args.resume),
                )
                if there
            ]
            again = f"the same command{' without ' if words else ''}{' and '.join(words)}"
            raise Interrupted(
                f"interrupted: the poison is saved, {target} is incomplete; "
                f"{again} exports it again"
            ) from None
        except (ValueError, OSError, MemoryError) as error:
            told = _text(error) or "out of memory"
            raise BackendError(
                f"{told}; the poison is saved; once that is mended, this exports it: "
                f"{_export_command(args)}"
            ) from error
    return code


def _export_command(args):
    """The command line that exports a finished poison to a new place."""
    new = args.out.with_name(f"{args.out.name}-export") / data.EXPORTS.get(args.export, "")
    words = [
        "miue-fast",
        "export",
        args.out,
        "--data",
        args.data,
        "--to",
        new,
        "--format",
        args.export,
    ]
    for name in ("size", "split", "per_class"):
        if getattr(args, name) is not None:
            words += [f"--{name.replace('_', '-')}", getattr(args, name)]
    return shlex.join(map(str, [*words, *(["--allow-lossy"] if args.allow_lossy else [])]))


def _check_export(dataset, target, args, eps, replace):
    """Says now, not after hours of work, what would stop the export."""
    if args.export in FORMATS:
        run = 3 * 4 * dataset.images.numel() + 4 * getattr(
            args, "weights", 0
        )  # the poison, and two checkpoints with momentum
        data.check_folder(
            dataset,
            target,
            eps=eps,
            image_format=args.export,
            allow_lossy=args.allow_lossy,
            overwrite=replace,
            beside=0 if replace else run,
        )
        others = (
            []
            if args.overwrite or unfinished(args.out / CHECKPOINT)
            else data.other_files(dataset, target, args.export)
        )
        if others:
            fail(
                "generate",
                "export",
                f"only images of this export in {target} (or --overwrite, which removes others)",
                others[0],
            )
    elif args.export is not None:
        data.check_file(target, args.export, eps=eps, overwrite=replace)


def _write(dataset, delta, target, form, eps, allow_lossy, rounding, overwrite):
    if form == "pt":
        data.export_pt(dataset, delta, target, eps=eps, overwrite=overwrite)
    elif form == "pickle":
        data.export_pickle(dataset, delta, target, eps=eps, overwrite=overwrite)
    elif form == "npz":
        data.export_npz(dataset, delta, target, eps=eps, rounding=rounding, overwrite=overwrite)
    else:
        data.export_folder(
            dataset,
            delta,
            target,
            eps=eps,
            image_format=form,
            allow_lossy=allow_lossy,
            rounding=rounding,
            overwrite=overwrite,
        )
    say(printable(f"exported {len(dataset)} as {form}: {target}", most=None))


def _export(args):
    if (
        args.format not in FORMATS
    ):  # before the images are read, which takes long; a folder of images is checked with them
        data.check_file(args.to, args.format, eps=getattr(args, "eps", 0), overwrite=args.overwrite)
    elif args.to.is_dir() and any(args.to.iterdir()) and not args.overwrite:
        fail(
            "export",
            "out",
            f"a new or empty folder (or {option('overwrite', True)})",
            f"{args.to}, which is not empty",
        )
    dataset = _load(args)
    delta, manifest = data.load_poison(args.poison, dataset)
    eps = getattr(args, "eps", manifest["eps"] if manifest else 1.0)
    try:
        _write(
            dataset,
            delta,
            args.to,
            args.format,
            eps,
            args.allow_lossy,
            args.rounding,
            args.overwrite,
        )
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted: {args.to} is incomplete; the same command with --overwrite finishes it"
        ) from None
    return _unreadable(dataset)


def _verify(args):
    clean = _load(args) if args.size or args.split else args.data
    proof = data.verify(clean, args.out, eps=args.eps, per_class=args.per_class)
    for problem in proof.problems:
        say(printable(problem, most=None))
    if proof.problem_count > len(proof.problems):
        say(f"... and {proof.problem_count - len(proof.problems)} more")
    unlisted = f"; no {data.LIST}: whether files were changed since is not known"
    say(
        f"{'ok' if proof.ok else 'FAILED'}: {proof.count} images compared, "
        f"{proof.problem_count} problems, largest change {proof.max_linf:g}/255, "
        f"budget {255 * args.eps:.3g}/255{unlisted if proof.listed is False else ''}"
    )
    if proof.unchanged:
        say(
            (
                "miue-fast: unchanged: "
                f"{proof.unchanged} of {proof.count} images are their clean originals"
            ),
            error=True,
        )
    code = _unreadable(proof)
    return code if proof.ok else 1


def _evaluate(args):
    targets = list(filter(None, (args.json, args.figure)))
    for target in targets:
        data.check_writable(target.parent)
        if target.is_dir():
            fail("evaluate", "output", "a file", f"the folder {target}")
        if target.name in RESERVED:
            fail("evaluate", "output", "a name that no other file of this package has", str(target))
    if len({os.path.realpath(target) for target in targets}) < len(targets):
        fail("evaluate", "figure", "another file than --json", str(args.figure))
    data.check_owned("evaluate", targets)
    if args.figure and figure_missing():
        raise BackendError(figure_missing())
    if args.figure:
        check_suffix(args.figure)
    clean = _load(args)
    test = data.load_test(args.test, size=args.size, split=args.test_split)
    code = _unreadable(clean, test)
    clean, poisoned = poisoned_images(clean, args.poisoned, size=args.size)
    copy = data.Dataset(poisoned, clean.labels, clean.classes, clean.names)
    names = (
        "victim",
        "epochs",
        "seeds",
        "lr",
        "batch",
        "crop",
        "eps",
        "noise",
        "device",
        "dtype",
        "defence",
        "poison_ratio",
        "unseen",
        "init",
    )
    table = evaluate(
        clean, copy, test, progress=not args.quiet, **{name: getattr(args, name) for name in names}
    )
    say(str(table))
    if args.json:
        content = {"poison": _origin(args.poisoned, clean, poisoned), **table.to_dict()}
        data.write_owned(
            {args.json: lambda file: file.write((json.dumps(content, indent=1) + "\n").encode())}
        )
    if args.figure:
        figure(table, clean, poisoned, args.figure)
    return code


def _origin(path, clean, poisoned):
    """The options and versions of the generation, if these images are a poison's or lie beside the
    poison that made them; else None.

    Images that were resized on reading cannot be compared, so the fingerprint of their clean
    originals decides.
    """
    for folder in (path, path.parent):
        if (folder / data.POISON_FILES[0]).is_file():
            try:
                delta, manifest = data.load_poison(folder, clean)
                assert manifest is not None, "a folder of save_poison has one"
            except ValueError as error:
                logging.getLogger("miue_fast").warning(
                    "the options of the poison are left out of the JSON: %s", error
                )
                return None
            resized = clean.sizes is not None and any(
                size != clean.images.shape[:1:-1] for size in clean.sizes
            )
            if resized or torch.equal(
                data.apply_poison(clean.images, delta, manifest["eps"]), poisoned
            ):
                return {"options": manifest["options"], "versions": manifest["versions"]}
            return None
    return None


def _report(args):
    from .. import report

    finished = report.load(args.config)
    if finished is not None:
        found, sources = finished, None
    else:
        config = report.read(args.config, data=args.data, test=args.test)
        found, sources = report.run(
            config, args.out, jobs=args.jobs, progress=not args.quiet, make=not args.no_run
        )
    for path in report.render(found, args.out, sources):
        say(printable(path, most=None))
    for what, why in found["missing"]:
        say(f"miue-fast: missing: {printable(what)}: {printable(why, most=LONGEST)}", error=True)
    code = _unreadable(sources.clean, sources.test) if sources else 0
    return 2 if found["missing"] else code


def _demo(args):
    from . import demo

    return demo.run(args.out, args.seed)


def _info(args):
    from . import info

    return info.main() or 0


COMMANDS = {
    "generate": _generate,
    "export": _export,
    "verify": _verify,
    "evaluate": _evaluate,
    "report": _report,
    "demo": _demo,
    "info": _info,
}
