"""Decodes one image file to RGB pixels, whatever the file holds."""

import contextlib
import io
import struct
import warnings
import zlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

from PIL import Image

from ..support.messages import printable
from .files import read_bytes

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".gif")
FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "BMP",
    "DIB",
    "TIFF",
    "PPM",
    "GIF",
)  # by content; nothing that starts another program
STRIPS, TILES = 273, 324  # TIFF: where the parts of the picture begin
ORIENTATION = 274  # EXIF: 1 as stored; 2 to 8 mirrored or turned
MAX_PIXELS = 89_478_485  # Pillow's own warning level, here a limit: 256 MiB of RGB
MAX_BYTES = 4 * MAX_PIXELS + (1 << 26)  # of a file: RGBA as it is, and metadata
FEW_PIXELS, PER_BYTE = (
    12_000_000,
    64,
)  # more pixels need a byte of the file for 64 of them: photographs have one for 2 to 20
RUN_PIXELS = 1 << 22  # of a run-length coded BMP, which Pillow decodes in Python: a second
FEW_SCANS, SCAN_PIXELS = (
    24,
    1 << 30,
)  # of a JPEG: 30 bytes are another pass over all its pixels; about 10 are usual
# What Pillow's decoders raise on hostile bytes.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    EOFError,
    AssertionError,
    RuntimeError,
    MemoryError,
    BufferError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


class UnreadableError(Exception):
    """This file is not an image that can be used; the text is the reason."""


@contextlib.contextmanager
def quiet_decoding() -> Generator[None, None, None]:
    """Drops Pillow's warnings about odd files, because the files that it cannot read are listed
    instead. It is not thread-safe, so it goes around a pool of threads and not into it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def read_file(path: str | Path) -> bytes:
    """The bytes of an image file, so that what is checked is what is decoded. UnreadableError: it
    is no regular file, or too large.
    """
    try:
        return read_bytes(path, MAX_BYTES)
    except OSError as error:
        raise UnreadableError(_reason(None, error)) from error


def read_image(
    path: str | Path, *, mode: str | None = None, raw: bytes | None = None
) -> Image.Image:
    """Decodes an image as torchvision's ImageFolder would give it to a trainer: an RGB Pillow image
    of the first frame, with the pixels in stored order (the EXIF orientation is not applied).
    Grayscale is repeated, palettes are looked up, and alpha is dropped.

    Args:
        mode: the Pillow mode in which the file must be stored; None takes any.
        raw: the bytes of the file, if they have been read already.

    UnreadableError: the file is not regular, empty, truncated, no image, over MAX_PIXELS, small but
    with many pixels or many passes over them (a bomb), or has more than 8 bits per channel, which
    would be lost.
    """
    with _opened(path, raw) as (image, raw):
        try:
            if (bomb := _bomb(image, raw)) is not None:
                raise UnreadableError(f"{bomb} (decompression bomb?)")
            if mode is not None and image.mode != mode:
                raise UnreadableError(f"mode {image.mode}, expected {mode}")
            if _deep(image):
                raise UnreadableError(
                    f"more than 8 bits per channel (mode {image.mode}): would lose data"
                )
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
        except DECODE_ERRORS as error:
            raise UnreadableError(_reason(raw, error)) from error


@contextlib.contextmanager
def _opened(path, raw=None):
    """(Pillow image, content) of a file, which is read once and as a whole: no other program
    changes what is decoded.
    """
    raw = read_file(path) if raw is None else raw
    try:
        image = Image.open(io.BytesIO(raw), formats=FORMATS)
    except DECODE_ERRORS as error:
        raise UnreadableError(_reason(raw, error)) from error
    with image:
        yield image, raw


def _bomb(image, raw):
    """Why decoding this image would take seconds or gigabytes, or None if it would not."""
    width, height = image.size
    pixels = width * height
    if pixels > MAX_PIXELS:
        return f"{width} x {height} pixels are more than {MAX_PIXELS}"
    if pixels > max(FEW_PIXELS, PER_BYTE * len(raw)):
        return f"{width} x {height} pixels in {len(raw)} bytes"
    if pixels > RUN_PIXELS and any(tile[0] == "bmp_rle" for tile in image.tile):
        return f"{width} x {height} pixels are more than {RUN_PIXELS} of a run-length coded BMP"
    if image.format == "JPEG" or (
        image.format == "TIFF" and image.info.get("compression") == "jpeg"
    ):
        parts = (
            1
            if image.format == "JPEG"
            else len(image.tag_v2.get(STRIPS) or image.tag_v2.get(TILES) or (0,))
        )
        scans = raw.count(b"\xff\xda") / parts
        if scans > FEW_SCANS and pixels * scans > SCAN_PIXELS:
            return f"{scans:.0f} scans of {width} x {height} pixels"
    return None


def read_look(path: str | Path, raw: bytes) -> dict[str, Any]:
    """How the pixels of `read_image` are meant to be shown, as options for Pillow's `save`: the
    orientation and an RGB colour profile. raw: the bytes of the file.

    Pillow turns a TIFF while it reads it, so there is no orientation left to keep.
    """
    look = {}
    with _opened(path, raw) as (image, raw):
        try:
            profile, orientation = (
                image.info.get("icc_profile"),
                1 if image.format == "TIFF" else image.getexif().get(ORIENTATION, 1),
            )
        except DECODE_ERRORS as error:
            raise UnreadableError(_reason(raw, error)) from error
    if isinstance(profile, bytes) and profile[16:20] == b"RGB ":
        look["icc_profile"] = profile
    if orientation in range(2, 9):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        look["exif"] = exif.tobytes()
    return look


def _deep(image):
    """Whether a file has more than 8 bits per channel. Pillow opens 16-bit RGB files as 8-bit RGB;
    only the raw mode of the tile, or the maximum in a PPM, shows it.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return True
    arguments = [
        a for tile in image.tile for a in (tile[3] if isinstance(tile[3], tuple) else (tile[3],))
    ]
    if image.format == "PPM" and any(isinstance(a, int) and a > 255 for a in arguments):
        return True
    return any(isinstance(a, str) and (";16" in a or ";32" in a) for a in arguments)


def _reason(raw, error):
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image" if raw else "empty file"
    return one_line(error)


def one_line(error: BaseException) -> str:
    """The text of someone else's exception, at most 200 printable characters."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return printable(" ".join(text.split())) or type(error).__name__
