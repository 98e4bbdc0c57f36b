"""The arguments of `miue-fast`: commands, options, types and help texts. What the commands do with
them is in `commands.py`.
"""

import argparse
import typing
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..data.export import FORMATS
from ..dispatch.precision import UNSCALED
from ..evaluation import DEFENCES, NOISES
from ..evaluation.defences.none import NoDefence
from ..generation import OBJECTIVES, PRESETS, TRANSFORMS, Objective, Options
from ..generation.presets import DEFAULT
from ..models import NETWORKS
from ..support.messages import short
from ..support.version import __version__

HELP = {
    "objective": "what the perturbation lowers",
    "classwise": "one perturbation per class",
    "eps": "L-inf budget on the [0, 1] scale",
    "eps_0": "budget of the first epoch, which rises linearly to eps; default: eps throughout",
    "alpha_0": "step size of the first epoch",
    "alpha_K": "step size it anneals to; default 4 / (255 * steps)",
    "steps": "sign steps per poison batch and epoch",
    "epochs": "rounds of model step and poison step",
    "poison_every": "a poison step after every so many epochs, and after the last one",
    "batch": "images per contrastive batch",
    "train_batch": "images per batch of the model step; fast, publish: 8 to 128, by the images",
    "lr": "learning rate of the source network, a cosine over the epochs",
    "mixed": "share of the loss of the model step that is of images without perturbation",
    "attack": "budget of an attack on the images of the model step; 0: none",
    "attack_steps": "sign steps of that attack",
    "momentum": "momentum of the SGD that trains the source network",
    "weight_decay": "weight decay of that SGD",
    "seed": "seed of everything random",
    "flip": "probability of a horizontal flip",
    "random_start": "start from uniform noise in +-eps",
    "robust": "transforms in each poison step, as in crop,grid:4: "
    + "; ".join(f"{name}: {kind.about}" for name, kind in TRANSFORMS.items()),
    "eot": "gradients that are averaged per poison step, each of its own draw of --robust",
    "width": "filters of the first stage of a built-in network",
    "network_chunk": "images per network launch; bounds memory, does not change the objective",
    "device": "cpu, cuda or cuda:N; default: cuda if there is one",
    "dtype": "compute type of the network: float32, bfloat16, float16, or auto: bfloat16 where the "
    "device has matrix units for it",
    "delta_dtype": "poison store: float32, float16 or int8",
    "channels_last": "memory format of the network while it trains",
    "fused": "run the frozen network as fused layers, else in PyTorch's autograd",
    "fp8": "let the fused layers multiply e4m3 values (with --dtype bfloat16); on a CPU emulated",
    "backend": "backend of the ops: auto, triton, cuda, cpu or reference",
}


def _number(text):
    """Reads a number, or a fraction such as 8/255."""
    above, _, below = text.partition("/")
    try:
        return float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(
            f"expected a number or a fraction such as 8/255, got {short(text)}"
        ) from None


def _whole(text):
    try:
        return int(text)
    except ValueError:  # also more digits than Python reads
        raise argparse.ArgumentTypeError(f"expected a whole number, got {short(text)}") from None


def _path(text):
    """Reads a path. An empty text, which an unset variable of the shell gives, would mean the
    current folder and is refused.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError(
            "expected a path, got an empty text; the current folder is ."
        )
    return Path(text)


KINDS = {
    bool: {"action": argparse.BooleanOptionalAction},
    int: {"type": _whole, "metavar": "N"},
    float: {"type": _number, "metavar": "X"},
    str: {"type": str, "metavar": "NAME"},
}


# Options that Python, or another part of the package, calls something else; a configuration has its
# own data and test.
WRITTEN = {
    "generate": {"folder": "--out", "image_format": "--export"},
    "export": {"folder": "--to", "out": "--to", "export.path": "--to", "image_format": "--format"},
    "evaluate": {"clean": "--data", "folder": "--json or --figure", "figure.path": "--figure"},
    "report": {"folder": "--out", "report.data": "data", "report.test": "test"},
    "demo": {"folder": "--out"},
}


class _Parser(argparse.ArgumentParser):
    """Treats a wrong command line like any other bad input: a ValueError of one line, without a
    usage text above it.
    """

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        command = self.prog.removeprefix("miue-fast").lstrip()
        raise ValueError(f"{command and f'{command}: '}{message} (see {self.prog} --help)")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line (None: the process's own); `command` is the name of the command. A
    wrong one is a ValueError.
    """
    return _parser().parse_args(argv)


