"""Publishing: a directory appears at its path whole, or what was there before stays there, whatever fails meanwhile.

What is new is written into a directory beside the path, flushed to the disk and read back; then the two directories
change places in one step, and the old one is deleted. The directory beside is the lock too: two writers of one path
take turns, and what a killed one has left is removed by the next.
"""

import ctypes
import errno
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from lora_jax.errors import CheckpointError, LoraError, StorageError

try:
    import fcntl
except ImportError:  # There are no such locks on Windows, where a directory in use cannot be removed anyway.
    fcntl = None  # type: ignore[assignment]

_EXCHANGE = 2
"""`RENAME_EXCHANGE` of Linux's renameat2."""
_HERE = -100
"""`AT_FDCWD`: paths are relative to the working directory."""
_NEW, _OLD, _GONE = "new", "old", "gone"
_TRIES = 100
_FAILING = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
"""What is no fault of the path: a full disk, and one that fails."""

_Result = TypeVar("_Result")


def place(path: str | os.PathLike[str]) -> Path:
    """Where something is to be written: the path itself, or what it links to.

    Raises:
      CheckpointError: it is a link to nothing, or no path can be that long or have such letters.
    """
    where = Path(path).expanduser().absolute()
    try:
        if where.is_symlink() and not where.exists():
            raise CheckpointError(
                f"{where} exists as a link to {os.readlink(where)}, where nothing is: remove the link"
            )
        with suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(where)
        return where.resolve() if where.is_symlink() else where
    except OSError as error:
        raise unwritable(where, error) from None
    except ValueError as error:  # A zero byte, or letters that names of files cannot have in this locale.
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{str(where)!r} can be no path here ({error}): choose another") from None


def publish(where: Path, write: Callable[[Path], None], *, replace: Callable[[Path], None] | None = None) -> None:
    """Make a directory, at once and whole.

    Whatever else is in a directory that is replaced (notes, other adapters) goes into the new one.

    Args:
      where: the path, as `place` gives it.
      write: fills a new, empty directory, and reads back what it has written.
      replace: checks that what is there may be replaced, and raises a `LoraError` if not; None if nothing may be.

    Raises:
      CheckpointError: something is there that may not be replaced, or the disk is full, read-only or broken.
    """
    try:
        where.parent.mkdir(parents=True, exist_ok=True)
        with _beside(where) as folder:
            _check(where, replace)
            new = folder / _NEW
            new.mkdir()
            write(new)
            _share(new)
            if where.exists():
                _carry_over(where, new)
            _flush(new)
            _put(new, where)
    except OSError as error:
        raise unwritable(where, error) from None


def publish_file(where: Path, content: bytes) -> None:
    """Make a file, at once and whole; what was there is replaced.

    Raises:
      CheckpointError: the disk is full, read-only or broken.
    """
    try:
        with _beside(where) as folder:
            new = folder / _NEW
            new.write_bytes(content)
            flush(new)
            os.replace(new, where)
    except OSError as error:
        raise unwritable(where, error) from None


def discard(where: Path) -> None:
    """Remove a file or a directory, at once and whole, and what killed writers of it have left.

    It is moved aside first: what a killed removal leaves is nothing that could be taken for the whole.

    Raises:
      CheckpointError: it cannot be moved.
    """
    try:
        if os.path.lexists(where) or partial(where).exists():
            with _beside(where) as folder, suppress(FileNotFoundError):
                os.rename(where, folder / _GONE)
    except OSError as error:
        raise unwritable(where, error) from None


def steady(folder: Path, read: Callable[[], _Result]) -> _Result:
    """Read several files of a directory, again if another has taken its place in the meantime."""
    for _ in range(_TRIES):
        before = _identity(folder)
        try:
            result = read()
        except (LoraError, OSError):
            if before == _identity(folder):
                raise
            continue
        if before == _identity(folder):
            return result
    raise CheckpointError(f"{folder} is written again and again: it was never the same before and after reading it")


def _identity(folder: Path) -> tuple[int, int, int] | None:
    """What tells one directory from the next at the same path, which may have the number of one that was deleted."""
    try:
        found = os.stat(folder)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_ctime_ns


