import torch


def formula(features, labels, normalize_dim):
    """mean_i log(1 + scale * sum_{j: y_j = y_i} ||f_i - f_j||), scale = 1/D or 1; autograd through
    it is the oracle.
    """
    same = labels[:, None] == labels[None, :]
    distances = torch.linalg.vector_norm(features[:, None] - features[None, :], dim=2)
    scale = 1 / features.shape[1] if normalize_dim and features.shape[1] else 1.0
    return torch.log1p(scale * (distances * same).sum(1)).mean()


def lengths_and_directions(difference):
    """||d|| and d / ||d|| of the rows, which are multiplied by a power of two each: no square
    overflows or underflows.

    A row shorter than the smallest normal number has direction 0.
    """
    if not difference.numel():
        return difference.new_zeros(len(difference)), difference
    most = 1022 if difference.dtype == torch.float64 else 126
    exponent = torch.frexp(difference.abs().amax(1)).exponent.clamp(-most, most)
    ones = torch.ones(len(difference), dtype=difference.dtype, device=difference.device)
    scaled = difference * torch.ldexp(ones, -exponent)[:, None]
    norm = torch.linalg.vector_norm(scaled, dim=1)
    length = norm * torch.ldexp(ones, exponent)
    return length, torch.where(
        (length < torch.finfo(length.dtype).tiny)[:, None], 0, scaled / norm[:, None]
    )


def intra_class_distance(features, labels, normalize_dim, want_grad):
    """Direct differences row by row, inside each class only (the Gram trick cancels on collapsed
    classes).
    """
    f = features if features.dtype == torch.float64 else features.float()
    count, width = f.shape
    scale = 1 / width if normalize_dim and width else 1.0
    members = [torch.nonzero(labels == label)[:, 0] for label in labels.unique()]
    sums = f.new_zeros(count)
    for rows in members:
        for i in rows.tolist():
            sums[i] = scale * lengths_and_directions(f[i] - f[rows])[0].sum()
    loss = torch.log1p(sums).mean()
    if not want_grad:
        return loss, f.new_empty(0)
    grad = torch.empty_like(f, memory_format=torch.contiguous_format)
    for rows in members:
        for i in rows.tolist():
            _, directions = lengths_and_directions(f[i] - f[rows])
            pull = 1 + (1 + sums[i]) / (
                1 + sums[rows]
            )  # a share alone may be too small: s_i may be as large as a number can be
            grad[i] = (pull[:, None] * directions).sum(0) * (scale / count) / (1 + sums[i])
    return loss, grad
