"""`miue-fast`: one command per job, each a few lines around the public functions. Exit codes: `main`; arguments: `_arguments.py`."""

import json
import logging
import sys

import torch

from . import data
from ._arguments import given, parse
from ._checks import LONGEST, fail, printable
from ._registry import BackendError
from .data.export import FORMATS
from .evaluate import evaluate, figure, poisoned_images
from .evaluate.defences import defence
from .evaluate.figure import check_suffix
from .evaluate.figure import missing as figure_missing
from .generate import Interrupted, generate
from .generate.checkpoint import NAME as CHECKPOINT
from .generate.options import choose

EXPORTS = {"pt": "poison.pt", "npz": "poisoned.npz", "pickle": "poison.pkl"}  # in the folder of `generate`; images go to "images"


def main(argv=None):
    """Runs one command and returns its exit code.

    0: done. 1: `verify` found a difference, or `demo` missed its numbers. 2: bad input or a machine that cannot do it, one line on
    stderr. 3: done, but some images were unreadable (listed on stderr). 130: interrupted.
    """
    logging.basicConfig(format="miue-fast: %(message)s")
    try:
        args = parse(argv)
        return COMMANDS[args.command](args)
    except Interrupted as told:
        return _complain(told, 130)
    except KeyboardInterrupt:
        return _complain("interrupted: what was finished before is kept; the same command starts again", 130)
    except (ValueError, BackendError, OSError) as error:
        return _complain(error, 2)
    except (MemoryError, RuntimeError) as error:
        text = str(error) or "none left"
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in text:
            raise
        return _complain(f"memory: expected enough, got: {text.splitlines()[0]}", 2)


def _complain(error, code):
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    print("miue-fast:", " ".join(text.split()) or type(error).__name__, file=sys.stderr)
    return code


# the commands


def _load(args):
    return data.load(args.data, size=args.size, split=args.split, per_class=args.per_class)


def _unreadable(*datasets):
    """Lists what was left out; the exit code."""
    left_out = [pair for dataset in datasets for pair in dataset.unreadable]
    for name, reason in left_out:
        print("miue-fast: unreadable, left out:", printable(f"{name}: {reason}", most=LONGEST), file=sys.stderr)
    return 3 if left_out else 0


def _generate(args):
    target = args.out / EXPORTS.get(args.export, "images")
    replace = args.overwrite or (args.resume and any((args.out / name).exists() for name in (CHECKPOINT, *data.POISON_FILES)))
    if data.is_tree(args.data):
        data.check_outside(args.out, args.data)
    data.check_writable(args.out)
    dataset = _load(args)
    code = _unreadable(dataset)
    options = given(args)
    _check_export(dataset, target, args, choose(args.preset, options).eps, replace)
    result = generate(dataset, args.out, preset=args.preset, model=args.model, feature=args.feature, resume=args.resume,
                      overwrite=args.overwrite, progress=not args.quiet, tensorboard=args.tensorboard, **options)  # fmt: skip
    print(f"poison of {len(dataset)} images, budget {255 * result.options.eps:.3g}/255: {args.out}")
    if args.export:
        try:
            _write(dataset, result.delta, target, args.export, result.options.eps, args.allow_lossy, "nearest", overwrite=replace)
        except KeyboardInterrupt:
            again = "the same command without --overwrite" if args.overwrite else "the same command"
            raise Interrupted(f"interrupted: the poison is saved, {target} is incomplete; {again} exports it again") from None
        if args.export in FORMATS:
            data.remove_others(dataset, target, args.export)
    return code


def _check_export(dataset, target, args, eps, replace):
    """An export of no images makes all its checks now, not after hours of work."""
    if args.export is None:
        return
    none = dataset.select([])
    if args.export in FORMATS:
        data.export_folder(none, none.images.float(), target, eps=0, image_format=args.export, allow_lossy=args.allow_lossy,
                           overwrite=replace)  # fmt: skip
        others = [] if args.overwrite else data.other_images(dataset, target, args.export)
        if others:
            fail("generate", "export", f"only images of this export in {target} (or --overwrite, which removes others)", others[0])
    elif target.exists() and not replace:
        fail("generate", "export", "a new file (or --overwrite)", f"{target}, which exists")
    elif args.export == "pickle":
        data.check_pickle(eps)


