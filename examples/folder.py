"""A folder of images: poison it, export PNG files of the same names, and prove the budget.

python examples/folder.py CLEAN OUT [EPOCHS]        # CLEAN holds one sub-folder per class
"""

import sys
from pathlib import Path

import miue_fast


def main(
    clean: Path, out: Path, epochs: int = 30, *, size: int = 32, model: str = "resnet18"
) -> miue_fast.data.Verification:
    """Writes the poison to out/poison and the images to out/images; returns what was verified.

    size: the side of the square that the network sees; the exported images keep their own.
    """
    images = miue_fast.data.load(clean, size=size)
    result = miue_fast.generate(images, out / "poison", model=model, epochs=epochs, progress=False)
    miue_fast.data.export_folder(images, result.delta, out / "images", eps=8 / 255)
    report = miue_fast.data.verify(images, out / "images", eps=8 / 255)
    print(f"{report.count} files, largest change {report.max_linf}/255, ok: {report.ok}")
    return report


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:4]))
