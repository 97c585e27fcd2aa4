"""`lora-jax convert` brings adapters of other tools into this library's own format."""

from pathlib import Path

import jax
import numpy as np
import pytest
from two_blocks import PARAMS, SITES, alphas, check, factors, written

import lora_jax as lora
from lora_jax.cli import main


def flat(name: str) -> str:
    return "lora_unet_" + name.replace(".", "_")


@pytest.fixture
def like(tmp_path: Path) -> Path:
    """An adapter of the same model."""
    adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets=("kernel",)), PARAMS, SITES)
    lora.save(tmp_path / "like", adapter)
    return tmp_path / "like"


def test_kohyas_names(like: Path, tmp_path: Path) -> None:
    tensors = factors("lora_down.weight", "lora_up.weight", flat) | alphas(np.float32(4), flat)
    path = written(tmp_path / "x.safetensors", tensors)
    assert not main(["convert", str(path), str(tmp_path / "own"), "--like", str(like)])
    check(lora.load(tmp_path / "own"), 2)


def test_alpha_is_asked_for(like: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["convert", str(written(tmp_path / "x.safetensors", factors())), str(tmp_path / "own"), "--like", str(like)]
    assert main(given) and "--alpha" in capsys.readouterr().err
    assert not main([*given, "--alpha", "6"])
    check(lora.load(tmp_path / "own"), 3)
