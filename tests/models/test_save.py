"""`models.save`: what was loaded comes back, beside what lies there, whole or not at all."""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers import assert_same
from safetensors.numpy import load_file
from tiny_models import tiny_directory

from lora_jax import CheckpointError, ParameterError, models


@pytest.mark.parametrize("unrolled", [False, True])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt2", "gpt_oss"])
def test_tensors_come_back_bit_for_bit(tmp_path: Path, family: str, unrolled: bool):
    source = tiny_directory(tmp_path / "m", family)
    model = models.load(source, unrolled=unrolled)
    models.save(tmp_path / "n", model)
    assert_same(load_file(tmp_path / "n" / "model.safetensors"), load_file(source / "model.safetensors"))
    config = json.loads((tmp_path / "n" / "config.json").read_text())
    assert config == json.loads((source / "config.json").read_text()) | {"dtype": "float32"}


def test_other_parameters_other_dtype_and_other_files(tmp_path: Path):
    source = tiny_directory(tmp_path / "m", "llama", torch_dtype="float32")
    (source / "tokenizer.json").write_text("{}")
    (source / "original").mkdir()
    (source / "original" / "params.json").write_text("{}")
    (source / "pytorch_model.bin").write_bytes(b"old weights")
    model = models.load(source)
    half = jax.tree.map(lambda leaf: (2 * leaf).astype(jnp.bfloat16), model.params)
    models.save(tmp_path / "n", model, params=half)
    assert_same(models.load(tmp_path / "n").params, half)
    files = {str(file.relative_to(tmp_path / "n")) for file in (tmp_path / "n").rglob("*") if file.is_file()}
    assert files == {"config.json", "model.safetensors", "tokenizer.json", "original/params.json"}
    assert json.loads((tmp_path / "n" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_large_models_are_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.modules["lora_jax.models.save"], "SHARD_BYTES", 10_000)
    model = models.load(tiny_directory(tmp_path / "m", "llama"))
    models.save(tmp_path / "n", model)
    files = sorted(file.name for file in (tmp_path / "n").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert all((tmp_path / "n" / name).stat().st_size < 14_000 for name in files)
    assert_same(models.load(tmp_path / "n").params, model.params)
    models.save(tmp_path / "n", model, overwrite=True)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"model-00001-of.* would stay beside"):
        models.save(tmp_path / "n", model, overwrite=True)


def test_nothing_foreign_is_replaced(tmp_path: Path):
    model = models.load(tiny_directory(tmp_path / "m", "llama"))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="exists"):
            models.save(tmp_path / "notes", model, overwrite=overwrite)
    with pytest.raises(CheckpointError, match="inside of the model"):
        models.save(tmp_path / "m", model, overwrite=True)
    models.save(tmp_path / "n", model)
    with pytest.raises(CheckpointError, match="overwrite=True"):
        models.save(tmp_path / "n", model)
    twice = jax.tree.map(lambda leaf: 2 * leaf, model.params)
    models.save(tmp_path / "n", model, twice, overwrite=True)
    assert_same(models.load(tmp_path / "n").params, twice)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m", "n", "notes"]


def without(tree: dict[str, Any], *path: str) -> dict[str, Any]:
    first, *rest = path
    return {
        key: without(value, *rest) if key == first and rest else value
        for key, value in tree.items()
        if rest or key != first
    }


def test_parameters_of_another_model_are_refused(tmp_path: Path):
    model = models.load(tiny_directory(tmp_path / "m", "llama"))
    wrong = {
        "'lm_head/weight' is missing": without(model.params, "lm_head"),
        "'model/norm/weight' is missing": without(model.params, "model", "norm"),
        "'extra' is no parameter": model.params | {"extra": jnp.ones(3)},
        r"'lm_head/weight' has shape \(3,\), and this model's is \(61, 24\)": model.params
        | {"lm_head": {"weight": jnp.ones(3)}},
        "lm_head/weight is int32; a directory holds F64": model.params
        | {"lm_head": {"weight": jnp.ones((61, 24), jnp.int32)}},
    }
    for message, params in wrong.items():
        with pytest.raises(ParameterError, match=message):
            models.save(tmp_path / "n", model, params)
    assert not (tmp_path / "n").exists()
