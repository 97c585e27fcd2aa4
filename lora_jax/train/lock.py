"""The lock of a run: one process at a time writes to a folder, and another one is told which."""

import errno
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lora_jax.publish import lock, same

_TRIES = 20
"""Another process that only asks who holds the lock has it for a moment."""


@contextmanager
def locked(path: Path) -> Iterator[str | None]:
    """Hold a lock; the system lets go of it if the process dies, and the file that is left means nothing.

    Args:
      path: the file to create and to remove at the end; its folder is there.

    Yields:
      None if this process holds it now, else who does.
    """
    handle = _acquired(path)
    if handle is None:
        yield _holder(path)
        return
    try:
        os.truncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        yield None
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(handle)


def holder(path: Path) -> str | None:
    """Who holds a lock, if anyone does."""
    try:
        handle = _opened(path)
    except OSError:
        return None
    try:
        return None if lock(handle, wait=False) else _holder(path)
    finally:
        os.close(handle)


def _acquired(path: Path) -> int | None:
    """The locked file, or None if another process has it."""
    for _ in range(_TRIES):
        handle = _opened(path, os.O_CREAT)
        if lock(handle, wait=False) and same(handle, path):
            return handle
        os.close(handle)
        time.sleep(0.02)
    return None


def _opened(path: Path, flags: int = 0) -> int:
    """The file, which is a regular one: opening a pipe would wait for its other end."""
    handle = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | flags, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "no regular file", str(path))
    return handle


def _holder(path: Path) -> str:
    with suppress(OSError):
        if (number := path.read_text(encoding="utf-8", errors="replace").strip()).isdecimal():
            return f"process {number}"
    return "another process"
