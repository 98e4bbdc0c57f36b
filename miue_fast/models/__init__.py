"""Source and victim networks."""

from .resnet import ResNet

_SHAPES = {"resnet18": (64, 4, 2), "small_resnet": (8, 3, 1)}  # first width, stages (each doubles it), blocks per stage
NAMES = tuple(_SHAPES)


def build(name, num_classes, *, width=None, normalize=True, size=32, channels=3):
    """A new network, initialised from torch's global generator (seed it first).

    Args:
        name: "resnet18" (CIFAR form: widths 64 to 512, 11.2 M parameters) or "small_resnet" (for CPUs: one block at each of
            width, 2 width, 4 width; 8 by default).
        num_classes: outputs of the classifier `fc`.
        width: filters of the first stage; None for the network's own.
        normalize: subtract the ImageNet mean and divide by its deviation inside the network (the source model does, victims do not).
        size: side of the images; 8 or more, for the later stages halve it.
        channels: of the images, 3 or 1.

    Convolutions: Kaiming normal, fan-out. The features of MI-UE are the output of `avgpool` (after the last ReLU). Errors: ValueError.
    """
    if name not in _SHAPES:
        raise ValueError(f"models.build: name: expected one of {', '.join(NAMES)}, got {name!r}")
    first, stages, blocks = _SHAPES[name]
    for argument, value, least in (("num_classes", num_classes, 1), ("width", first if width is None else width, 1), ("size", size, 8)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"models.build: {argument}: expected a whole number >= {least}, got {value!r}")
    if channels not in (1, 3):
        raise ValueError(f"models.build: channels: expected 3 or 1, got {channels!r}")
    return ResNet([(width or first) << stage for stage in range(stages)], blocks, num_classes, normalize, channels)


__all__ = ["NAMES", "ResNet", "build"]
