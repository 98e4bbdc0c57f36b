"""Finished parts of a longer work as JSON files, named after what they depend on: as they were
written, or refused.
"""

import hashlib
import json

from .files import parse_json, read_bytes
from .images import one_line

LARGEST = 1 << 27  # bytes of a JSON file that is read


def digest(key):
    """A name of 16 hexadecimal digits for what a part depends on (JSON values)."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def checksum(content):
    """sha256 of what `pack` gives, without that entry itself."""
    return hashlib.sha256(
        json.dumps({name: value for name, value in content.items() if name != "sha256"}).encode()
    ).hexdigest()


def pack(content):
    """The bytes of a JSON file whose last key is the sha256 of the rest."""
    return (
        json.dumps({**content, "sha256": checksum(content)}, indent=1, allow_nan=False) + "\n"
    ).encode()


def read_json(path, op):
    """What a JSON file holds. ValueError of one line: no regular file, larger than 128 MiB, no
    JSON, NaN or infinity in it, a key twice.
    """
    try:
        return parse_json(read_bytes(path, LARGEST).decode("utf-8-sig"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{op}: {path}: expected a JSON file, got: {one_line(error)}") from None


def read_part(path, key):
    """What `pack` gave for the key that is its entry `key`; None if the file is damaged, or another
    one. Errors: OSError.
    """
    try:
        found = read_json(path, "part")
    except ValueError:
        return None
    return found if is_whole(found) and found.get("key") == json.loads(json.dumps(key)) else None


def is_whole(content):
    """Whether a file's content is what `pack` gave."""
    try:
        return isinstance(content, dict) and content.get("sha256") == checksum(content)
    except RecursionError:
        return False
