"""The data set every part of the program works on."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..support.messages import describe, fail, printable


@dataclass(repr=False)
class Dataset:
    """Labelled 8-bit images in memory, on the CPU.

    Attributes:
        images: uint8 [N, C, H, W] at the network's size; C is 1 or 3.
        labels: int64 [N], indices into `classes`.
        classes: the names of the classes.
        names: posix paths relative to `root` ("cat/0001.jpg"), or "00000017" for arrays.
        root: the folder that the images came from; None for arrays.
        sizes: the original (width, height) of each image; None for arrays.
        unreadable: (name, reason) of every image that was left out.
        skipped: names of the files in class folders that are no images.
        digests: the sha256 (hex) of each image file as it was read, so that an export takes no
            other file for it; None for arrays.
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
        """One line: count, sides, classes, and where the images came from."""
        sides = " x ".join(map(str, self.images.shape[1:]))
        named = ", ".join(self.classes[:3]) + (", ..." if len(self.classes) > 3 else "")
        source = "arrays" if self.root is None else printable(self.root)
        left_out = f", {len(self.unreadable)} unreadable" if self.unreadable else ""
        return printable(
            f"Dataset({len(self)} images of {sides}, {len(self.classes)} classes ({named}), "
            f"from {source}{left_out})"
        )

    @property
    def fingerprint(self) -> str:
        """The sha256 (hex) over shape, pixels, labels and class names; a poison belongs to one
        fingerprint.
        """
        digest = hashlib.sha256(repr((tuple(self.images.shape), self.classes)).encode())
        digest.update(self.images.contiguous().numpy())
        digest.update(self.labels.contiguous().numpy())
        return digest.hexdigest()

    def select(self, index: torch.Tensor | Sequence[int]) -> "Dataset":
        """The data set of the rows `index` (an int64 tensor or a list of ints), with the same
        classes.
        """
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
