"""Runs of `lora-jax finetune` on tiny settings that several files look at."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_jax.cli import main

TINY = "finetune --model tiny --length 32 --batch 4 --pretrain-steps 8 --steps 6 --eval-every 3 --dropout 0.1"


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """The arguments of a run of seconds, without `--out`."""
    return TINY.split()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where tests keep their caches and runs."""
    path = tmp_path_factory.mktemp("finetune")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_JAX_CACHE", str(path / "cache"))
        yield path


@pytest.fixture(scope="session")
def whole(folder: Path, tiny: list[str]) -> Path:
    """The output of a run that nothing disturbed."""
    assert main([*tiny, "--out", str(folder / "whole")]) == 0
    return folder / "whole"
