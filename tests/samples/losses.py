"""Samples of the losses: features and labels of a batch, and what each loss takes beside them."""

import torch

import miue_fast

from . import DOUBLES, Samples, add


def batches(device, dtype):
    """(features, labels): one, ragged, workload-sized; duplicates, zero rows, lone members, tight
    clusters, strange labels, strides.
    """
    gen = torch.Generator().manual_seed(7)

    def make(batch, width, classes, *, spread=1.0, offset=0):
        labels = torch.randint(classes, (batch,), generator=gen) + offset
        centres = torch.randn(classes, width, generator=gen)
        features = centres[labels - offset] + spread * torch.randn(batch, width, generator=gen)
        return features.relu().to(dtype).to(device), labels.to(device)

    yield make(2, 1, 2)
    yield make(1, 5, 1)
    yield make(7, 3, 2)
    yield make(33, 17, 4, offset=-3)
    yield make(40, 64, 10, spread=0.01)  # tight clusters: the end of every run
    features, labels = make(24, 16, 3)
    features[5] = features[4]
    labels[5] = labels[4]
    features[9] = 0
    yield features, labels.to(torch.int32).long()
    labels = labels.clone()
    labels[0] = 2**40  # a class with one member, and labels that are no small numbers
    yield features, labels
    wide, labels = make(20, 32, 3)
    yield wide[:, ::2], labels  # strided rows
    yield wide[::2, :9], labels[::2].contiguous()
    yield make(130, 70, 7)


def strided(tensor, kind):
    """The same values in memory of another layout."""
    rows, columns = tensor.shape
    if kind == "columns apart":
        return torch.stack([tensor, torch.full_like(tensor, torch.nan)], 2).flatten(1)[:, ::2]
    if kind == "rows apart":
        return torch.stack([tensor, torch.full_like(tensor, torch.nan)], 1).flatten(0, 1)[::2]
    if kind == "transposed":
        return tensor.t().contiguous().t()
    if kind == "odd offset":
        wide = torch.full((rows * columns + 1,), torch.nan, dtype=tensor.dtype)
        return wide[1:].view(rows, columns).copy_(tensor)
    return tensor


# Powers of ten of the features: similarities take any above the clamp of the norms, distances any
# that float64's squares take.
ABOVE_CLAMP = {
    torch.float32: (-5, 33),
    torch.bfloat16: (-5, 33),
    torch.float16: (-2, 3),
    torch.float64: (-5, 140),
}
DISTANCES = {
    torch.float32: (-28, 33),
    torch.bfloat16: (-28, 33),
    torch.float16: (-2, 3),
    torch.float64: (-130, 140),
}


def fuzzed(choose, magnitudes, clamped=True):
    """(features, labels): B 0 to 40, D 0 to 70. magnitudes: {dtype: the powers of ten of the
    features}; clamped: norms below 1e-7 become zero.
    """
    gen = choose.generator()
    rows, columns = choose.integer(0, 40), choose.integer(0, 70)
    dtype = choose.one_of(*DOUBLES)
    layout = choose.one_of(
        "one class", "two", "few", "many", "lone members", "sorted", "huge", "negative"
    )
    classes = {"one class": 1, "two": 2, "many": 30}.get(layout, 4)
    labels = (
        torch.randperm(rows, generator=gen)
        if layout == "lone members"
        else torch.randint(classes, (rows,), generator=gen)
    )
    kind = choose.one_of("normal", "relu", "tight", "duplicates", "zeros", "uneven rows", "sparse")
    features = torch.randn(rows, columns, generator=gen, dtype=torch.float64)
    if kind == "relu":
        features = features.relu()
    elif kind == "tight":
        centres = torch.randn(classes, columns, generator=gen, dtype=torch.float64)
        features = centres[labels % classes] + 1e-3 * features
    elif kind == "duplicates":
        features = features[torch.randint(3, (rows,), generator=gen) % max(rows, 1)]
    elif kind == "zeros":
        features[torch.rand(rows, generator=gen) < 0.3] = 0
    elif kind == "uneven rows":
        scale = torch.rand(rows, 1, generator=gen, dtype=torch.float64)
        features = features * 10 ** (3 * scale - 2)
    elif kind == "sparse":
        features = features * (torch.rand(rows, columns, generator=gen) < 0.1)
    features = (features * 10.0 ** choose.number(*magnitudes[dtype])).to(dtype)
    # Norms are clamped at 1e-8: below, a row is zero or the closed form does not hold.
    if clamped:
        features[torch.linalg.vector_norm(features.double(), dim=1) < 1e-7] = 0
    if layout == "sorted":
        labels = labels.sort().values
    elif layout == "huge":
        labels = labels * 2**60 - 2**62
    elif layout == "negative":
        labels = -1 - labels
    kind = choose.one_of("contiguous", "columns apart", "rows apart", "transposed", "odd offset")
    return strided(features, kind), labels


