"""mlx-lm's folders: `x·lora_a·lora_b·scale` is what the adapter adds, under every reader."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from two_blocks import FACTORS, PARAMS, RANK, WEIGHTS, base, check, draw, factors, load, written

import lora_jax as lora
from lora_jax.cli import main
from lora_jax.io.inspect import inspect
from lora_jax.io.peft import Module, PeftFiles, merge_checkpoint, read_peft
from lora_jax.io.peft.mlx import write_mlx

OWN = {"rank": RANK, "scale": 20.0, "dropout": 0.0, "keys": ["attn.to_q", "ff.out"]}
CONFIG = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": OWN, "model": "some/model", "batch_size": 4}
MLX = {key: value.T for key, value in factors("lora_a", "lora_b").items()}


def folder(path: Path, config: Any = CONFIG, tensors: Any = MLX, name: str = "adapters.safetensors") -> Path:
    written(path / name, tensors)
    if config is not None:
        (path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


CONFIGS: dict[str, tuple[dict[str, Any], float]] = {
    "today's": (CONFIG, 20),
    "without keys": ({**CONFIG, "lora_parameters": {"rank": 2, "scale": 2.5, "dropout": 0.1}}, 2.5),
    "the first, with lora_layers": ({"lora_layers": 16, "lora_parameters": {"rank": 2, "scale": 10}}, 10),
    "alpha equal to the rank": ({**CONFIG, "lora_parameters": {**OWN, "alpha": 2}}, 20),
    "without a type": ({"model": "m", "num_layers": -1, "lora_parameters": OWN}, 20),
}


@pytest.mark.parametrize(("config", "scale"), CONFIGS.values(), ids=CONFIGS)
def test_every_reader(config: dict[str, Any], scale: float, tmp_path: Path) -> None:
    path = folder(tmp_path / "mlx", config)
    check(load(path), scale)
    check(load(path / "adapters.safetensors"), scale)
    assert {entry.scale for entry in inspect(path).entries} == {scale}
    merge_checkpoint(base(tmp_path / "base"), path, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, (a, b) in FACTORS.items():
        np.testing.assert_allclose(merged[f"{name}.weight"], WEIGHTS[name] + scale * b @ a, rtol=1e-5, atol=1e-5)
    assert not main(["compose", str(path), str(path), "--out", str(tmp_path / "two"), "--weights", "1", "2"])
    check(load(tmp_path / "two"), 3 * scale)


def test_a_checkpoint_of_a_run(tmp_path: Path) -> None:
    path = folder(tmp_path, name="0000100_adapters.safetensors")
    check(load(path / "0000100_adapters.safetensors"), 20)


def test_dora(tmp_path: Path) -> None:
    magnitudes = {name: np.abs(draw(len(weight))) for name, weight in WEIGHTS.items()}
    tensors = MLX | {f"{name}.m": value for name, value in magnitudes.items()}
    merged = lora.merge(PARAMS, load(folder(tmp_path, {**CONFIG, "fine_tune_type": "dora"}, tensors)))
    for name, (a, b) in FACTORS.items():
        weight = WEIGHTS[name] + 20 * b @ a
        expected = magnitudes[name][:, None] * weight / np.linalg.norm(weight, axis=1, keepdims=True)
        found = merged
        for part in name.split("."):
            found = found[part]
        np.testing.assert_allclose(found["kernel"].T, expected, rtol=1e-4, atol=1e-5)
    assert read_peft(tmp_path).config["use_dora"]


def test_what_is_written_for_mlx_comes_back(tmp_path: Path) -> None:
    modules = {name: Module("linear", a, b) for name, (a, b) in FACTORS.items()}
    write_mlx(tmp_path / "mlx", PeftFiles({"r": RANK, "lora_alpha": 6}, modules))
    check(load(tmp_path / "mlx"), 3)


def test_tables(tmp_path: Path) -> None:
    tensors = {"model.embed_tokens.lora_a": draw(9, 2), "model.embed_tokens.lora_b": draw(2, 4)}
    files = read_peft(folder(tmp_path, CONFIG, tensors))
    want = 20 * tensors["model.embed_tokens.lora_a"] @ tensors["model.embed_tokens.lora_b"]
    np.testing.assert_allclose(files.delta("model.embed_tokens", (9, 4)), want, rtol=1e-5)


def test_without_its_config_the_scale_is_asked_for(tmp_path: Path) -> None:
    path = folder(tmp_path, None)
    with pytest.raises(lora.CheckpointError, match="nothing tells"):
        load(path)
    check(load(path, alpha=4), 2)


PEFT = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
REFUSED: dict[str, tuple[Any, Any, str]] = {
    "alpha": ({**CONFIG, "lora_parameters": {**OWN, "alpha": 16.0}}, MLX, "160, later by the scale alone, 20"),
    "rank": ({**CONFIG, "lora_parameters": {**OWN, "rank": 4}}, MLX, "has rank 2, but its config says 4"),
    "no scale": ({**CONFIG, "lora_parameters": {"rank": 2}}, MLX, "scale=None in lora_parameters must be a number"),
    "scale": ({**CONFIG, "lora_parameters": {**OWN, "scale": "20"}}, MLX, "scale='20' in lora_parameters"),
    "NaN": ({**CONFIG, "lora_parameters": {**OWN, "scale": float("nan")}}, MLX, "scale=nan"),
    "no parameters": ({"fine_tune_type": "lora"}, MLX, "lora_parameters=None in its config must be an object"),
    "a list": ({"fine_tune_type": "lora", "lora_parameters": [2]}, MLX, "must be an object"),
    "full": ({"fine_tune_type": "full"}, {"model.q.weight": draw(2, 2)}, "mlx-lm fine-tuned in full"),
    "PEFT's config": (PEFT, MLX, "tensors are mlx-lm's, and its config is not"),
    "PEFT's tensors": (CONFIG, factors(), "config is mlx-lm's, and its tensors are not"),
    "experts": (CONFIG, {"mlp.up.lora_a": draw(4, 2, 3), "mlp.up.lora_b": draw(4, 5, 2)}, "switch layers"),
    "DoRA of a table": (CONFIG, {"wte.lora_a": draw(9, 2), "wte.lora_b": draw(2, 4), "wte.m": draw(9)}, "by row"),
    "half": (CONFIG, {"q.lora_a": draw(3, 2)}, "lora_B.weight is missing"),
    "vectors": (CONFIG, {"q.lora_a": draw(3), "q.lora_b": draw(3)}, "mlx-lm's factors are matrices"),
    "something else": (CONFIG, MLX | {"norm.weight": draw(3)}, "neither factors nor"),
}  # fmt: skip


@pytest.mark.parametrize(("config", "tensors", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_told_is_refused(config: Any, tensors: Any, message: str, tmp_path: Path) -> None:
    path = folder(tmp_path, config, tensors)
    for face in (load, inspect, read_peft):
        with pytest.raises(lora.CheckpointError, match=message):
            face(path)
