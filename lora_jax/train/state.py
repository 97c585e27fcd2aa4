"""Trees of arrays on disk: the states of a run, whole and checked, the newest two of them kept."""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from hashlib import file_digest
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from lora_jax.errors import CheckpointError
from lora_jax.io.own.write import TURNS, copied, elsewhere, guarded, plain_name
from lora_jax.processes import gathered, written_by_the_first
from lora_jax.publish import discard, publish, steady

_KEPT = 2
_MANIFEST = "manifest.json"
_NAME = re.compile(r"\.?(\d+)(\..*\.partial)?")
"""Of a state, which is its step, and of what a killed process has left of one."""


class State(NamedTuple):
    """A run after some steps: what is trained and what the optimizer remembers.

    Batches and random keys are functions of the seed and the step, so nothing else is needed.
    """

    weights: Any
    optimizer: Any
    step: int = 0


def save_state(directory: Path, state: State) -> None:
    """Write a state, and delete all but the one before; whenever this is cut short, one of them is whole.

    Raises:
      CheckpointError: the disk is full, read-only or broken.
    """
    write_arrays(directory / str(state.step), {"weights": state.weights, "optimizer": state.optimizer})
    written_by_the_first(directory, lambda: _forget(directory, state.step))


def _forget(directory: Path, last: int) -> None:
    """Delete all states but the newest two up to the last one."""
    kept = [step for step in _steps(directory) if step <= last][-_KEPT:]
    for name in os.listdir(directory):
        if (found := _NAME.fullmatch(name)) and int(found[1]) not in kept:
            discard(directory / found[1])


def load_state(directory: Path, start: State, say: Callable[[str], None] = print) -> State:
    """The last state saved, bit for bit, or `start` if there is none.

    Args:
      directory: where `save_state` wrote.
      start: a state of the same structure.
      say: is told if a state is damaged, and the one before is taken.

    Raises:
      CheckpointError: there are states, and all are damaged.
    """
    like = {"weights": start.weights, "optimizer": start.optimizer}
    damaged: list[str] = []
    for step in reversed(_steps(directory)):
        try:
            loaded = read_arrays(directory / str(step), like)
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        for reason in damaged:
            say(f"{reason}. Going on from step {step}")
        return State(loaded["weights"], loaded["optimizer"], step)
    if damaged:
        raise CheckpointError(f"{'; '.join(damaged)}. No state is left to go on from: start again with --overwrite")
    return start


def write_arrays(where: Path, tree: Any) -> None:
    """Write a tree of arrays, whole or not at all; what is there already is replaced.

    Every process of a program calls it, and the first one writes.

    Raises:
      CheckpointError: the disk is full, read-only or broken.
    """
    tree = gathered(tree)
    with elsewhere() as made:
        guarded(where, lambda: ocp.save(str(made), tree))
        written_by_the_first(where, lambda: publish(where, partial(_fill, made), replace=lambda old: None))


def read_arrays(where: Path, like: Any) -> Any:
    """Read a tree of arrays with the structure, shapes and dtypes of `like`.

    Raises:
      CheckpointError: a file is missing or is not what was written, or the tree is another one.
    """
    # Into NumPy arrays: Orbax's JAX arrays are committed to a device, and the step would be compiled again for them.
    empty = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), like)
    return jax.tree.map(jnp.asarray, steady(where, lambda: _read(where, empty)))


def _fill(made: Path, folder: Path) -> None:
    copied(made, folder)
    listed = {path.relative_to(folder).as_posix(): _facts(path) for path in folder.rglob("*") if path.is_file()}
    (folder / _MANIFEST).write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")


def _facts(path: Path) -> list[Any]:
    """Size and digest of a file."""
    with path.open("rb") as file:
        return [path.stat().st_size, file_digest(file, "sha256").hexdigest()]


def _read(where: Path, empty: Any) -> Any:
    for name in _changed(where):
        raise CheckpointError(f"{where / name} is damaged: it is not what was written")
    try:
        with plain_name(where) as path, TURNS:
            return ocp.load(str(path.absolute()), empty)
    except Exception as error:
        reason = str(error).partition("\n")[0][:300]
        raise CheckpointError(f"{where} cannot be read: {type(error).__name__}: {reason}") from error


def _changed(where: Path) -> Iterator[str]:
    """Files of which the manifest says something else; there is none beside arrays of lora_jax before 0.1."""
    try:
        listed = json.loads((where / _MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except (OSError, ValueError, RecursionError):
        yield _MANIFEST
        return
    if not isinstance(listed, Mapping):
        yield _MANIFEST
        return
    for name, facts in listed.items():
        with suppress(OSError):
            if _facts(where / name) == facts:
                continue
        yield name


def _steps(directory: Path) -> list[int]:
    """Steps of the complete states; what is being written or removed has no such name."""
    names = [path.name for path in directory.iterdir()] if directory.exists() else []
    return sorted(int(name) for name in names if name.isdecimal())
