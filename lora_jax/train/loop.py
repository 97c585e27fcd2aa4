"""The training loop: steps, evaluations, checkpoints through Orbax, stopping in order and going on from there."""

import math
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from lora_jax.errors import LoraError
from lora_jax.report.terminal import Progress
from lora_jax.train.data import Bytes


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


Step = Callable[[Any, Any, Bytes, jax.Array], tuple[Any, Any, jax.Array]]
"""Maps weights, optimizer state, tokens and a random key to new weights, new optimizer state and the loss."""


class TrainingError(LoraError, RuntimeError):
    """Training cannot go on."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, in order: the run stopped after a step, and its state is on disk."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When a run does what: `steps` in total, and the steps between states on disk and between evaluations."""

    steps: int
    checkpoint_every: int
    eval_every: int

    def checkpoint(self, done: int) -> bool:
        """Whether to write the state after `done` steps."""
        return done % self.checkpoint_every == 0 or done == self.steps

    def evaluate(self, done: int) -> bool:
        """Whether to evaluate after `done` steps."""
        return done % self.eval_every == 0 or done == self.steps


def train(
    state: State,
    step: Step,
    batches: Callable[[int], Bytes],
    key: jax.Array,
    schedule: Schedule,
    directory: Path,
    reporter: Progress,
    record: Callable[[int, float], None] = lambda done, loss: None,
    evaluate: Callable[[int, Any], None] = lambda done, weights: None,
) -> State:
    """Train from wherever `state` is to the last step.

    Args:
      state: where to begin.
      step: the compiled training step; it may donate the weights and the optimizer's state.
      batches: maps the number of a step, from 0, to its tokens.
      key: `jax.random` key; each step gets one folded from it and the number of the step.
      schedule: when to do what.
      directory: where states are written.
      reporter: shows progress.
      record: called after each step with the steps done and the loss.
      evaluate: called with the steps done and the weights.

    Returns:
      The state after the last step, which is on disk too.

    Raises:
      TrainingError: a loss is not finite.
      Interrupted: Ctrl-C was pressed; the state is on disk.
    """
    with _interrupts() as interrupted, reporter.shown():
        for index in range(state.step, schedule.steps):
            step_key = jax.random.fold_in(key, index)
            weights, optimizer, mean = step(state.weights, state.optimizer, batches(index), step_key)
            done, loss = index + 1, float(mean)
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss is {loss} at step {done}: try a lower learning rate or more warmup steps"
                )
            state = State(weights, optimizer, done)
            record(done, loss)
            reporter.update(done, f"loss {loss:.3f}")
            if schedule.evaluate(done):
                evaluate(done, state.weights)
            stop = interrupted()
            if stop or schedule.checkpoint(done):
                save_state(directory, state)
            if stop:
                raise Interrupted(f"stopped after step {done} of {schedule.steps}")
    return state


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a flag, so that no step is cut in half; a second one interrupts as usual."""
    pressed = False

    def note(number: int, frame: Any) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, usual)

    usual = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, usual)
