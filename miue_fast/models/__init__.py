"""Source and victim networks."""

from ..support.messages import fail
from ..support.ranges import MOST, WIDEST, whole
from .convolutional import VGG, DenseNet, LeNet5
from .perceptron import MLP, ViT
from .resnet import Bottleneck, ResNet

# Per name: the usual width (None: it has no width), and the network from width, classes, normalize,
# size and channels.
_BUILDERS = {
    "resnet18": (64, lambda w, n, norm, size, c: ResNet([w, 2 * w, 4 * w, 8 * w], 2, n, norm, c)),
    "small_resnet": (8, lambda w, n, norm, size, c: ResNet([w, 2 * w, 4 * w], 1, n, norm, c)),
    "resnet50": (
        64,
        lambda w, n, norm, size, c: ResNet(
            [w, 2 * w, 4 * w, 8 * w], [3, 4, 6, 3], n, norm, c, Bottleneck
        ),
    ),
    "vgg11": (64, lambda w, n, norm, size, c: VGG(w, [1, 1, 2, 2, 2], n, norm, size, c)),
    "vgg16": (64, lambda w, n, norm, size, c: VGG(w, [2, 2, 3, 3, 3], n, norm, size, c)),
    "densenet121": (32, lambda w, n, norm, size, c: DenseNet(w, [6, 12, 24, 16], n, norm, c)),
    "vit": (192, ViT),
    "lenet5": (None, lambda w, n, norm, size, c: LeNet5(n, norm, size, c)),
    "linear": (None, lambda w, n, norm, size, c: MLP(0, 0, n, norm, size, c)),
    "mlp2": (512, lambda w, n, norm, size, c: MLP(1, w, n, norm, size, c)),
    "mlp3": (512, lambda w, n, norm, size, c: MLP(2, w, n, norm, size, c)),
}
NAMES = tuple(_BUILDERS)
# The layer whose flattened output is the features: what the classifier `fc` reads.
FEATURE = dict.fromkeys(NAMES, "avgpool") | {
    "vit": "norm",
    "lenet5": "relu",
    "linear": "features",
    "mlp2": "features",
    "mlp3": "features",
}
SQUARE = (
    "vit",
    "lenet5",
    "linear",
    "mlp2",
    "mlp3",
)  # built for images of exactly size x size; the others take any from 8 x 8


def build(name, num_classes, *, width=None, normalize=True, size=32, channels=3):
    """A new network, initialised from torch's global generator (seed it first).

    Args:
        name: the CIFAR forms (3x3 stem, no max-pool) of "resnet18" (11.2 M parameters), "resnet50",
            "vgg11", "vgg16" (with batch norm), "densenet121"; "vit" (4x4 patches, six blocks);
            "lenet5"; "mlp2", "mlp3" (layers, counting the classifier), "linear"; "small_resnet"
            (for CPUs: one block at each of width, 2 width, 4 width; 8 by default).
        num_classes: outputs of the classifier `fc`.
        width: None for the network's own. Filters of the first stage (ResNet, VGG), growth
            (DenseNet), token width (vit: a multiple of 3), hidden units (mlp2, mlp3); lenet5 and
                linear have none.
        normalize: subtract the ImageNet mean and divide by its deviation inside the network (the
            source model does, victims do not).
        size: side of the images; 8 or more (lenet5: 16 or more, vit: a multiple of 4), for the
            later stages halve it. The networks in `SQUARE` take this size only.
        channels: of the images, 3 or 1.

    Convolutions: Kaiming normal, fan-out (vit: truncated normal; lenet5 and the perceptrons:
        PyTorch's own). The features of MI-UE are
    the output of the layer `FEATURE[name]`: `avgpool` (after the last ReLU) in the networks that
        have one. Errors: ValueError.
    """
    if name not in _BUILDERS:
        fail("models.build", "name", f"one of {', '.join(NAMES)}", repr(name))
    usual, make = _BUILDERS[name]
    if usual is None and width is not None:
        fail("models.build", "width", f"None for {name}", repr(width))
    limits = {
        "num_classes": (1, MOST),
        "width": (1, WIDEST),
        "size": (16 if name == "lenet5" else 8, 4096),
    }
    given = {
        "num_classes": num_classes,
        "width": usual or 1 if width is None else width,
        "size": size,
    }
    for argument, value in given.items():
        whole("models.build", argument, value, *limits[argument])
    for argument, unit in (("width", 3), ("size", 4)):
        if name == "vit" and given[argument] % unit:
            fail("models.build", argument, f"a multiple of {unit} for vit", given[argument])
    if channels not in (1, 3):
        fail("models.build", "channels", "3 or 1", repr(channels))
    return make(given["width"], num_classes, normalize, size, channels)


__all__ = ["FEATURE", "NAMES", "SQUARE", "ResNet", "build"]
