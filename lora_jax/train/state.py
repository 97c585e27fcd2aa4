"""What a run needs to go on exactly where it stopped, on disk through Orbax."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp


class State(NamedTuple):
    """A run after some steps: what is trained and what the optimizer remembers.

    Batches and random keys are functions of the seed and the step, so nothing else is needed.
    """

    weights: Any
    optimizer: Any
    step: int = 0


def save_state(directory: Path, state: State) -> None:
    """Write a state, then delete older ones. Cut short at any point, the last complete state remains."""
    write_arrays(directory / str(state.step), {"weights": state.weights, "optimizer": state.optimizer})
    for step in _steps(directory):
        if step != state.step:
            shutil.rmtree(directory / str(step))


def load_state(directory: Path, start: State) -> State:
    """The last state saved, bit for bit, or `start` if there is none.

    Args:
      directory: where `save_state` wrote.
      start: a state of the same structure.
    """
    if not (steps := _steps(directory)):
        return start
    like = {"weights": start.weights, "optimizer": start.optimizer}
    loaded = read_arrays(directory / str(steps[-1]), like)
    return State(loaded["weights"], loaded["optimizer"], steps[-1])


def write_arrays(path: Path, tree: Any) -> None:
    """Write a tree of arrays, whole or not at all; what is there already is replaced."""
    ocp.save(str(path.absolute()), tree, overwrite=True)


def read_arrays(path: Path, like: Any) -> Any:
    """Read a tree of arrays with the structure, shapes and dtypes of `like`."""
    # Into NumPy arrays: Orbax's JAX arrays are committed to a device, and the step would be compiled again for them.
    empty = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), like)
    return jax.tree.map(jnp.asarray, ocp.load(str(path.absolute()), empty))


def _steps(directory: Path) -> list[int]:
    """Steps of the complete states; Orbax gives them their names at the very end."""
    names = [path.name for path in directory.iterdir()] if directory.exists() else []
    return sorted(int(name) for name in names if name.isdecimal())
