"""`miue-fast`: one command per job, each a few lines around the public functions. Exit codes are in `main`."""

import argparse
import json
import logging
import sys
import typing
from dataclasses import fields
from pathlib import Path

import torch

from . import __version__, data
from ._checks import fail
from ._registry import BackendError
from .data.export import FORMATS
from .evaluate import NOISES, evaluate, figure, poisoned_images
from .evaluate.defences import NAMES as DEFENCES
from .evaluate.defences import defence
from .evaluate.figure import check_suffix
from .evaluate.figure import missing as figure_missing
from .evaluate.victims import RECIPES
from .generate import PRESETS, Interrupted, Options, generate
from .generate.checkpoint import NAME as CHECKPOINT
from .generate.options import choose
from .models import NAMES

EXPORTS = {"pt": "poison.pt", "npz": "poisoned.npz", "pickle": "poison.pkl"}  # in the folder of `generate`; images go to "images"

HELP = {
    "objective": "what the perturbation lowers: mi-ue, em (error-minimising), tap (targeted adversarial) or random (no training)",
    "classwise": "one perturbation per class",
    "target_shift": "of tap: images of class y are pushed towards class y + N",
    "zeta": "weight of the within-class distance term",
    "denominator": "pairs in the denominator of nt_xent: all, or negatives (other classes only)",
    "normalize_dim": "divide the distance term by the feature width",
    "temperature": "of nt_xent",
    "eps": "L-inf budget on the [0, 1] scale",
    "alpha_0": "step size of the first epoch",
    "alpha_K": "step size it anneals to; default 4 / (255 * steps)",
    "steps": "sign steps per poison batch and epoch",
    "epochs": "rounds of model step and poison step",
    "batch": "images per contrastive batch",
    "train_batch": "images per batch of the model step",
    "lr": "learning rate of the source model, cosine over the epochs",
    "momentum": "of the source model's SGD",
    "weight_decay": "of the source model's SGD",
    "seed": "of everything random",
    "flip": "probability of a horizontal flip",
    "random_start": "start from uniform noise in +-eps",
    "width": "filters of the built-in model's first stage",
    "network_chunk": "images per network launch; bounds memory, does not change the objective",
    "device": "cpu, cuda or cuda:N; default: cuda if there is one",
    "dtype": "compute type of the network: float32, bfloat16 or float16",
    "delta_dtype": "poison store: float32, float16 or int8",
    "channels_last": "memory format of the network while it trains",
    "fused": "run the frozen network as fused layers, else in PyTorch's autograd",
    "fp8": "let the fused layers multiply e4m3 values (with --dtype bfloat16); on a CPU emulated",
    "backend": "of the ops: auto, triton, cuda, cpu or reference",
}


def _number(text):
    """A number, or a fraction such as 8/255."""
    above, _, below = text.partition("/")
    try:
        return float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"expected a number or a fraction such as 8/255, got {text!r}") from None


KINDS = {
    bool: {"action": argparse.BooleanOptionalAction},
    int: {"type": int, "metavar": "N"},
    float: {"type": _number, "metavar": "X"},
    str: {"type": str, "metavar": "NAME"},
}


