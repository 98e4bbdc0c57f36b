"""What the poison step lowers: a loss of the source network's outputs, and its gradient in them,
without autograd.

| objective | outputs | loss that delta lowers | the source model is trained on |
|---|---|---|---|
| mi-ue | features | nt_xent + zeta * within-class distance (Zhu et al., ICLR 2026) \
| image + delta |
| em | logits | cross-entropy of the true label: error-minimising noise \
(Huang et al., ICLR 2021) | image + delta |
| tap | logits | cross-entropy of class (y + target_shift) mod classes: targeted adversarial \
(Fowl et al., NeurIPS 2021) | the clean image |
| random | none | none: every value is -eps or +eps | not at all |

Loop, step size, budget and kernels are the same for all of them, which is not what the papers of em
and tap ran (em trains until the training accuracy is 99 %, tap takes 250 steps on one finished
network)."""

import torch

from .. import models
from ..ops import mi_ue_value_and_grad
from ..support.messages import fail

OBJECTIVES = ("mi-ue", "em", "tap", "random")


def on_logits(objective):
    return objective in ("em", "tap")


def trains_on_delta(objective):
    return objective != "tap"


def default_layer(objective, model):
    """Name of the layer whose output the objective looks at."""
    if not on_logits(objective):
        return (models.FEATURE.get(model) if isinstance(model, str) else None) or "avgpool"
    if not isinstance(model, torch.nn.Module):
        return "fc"
    linear = [name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)]
    if not linear:
        fail(
            "generate",
            "feature",
            "the name of the layer that gives the logits (the model has no nn.Linear)",
            None,
        )
    return linear[-1]


def value_and_grad(outputs, labels, classes, options):
    """(loss, d loss / d outputs) of a batch. outputs: [B, D] features or [B, >= classes] logits;
    labels: int64 [B] below `classes`.
    """
    o = options
    if not on_logits(o.objective):
        return mi_ue_value_and_grad(
            outputs,
            labels,
            o.temperature,
            o.zeta,
            denominator=o.denominator,
            normalize_dim=o.normalize_dim,
            backend=o.backend,
        )
    wanted = labels if o.objective == "em" else (labels + o.target_shift) % classes
    logs = outputs.float().log_softmax(1)
    hit = torch.arange(outputs.shape[1], device=outputs.device) == wanted[:, None]
    return -(logs * hit).sum(1).mean(), (logs.exp() - hit.float()) / len(outputs)