def _parser():
    codes = (
        "Exit codes: 0 done, 1 verify or demo failed, 2 bad input, "
        "3 done but some images were unreadable, 130 interrupted."
    )
    about = (
        "Unlearnable examples by MI-UE: poison a folder of images, export it, prove it, test it."
    )
    parser = _Parser(prog="miue-fast", description=about, epilog=codes)
    parser.add_argument("--version", action="version", version=f"miue-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, text):
        return commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            argument_default=argparse.SUPPRESS,
        )

    _generate_options(
        command(
            "generate", "compute one small perturbation per image, and export the poisoned copy"
        )
    )

    sub = command("export", "write the poisoned images of a poison")
    sub.add_argument(
        "poison",
        type=_path,
        metavar="POISON",
        help="folder of generate, or a .safetensors, .pt, .npz or .pkl file",
    )
    sub.add_argument(
        "--to",
        type=_path,
        required=True,
        metavar="OUT",
        help="new folder, or file ending in .pt, .npz or .pkl",
    )
    _data_options(sub)
    _export_options(sub, "--format", default="png")
    sub.add_argument(
        "--eps",
        type=_number,
        help="clamp the perturbation to this budget; default: its own, a bare one as it is",
    )
    sub.add_argument(
        "--rounding",
        default="nearest",
        choices=["nearest", "truncate"],
        help="of images and .npz to 8 bits; nearest keeps the budget",
    )
    sub.add_argument(
        "--overwrite", action="store_true", default=False, help="replace files of the same names"
    )

    sub = command(
        "verify",
        "re-read a poisoned copy and prove count, names, sizes and budget; exit code 1 if it fails",
    )
    sub.add_argument("data", type=_path, metavar="CLEAN", help="the clean images")
    sub.add_argument("out", type=_path, metavar="OUT", help="exported folder or .npz, or a poison")
    sub.add_argument(
        "--eps", type=_number, default=8 / 255, help="budget on the [0, 1] scale; default 8/255"
    )
    _selection_options(sub)

    sub = command(
        "evaluate",
        "train a victim on clean, poisoned and random-noise images and compare clean-test accuracy",
    )
    _data_options(sub)
    sub.add_argument(
        "--poisoned",
        type=_path,
        required=True,
        metavar="OUT",
        help="exported folder or .npz, or a poison",
    )
    sub.add_argument(
        "--test",
        type=_path,
        required=True,
        metavar="DIR",
        help="clean test images of the same classes",
    )
    sub.add_argument(
        "--test-split", default=None, choices=["train", "test"], help="of the --test folder"
    )
    sub.add_argument(
        "--victim",
        default="small_resnet",
        choices=list(NETWORKS),
        metavar="NAME",
        help=f"{', '.join(NETWORKS)}; default: small_resnet",
    )
    sub.add_argument(
        "--seeds", type=_whole, default=1, metavar="N", help="victims per training set; default 1"
    )
    sub.add_argument("--epochs", type=_whole, default=None, help="default: the victim's own")
    sub.add_argument("--lr", type=_number, default=None, help="default: the victim's own")
    sub.add_argument("--batch", type=_whole, default=None, help="default: the victim's own")
    sub.add_argument(
        "--crop",
        type=_whole,
        default=None,
        help="padding of the random crop; default: an eighth of the width; 0: flips only",
    )
    sub.add_argument(
        "--eps",
        type=_number,
        default=None,
        help="budget of the random noise; default: the one found in the poisoned images",
    )
    sub.add_argument(
        "--noise",
        default="sign",
        choices=NOISES,
        help="random noise: sign (+-eps, default) or uniform",
    )
    text = (
        f"what the victim's owner does: {', '.join(DEFENCES)}; options behind colons: "
        "jpeg:10, adversarial:4:steps=3"
    )
    sub.add_argument("--defence", default=NoDefence.name, metavar="SPEC", help=text)
    sub.add_argument(
        "--poison-ratio",
        type=_number,
        default=1.0,
        metavar="R",
        help="share of each class that is poisoned; default 1",
    )
    sub.add_argument(
        "--unseen",
        nargs="+",
        default=None,
        metavar="CLASS",
        help="classes that stay clean; test accuracy is given apart",
    )
    sub.add_argument(
        "--init",
        type=_path,
        default=None,
        metavar="FILE",
        help="pretrained weights (.safetensors or .pt) to start from",
    )
    sub.add_argument("--device", default=None, help=HELP["device"])
    sub.add_argument(
        "--dtype",
        default="float32",
        metavar="TYPE",
        help=f"what victims compute in: {', '.join(UNSCALED)}; default: float32",
    )
    sub.add_argument(
        "--json",
        type=_path,
        default=None,
        metavar="FILE",
        help="write the table with all seeds, options and versions",
    )
    sub.add_argument(
        "--figure",
        type=_path,
        default=None,
        metavar="FILE",
        help="draw images, perturbations and curves (needs matplotlib)",
    )
    sub.add_argument("--quiet", action="store_true", default=False, help="no progress bar")

    sub = command(
        "report",
        (
            "run what a configuration misses (poisons, victims, defences, analysis) "
            "and write one report"
        ),
    )
    sub.add_argument(
        "config",
        type=_path,
        metavar="CONFIG",
        help="JSON, see docs/report.md; or a report.json, which is only written anew",
    )
    sub.add_argument(
        "--out",
        type=_path,
        required=True,
        metavar="OUT",
        help="folder for cells, poisons, report.json, report.md, report.html",
    )
    sub.add_argument(
        "--data",
        type=_path,
        default=None,
        metavar="DIR",
        help="clean images, instead of the configuration's",
    )
    sub.add_argument(
        "--test",
        type=_path,
        default=None,
        metavar="DIR",
        help="clean test images, instead of the configuration's",
    )
    sub.add_argument(
        "--jobs",
        type=_whole,
        default=1,
        metavar="N",
        help="processes at once, each with its share of the threads; default 1",
    )
    sub.add_argument(
        "--no-run",
        action="store_true",
        default=False,
        help="train nothing: the report of what is finished",
    )
    sub.add_argument("--quiet", action="store_true", default=False, help="no progress bar")

    sub = command(
        "demo", "the whole story on drawn shapes, in a few minutes on a CPU, without a download"
    )
    sub.add_argument(
        "--out",
        type=_path,
        default=Path("demo-output"),
        metavar="DIR",
        help="default: demo-output; an interrupted demo there goes on, a finished one starts again",
    )
    sub.add_argument("--seed", type=_whole, default=0, help="default 0")

    command("info", "ops and backends of this machine, versions, build")
    for name, sub in commands.choices.items():
        flags = {
            action.dest: f"--{action.dest.replace('_', '-')}"
            for action in sub._actions
            if action.option_strings
        }
        sub.set_defaults(written=flags | WRITTEN.get(name, {}))
    return parser


