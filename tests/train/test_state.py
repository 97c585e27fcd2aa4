"""States on disk: killed at any moment one of two is whole, damage falls back to the one before and is told."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from killed import killed_at
from orbax.checkpoint import v1 as ocp

from lora_jax.errors import CheckpointError
from lora_jax.train import state as states
from lora_jax.train.state import State, load_state, save_state

START = State({"w": jnp.zeros(3)}, jnp.zeros(()))


def state(step: int) -> State:
    return State({"w": jnp.full(3, float(step))}, jnp.asarray(float(-step)), step)


def step_of(found: State) -> int:
    """The step of a state, all of which belongs to it."""
    assert np.all(found.weights["w"] == found.step) and found.optimizer == -found.step
    return found.step


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


@pytest.fixture
def simple(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays in one file, as Orbax takes its time."""

    def save(path: str, tree: dict[str, object]) -> None:
        os.mkdir(path)
        np.savez(f"{path}/arrays", w=tree["weights"]["w"], optimizer=tree["optimizer"])  # type: ignore[index]

    def load(path: str, like: object) -> dict[str, object]:
        found = np.load(f"{path}/arrays.npz")
        return {"weights": {"w": found["w"]}, "optimizer": found["optimizer"]}

    monkeypatch.setattr(states.ocp, "save", save)
    monkeypatch.setattr(states.ocp, "load", load)


def test_the_newest_two_are_kept_and_the_newest_is_loaded(tmp_path: Path) -> None:
    assert load_state(tmp_path / "none", START) is START
    for step in (2, 4, 6):
        save_state(tmp_path, state(step))
    assert names(tmp_path) == ["4", "6"]
    assert step_of(load_state(tmp_path, START)) == 6


def test_killed_at_any_moment_a_state_is_whole_and_the_next_save_is_as_ever(tmp_path: Path, simple: None) -> None:
    found: list[int] = []
    for moment in range(1000):
        directory = tmp_path / str(moment)
        save_state(directory, state(2))
        save_state(directory, state(4))
        died = killed_at(moment, lambda directory=directory: save_state(directory, state(6)))
        found.append(step_of(load_state(directory, START, pytest.fail)))
        save_state(directory, state(6))
        save_state(directory, state(8))
        assert names(directory) == ["6", "8"]
        if not died:
            break
    assert len(found) > 10 and found == sorted(found) and set(found) == {4, 6}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_a_damaged_state_falls_back_to_the_one_before_in_one_line(
    damage: Callable[[Path], None], tmp_path: Path, simple: None
) -> None:
    save_state(tmp_path, state(2))
    save_state(tmp_path, state(4))
    damage(tmp_path / "4" / "arrays.npz")
    said: list[str] = []
    assert step_of(load_state(tmp_path, START, said.append)) == 2
    assert said == [f"{tmp_path / '4' / 'arrays.npz'} is damaged: it is not what was written. Going on from step 2"]
    save_state(tmp_path, state(4))
    assert step_of(load_state(tmp_path, START, pytest.fail)) == 4
    for step in (2, 4):
        damage(tmp_path / str(step) / "arrays.npz")
    with pytest.raises(CheckpointError, match="No state is left to go on from: start again with --overwrite"):
        load_state(tmp_path, START)


@pytest.mark.parametrize("content", ["", "[]", '{"arrays.npz": 1}', "[" * 100_000, "\udcff"])
def test_a_damaged_manifest_is_a_damaged_state(content: str, tmp_path: Path, simple: None) -> None:
    save_state(tmp_path, state(2))
    save_state(tmp_path, state(4))
    (tmp_path / "4" / "manifest.json").write_bytes(content.encode(errors="surrogateescape"))
    assert step_of(load_state(tmp_path, START, lambda said: None)) == 2


def test_a_full_disk_is_named_and_the_state_before_stays(
    tmp_path: Path, simple: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    save_state(tmp_path, state(2))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="4 cannot be written: No space left on device"):
            save_state(tmp_path, state(4))
    assert names(tmp_path) == ["2"] and step_of(load_state(tmp_path, START)) == 2


def test_states_that_have_no_manifest_load(tmp_path: Path) -> None:
    ocp.save(str(tmp_path / "4"), {"weights": state(4).weights, "optimizer": state(4).optimizer})
    assert step_of(load_state(tmp_path, START)) == 4
    shutil.rmtree(tmp_path / "4" / "state" / "d")
    with pytest.raises(CheckpointError, match="4 cannot be read"):
        load_state(tmp_path, START)


def test_a_state_of_something_else_is_refused(tmp_path: Path) -> None:
    save_state(tmp_path, state(4))
    with pytest.raises(CheckpointError, match="4 cannot be read"):
        load_state(tmp_path, State({"other": jnp.zeros(3)}, jnp.zeros(())))


def test_names_that_orbax_takes_for_patterns(tmp_path: Path) -> None:
    save_state(tmp_path / "lr[0.1]", state(4))
    assert step_of(load_state(tmp_path / "lr[0.1]", START)) == 4
