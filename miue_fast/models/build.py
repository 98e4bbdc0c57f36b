"""A new network by its name."""

from ..support.messages import fail
from ..support.ranges import MOST, WIDEST, whole
from .base import NETWORKS, Network

LARGEST_SIDE = 4096


def build(
    name: str,
    num_classes: int,
    *,
    width: int | None = None,
    normalize: bool = True,
    size: int = 32,
    channels: int = 3,
) -> Network:
    """A new network, initialised from torch's global generator (seed it first).

    Args:
        name: an entry of `NETWORKS`, whose `about` says what it is: CIFAR forms (3x3 stem, no
            max-pool) of ResNet, VGG and DenseNet, a small vision transformer, LeNet-5 and
            perceptrons.
        num_classes: outputs of the classifier `fc`.
        width: None for the network's own. Filters of the first stage (ResNet, VGG), growth
            (DenseNet), token width (vit: a multiple of 3), hidden units (mlp2, mlp3); lenet5 and
            linear have none.
        normalize: subtract the ImageNet mean and divide by its deviation inside the network (the
            source network does, victims do not).
        size: side of the images; 8 or more (lenet5: 16 or more, vit: a multiple of 4), because the
            later stages halve it. Networks whose entry is `square` take this size only.
        channels: of the images, 3 or 1.

    Convolutions start Kaiming normal, fan-out (vit: truncated normal; lenet5 and the perceptrons:
    PyTorch's own). The features of MI-UE are the output of the layer `NETWORKS[name].feature`:
    `avgpool` (after the last ReLU) in the networks that have one. Errors: ValueError.
    """
    entry = NETWORKS.choose("models.build", "name", name)
    if entry.width is None and width is not None:
        fail("models.build", "width", f"None for {name}", repr(width))
    limits = {"num_classes": (1, MOST), "width": (1, WIDEST), "size": (entry.least, LARGEST_SIDE)}
    given = {
        "num_classes": num_classes,
        "width": entry.width or 1 if width is None else width,
        "size": size,
    }
    for argument, value in given.items():
        whole("models.build", argument, value, *limits[argument])
    for argument, unit in (("width", entry.width_unit), ("size", entry.size_unit)):
        if given[argument] % unit:
            fail("models.build", argument, f"a multiple of {unit} for {name}", given[argument])
    if channels not in (1, 3):
        fail("models.build", "channels", "3 or 1", repr(channels))
    return entry.make(given["width"], num_classes, normalize, size, channels)