class _Parser(argparse.ArgumentParser):
    """A wrong command line is a bad input like any other: one line, no usage text above it."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        raise ValueError(f"{self.prog.removeprefix('miue-fast ')}: {message} (see {self.prog} --help)")


def main(argv=None):
    """Runs one command and returns its exit code.

    0: done. 1: `verify` found a difference, or `demo` missed its numbers. 2: bad input or a machine that cannot do it, one line on
    stderr. 3: done, but some images were unreadable (listed on stderr). 130: interrupted.
    """
    logging.basicConfig(format="miue-fast: %(message)s")
    try:
        args = _parser().parse_args(argv)
        return args.run(args)
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


def _parser():
    codes = "Exit codes: 0 done, 1 verify or demo failed, 2 bad input, 3 done but some images were unreadable, 130 interrupted."
    about = "Unlearnable examples by MI-UE: poison a folder of images, export it, prove it, test it."
    parser = _Parser(prog="miue-fast", description=about, epilog=codes)
    parser.add_argument("--version", action="version", version=f"miue-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, run, text):
        sub = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", argument_default=argparse.SUPPRESS)
        sub.set_defaults(run=run)
        return sub

    _generate_options(command("generate", _generate, "compute one small perturbation per image, and export the poisoned copy"))

    sub = command("export", _export, "write the poisoned images of a poison")
    sub.add_argument("poison", type=Path, metavar="POISON", help="folder of generate, or a .safetensors, .pt, .npz or .pkl file")
    sub.add_argument("--to", type=Path, required=True, metavar="OUT", help="new folder, or file ending in .pt, .npz or .pkl")
    _data_options(sub)
    _export_options(sub, "--format", default="png")
    sub.add_argument("--eps", type=_number, help="clamp the perturbation to this budget; default: its own, a bare one as it is")
    sub.add_argument("--rounding", default="nearest", choices=["nearest", "truncate"],
                     help="of images and .npz to 8 bits; nearest keeps the budget")  # fmt: skip
    sub.add_argument("--overwrite", action="store_true", default=False, help="replace files of the same names")

    sub = command("verify", _verify, "re-read a poisoned copy and prove count, names, sizes and budget; exit code 1 if it fails")
    sub.add_argument("data", type=Path, metavar="CLEAN", help="the clean images")
    sub.add_argument("out", type=Path, metavar="OUT", help="exported folder or .npz, or a poison")
    sub.add_argument("--eps", type=_number, default=8 / 255, help="budget on the [0, 1] scale; default 8/255")
    _selection_options(sub)

    sub = command("evaluate", _evaluate, "train a victim on clean, poisoned and random-noise images and compare clean-test accuracy")
    _data_options(sub)
    sub.add_argument("--poisoned", type=Path, required=True, metavar="OUT", help="exported folder or .npz, or a poison")
    sub.add_argument("--test", type=Path, required=True, metavar="DIR", help="clean test images of the same classes")
    sub.add_argument("--test-split", default=None, choices=["train", "test"], help="of the --test folder")
    sub.add_argument("--victim", default="small_resnet", choices=list(RECIPES), metavar="NAME",
                     help=f"{', '.join(RECIPES)}; default: small_resnet")  # fmt: skip
    sub.add_argument("--seeds", type=int, default=1, metavar="N", help="victims per training set; default 1")
    sub.add_argument("--epochs", type=int, default=None, help="default: the victim's own")
    sub.add_argument("--lr", type=_number, default=None, help="default: the victim's own")
    sub.add_argument("--batch", type=int, default=None, help="default: the victim's own")
    sub.add_argument("--crop", type=int, default=None, help="padding of the random crop; default: an eighth of the width; 0: flips only")
    sub.add_argument("--eps", type=_number, default=None, help="budget of the random noise; default: the one found in the poisoned images")
    sub.add_argument("--noise", default="sign", choices=NOISES, help="random noise: sign (+-eps, default) or uniform")
    text = f"what the victim's owner does: {', '.join(DEFENCES)}; options behind colons: jpeg:10, adversarial:4:steps=3; default: none"
    sub.add_argument("--defence", default="none", metavar="SPEC", help=text)
    sub.add_argument("--poison-ratio", type=_number, default=1.0, metavar="R", help="share of each class that is poisoned; default 1")
    sub.add_argument("--unseen", nargs="+", default=None, metavar="CLASS", help="classes that stay clean; test accuracy is given apart")
    sub.add_argument("--init", type=Path, default=None, metavar="FILE", help="pretrained weights (.safetensors or .pt) to start from")
    sub.add_argument("--device", default=None, help=HELP["device"])
    sub.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the table with all seeds, options and versions")
    sub.add_argument("--figure", type=Path, default=None, metavar="FILE", help="draw images, perturbations and curves (needs matplotlib)")
    sub.add_argument("--quiet", action="store_true", default=False, help="no progress bar")

    sub = command("report", _report, "run what a configuration misses (poisons, victims, defences, analysis) and write one report")
    sub.add_argument("config", type=Path, metavar="CONFIG", help="JSON, see docs/report.md; or a report.json, which is only written anew")
    sub.add_argument(
        "--out", type=Path, required=True, metavar="OUT", help="folder for cells, poisons, report.json, report.md, report.html"
    )
    sub.add_argument("--data", type=Path, default=None, metavar="DIR", help="clean images, instead of the configuration's")
    sub.add_argument("--test", type=Path, default=None, metavar="DIR", help="clean test images, instead of the configuration's")
    sub.add_argument("--jobs", type=int, default=1, metavar="N", help="processes at once, each with its share of the threads; default 1")
    sub.add_argument("--no-run", action="store_true", default=False, help="train nothing: the report of what is finished")
    sub.add_argument("--quiet", action="store_true", default=False, help="no progress bar")

    sub = command("demo", _demo, "the whole story on drawn shapes, in a few minutes on a CPU, without a download")
    sub.add_argument("--out", type=Path, default=Path("demo-output"), metavar="DIR", help="default: demo-output; replaced")
    sub.add_argument("--seed", type=int, default=0, help="default 0")

    command("info", _info, "ops and backends of this machine, versions, build")
    return parser


def _selection_options(sub):
    sub.add_argument("--size", type=int, default=None, metavar="N", help="resize to N x N for the network; default: images as they are")
    sub.add_argument("--per-class", type=int, default=None, metavar="N", help="only the first N images of each class")
    sub.add_argument("--split", default=None, choices=["train", "test"], help="read this part of the data")


def _data_options(sub):
    sub.add_argument("--data", type=Path, required=True, metavar="DIR", help="clean images: DIR/CLASS/*, CIFAR python files, or .npz")
    _selection_options(sub)


def _export_options(sub, flag, default):
    sub.add_argument(flag, default=default, choices=[*FORMATS, "pt", "npz", "pickle"], help="jpeg needs --allow-lossy; pickle: int8 levels")
    sub.add_argument("--allow-lossy", action="store_true", default=False, help="export JPEG although it breaks the budget")


def _generate_options(sub):
    _data_options(sub)
    sub.add_argument("--out", type=Path, required=True, metavar="OUT", help="folder for the poison, its log and checkpoint, and the export")
    sub.add_argument("--preset", default="paper", choices=list(PRESETS), help="default: paper")
    sub.add_argument("--model", default="resnet18", choices=list(NAMES), help="source model; default: resnet18")
    sub.add_argument("--feature", default=None, metavar="LAYER", help="its feature layer; default: the one its classifier reads")
    _export_options(sub, "--export", default=None)
    sub.add_argument("--overwrite", action="store_true", default=False, help="start again, replacing what is in OUT")
    sub.add_argument("--no-resume", dest="resume", action="store_false", default=True, help="refuse OUT if it has a checkpoint")
    sub.add_argument("--tensorboard", action="store_true", default=False, help="also write OUT/tensorboard")
    sub.add_argument("--quiet", action="store_true", default=False, help="no progress bar")
    group = sub.add_argument_group("options of the algorithm", "The default is the preset's; the value shown is that of 'paper'.")
    kinds = typing.get_type_hints(Options)
    for option in fields(Options):
        kind = next(k for k in (typing.get_args(kinds[option.name]) or (kinds[option.name],)) if k is not type(None))
        how = KINDS[kind]
        text = HELP.get(option.name, "") + ("" if option.default is None else f" ({_shown(option.default)})")
        group.add_argument("--" + option.name.replace("_", "-"), help=text, **how)


def _shown(value):
    """Image-scale values as people write them: 8/255."""
    levels = 255 * value if isinstance(value, float) else 0.0
    return f"{levels:.1f}/255".replace(".0/", "/") if 0.05 < levels < 20 and abs(levels - round(levels, 1)) < 1e-9 else str(value)


# the commands


def _load(args, source=None, split=None):
    return data.load(source or args.data, size=args.size, split=split or args.split, per_class=args.per_class)


def _unreadable(*datasets):
    """Lists what was left out; the exit code."""
    left_out = [pair for dataset in datasets for pair in dataset.unreadable]
    for name, reason in left_out:
        print(f"miue-fast: unreadable, left out: {name}: {reason}", file=sys.stderr)
    return 3 if left_out else 0


def _generate(args):
    target = args.out / EXPORTS.get(args.export, "images")
    replace = args.overwrite or (args.resume and any((args.out / name).exists() for name in (CHECKPOINT, *data.POISON_FILES)))
    if data.is_tree(args.data):
        data.check_outside(args.out, args.data)
    data.check_writable(args.out)
    dataset = _load(args)
    code = _unreadable(dataset)
    options = {field.name: getattr(args, field.name) for field in fields(Options) if hasattr(args, field.name)}
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


if __name__ == "__main__":
    sys.exit(main())
