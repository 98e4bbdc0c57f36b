"""The data set every part of the program works on."""

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..support.messages import describe, fail


@dataclass(repr=False)
class Dataset:
    """Labelled 8-bit images in memory, on the CPU.

    images: uint8 [N, C, H, W] at the model's size, C = 1 or 3. labels: int64 [N], indices into
        `classes`.
    names: posix paths relative to `root` ("cat/0001.jpg"), or "00000017" for arrays.
    sizes: original (width, height) of each image, None for arrays. digests: sha256 (hex) of each
        image file as it was read, None for
    arrays: an export takes no other file for it. unreadable: (name, reason) of every image left
        out.
    skipped: names of the files in class folders that are not images.
    """

    images: torch.Tensor
    labels: torch.Tensor
    classes: list[str]
    names: list[str]
    root: Path | None = None
    sizes: list[tuple[int, int]] | None = None
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    digests: list[str] | None = None

    def __post_init__(self):
        images, labels = self.images, self.labels
        if (
            not isinstance(images, torch.Tensor)
            or images.dtype != torch.uint8
            or images.dim() != 4
            or images.shape[1] not in (1, 3)
        ):
            fail("data", "images", "a uint8 tensor [N, 1 or 3, H, W]", describe(images))
        count = len(images)
        if (
            not isinstance(labels, torch.Tensor)
            or labels.dtype != torch.int64
            or labels.shape != (count,)
        ):
            fail("data", "labels", f"an int64 tensor [{count}]", describe(labels))
        if count and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.classes):
            fail(
                "data",
                "labels",
                f"0 to {len(self.classes) - 1}",
                f"{int(labels.min())} to {int(labels.max())}",
            )
        if len(self.names) != count or len(set(self.names)) != count:
            fail(
                "data",
                "names",
                f"{count} different names",
                f"{len(self.names)}, {len(set(self.names))} different",
            )

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        root = "" if self.root is None else f", root={str(self.root)!r}"
        return f"Dataset(images={list(self.images.shape)}, classes={len(self.classes)}{root})"

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over shape, pixels, labels and class names: what a poison belongs to."""
        digest = hashlib.sha256(repr((tuple(self.images.shape), self.classes)).encode())
        digest.update(self.images.contiguous().numpy())
        digest.update(self.labels.contiguous().numpy())
        return digest.hexdigest()

    def select(self, index: torch.Tensor | list[int]) -> "Dataset":
        """The data set of the rows `index` (int64 tensor or list of ints), same classes."""
        index = torch.as_tensor(index, dtype=torch.int64)
        rows = index.tolist()
        sizes, digests = (
            None if column is None else [column[i] for i in rows]
            for column in (self.sizes, self.digests)
        )
        names = [self.names[i] for i in rows]
        return replace(
            self,
            images=self.images[index],
            labels=self.labels[index],
            names=names,
            sizes=sizes,
            digests=digests,
        )
