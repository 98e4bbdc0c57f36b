"""Networks without convolutions over the whole image: linear, multi-layer perceptrons, a small
vision transformer.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .base import NETWORKS, Architecture, Network, Recipe


class MLP(Network):
    """`hidden` layers of `width` units with ReLU; `features` is what the classifier reads (with no
    hidden layer: the pixels).
    """

    def __init__(self, hidden, width, num_classes, normalize, size, channels):
        super().__init__(normalize, channels)
        self.features, inner = nn.Sequential(nn.Flatten()), channels * size * size
        for _ in range(hidden):
            self.features.append(nn.Linear(inner, width)).append(nn.ReLU())
            inner = width
        self.fc = nn.Linear(inner, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.features(self.normalized(x)))


class EncoderBlock(nn.Module):
    """Pre-norm self-attention and a GELU perceptron of four times the width, each added to its
    input.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        q, k, v = (
            self.qkv(self.norm1(x))
            .view(batch, tokens, 3, self.heads, width // self.heads)
            .permute(2, 0, 3, 1, 4)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.project(y)
        return x + self.mlp(self.norm2(x))


class ViT(Network):
    """Dosovitskiy et al. 2021, small: 4x4 patches, six blocks, a class token. `norm` gives the
    features [B, width], of that token.

    Linear layers and embeddings: truncated normal of deviation 0.02, biases 0.
    """

    def __init__(self, width, num_classes, normalize, size, channels, *, patch=4, depth=6, heads=3):
        super().__init__(normalize, channels)
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, (size // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*[EncoderBlock(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.token, std=0.02)
        nn.init.trunc_normal_(self.position, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(self.normalized(x)).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.fc(self.norm(self.blocks(x)[:, 0]))


# Of the recipes of the shallow networks only the order of magnitude is known to be right.
NETWORKS.add(
    Architecture(
        "vit",
        "a vision transformer of six blocks on 4x4 patches; its width, of a token, is a multiple "
        "of 3",
        Recipe(200, 5e-4, 128, weight_decay=0.05, optimizer="adamw"),
        ViT,
        width=192,
        feature="norm",
        square=True,
        width_unit=3,
        size_unit=4,
    )
)
NETWORKS.add(
    Architecture(
        "linear",
        "a linear classifier of the pixels",
        Recipe(40, 0.01, 64),
        lambda width, num_classes, normalize, size, channels: MLP(
            0, 0, num_classes, normalize, size, channels
        ),
        feature="features",
        square=True,
    )
)
NETWORKS.add(
    Architecture(
        "mlp2",
        "a perceptron of two layers, counting the classifier; its width is the hidden units",
        Recipe(60, 0.01, 64),
        lambda width, num_classes, normalize, size, channels: MLP(
            1, width, num_classes, normalize, size, channels
        ),
        width=512,
        feature="features",
        square=True,
    )
)
NETWORKS.add(
    Architecture(
        "mlp3",
        "a perceptron of three layers",
        Recipe(60, 0.01, 64),
        lambda width, num_classes, normalize, size, channels: MLP(
            2, width, num_classes, normalize, size, channels
        ),
        width=512,
        feature="features",
        square=True,
    )
)
