"""Writing a checkpoint with Orbax, so that it appears at its path whole, or what was there before stays.

Orbax writes to the system's temporary directory, and what it wrote is copied from there: on a disk that is full or
broken its threads would raise whatever they like, or never end.
"""

import errno
import filecmp
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import Any

from orbax.checkpoint import v1 as ocp

from lora_jax.errors import CheckpointError, LoraError
from lora_jax.processes import said_by_the_first, written_by_the_first
from lora_jax.publish import publish, unwritable

TURNS = RLock()
"""Held while Orbax works: what one thread saves fails if another saves or loads, as each takes files for its own."""
_SPECIAL = set("[]*?{}\\")
"""Characters that Orbax takes for a pattern in the path of a checkpoint."""
_UNFINISHED = ".orbax-checkpoint-tmp"
"""The end of the names that Orbax gives to what it has not finished."""


def write(
    where: Path, arrays: Mapping[str, Any], notes: Mapping[str, Any], *, replace: Callable[[Path], None] | None
) -> None:
    """Write a checkpoint of arrays and notes; every process of a program calls it.

    Args:
      where: the directory to create.
      arrays: a tree of arrays, none of them spread over processes.
      notes: what JSON can hold.
      replace: as of `publish`.

    Raises:
      CheckpointError: it cannot be written, something is there already, or what was written is not what is there.
    """
    try:
        with elsewhere() as made:
            guarded(where, lambda: ocp.save(str(made), arrays, custom_metadata=dict(notes)))
            written_by_the_first(where, lambda: publish(where, lambda folder: copied(made, folder), replace=replace))
    except OSError as error:
        raise unwritable(where, error) from None


def guarded(where: Any, run: Callable[[], Any]) -> Any:
    """Run what calls Orbax, one thread at a time; whatever it raises is an error of this library."""
    try:
        with TURNS:
            return run()
    except (LoraError, OSError):
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0][:300]
        raise CheckpointError(f"{where} cannot be written: {type(error).__name__}: {reason}") from error


@contextmanager
def elsewhere() -> Iterator[Path]:
    """A new path in the temporary directory, the same one in every process of a program, as Orbax needs it."""
    with tempfile.TemporaryDirectory(prefix="lora_jax-") as spare:
        folder = Path(said_by_the_first(spare))
        folder.mkdir(exist_ok=True)  # On other machines it is not there.
        try:
            yield folder / "adapter"
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def copied(made: Path, folder: Path) -> None:
    """Copy a checkpoint, and compare the copy.

    Raises:
      OSError: the disk is full or broken.
    """
    shutil.copytree(made, folder, dirs_exist_ok=True, copy_function=shutil.copyfile)
    for path in made.rglob("*"):
        copy = folder / path.relative_to(made)
        if path.is_file() and not filecmp.cmp(path, copy, shallow=False):
            raise OSError(errno.EIO, f"{copy.name} reads back as something else")


@contextmanager
def plain_name(where: Path) -> Iterator[Path]:
    """The directory under a path that Orbax takes literally: a link, where its own has special characters."""
    if not _SPECIAL & set(str(where)) and not where.name.endswith(_UNFINISHED):
        yield where
        return
    with tempfile.TemporaryDirectory(prefix="lora_jax-") as spare:
        link = Path(spare) / "adapter"
        link.symlink_to(where)
        yield link
