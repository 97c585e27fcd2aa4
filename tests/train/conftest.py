"""Runs of `lora-jax finetune` on a tiny random model that several files look at."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_runs import bytes_model, sums

from lora_jax.cli import main


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where tests keep their caches and runs."""
    path = tmp_path_factory.mktemp("finetune")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_JAX_CACHE", str(path / "cache"))
        yield path


@pytest.fixture(scope="session")
def model(folder: Path) -> Path:
    """A tiny model."""
    return bytes_model(folder / "model")


@pytest.fixture(scope="session")
def data(folder: Path) -> Path:
    """Data for it."""
    return sums(folder / "sums.jsonl")


@pytest.fixture(scope="session")
def tiny(model: Path, data: Path) -> list[str]:
    """The arguments of a run of seconds, without `--out`."""
    args = f"finetune --model {model} --data {data} --length 32 --batch 2 --steps 6 --eval-every 3 --eval-batches 1 "
    return (args + "--lr 0.01 --warmup 1 --dropout 0.1 --targets q_proj down_proj --accumulate 2").split()


@pytest.fixture(scope="session")
def whole(folder: Path, tiny: list[str]) -> Path:
    """The output of a run that nothing disturbed."""
    assert main([*tiny, "--out", str(folder / "whole")]) == 0
    return folder / "whole"
