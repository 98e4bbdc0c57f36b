import torch

WORKSPACE = 32 << 20  # bytes for the row chunks


def unit_rows(features):
    """f / max(||f||, 1e-8) in the accumulation dtype, and the clamped norms [B, 1]."""
    f = features if features.dtype == torch.float64 else features.float()
    norm = torch.linalg.vector_norm(f, dim=1, keepdim=True)
    if norm.isfinite().all():
        norm = norm.clamp_min(1e-8)
        return f / norm, norm
    small = torch.tensor(
        2.0**-520 if f.dtype == torch.float64 else 2.0**-80, dtype=f.dtype, device=f.device
    )
    factor = torch.where(norm.isfinite(), 1, small)  # where squares overflow
    norm = torch.linalg.vector_norm(f * factor, dim=1, keepdim=True).clamp_min(1e-8)
    return f * factor / norm, norm / factor


def formula(features, labels, temperature, denominator):
    """The definition, B x B at once; autograd through it in float64 is the oracle of every
    gradient.
    """
    z, _ = unit_rows(features)
    logits = z @ z.T / temperature
    same = labels[:, None] == labels[None, :]
    positives = logits.masked_fill(~same, -torch.inf).logsumexp(1)
    pool = logits if denominator == "all" else logits.masked_fill(same, -torch.inf)
    return (pool.logsumexp(1) - positives).mean()


def nt_xent(features, labels, temperature, denominator, want_grad):
    """The closed form of docs/method.md in row chunks: sums P (same class) and N (other classes)
    are kept apart.

    P is shifted by the row's own norm (1, or 0 for a zero row). N uses the same shift, or its
    maximum with "negatives"."""
    z, norm = unit_rows(features)
    count = len(z)
    rows = max(1, WORKSPACE // (6 * z.element_size() * max(count, 1)))
    chunks = [slice(start, start + rows) for start in range(0, count, rows)]
    own = torch.linalg.vector_norm(z, dim=1)
    top, same_sum, other_sum = own.clone(), torch.empty_like(own), torch.empty_like(own)
    for c in chunks:
        s = z[c] @ z.T
        same = labels[c, None] == labels[None, :]
        if denominator == "negatives":
            top[c] = s.masked_fill(same, -torch.inf).amax(1)
        same_sum[c] = ((s - own[c, None]) / temperature).exp().masked_fill(~same, 0).sum(1)
        other_sum[c] = ((s - top[c, None]) / temperature).exp().masked_fill(same, 0).sum(1)
    if denominator == "all":
        losses = torch.log1p(other_sum / same_sum)
        same_weight, other_weight = (
            -other_sum / (same_sum * (same_sum + other_sum)),
            1 / (same_sum + other_sum),
        )
    else:
        losses = torch.log(other_sum) + top / temperature - torch.log(same_sum) - own / temperature
        same_weight, other_weight = -1 / same_sum, 1 / other_sum
    if not want_grad:
        return losses.mean(), z.new_empty(0)
    grad = torch.empty_like(z, memory_format=torch.contiguous_format)
    for c in chunks:
        s = z[c] @ z.T
        same = labels[c, None] == labels[None, :]
        pull = (
            same_weight[c, None] * ((s - own[c, None]) / temperature).exp()
            + same_weight * ((s - own) / temperature).exp()
        )
        push = (
            other_weight[c, None] * ((s - top[c, None]) / temperature).exp()
            + other_weight * ((s - top) / temperature).exp()
        )
        g = torch.where(same, pull, push) @ z / (count * temperature)
        grad[c] = (g - (g * z[c]).sum(1, keepdim=True) * z[c]) / norm[c]
    return losses.mean(), grad
