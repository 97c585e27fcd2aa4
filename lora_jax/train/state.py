"""What a run needs to go on exactly where it stopped, on disk through Orbax."""

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
    """Write a state, then delete older ones; cut short at any point, one complete state remains."""
    policy = ocp.training.preservation_policies.LatestN(1)
    with ocp.training.Checkpointer(directory.absolute(), preservation_policy=policy) as checkpointer:
        checkpointer.save(
            state.step, {"weights": state.weights, "optimizer": state.optimizer}, overwrite=True, force=True
        )


def load_state(directory: Path, start: State) -> State:
    """The last state saved, bit for bit, or `start` if there is none.

    Args:
      directory: where `save_state` wrote.
      start: a state of the same structure.
    """
    if not directory.exists():
        return start
    with ocp.training.Checkpointer(directory.absolute()) as checkpointer:
        if checkpointer.latest is None:
            return start
        # Into NumPy arrays: Orbax's JAX arrays are committed to a device, which would compile the step once more.
        like = {"weights": start.weights, "optimizer": start.optimizer}
        like = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), like)
        step = checkpointer.latest.step
        loaded = jax.tree.map(jnp.asarray, checkpointer.load(step, like))
    return State(loaded["weights"], loaded["optimizer"], step)
