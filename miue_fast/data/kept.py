"""Keeps finished parts of a longer work as JSON files, named after what they depend on. A part is
read as it was written, or refused.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import parse_json, read_bytes
from .images import one_line

LARGEST = 1 << 27  # bytes of a JSON file that is read


def digest(key: Any) -> str:
    """A name of 16 hexadecimal digits for what a part depends on (JSON values)."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def checksum(content: Mapping[str, Any]) -> str:
    """sha256 of what `pack` gives, without that entry itself."""
    return hashlib.sha256(
        json.dumps({name: value for name, value in content.items() if name != "sha256"}).encode()
    ).hexdigest()


def pack(content: Mapping[str, Any]) -> bytes:
    """The bytes of a JSON file whose last key is the sha256 of the rest."""
    return (
        json.dumps({**content, "sha256": checksum(content)}, indent=1, allow_nan=False) + "\n"
    ).encode()


def read_json(path: str | Path, op: str) -> Any:
    """The content of a JSON file. ValueError of one line: it is no regular file, larger than 128
    MiB, no JSON, or has NaN, an infinity or a key that comes twice.
    """
    try:
        return parse_json(read_bytes(path, LARGEST).decode("utf-8-sig"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{op}: {path}: expected a JSON file, got: {one_line(error)}") from None


def read_part(path: Path, key: Any) -> dict[str, Any] | None:
    """The part that `pack` wrote for the key in its entry `key`, or None if the file is damaged or
    belongs to another key. Errors: OSError.
    """
    try:
        found = read_json(path, "part")
    except ValueError:
        return None
    return found if is_whole(found) and found.get("key") == json.loads(json.dumps(key)) else None


def is_whole(content: Any) -> bool:
    """Whether a file's content is what `pack` gave."""
    try:
        return isinstance(content, dict) and content.get("sha256") == checksum(content)
    except RecursionError:
        return False
