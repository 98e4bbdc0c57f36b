"""Folders of images for tests."""

from pathlib import Path

from PIL import Image

from miue_fast.data import Dataset


def write_images(folder: Path, dataset: Dataset) -> None:
    """folder/CLASS/NNNN.png for every image of a data set."""
    for k, (image, label) in enumerate(zip(dataset.images, dataset.labels)):
        path = folder / dataset.classes[int(label)] / f"{k:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
