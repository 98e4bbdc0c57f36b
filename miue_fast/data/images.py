"""One image file to RGB pixels, whatever the file holds."""

import contextlib
import io
import struct
import warnings
import zlib

from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".gif")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "TIFF", "PPM", "GIF")  # by content; nothing that starts another program
ORIENTATION = 274  # EXIF: 1 as stored; 2 to 8 mirrored or turned
MAX_PIXELS = 89_478_485  # Pillow's own warning level, here a limit: 256 MiB of RGB
# What Pillow's decoders raise on hostile bytes.
DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, EOFError, AssertionError, RuntimeError,
    MemoryError, BufferError, struct.error, zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip


class UnreadableError(Exception):
    """This file is not an image that can be used; the text is the reason."""


@contextlib.contextmanager
def quiet_decoding():
    """Pillow's warnings about odd files are dropped: the files it cannot read are listed instead. Not thread-safe: outside the pool."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def read_bytes(path):
    """The bytes of an image file, so that what is checked is what is decoded. UnreadableError: it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UnreadableError(_reason(path, error)) from error


def read_image(path, *, mode=None, raw=None):
    """An RGB Pillow image: the first frame, pixels in stored order (EXIF orientation is not applied), Pillow's `convert("RGB")`.

    That is what torchvision's ImageFolder gives a trainer: grayscale is repeated, palettes are looked up, alpha is dropped.
    `mode` demands that the file is stored in this Pillow mode; `raw`: the file's bytes, where they are there.
    UnreadableError: empty, truncated, not an image, over MAX_PIXELS, or more than 8 bits per channel (would lose data).
    """
    try:
        with Image.open(path if raw is None else io.BytesIO(raw), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UnreadableError(f"{width} x {height} pixels are more than {MAX_PIXELS} (decompression bomb?)")
            if mode is not None and image.mode != mode:
                raise UnreadableError(f"mode {image.mode}, expected {mode}")
            if _deep(image):
                raise UnreadableError(f"more than 8 bits per channel (mode {image.mode}): would lose data")
            return image.convert("RGB")
    except DECODE_ERRORS as error:
        raise UnreadableError(_reason(path, error)) from error


def read_look(path, raw):
    """How the pixels of `read_image` are meant to be shown, as options of Pillow's `save`: orientation, and an RGB colour profile.

    raw: the bytes of the file. Pillow turns a TIFF while it reads it, so nothing is left to say.
    """
    look = {}
    try:
        with Image.open(io.BytesIO(raw), formats=FORMATS) as image:
            profile, orientation = image.info.get("icc_profile"), 1 if image.format == "TIFF" else image.getexif().get(ORIENTATION, 1)
    except DECODE_ERRORS as error:
        raise UnreadableError(_reason(path, error)) from error
    if isinstance(profile, bytes) and profile[16:20] == b"RGB ":
        look["icc_profile"] = profile
    if orientation in range(2, 9):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        look["exif"] = exif.tobytes()
    return look


def _deep(image):
    """Pillow opens 16-bit RGB files as 8-bit RGB: only the tile's raw mode, or the maximum in a PPM, says so."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return True
    arguments = [a for tile in image.tile for a in (tile[3] if isinstance(tile[3], tuple) else (tile[3],))]
    if image.format == "PPM" and any(isinstance(a, int) and a > 255 for a in arguments):
        return True
    return any(isinstance(a, str) and (";16" in a or ";32" in a) for a in arguments)


def _reason(path, error):
    if isinstance(error, Image.UnidentifiedImageError):
        return "empty file" if path.stat().st_size == 0 else "not an image"
    return error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)


def one_line(error):
    """The text of someone else's exception, at most 200 characters without line breaks."""
    return " ".join(str(error).split())[:200] or type(error).__name__
