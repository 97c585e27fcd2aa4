"""Texts as bytes: where they come from, how they are split, and batches that depend on a seed and a step alone."""

import sysconfig
from dataclasses import dataclass
from hashlib import sha256
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lora_jax.errors import LoraError

Bytes = NDArray[np.uint8]

_SOURCE_BYTES = 4_000_000
# Tests, installed packages, tables of characters, this machine's paths; and `pydoc_data`, which is the English text.
_NO_SOURCE = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "_bundled"}


class TextError(LoraError, ValueError):
    """A text that cannot be read, or is too short to train on."""


@dataclass(frozen=True)
class Corpus:
    """A text split in two: `train`, and `held_out` for evaluation only.

    Attributes:
      name: what the text is, for people.
      train: the bytes to train on.
      held_out: the bytes to evaluate on.
      sha256: digest of the whole text.
    """

    name: str
    train: Bytes
    held_out: Bytes
    sha256: str


def read_text(path: str | PathLike[str]) -> bytes:
    """Read a UTF-8 text file.

    Raises:
      TextError: the file is missing, unreadable, empty, or not UTF-8 text.
    """
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise TextError(f"cannot read {path}: {error.strerror}") from error
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 text: byte {text[error.start]:#04x} at position {error.start}") from error
    if not text.strip():
        raise TextError(f"{path} is empty")
    return text


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


def split(name: str, text: bytes, seq_len: int, share: float = 0.1) -> Corpus:
    """Hold out the end of a text for evaluation.

    Args:
      name: what the text is, for people.
      text: the bytes.
      seq_len: length of a training sequence; both parts hold at least one, and the byte after it.
      share: part of the text to hold out.

    Raises:
      TextError: the text is too short.

    Example:
      >>> corpus = split("digits", b"0123456789" * 10, seq_len=8)
      >>> corpus.train.size, corpus.held_out.size
      (90, 10)
    """
    need = seq_len + 1
    if len(text) < 2 * need:
        raise TextError(
            f"{name} has {len(text):,} bytes, but {2 * need:,} are needed: one training and one held-out sequence of "
            f"--length {seq_len} and the byte after each"
        )
    data = np.frombuffer(text, np.uint8)
    cut = len(data) - max(need, int(len(data) * share))
    return Corpus(name, data[:cut], data[cut:], sha256(text).hexdigest())


def batch(data: Bytes, seed: int, step: int, size: int, seq_len: int) -> Bytes:
    """The training batch of a step: sequences at random places, each with the byte after it.

    It is a function of its arguments alone, so a resumed run sees what an uninterrupted one would have seen.

    Returns:
      `[size, seq_len + 1]`.

    Example:
      >>> data = np.arange(100, dtype=np.uint8)
      >>> bool((batch(data, 0, 7, 4, 16) == batch(data, 0, 7, 4, 16)).all())
      True
    """
    starts = np.random.default_rng((seed, step)).integers(len(data) - seq_len, size=size)
    return data[starts[:, None] + np.arange(seq_len + 1)[None, :]]


def windows(data: Bytes, seq_len: int, most: int) -> Bytes:
    """Sequences for evaluation, evenly spread over a text, at most `most` of them.

    Returns:
      `[count, seq_len + 1]`; neighbours share one byte, so nothing is predicted twice.

    Example:
      >>> windows(np.arange(10, dtype=np.uint8), seq_len=4, most=5)
      array([[0, 1, 2, 3, 4],
             [4, 5, 6, 7, 8]], dtype=uint8)
    """
    count = (len(data) - 1) // seq_len
    chosen = np.unique(np.linspace(0, count - 1, min(count, most)).astype(int))
    return data[(chosen * seq_len)[:, None] + np.arange(seq_len + 1)[None, :]]
