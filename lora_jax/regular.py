"""Which files below a directory may be opened or copied: regular ones, and no links that lead out of it."""

import stat
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from lora_jax.errors import CheckpointError, listed

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a directory",
}


def obstacle(path: Path, root: Path) -> str | None:
    """Why a file is none that may be copied from below `root`, or None if it is one.

    Links may stay below `root`. In a cache of the Hugging Face Hub, where each file of `snapshots` is a link to one of
    `blobs`, they may stay in the cache of their repository.

    Args:
      path: the file.
      root: the directory that was named.

    Example:
      >>> import tempfile
      >>> folder = Path(tempfile.mkdtemp())
      >>> (folder / "NOTICE").symlink_to("/etc/passwd")
      >>> obstacle(folder / "NOTICE", folder)
      'a link that leads out, to /etc/passwd'
    """
    kind = unreadable(path)
    if kind is not None:
        return kind
    target = path.resolve()
    if any(target.is_relative_to(place) for place in _places(root)):
        return None
    return f"a link that leads out, to {target}"


def unreadable(path: Path) -> str | None:
    """Why what is at a path, or behind the links there, is no regular file; None if it is one.

    >>> unreadable(Path("/dev/null")), unreadable(Path("/")), unreadable(Path("/nowhere"))
    ('a device', 'a directory', 'nothing, or a link to nothing')
    """
    try:
        mode = path.stat().st_mode
    except (OSError, RuntimeError):
        return "nothing, or a link to nothing"
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "no regular file")


def _places(root: Path) -> Iterator[Path]:
    """Directories in which files of `root` may lie."""
    whole = root.resolve()
    yield whole
    for parent in whole.parents:
        if parent.name == "snapshots" and (parent.parent / "blobs").is_dir():
            yield parent.parent


def copyable(root: Path, files: Iterable[Path]) -> list[Path]:
    """Those of the files, relative to `root`, that may be copied; a warning names the others."""
    found = {file: obstacle(root / file, root) for file in files}
    wrong = [f"{str(file)!r} is {why}" for file, why in found.items() if why is not None]
    if wrong:
        warnings.warn(f"{root}: left out of the copy: {listed(wrong, '; ')}", stacklevel=3)
    return [file for file, why in found.items() if why is None]


def check_regular(root: Path) -> None:
    """Refuse a directory with anything in it that is neither a directory nor a regular file.

    Raises:
      CheckpointError: names it. Opening a pipe waits until somebody writes.
    """
    for path in root.rglob("*"):
        kind = unreadable(path)
        if kind not in (None, "a directory"):
            raise CheckpointError(f"{path} is {kind}, where only regular files belong. Remove it, or copy it again.")
