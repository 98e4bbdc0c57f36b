"""JPEG compression, one part of image shortcut squeezing (ISS: Liu, Zhao and Larson 2023)."""

import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from .base import Defence, Stage, option, register

SUBSAMPLING = 2  # 4:2:0, half the colour resolution in both directions, Pillow's own default


@register
@dataclass(frozen=True)
class Jpeg(Defence):
    """A round trip through Pillow's JPEG with 4:2:0 subsampling (one channel: grey JPEG)."""

    name = "jpeg"
    stage = Stage.ONCE
    quality: int = option(10, 10, 95)

    def prepare(self, images: torch.Tensor, labels: torch.Tensor, seed: int) -> torch.Tensor:
        out = np.empty_like(images.numpy())
        for target, image in zip(out, images.numpy()):
            buffer = io.BytesIO()
            picture = (
                Image.fromarray(image[0])
                if len(image) == 1
                else Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
            )
            picture.save(buffer, "JPEG", quality=self.quality, subsampling=SUBSAMPLING)
            with Image.open(buffer) as decoded:
                pixels = np.asarray(decoded)
            target[:] = pixels if len(image) == 1 else pixels.transpose(2, 0, 1)
        return torch.from_numpy(out)
