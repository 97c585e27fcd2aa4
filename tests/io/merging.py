"""Small checkpoints and adapters on disk, for tests that merge them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from lora_jax.io.peft import Module, PeftFiles, write_peft


def write_base(path: Path, state: Mapping[str, Any], shards: int = 1, config: Mapping[str, Any] | None = None) -> Path:
    """A checkpoint directory with other files beside it."""
    path.mkdir()
    state = {name: np.array(value, order="C") for name, value in state.items()}
    (path / "config.json").write_text(json.dumps(config or {"model_type": "test"}))
    (path / "tokenizer.json").write_text("{}")
    (path / "pytorch_model.bin").write_bytes(b"the same weights")
    if shards == 1:
        save_file(state, path / "model.safetensors", {"format": "pt"})
        return path
    files = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(sorted(state))}
    for file in set(files.values()):
        save_file({name: state[name] for name in state if files[name] == file}, path / file, {"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"x": 1}, "weight_map": files}))
    return path


def read_all(path: Path) -> dict[str, np.ndarray]:
    return {name: value for file in path.glob("*.safetensors") for name, value in load_file(file).items()}


def write_adapter(path: Path, modules: Mapping[str, Module], saved: Mapping[str, Any] = {}, **config: Any) -> Path:
    rank = next((module.a.shape[0] for module in modules.values()), 2)
    given = {"r": rank, "lora_alpha": 2 * rank, "target_modules": sorted(modules), **config}
    write_peft(path, PeftFiles(given, modules, saved))
    return path


def factors(out: int, into: int, rank: int = 2, seed: int = 0, kind: Any = "linear") -> Module:
    draw = np.random.default_rng(seed)
    a, b = draw.normal(size=(rank, into)), draw.normal(size=(out, rank))
    return Module(kind, a.astype(np.float32), b.astype(np.float32))


def state(*shapes: tuple[str, tuple[int, ...]], dtype: Any = np.float32) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(7)
    return {name: draw.normal(size=shape).astype(dtype) for name, shape in shapes}
