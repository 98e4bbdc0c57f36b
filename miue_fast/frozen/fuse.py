"""Fuses layers where they meet."""

from dataclasses import dataclass, replace
from typing import Any

from .base import Layer, consumers
from .convolution import Conv
from .layers import Add, Affine, Flatten, Linear
from .trace import NotLowered


@dataclass(eq=False)
class Slice(Layer):
    """x[:, :, ::step, ::step], which only a 1x1 convolution after it can take."""

    step: int = 1


def fuse(layers: list[Layer], out: int) -> tuple[list[Layer], list[Any], int]:
    """The layers that value `out` needs, fused: norms go into convolutions and linear layers, ReLUs
    into whatever makes their input, sums into the later convolution, slices into 1x1 convolutions.

    Returns: (layers, affine maps of the network's input, the value of the features).
    """
    needed = {out}
    for layer in reversed(layers):
        if layer.out in needed:
            needed |= set(layer.inputs)
    layers = [layer for layer in layers if layer.out in needed]
    uses = consumers(layers, out)
    made, fused, norms = {}, [], []

    def only(value, *kinds):
        """The layer that makes `value` for one reader, if it is of one of the kinds and open for
        fusion.
        """
        maker = made.get(value)
        return (
            maker
            if isinstance(maker, kinds)
            and uses[value] == 1
            and not maker.relu
            and len(maker.inputs) == 1
            else None
        )

    for layer in layers:
        if isinstance(layer, Affine):
            maker = only(layer.inputs[0], Conv, Linear, Affine)
            if maker:
                maker.norms.extend(layer.norms)
                if isinstance(maker, Affine):
                    maker.channels, maker.constant = (
                        max(maker.channels, layer.channels),
                        maker.constant and layer.constant,
                    )
                maker.out = layer.out
                made[layer.out] = maker
                continue
        elif isinstance(layer, Add) and layer.relu:
            maker = made.get(layer.inputs[0])
            if (
                maker
                and uses[layer.inputs[0]] == 1
                and not maker.relu
                and not isinstance(maker, Slice)
            ):
                maker.relu, maker.out = True, layer.out
                made[layer.out] = maker
                continue
        elif isinstance(layer, Add):
            a, b = layer.inputs
            makers = (
                [
                    (fused.index(m), m, other)
                    for m, other in ((only(a, Conv), b), (only(b, Conv), a))
                    if m
                ]
                if a != b
                else []
            )
            # the later convolution takes the other branch as its residual, and moves to where both
            # are there
            if makers:
                _, maker, other = max(makers, key=lambda entry: entry[0])
                fused.remove(maker)
                maker.inputs, maker.out = [*maker.inputs, other], layer.out
                fused.append(maker)
                made[layer.out] = maker
                continue
        elif isinstance(layer, Conv) and isinstance(made.get(layer.inputs[0]), Slice):
            cut = made[layer.inputs[0]]
            if layer.module.kernel_size != (1, 1) or any(layer.module.padding):
                raise NotLowered(f"{layer.name}: a slice before a convolution other than 1x1")
            layer = replace(layer, inputs=list(cut.inputs), pick=cut.step)
            uses = {**uses, cut.inputs[0]: uses[cut.inputs[0]] + 1, cut.out: uses[cut.out] - 1}
        fused.append(layer)
        made[layer.out] = layer
    for cut in [layer for layer in fused if isinstance(layer, Slice)]:
        if uses[cut.out]:
            raise NotLowered(f"{cut.name}: a slice that is not followed by a 1x1 convolution")
        fused.remove(cut)
    first = [layer for layer in fused if 0 in layer.inputs]
    if len(first) == 1 and isinstance(first[0], Affine) and first[0].constant and not first[0].relu:
        norms, value = first[0].norms, first[0].out
        fused.remove(first[0])
        for layer in fused:
            layer.inputs = [0 if v == value else v for v in layer.inputs]
        out = 0 if out == value else out
    end = Flatten("features", [out], max([out, *(layer.out for layer in layers)]) + 1)
    return [*fused, end], norms, end.out
