"""TensorBoard's files hold the numbers of the metrics; without its package the error says what to install."""

import sys
from pathlib import Path

import pytest

from lora_jax.cli import main
from lora_jax.train.board import Board


def test_numbers_are_written_by_their_names(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    board = Board(tmp_path)
    board.write(1, {"loss": 2.5, "learning_rate": 1e-3})
    board.close()
    (found,) = tmp_path.iterdir()
    assert found.name.startswith("events.") and b"loss" in found.read_bytes() and b"learning_rate" in found.read_bytes()


def test_the_extra_is_named(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    args = ["finetune", "--model", str(model), "--data", str(data), "--tensorboard", "--out", str(tmp_path / "out")]
    assert main(args) == 1
    assert 'pip install "lora_jax[tensorboard]"' in capsys.readouterr().err
