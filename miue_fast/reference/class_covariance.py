import torch


def class_covariance(features, labels, num_classes):
    """Class by class: the mean in float64, rows centred by it and rounded once, one product; the
    upper triangle is mirrored.
    """
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    width = features.shape[1]
    counts = torch.zeros(num_classes, dtype=torch.int64, device=features.device)
    means = torch.zeros(num_classes, width, dtype=wide, device=features.device)
    covariances = torch.zeros(num_classes, width, width, dtype=wide, device=features.device)
    for number in labels.unique().tolist():
        rows = features[labels == number].double()
        origin = (
            rows[0] if wide == torch.float64 else 0
        )  # of equal rows the mean is exact, as it is of float32 summed in float64
        mean = (rows - origin).sum(0) / len(rows) + origin
        centred = (rows - mean).to(wide)
        product = centred.T @ centred / len(rows)
        if not product.isfinite().all():  # a sum may be too large where its mean is not
            small = centred.double() * 2.0**-300
            product = torch.where(
                product.isfinite(),
                product,
                (small.T @ small / len(rows) * 2.0**300 * 2.0**300).to(wide),
            )
        counts[number], means[number] = len(rows), mean
        covariances[number] = product.triu() + product.triu(1).T
    return counts, means, covariances
