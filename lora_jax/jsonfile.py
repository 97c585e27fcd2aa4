"""A JSON object out of a file, as configs are: read in one way everywhere, or an error that names the file."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from lora_jax.errors import CheckpointError, LoraError
from lora_jax.regular import unreadable

_MAX_BYTES = 1 << 24


def read_object(path: Path, error: type[LoraError] = CheckpointError) -> dict[str, Any] | None:
    """The object in a file, or None if there is no file.

    Args:
      path: of the file.
      error: what is raised.

    Raises:
      LoraError: there is something else than a regular file, it is too large or no JSON, it has a field twice, or it
        holds no object.

    Example:
      >>> import tempfile
      >>> file = Path(tempfile.mkdtemp(), "config.json")
      >>> read_object(file), file.write_text('{"r": 8}'), read_object(file)
      (None, 8, {'r': 8})
    """
    if not path.exists() and not path.is_symlink():
        return None
    if kind := unreadable(path):
        # Taken for no file at all it would change what others mean, and reading a pipe would wait for ever.
        raise error(f"{path} is {kind}, where a regular file belongs")
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes are too many")
        # A byte order mark is no part of JSON, and some editors write one.
        found = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_once)
    except (OSError, ValueError, RecursionError) as reason:
        raise error(f"{path} is not readable as JSON ({reason}). Copy it again from where it came from.") from None
    if not isinstance(found, dict):
        raise error(f"{path} holds a {type(found).__name__}, not the object that belongs there")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of which no field is there twice: readers differ in which one they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice[:100]!a} is there twice")
    return found