def unwritable(where: Path, error: OSError) -> CheckpointError:
    """What to raise where the system refuses to write."""
    kind = StorageError if error.errno in _FAILING else CheckpointError
    return kind(
        f"{where} cannot be written: {error.strerror or error}. What was there before is untouched; check the space, "
        "the rights and the length of the name, or choose another path."
    )


def _check(where: Path, replace: Callable[[Path], None] | None) -> None:
    if not where.exists():
        return
    if replace is None:
        raise CheckpointError(f"{where} exists already. Choose another path, or pass overwrite=True to replace it.")
    replace(where)


def partial(where: Path) -> Path:
    """Where what is to be at a path is made, and where a killed writer leaves it."""
    return where.parent / f".{where.name[:60]}.{sha256(os.fsencode(where.name)).hexdigest()[:8]}.partial"


@contextmanager
def _beside(where: Path) -> Iterator[Path]:
    """An empty directory beside the path that nobody else uses; what an earlier one holds is dealt with first."""
    folder = partial(where)
    with _locked(folder):
        _recover(folder, where)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make a directory and hold a lock on it, which the system lets go of if the process dies."""
    while True:
        with suppress(FileExistsError):
            folder.mkdir()
        try:
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue  # Another writer has just finished.
        try:
            lock(handle)
            if same(handle, folder):
                yield
                return
        finally:
            os.close(handle)
        time.sleep(0.001)


def lock(handle: int, *, wait: bool = True) -> bool:
    """Lock a file or directory that is open, which the system undoes if the process dies; whether it has the lock.

    Args:
      handle: of the file or directory.
      wait: until nobody else has the lock, and not return at once.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def same(handle: int, path: Path) -> bool:
    """Whether the file or directory that was locked is still the one at its path."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), os.stat(path))
    return False


def _recover(folder: Path, where: Path) -> None:
    """Put back what a killed writer had moved aside, and remove the rest of what it left."""
    if (folder / _OLD).exists() and not where.exists():
        os.rename(folder / _OLD, where)
    for name in os.listdir(folder):
        left = folder / name
        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


def _carry_over(old: Path, new: Path) -> None:
    """Everything of the old directory that the new one does not have; files by links, so that none is copied."""
    for name in set(os.listdir(old)) - set(os.listdir(new)):
        source, target = old / name, new / name
        if source.is_dir() and not source.is_symlink():
            shutil.copytree(source, target, symlinks=True, copy_function=_link)
        else:
            _link(source, target)


def _link(source: Any, target: Any) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno in _FAILING:
            raise
        shutil.copy2(source, target, follow_symlinks=False)  # There are file systems without links.


def _share(folder: Path) -> None:
    """Give files the rights that the umask leaves, as the folder has them; safetensors gives them to the owner only."""
    mode = stat.S_IMODE(os.stat(folder).st_mode) & 0o666
    for parent, _, names in os.walk(folder):
        for name in names:
            if not os.path.islink(path := os.path.join(parent, name)):
                os.chmod(path, mode)


def _flush(folder: Path) -> None:
    """Have the disk write a directory and everything in it."""
    for parent, _, names in os.walk(folder, topdown=False):
        for path in [*(os.path.join(parent, name) for name in names), parent]:
            if not os.path.islink(path) and (os.path.isdir(path) or os.path.isfile(path)):
                flush(path)


def flush(path: str | Path) -> None:
    """Have the disk write a file, or the names in a directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # Some file systems cannot flush directories.
            raise
    finally:
        os.close(handle)


def _put(new: Path, where: Path) -> None:
    """Have the new directory at the path, and the old one, if there is one, beside it."""
    if not where.exists():
        os.rename(new, where)
    elif not _exchanged(new, where):
        aside = new.with_name(_OLD)
        os.rename(where, aside)
        try:
            os.rename(new, where)
        except OSError:
            os.rename(aside, where)
            raise
    with suppress(OSError):  # It is there: that is as sure as this system makes it.
        flush(where.parent)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two directories in one step, where the system can."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(number, os.strerror(number), str(other))
