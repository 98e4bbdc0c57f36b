"""Mutual information of one-dimensional projections as a neural lower bound."""

import math

import torch

SHARE = 0.75  # of the points train, the rest judges
RATE, DECAY = 1e-2, 1e-3
SHIFTS = 16  # each judging u meets so many foreign v


def mine(
    u: torch.Tensor, v: torch.Tensor, *, hidden: int, steps: int, batch: int, seed: int
) -> torch.Tensor:
    """Held-out Donsker-Varadhan bound (Belghazi et al., "Mutual Information Neural Estimation",
    ICML 2018) in nats, float64 [S].

    E[T(u, v)] - log E[exp T(u, v')], v' another point's v; T: 2 -> hidden -> hidden -> 1 with SiLU,
    one network per row pair of u and v [S, N], all of them trained at once by AdamW (cosine to 0)
    on three quarters of the points. The rest gives the estimate."""
    draw = torch.Generator().manual_seed(seed)
    slices, points = u.shape
    order = torch.randperm(points, generator=draw).to(u.device)
    both = torch.stack((u, v), 2)[:, order]
    cut = int(SHARE * points)
    batch = min(batch, cut)

    def layer(inputs, outputs):
        # The same start for every slice: a result does not depend on how the slices are cut into
        # pieces.
        weight = torch.randn(1, inputs, outputs, generator=draw) / math.sqrt(inputs)
        bias = (
            torch.randn(1, 1, outputs, generator=draw) / 2 if outputs > 1 else torch.zeros(1, 1, 1)
        )
        return [t.repeat(slices, 1, 1).to(u.device).requires_grad_() for t in (weight, bias)]

    weights = [layer(2, hidden), layer(hidden, hidden), layer(hidden, 1)]

    def critic(pairs):
        for weight, bias in weights[:-1]:
            pairs = torch.nn.functional.silu(torch.baddbmm(bias, pairs, weight))
        return torch.baddbmm(weights[-1][1], pairs, weights[-1][0]).squeeze(2)

    def bound(joint, shifts):
        foreign = (
            torch.stack((joint[..., 0], joint[..., 1].roll(shift, 1)), 2) for shift in shifts
        )
        product = torch.stack([critic(pairs).logsumexp(1) for pairs in foreign]).logsumexp(0)
        return critic(joint).mean(1) - product + math.log(joint.shape[1] * len(shifts))

    with torch.enable_grad():
        optimizer = torch.optim.AdamW(
            [t for pair in weights for t in pair], RATE, weight_decay=DECAY
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            chosen = torch.randperm(cut, generator=draw)[:batch].to(u.device)
            optimizer.zero_grad()
            bound(both[:, chosen], (1,)).sum().neg().backward()
            optimizer.step()
            schedule.step()
    judging = both[:, cut:]
    apart = max(1, judging.shape[1] // (SHIFTS + 1))
    with torch.no_grad():
        return bound(judging, range(apart, judging.shape[1], apart)).double()
