"""Texts that every Python brings: the source of its library, and the English of its help."""

import sysconfig
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lora_jax.errors import LoraError

_SOURCE_BYTES = 4_000_000
# Tests, installed packages, tables of characters, this machine's paths; and `pydoc_data`, which is the English text.
_NO_SOURCE = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "_bundled"}


class TextError(LoraError, ValueError):
    """A text that this Python does not have."""


def python_source() -> bytes:
    """A fixed sample of the Python standard library's own source, a few megabytes.

    Raises:
      TextError: this Python has no library sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [path.relative_to(root) for path in root.rglob("*.py")]
    kept = [path for path in files if not _NO_SOURCE.intersection(path.parts) and "sysconfigdata" not in path.name]
    sample, size = [], 0
    # Ordered by digest, so that the end, which is held out, is as varied as the rest.
    for path in sorted(kept, key=lambda path: sha256(path.as_posix().encode()).digest()):
        sample.append((root / path).read_bytes())
        size += len(sample[-1])
        if size > _SOURCE_BYTES:
            break
    if not sample:
        raise TextError(f"this Python has no sources of its standard library under {root} to pre-train on")
    return b"\n".join(sample)


def python_topics() -> bytes:
    """The language topics of Python's `help()`, in English.

    Raises:
      TextError: this Python comes without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise TextError("this Python comes without pydoc_data; pass a text of your own with --data FILE") from error
    return "\n\n".join(topics[name] for name in sorted(topics)).encode()


def split(text: bytes, share: float = 0.1) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A text in two: what to train on, and its end, to evaluate on.

    >>> [part.size for part in split(b"0123456789" * 10)]
    [90, 10]
    """
    data = np.frombuffer(text, np.uint8)
    cut = len(data) - int(len(data) * share)
    return data[:cut], data[cut:]


def rows_at_random(data: NDArray[np.uint8], seed: int, step: int, rows: int, length: int) -> NDArray[np.int32]:
    """Rows from random places, `[rows, length]`, as a function of the arguments alone.

    >>> rows_at_random(np.arange(9, dtype=np.uint8), 0, 0, 2, 4).shape
    (2, 4)
    """
    starts = np.random.default_rng((seed, step)).integers(len(data) - length + 1, size=rows)
    return data[starts[:, None] + np.arange(length)[None, :]].astype(np.int32)


def rows_evenly(data: NDArray[np.uint8], most: int, length: int) -> NDArray[np.int32]:
    """Rows that are evenly spread over a text, `[rows, length]`; at most so many.

    >>> rows_evenly(np.arange(10, dtype=np.uint8), most=5, length=4)
    array([[0, 1, 2, 3],
           [4, 5, 6, 7]], dtype=int32)
    """
    count = len(data) // length
    chosen = np.unique(np.linspace(0, count - 1, min(count, most)).astype(int))
    return data[(chosen * length)[:, None] + np.arange(length)[None, :]].astype(np.int32)
