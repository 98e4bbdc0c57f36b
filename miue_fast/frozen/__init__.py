"""A frozen eval-mode network as its own machine: fused layers, forward and input gradient only,
ReLU bits instead of activations.
"""

import logging

import torch
from torch import nn

from ..support.calls import ordinary
from ..support.messages import fail
from .autograd import AutogradNet
from .chunks import CPU_CHUNK
from .net import FrozenNet
from .plan import plan
from .trace import NotLowered

__all__ = ["CPU_CHUNK", "AutogradNet", "FrozenNet", "find_layer", "freeze", "frozen_form"]
log = logging.getLogger("miue_fast")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@ordinary()
def freeze(
    model: nn.Module,
    feature: str = "avgpool",
    *,
    dtype: torch.dtype | None = None,
    chunk: int | None = None,
    fused: bool = True,
    fp8: bool = False,
    channels_last: bool = False,
    backend: str = "auto",
    channels: int | None = None,
) -> FrozenNet | AutogradNet:
    """The frozen network of an eval-mode model: `forward(images) -> features`,
    `input_grad(grad) -> image_grad`, `refold()`.

    Args:
        model: nn.Module on one device, in eval mode; images [B, C, H, W] on the [0, 1] scale, it
            normalises its input itself. It is not changed. After training it further call
            `refold()`: the folded weights are made anew in place. Of a model that torch.compile
                wrapped the layers are taken.
        feature: name of the layer whose flattened output [B, D] is the features; what comes after
            it is not computed.
        dtype: compute type: float32 (None), bfloat16, float16 (float64 on the CPU). Weights are
            folded in float64 and rounded once.
        chunk: images per launch, >= 2 (None: 64 on a CPU, the whole batch on a GPU; a CPU takes at
            least four per thread). The results do not depend on it, up to rounding.
        fused: False takes PyTorch's autograd at once.
        fp8: every convolution but the first multiplies e4m3 values, quantised per tensor (weights;
            input and gradient of each launch, so that results depend on `chunk`); bfloat16 in
            between: dtype None or bfloat16. Triton, compute capability >= 8.9; on a CPU it is
            emulated, which is slow. What it does to the gradient's signs is in
            docs/performance-notes.md.
        channels_last: memory format of the autograd form; the fused one has no other.
        backend: of the ops: "auto", "triton", "cuda", "cpu" or "reference".
        channels: of the images, where they are known: grayscale that the model's normalisation
            spreads over several has no fused form.

    Returns: a FrozenNet, or, for a network with an operation that has no fused layer, an
        AutogradNet with the same calls; one log line
    (and its `reason`) names that operation. Covered: convolution, batch norm, ReLU, sums,
    concatenation, max and average pooling, linear, flatten, per-channel constants, in the order
    that ResNets, VGGs, pre-activation WRNs and DenseNets have them. The result is for one thread at
    a time; it copies (`copy.deepcopy`) and pickles. Autocast, inference mode and the default dtype
    of the caller change nothing. Errors: ValueError."""
    training = (
        [name or "the model" for name, m in model.named_modules() if m.training]
        if isinstance(model, nn.Module)
        else []
    )
    if training:
        fail("freeze", "model", "eval mode (call model.eval())", f"training mode ({training[-1]})")
    return frozen_form(
        model,
        feature,
        dtype=dtype,
        chunk=chunk,
        fused=fused,
        fp8=fp8,
        channels_last=channels_last,
        backend=backend,
        channels=channels,
    )


def frozen_form(
    model: nn.Module,
    feature: str,
    *,
    dtype: torch.dtype | None,
    chunk: int | None,
    fused: bool,
    fp8: bool,
    channels_last: bool,
    backend: str,
    channels: int | None,
) -> FrozenNet | AutogradNet:
    """`freeze` of a model in any mode: what is frozen is how it runs in eval mode."""
    if not isinstance(model, nn.Module):
        fail("freeze", "model", "an nn.Module", type(model).__name__)
    compiled = getattr(model, "_orig_mod", None)
    if isinstance(compiled, nn.Module) and isinstance(feature, str):
        # Of a model that torch.compile wrapped, only the layers count here.
        model, feature = compiled, feature.removeprefix("_orig_mod.")
    find_layer("freeze", model, feature)
    if not isinstance(fp8, bool):
        fail("freeze", "fp8", "True or False", repr(fp8))
    if fp8 and dtype not in (None, torch.bfloat16):
        fail("freeze", "dtype", "bfloat16 with fp8", dtype)
    dtype = dtype or (torch.bfloat16 if fp8 else torch.float32)
    if dtype not in _DTYPES:
        fail("freeze", "dtype", "float32, bfloat16, float16 or float64", dtype)
    if chunk is not None and (not isinstance(chunk, int) or chunk < 2):
        fail("freeze", "chunk", "None or a whole number >= 2", chunk)
    devices = {str(t.device) for t in [*model.parameters(), *model.buffers()]}
    if len(devices) > 1:
        fail("freeze", "model", "weights on one device", ", ".join(sorted(devices)))
    reason = "fused=False"
    if fused:
        try:
            net = FrozenNet(
                model, plan(model, feature), dtype=dtype, chunk=chunk, backend=backend, fp8=fp8
            )
            if channels == 1 and net.mean and len(net.mean) > 1:
                raise NotLowered(f"a normalisation that spreads one channel over {len(net.mean)}")
            return net
        except NotLowered as error:
            reason = str(error)
        if not fp8:
            log.warning("the network runs in PyTorch's autograd: no fused layer for %s", reason)
    if fp8:
        fail("freeze", "fp8", "False without a fused network", f"True ({reason})")
    return AutogradNet(
        model, feature, reason, dtype=dtype, chunk=chunk, channels_last=channels_last
    )


def find_layer(op: str, model: nn.Module, name: str) -> nn.Module:
    """The layer of that name. Errors: ValueError, which lists the layers there are."""
    layers = dict(model.named_modules())
    if not name or name not in layers:
        fail(
            op, "feature", f"a layer of the model ({', '.join(n for n in layers if n)})", repr(name)
        )
    return layers[name]