def _write(dataset, delta, target, form, eps, allow_lossy, rounding, overwrite):
    if form in ("pt", "pickle") and rounding != "nearest":
        fail("export", "rounding", f"'nearest' for {form}, which holds the perturbation", repr(rounding))
    if form == "pt":
        data.export_pt(dataset, delta, target, eps=eps, overwrite=overwrite)
    elif form == "pickle":
        data.export_pickle(dataset, delta, target, eps=eps, overwrite=overwrite)
    elif form == "npz":
        data.export_npz(dataset, delta, target, eps=eps, rounding=rounding, overwrite=overwrite)
    else:
        data.export_folder(dataset, delta, target, eps=eps, image_format=form, allow_lossy=allow_lossy, rounding=rounding,
                           overwrite=overwrite)  # fmt: skip
    print(f"exported {len(dataset)} as {form}: {target}")


def _export(args):
    dataset = _load(args)
    delta, manifest = data.load_poison(args.poison, dataset)
    eps = getattr(args, "eps", manifest["eps"] if manifest else 1.0)
    try:
        _write(dataset, delta, args.to, args.format, eps, args.allow_lossy, args.rounding, args.overwrite)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted: {args.to} is incomplete; the same command with --overwrite finishes it") from None
    return _unreadable(dataset)


def _verify(args):
    clean = _load(args) if args.size or args.split else args.data
    report = data.verify(clean, args.out, eps=args.eps, per_class=args.per_class)
    for problem in report.problems:
        print(problem)
    if report.problem_count > len(report.problems):
        print(f"... and {report.problem_count - len(report.problems)} more")
    print(f"{'ok' if report.ok else 'FAILED'}: {report.count} images compared, {report.problem_count} problems, largest change "
          f"{report.max_linf:g}/255, budget {255 * args.eps:.3g}/255")  # fmt: skip
    if report.unchanged:
        print(f"miue-fast: unchanged: {report.unchanged} of {report.count} images are their clean originals", file=sys.stderr)
    code = _unreadable(report)
    return code if report.ok else 1


def _evaluate(args):
    for target in filter(None, (args.json, args.figure)):
        data.check_writable(target.parent)
        if target.is_dir():
            fail("evaluate", "output", "a file", f"the folder {target}")
    if args.figure and figure_missing():
        raise BackendError(figure_missing())
    if args.figure:
        check_suffix(args.figure)
    defence(args.defence)  # a wrong text is told before the images are read
    clean = _load(args)
    test = data.load_test(args.test, size=args.size, split=args.test_split)
    code = _unreadable(clean, test)
    clean, poisoned = poisoned_images(clean, args.poisoned, size=args.size)
    copy = data.Dataset(poisoned, clean.labels, clean.classes, clean.names)
    names = ("victim", "epochs", "seeds", "lr", "batch", "crop", "eps", "noise", "device", "defence", "poison_ratio", "unseen", "init")
    table = evaluate(clean, copy, test, progress=not args.quiet, **{name: getattr(args, name) for name in names})
    print(table)
    if args.json:
        content = {"poison": _origin(args.poisoned, clean, poisoned), **table.to_dict()}
        data.write_file(args.json, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))
    if args.figure:
        figure(table, clean, poisoned, args.figure)
    return code


def _origin(path, clean, poisoned):
    """Options and versions of the generation, where these images are a poison's, or lie beside the one that made them; else None.

    Images that were resized on reading cannot be compared: the fingerprint of their clean originals must do.
    """
    for folder in (path, path.parent):
        if (folder / data.POISON_FILES[0]).is_file():
            try:
                delta, manifest = data.load_poison(folder, clean)
            except ValueError as error:
                logging.getLogger("miue_fast").warning("the options of the poison are left out of the JSON: %s", error)
                return None
            resized = clean.sizes is not None and any(size != clean.images.shape[:1:-1] for size in clean.sizes)
            if resized or torch.equal(data.apply_poison(clean.images, delta, manifest["eps"]), poisoned):
                return {"options": manifest["options"], "versions": manifest["versions"]}
            return None
    return None


def _report(args):
    from . import report

    finished = report.load(args.config)
    if finished is not None:
        found, sources = finished, None
    else:
        config = report.read(args.config, data=args.data, test=args.test)
        found, sources = report.run(config, args.out, jobs=args.jobs, progress=not args.quiet, make=not args.no_run)
    for path in report.render(found, args.out, sources):
        print(path)
    for what, why in found["missing"]:
        print(f"miue-fast: missing: {what}: {why}", file=sys.stderr)
    code = _unreadable(sources.clean, sources.test) if sources else 0
    return 2 if found["missing"] else code


def _demo(args):
    from . import demo

    return demo.run(args.out, args.seed)


def _info(args):
    from . import info

    return info.main() or 0


COMMANDS = {"generate": _generate, "export": _export, "verify": _verify, "evaluate": _evaluate, "report": _report, "demo": _demo,
            "info": _info}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
