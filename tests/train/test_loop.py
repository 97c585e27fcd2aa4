"""The loop: what happens after which step, losses that are not finite, and runs that are over early."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from lora_jax.report.terminal import Progress
from lora_jax.train.best import Best
from lora_jax.train.loop import Schedule, TrainingError, train
from lora_jax.train.state import State, load_state, save_state
from lora_jax.train.step import Report

START = State(jnp.zeros(()), jnp.zeros(()))


def run_loop(tmp_path: Path, losses: list[float], **options: Any) -> list[int]:
    """Train on given losses; the weights count the steps, of which those that were recorded are returned."""
    happened: list[int] = []
    schedule = Schedule(steps=len(losses), checkpoint_every=2, eval_every=3)

    def step(weights: Any, optimizer: Any, loss: float, key: jax.Array) -> Any:
        return weights + 1, optimizer - 1, Report(jnp.asarray(loss), jnp.asarray(1.0), jnp.asarray(1.0))

    def record(state: State, report: Report) -> str:
        happened.append(state.step)
        return "shown"

    train(
        load_state(tmp_path / "state", START),
        step,
        lambda index: losses[index],
        jax.random.key(0),
        schedule,
        partial(save_state, tmp_path / "state"),
        Progress("loop", schedule.steps),
        record,
        **options,
    )
    return happened


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(value: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=rf"the loss is {value} at step 4, whose batch holds examples of 3: try"):
        run_loop(tmp_path, [1.0, 1.0, 1.0, float(value), 1.0], named=lambda index: f"examples of {index}")
    state = load_state(tmp_path / "state", START)
    assert (float(state.weights), float(state.optimizer), state.step) == (2.0, -2.0, 2)
    assert run_loop(tmp_path, [1.0] * 5) == [3, 4, 5]


def test_a_run_that_is_over_stops_with_a_state_and_stays_over(tmp_path: Path) -> None:
    seen: list[int] = []

    def over() -> bool:
        return len(seen) >= 3

    def note(state: State, report: Report) -> str:
        seen.append(state.step)
        return ""

    schedule = Schedule(steps=9, checkpoint_every=9, eval_every=3)
    report = Report(jnp.ones(()), jnp.ones(()), jnp.ones(()))
    for _ in range(2):
        state = load_state(tmp_path, START)
        done = train(
            state,
            lambda weights, optimizer, batch, key: (weights, optimizer, report),
            lambda index: None,
            jax.random.key(0),
            schedule,
            partial(save_state, tmp_path),
            Progress("loop", 9),
            note,
            over,
        )
        assert done.step == 3 and seen == [1, 2, 3]


def test_the_best_evaluation_and_patience_are_functions_of_the_metrics() -> None:
    losses = [3.0, 2.0, 2.5, 2.0, 1.9]
    records = [{"step": step, "eval_loss": loss} for step, loss in enumerate(losses, 1)]
    assert [Best(records[:count], patience=2).over for count in range(6)] == [False, False, False, False, True, False]
    assert [Best(records[:count]).step for count in range(6)] == [None, 1, 2, 2, 2, 5]
    assert not Best([{"step": step, "loss": 1.0} for step in range(9)], patience=1).over
