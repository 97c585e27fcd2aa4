"""Which files an adapter was read from, and whether they are still the ones that were read."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from os import PathLike

Identity = tuple[tuple[str, int, int, int, int, int], ...]
"""For a file, or a folder and each file in it: name, device, inode, size, and when contents and file last changed."""

_NOTED: ContextVar[dict[str, Identity] | None] = ContextVar("noted", default=None)


def note(path: str | PathLike[str]) -> None:
    """Say that a file, or a folder with files, is about to be read; free where nobody listens."""
    if (noted := _NOTED.get()) is not None:
        noted[os.path.abspath(path)] = identity(path)


@contextmanager
def noted() -> Iterator[Mapping[str, Identity]]:
    """What is read inside, as it was before it was read.

    Example:
      >>> import tempfile, pathlib
      >>> file = pathlib.Path(tempfile.mkdtemp(), "file")
      >>> file.write_text("old") and None
      >>> with noted() as origin:
      ...     note(file)
      >>> changed(origin), file.write_text("newer"), changed(origin)
      (False, 5, True)
    """
    found: dict[str, Identity] = {}
    token = _NOTED.set(found)
    try:
        yield found
    finally:
        _NOTED.reset(token)


def changed(origin: Mapping[str, Identity]) -> bool:
    """Whether something else is now where these files were; what is gone has not changed."""
    return any(now and now != then for then, now in ((then, identity(path)) for path, then in origin.items()))


def identity(path: str | PathLike[str]) -> Identity:
    """What tells a file, or a folder and the files in it, from others in its place; empty where there is nothing."""
    try:
        entries = sorted(os.scandir(path), key=lambda entry: entry.name) if os.path.isdir(path) else []
        return (_facts("", os.stat(path)), *(_facts(entry.name, entry.stat()) for entry in entries))
    except OSError:
        return ()


def _facts(name: str, found: os.stat_result) -> tuple[str, int, int, int, int, int]:
    return name, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
