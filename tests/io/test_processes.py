"""Programs of several processes: one adapter is written, whole, or each of them is told why not."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_same

import lora_jax as lora
from lora_jax.processes import gathered, said_by_the_first, written_by_the_first

SEVERAL = Path(__file__).with_name("several.py")
ROOT = Path(__file__).parents[2]


def scale(folder: Path) -> float:
    (update,) = lora.load(folder).values()
    assert isinstance(update, lora.LowRank)
    return float(update.scale)


def start(count: int, folder: Path, *more: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    (folder / "file").write_text("no directory", encoding="utf-8")
    (folder / "temporary").mkdir()
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "TMPDIR": str(folder / "temporary")}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return [
        subprocess.Popen(
            [sys.executable, SEVERAL, port, str(count), str(index), folder, *more],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) for index in range(count)
    ]  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("count", [2, 4])
def test_one_adapter_of_all(count: int, tmp_path: Path) -> None:
    """Spread over processes, in both formats; where the first may not write, all are told."""
    ended = [(process, *process.communicate(timeout=120)) for process in start(count, tmp_path)]
    for index, (process, out, err) in enumerate(ended):
        assert process.returncode == 0, err[-2000:]
        said = json.loads(out.splitlines()[-1])
        assert said["own over"] == said["peft over"] == "saved"
        others = [said[key] for key in ("own again", "peft again", "own held", "peft held")]
        assert all(text.startswith("CheckpointError: ") for text in others), others
        reasons = ("exists already", "exists already", "cannot be written", "cannot be written")
        told = reasons if index == 0 else ["the first process"] * 4
        assert [reason in text for reason, text in zip(told, others, strict=True)] == [True] * 4, others
    assert sorted(os.listdir(tmp_path)) == ["file", "own", "peft", "temporary"]
    assert os.listdir(tmp_path / "temporary") == []
    assert scale(tmp_path / "own") == 2


@pytest.mark.full
@pytest.mark.parametrize(("moment", "dead"), [("before", -1), ("publishes", 0)])
def test_one_process_is_killed(moment: str, dead: int, tmp_path: Path) -> None:
    """What was there stays, and the next writer is not hindered by what is left."""
    processes = start(2, tmp_path, moment)
    processes[dead].wait(timeout=60)
    assert processes[dead].returncode == -9
    for process in processes:
        process.kill()  # JAX ends the others itself, after a while.
        process.communicate(timeout=60)
    for name in ("own", "peft"):
        assert (tmp_path / name).is_dir()
    assert scale(tmp_path / "own") == 1
    lora.save(tmp_path / "own", lora.scale(lora.load(tmp_path / "own"), 4.0), overwrite=True)
    assert scale(tmp_path / "own") == 4
    assert sorted(os.listdir(tmp_path)) == ["file", "own", "peft", "temporary"]


def test_a_single_process_waits_for_nobody(tmp_path: Path) -> None:
    tree, done = {"a": np.ones(3), "b": lora.Adapter({})}, list[int]()
    assert_same(gathered(tree)["a"], tree["a"])
    written_by_the_first(tmp_path, lambda: done.append(1))
    assert done == [1] and said_by_the_first(str(tmp_path)) == str(tmp_path)
