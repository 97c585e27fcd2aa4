"""mlx-lm's folder: its arrays in its layout do what PEFT's file does, and its config says how."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import assert_close
from safetensors.numpy import load_file

import lora_jax as lora
from lora_jax.errors import CheckpointError
from lora_jax.io.peft import Module, PeftFiles, write_mlx

QUERY, UP, TABLE = "model.layers.3.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.embed_tokens"


def draw(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(dtype)


def written(folder: Path, files: PeftFiles) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    write_mlx(folder, files)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return config, load_file(folder / "adapters.safetensors")


def test_factors_scale_and_keys(tmp_path: Path) -> None:
    modules = {
        QUERY: Module("linear", draw(2, 6), draw(5, 2)), UP: Module("linear", draw(4, 6), draw(7, 4)),
        TABLE: Module("embedding", draw(2, 9), draw(6, 2)),
    }  # fmt: skip
    files = PeftFiles({"r": 2, "lora_alpha": 5, "rank_pattern": {"up_proj": 4}, "lora_dropout": 0.25}, modules)
    config, arrays = written(tmp_path / "a", files)
    found = config["lora_parameters"]
    assert (config["fine_tune_type"], config["num_layers"]) == ("lora", -1)
    assert (found["rank"], found["dropout"]) == (4, 0.25)
    assert found["keys"] == ["mlp.up_proj", "model.embed_tokens", "self_attn.q_proj"]
    for name, shape in {QUERY: (5, 6), UP: (7, 6), TABLE: (9, 6)}.items():
        a, b = arrays[f"{name}.lora_a"], arrays[f"{name}.lora_b"]
        assert (a.shape[1], b.shape[0]) == (4, 4)
        delta = np.float32(found["scale"]) * (a @ b)
        assert_close(delta if name == TABLE else delta.T, files.delta(name, shape))


def test_dora_keeps_its_magnitudes_and_its_dtype(tmp_path: Path) -> None:
    module = Module("linear", draw(2, 6, dtype=ml_dtypes.bfloat16), draw(5, 2, dtype=ml_dtypes.bfloat16), draw(5))
    config, arrays = written(tmp_path / "a", PeftFiles({"r": 2, "lora_alpha": 2, "use_dora": True}, {QUERY: module}))
    assert config["fine_tune_type"] == "dora"
    np.testing.assert_array_equal(arrays[f"{QUERY}.m"], module.magnitude)
    assert arrays[f"{QUERY}.lora_a"].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize(
    ("module", "saved", "reason"),
    [
        (Module("conv", draw(2, 6, 3), draw(5, 2, 1)), {}, "convolutions"),
        (Module("linear", draw(2, 6), draw(5, 2), b_bias=draw(5)), {}, "bias on B"),
        (Module("linear", draw(2, 6), draw(5, 2)), {"norm.weight": draw(6)}, "norm.weight: .* factors only"),
        (Module("embedding", draw(2, 9), draw(6, 2), draw(6)), {}, "magnitude for each row"),
    ],
)
def test_what_has_no_place_there_is_refused(module: Module, saved: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=reason):
        write_mlx(
            tmp_path / "a", PeftFiles({"r": 2, "lora_alpha": 2, "modules_to_save": ["norm"]}, {"q": module}, saved)
        )
    assert not (tmp_path / "a").exists()


def test_nothing_that_is_there_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(lora.CheckpointError, match="exists"):
        write_mlx(tmp_path / "a", PeftFiles({"r": 2}, {"q": Module("linear", draw(2, 6), draw(5, 2))}))


@pytest.mark.parametrize(
    ("name", "key"), [("h.11.attn.c_attn", "attn.c_attn"), ("lm_head", "lm_head"), ("x1.y2", "x1.y2")]
)
def test_names_within_a_layer(name: str, key: str, tmp_path: Path) -> None:
    config, _ = written(tmp_path / "a", PeftFiles({"r": 2}, {name: Module("linear", draw(2, 6), draw(5, 2))}))
    assert config["lora_parameters"]["keys"] == [key]