def _selection_options(sub):
    sub.add_argument(
        "--size",
        type=_whole,
        default=None,
        metavar="N",
        help="resize to N x N for the network; default: images as they are",
    )
    sub.add_argument(
        "--per-class",
        type=_whole,
        default=None,
        metavar="N",
        help="only the first N images of each class",
    )
    sub.add_argument(
        "--split", default=None, choices=["train", "test"], help="read this part of the data"
    )


def _data_options(sub):
    sub.add_argument(
        "--data",
        type=_path,
        required=True,
        metavar="DIR",
        help="clean images: DIR/CLASS/*, CIFAR python files, or .npz",
    )
    _selection_options(sub)


def _export_options(sub, flag, default):
    sub.add_argument(
        flag,
        default=default,
        choices=[*FORMATS, "pt", "npz", "pickle"],
        help="jpeg needs --allow-lossy; pickle: int8 levels",
    )
    sub.add_argument(
        "--allow-lossy",
        action="store_true",
        default=False,
        help="export JPEG although it breaks the budget",
    )


def _generate_options(sub):
    _data_options(sub)
    sub.add_argument(
        "--out",
        type=_path,
        required=True,
        metavar="OUT",
        help="folder for the poison, its log and checkpoint, and the export",
    )
    sub.add_argument(
        "--preset",
        default=DEFAULT.name,
        choices=list(PRESETS),
        help="; ".join(f"{preset.name}: {preset.about}" for preset in PRESETS.values())
        + f"; default: {DEFAULT.name}",
    )
    sub.add_argument(
        "--model",
        default=None,
        choices=list(NETWORKS),
        help=f"source network; default: {Objective.network}"
        + "".join(
            f", for {each.name}: {each.network}"
            for each in OBJECTIVES.values()
            if each.network != Objective.network
        ),
    )
    sub.add_argument(
        "--feature",
        default=None,
        metavar="LAYER",
        help="its feature layer; default: the one its classifier reads",
    )
    _export_options(sub, "--export", default=None)
    sub.add_argument(
        "--overwrite",
        action="store_true",
        default=False,
        help="start again, replacing what is in OUT",
    )
    sub.add_argument(
        "--no-resume",
        dest="resume",
        action="store_false",
        default=True,
        help="refuse OUT if it has a checkpoint",
    )
    sub.add_argument(
        "--tensorboard", action="store_true", default=False, help="also write OUT/tensorboard"
    )
    sub.add_argument("--quiet", action="store_true", default=False, help="no progress bar")
    group = sub.add_argument_group(
        "options of the algorithm",
        f"The default is the preset's; the value shown is that of '{DEFAULT.name}'.",
    )
    own = {name for objective in OBJECTIVES.values() for name in objective.options}
    for option in fields(Options):
        if option.name not in own:
            text = HELP.get(option.name, "")
            if option.name == "objective":
                text += ": " + "; ".join(f"{o.name}: {o.about}" for o in OBJECTIVES.values())
            _algorithm_option(group, option, text)
    for objective in OBJECTIVES.values():
        group = sub.add_argument_group(f"options of the objective {objective.name}")
        for option in fields(Options):
            if option.name in objective.options:
                _algorithm_option(group, option, objective.options[option.name])


def _algorithm_option(group, option, text):
    """One option of `generate` for a field of `Options`; the help ends with its default value."""
    hint = typing.get_type_hints(Options)[option.name]
    kind = next(k for k in (typing.get_args(hint) or (hint,)) if k is not type(None))
    shown = "" if option.default in (None, "") else f" ({_shown(option.default)})"
    group.add_argument("--" + option.name.replace("_", "-"), help=text + shown, **KINDS[kind])


def _shown(value):
    """Image-scale values as people write them: 8/255."""
    levels = 255 * value if isinstance(value, float) else 0.0
    return (
        f"{levels:.1f}/255".replace(".0/", "/")
        if 0.05 < levels < 20 and abs(levels - round(levels, 1)) < 1e-9
        else str(value)
    )


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the algorithm that were on the command line, by name. The others are the
    preset's.
    """
    return {
        field.name: getattr(args, field.name)
        for field in fields(Options)
        if hasattr(args, field.name)
    }
