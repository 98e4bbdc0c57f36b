"""Published numbers (Zhu et al., ICLR 2026), in percent of clean test images unless said otherwise,
and the setting they were measured in.
"""

from collections.abc import Mapping
from typing import Any

from ..generation import OBJECTIVES, Objective, Options
from ..generation.objectives.em import Em
from ..generation.objectives.mi_ue import MiUe
from ..generation.objectives.random import Random
from ..generation.objectives.tap import Tap

PAPER: dict[str, dict[str, Any]] = {
    "CIFAR-10": {
        "setting": (
            "CIFAR-10 (PNG), all 50,000 training images, source and victim ResNet-18, "
            "100 epochs of generation, 200 of training, one run without spread"
        ),
        "train_images": 50000,
        "test_images": 10000,
        "source": {"model": "resnet18", "width": None, "epochs": 100},
        "victim": {"victim": "resnet18", "epochs": 200, "lr": 0.5, "batch": 128},
        "standard": {"clean": 94.45, Em.name: 24.17, Tap.name: 11.21, MiUe.name: 9.95},  # ResNet-18
        "transfer": {
            "resnet50": 9.98,
            "densenet121": 9.93,
            "vit": 15.51,
            "lenet5": 10.80,
            "mlp3": 14.16,
            "mlp2": 17.82,
        },  # MI-UE
        "adversarial": {2: 17.39, 4: 31.79, 6: 45.55, 8: 70.56},  # MI-UE, by 255 eps
        "mutual_information": {
            "clean": 0.7122,
            Random.name: 0.6747,
            Em.name: 0.64,
            MiUe.name: 0.4969,
        },  # histogram estimator
        "spearman": 0.78,  # of the MI gap with the accuracy gap
    }
}
ORDER = (
    Random.name,
    Em.name,
    MiUe.name,
)  # the paper's, of mutual information and covariance below "clean", largest first


def differences(paper: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
    """Says in words what keeps the numbers of this report from being compared one to one with the
    paper's.
    """
    setting, found = report["setting"], []
    if setting["jpeg"]:
        found.append("the images are JPEG files")
    for key, what in (("train_images", "training"), ("test_images", "test")):
        if setting[key] != paper[key]:
            found.append(f"{setting[key]:,} {what} images instead of {paper[key]:,}")
    victims = list(setting["recipes"].values())
    if not any(
        all(plan[key] == value for key, value in paper["victim"].items()) for plan in victims
    ):
        told = ", ".join(
            f"{name} ({plan['epochs']} epochs)" for name, plan in setting["recipes"].items()
        )
        found.append(f"victims {told} instead of ResNet-18 (200 epochs)")
    sources = [
        options
        for entry in report["poisons"]
        if not (options := entry["options"]).keys() & {"of", "made"}
    ]
    sources = [options for options in sources if _trains(options)]
    usual = {"width": None, "epochs": 100}
    if any(
        {"model": _network(options), **{key: options.get(key, usual[key]) for key in usual}}
        != paper["source"]
        for options in sources
    ):
        found.append("other source models or epochs than ResNet-18 and 100")
    return found


def _network(options):
    """The name of the source network of a poison."""
    objective = OBJECTIVES.get(options.get("objective", Options.objective), Objective)
    return options.get("model", objective.network)


def _trains(options):
    """Whether the objective of a poison trains a source network."""
    objective = OBJECTIVES.get(options.get("objective", Options.objective))
    return objective is None or objective.outputs is not None
