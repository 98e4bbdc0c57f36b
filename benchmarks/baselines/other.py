"""Losses of other packages that do a similar job, for their time and memory. Each is another
function, and so has an oracle of its own.

PATHS[op][name] is (implementation, oracle), both with the arguments of the op's `Impl.fn`; an
implementation whose package is missing says so in `missing(name)`.
"""

import importlib.util

import torch

SUPCON = "SupConLoss of pytorch-metric-learning"


def _value_and_grad(loss, features, labels):
    leaf = features.detach().requires_grad_()
    with torch.enable_grad():
        value = loss(leaf if leaf.dtype == torch.float64 else leaf.float(), labels)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def _supcon(features, labels, temperature, denominator, want_grad):
    from pytorch_metric_learning.losses import SupConLoss

    return _value_and_grad(SupConLoss(temperature), features, labels)


def _supcon_formula(features, labels, temperature, denominator, want_grad):
    """Khosla et al., NeurIPS 2020, L_out: the mean of -log(exp(s_ij / t) / sum_{a != i} exp(s_ia /
    t)) over the other members of a class, then over the rows that have any. MI-UE's loss keeps the
    self pair and sums before the logarithm."""

    def loss(f, y):
        z = torch.nn.functional.normalize(f)
        own = torch.eye(len(f), dtype=torch.bool, device=f.device)
        same = (y[:, None] == y) & ~own
        s = z @ z.T / temperature
        logs = s - s.masked_fill(own, -torch.inf).logsumexp(1, keepdim=True)
        count = same.sum(1)
        return -(logs.masked_fill(~same, 0).sum(1) / count.clamp_min(1))[count > 0].mean()

    return _value_and_grad(loss, features, labels)


PATHS = {"nt_xent": {SUPCON: (_supcon, _supcon_formula)}}


def missing(name):
    found = importlib.util.find_spec("pytorch_metric_learning")
    return None if found else f"{name}: not installed (pip install pytorch-metric-learning)"