def temperature(choose):
    return min(max(10 ** choose.number(-3, 1), 1e-3), 10.0)


def no_rows(args):
    return args[0][:0], args[1][:0], *args[2:]


def nt_xent_samples(device, dtype):
    for features, labels in batches(device, dtype):
        yield features, labels, 0.1, "all", True
        yield features, labels, 0.5, "all", False
        if len(labels.unique()) > 1:
            yield features, labels, 0.1, "negatives", True
    features, labels = list(batches(device, dtype))[3]
    for temperature in (1e-3, 0.02, 10.0):
        yield features, labels, temperature, "all", True
        yield features, labels, temperature, "negatives", True


def large_losses(device, dtype, big=False):
    """Arguments of nt_xent for its kernels of large batches: several spans of several tiles, every
    width of a tile, rows that no vector reads, weights of every size. big: more rows than any other
    kernel takes (a GPU's number of multiprocessors decides the spans)."""
    gen = torch.Generator().manual_seed(4)

    def case(features, labels, temperature=0.1, denominator="all"):
        return features.to(dtype).to(device), labels.to(device), temperature, denominator, True

    for batch, width, temperature, denominator in [
        (200, 128, 0.1, "all"),
        (200, 100, 0.5, "negatives"),
        (300, 3, 0.1, "all"),
        (70, 200, 0.1, "negatives"),
        (140, 512, 0.1, "all"),
        (130, 500, 0.02, "negatives"),
        *(
            (2300, width, 0.1, way)
            for width in (512, 200, 100)
            for way in ("all", "negatives")
            if big
        ),
    ]:
        yield case(
            torch.randn(batch, width, generator=gen),
            torch.arange(batch) % 7,
            temperature,
            denominator,
        )
    features = torch.randn(130, 500, generator=gen)
    whole, labels, *rest = case(features, torch.arange(130) % 3)
    yield whole[::2, 1:], labels[:65], *rest
    yield case(features * torch.logspace(-3, 3, 130)[:, None], torch.arange(130) // 2)
    centres, apart = (
        torch.randn(3, 128, generator=gen),
        torch.randn(1, 20, generator=gen) * (-1.0) ** torch.arange(10)[:, None],
    )
    yield case(
        centres[torch.arange(130) % 3], torch.arange(130) % 3
    )  # nothing left to learn: tiny weights
    apart = apart + 0.1 * torch.randn(10, 20, generator=gen)
    yield case(
        apart, torch.arange(10) % 2, 1e-3, "negatives"
    )  # the weight of a column that is not there overflows


def nt_xent_case(choose):
    batch = fuzzed(choose, ABOVE_CLAMP)
    return *batch, temperature(choose), choose.one_of("all", "negatives"), choose.flag()


def nt_xent(backend, batch):
    return 2 * miue_fast.nt_xent(batch["features"] * 3, batch["labels"], backend=backend)


def distance_samples(device, dtype):
    for features, labels in batches(device, dtype):
        yield features, labels, True, True
        yield features, labels, False, True
    yield features, labels, True, False


def distance_case(choose):
    batch = fuzzed(choose, DISTANCES, clamped=False)
    return *batch, choose.flag(), choose.flag()


def intra_class_distance(backend, batch):
    return 2 * miue_fast.intra_class_distance(
        batch["features"] * 3, batch["labels"], backend=backend
    )


def mi_ue_samples(device, dtype):
    for features, labels in batches(device, dtype):
        yield features, labels, 0.1, 0.1, "all", True
        yield features, labels, 0.2, 0.0, "all", True
        if len(labels.unique()) > 1:
            yield features, labels, 0.1, 0.1, "negatives", False


def mi_ue_case(choose):
    batch = fuzzed(choose, ABOVE_CLAMP)
    zeta = choose.one_of(0.0, 1e-3, 0.1, 1.0, 10.0)
    return *batch, temperature(choose), zeta, choose.one_of("all", "negatives"), choose.flag()


def mi_ue_value_and_grad(backend, batch):
    return miue_fast.mi_ue_value_and_grad(batch["features"] * 2, batch["labels"], backend=backend)


add("nt_xent", Samples(nt_xent_samples, nt_xent_case, no_rows, nt_xent, (0,)))
add(
    "intra_class_distance",
    Samples(distance_samples, distance_case, no_rows, intra_class_distance, (0,)),
)
add("mi_ue_value_and_grad", Samples(mi_ue_samples, mi_ue_case, no_rows, mi_ue_value_and_grad, (0,)))
