"""What the source network sees of a batch, and the way of its gradient back to the perturbation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..frozen import AutogradNet, FrozenNet
from ..ops import perturbed_input
from ..ops.perturbed_input import transposed_view
from .options import Options
from .robust import Drawn


def network_input(
    images: torch.Tensor,
    delta: torch.Tensor | None,
    labels: torch.Tensor,
    index: torch.Tensor | None,
    flip: torch.Tensor | None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    *,
    classwise: bool,
    **rest: Any,
) -> torch.Tensor:
    """`perturbed_input` of the rows `index` [B]; with `classwise`, delta has one row per class and
    `labels` [B] choose it. `rest` are more arguments of `perturbed_input`.
    """
    if classwise and delta is not None:
        images, delta, index = images[index], delta[labels], None
    return perturbed_input(images, delta, index, flip, mean, std, **rest)


@dataclass
class Seen:
    """A contrastive batch in one draw of the transforms.

    network: the frozen one that sees it. images, delta: the stores of a `Descent`. labels, index
    (int64), flip (bool or None): [B] in one order. drawn: what is random.
    """

    network: FrozenNet | AutogradNet
    images: torch.Tensor
    delta: torch.Tensor
    options: Options
    labels: torch.Tensor
    index: torch.Tensor
    flip: torch.Tensor | None
    drawn: Drawn

    def load(self, rows: slice) -> torch.Tensor:
        """The network's input of some rows of the batch: image + delta, transformed and
        normalised.
        """
        network, view = self.network, _of(rows, self.drawn.view)
        normalisation = network.normalisation(self.images.shape[1])
        form: dict[str, Any] = {
            "dtype": network.dtype if network.fused else torch.float32,
            "channels_last": isinstance(network, FrozenNet)
            or network.layout is torch.channels_last,
            "backend": self.options.backend,
        }
        if not self.drawn.changes:
            return self._picture(rows, *normalisation, view=view, **form)
        x = self._changed(self._plain(rows)).contiguous()
        return perturbed_input(x, None, None, None, *normalisation, view=view, **form)

    def back(self, rows: slice, grad: torch.Tensor) -> torch.Tensor:
        """The gradient of image + delta, [rows, C, H, W], from that of the network's input."""
        if self.drawn.view is not None:
            view = transposed_view(self.drawn.view[rows])
            grad = perturbed_input(
                grad.float().contiguous(),
                view=view,
                channels_last=False,
                backend=self.options.backend,
            )
        if self.drawn.changes:
            with torch.enable_grad():
                x = self._plain(rows).requires_grad_()
                (grad,) = torch.autograd.grad(self._changed(x), x, grad.float())
        return grad

    def _picture(self, rows, *normalisation, **form):
        """Image + delta."""
        return network_input(
            self.images,
            self.delta,
            self.labels[rows],
            self.index[rows],
            _of(rows, self.flip),
            *normalisation,
            eps=self.options.eps,
            classwise=self.options.classwise,
            **form,
        )

    def _plain(self, rows):
        """The same on the [0, 1] scale, for the changes, which are computed twice: to keep their
        values until the gradient is there would take the memory of a whole batch.
        """
        return self._picture(rows, channels_last=False, backend=self.options.backend)

    def _changed(self, x):
        for change in self.drawn.changes:
            x = change(x)
        return x


def _of(rows, each):
    return None if each is None else each[rows]
