"""Writing a checkpoint with Orbax, so that it appears at its path whole, or what was there before stays.

Orbax writes to the system's temporary directory, and what it wrote is copied from there: on a disk that is full or
broken its threads would raise whatever they like, or never end.
"""

import errno
import filecmp
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from lora_jax.errors import CheckpointError, LoraError
from lora_jax.publish import publish

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
      arrays: a tree of arrays.
      notes: what JSON can hold.
      replace: as of `publish`.

    Raises:
      CheckpointError: it cannot be written, something is there already, or what was written is not what is there.
    """
    save = lambda to: guarded(where, lambda: ocp.save(str(to), arrays, custom_metadata=dict(notes)))  # noqa: E731
    if jax.process_count() == 1:
        publish(where, lambda folder: from_elsewhere(folder, save), replace=replace)
    else:
        _together(where, save, replace)


def guarded(where: Any, run: Callable[[], Any]) -> Any:
    """Run what calls Orbax; whatever it raises is an error of this library."""
    try:
        return run()
    except (LoraError, OSError):
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0][:300]
        raise CheckpointError(f"{where} cannot be written: {type(error).__name__}: {reason}") from error


def from_elsewhere(folder: Path, save: Callable[[Path], None]) -> None:
    """Have a checkpoint written to the temporary directory, copy it, and compare the copy."""
    with tempfile.TemporaryDirectory(prefix="lora_jax-") as spare:
        made = Path(spare) / "adapter"
        save(made)
        shutil.copytree(made, folder, dirs_exist_ok=True, copy_function=shutil.copyfile)
        for path in made.rglob("*"):
            copy = folder / path.relative_to(made)
            if path.is_file() and not filecmp.cmp(path, copy, shallow=False):
                raise OSError(errno.EIO, f"{copy.name} reads back as something else")


def _together(where: Path, save: Callable[[Path], None], replace: Callable[[Path], None] | None) -> None:
    """Have all processes write one checkpoint beside the path, and the first one put it there."""
    beside, first = where.parent / f".{where.name[:60]}.together", jax.process_index() == 0
    if first:
        where.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(beside, ignore_errors=True)
    multihost_utils.sync_global_devices(f"lora_jax.save {where}")
    save(beside)
    failed: LoraError | None = None
    if first:
        try:
            publish(where, lambda folder: _moved(beside, folder), replace=replace)
        except LoraError as error:
            failed = error
        shutil.rmtree(beside, ignore_errors=True)
    if not bool(multihost_utils.broadcast_one_to_all(failed is None)):
        raise failed or CheckpointError(f"{where} was not written: the first process says why")


def _moved(source: Path, folder: Path) -> None:
    for name in os.listdir(source):
        os.rename(source / name, folder / name)


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
