"""A model of two blocks with names as PyTorch has them, and its factors under the names that tools give them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

import lora_jax as lora

RANK = 2
SHAPES = {"attn.to_q": (5, 6), "ff.out": (6, 5)}
NAMES = lora.peft.Names(literal=True)
_RANDOM = np.random.default_rng(0)


def draw(*shape: int) -> np.ndarray:
    return _RANDOM.standard_normal(shape).astype(np.float32)


WEIGHTS = {f"blocks.{i}.{name}": draw(*shape) for i in (0, 1) for name, shape in SHAPES.items()}
FACTORS = {name: (draw(RANK, weight.shape[1]), draw(len(weight), RANK)) for name, weight in WEIGHTS.items()}


def model(params: Any, x: Any) -> Any:
    for block in params["blocks"].values():
        x = jnp.tanh(x @ block["attn"]["to_q"]["kernel"]) @ block["ff"]["out"]["kernel"]
    return x


def tree(weights: Mapping[str, np.ndarray]) -> Any:
    """JAX's parameters of PyTorch's weights."""
    params: dict[str, Any] = {}
    for name, weight in weights.items():
        place = params
        for part in name.split("."):
            place = place.setdefault(part, {})
        place["kernel"] = weight.T
    return params


PARAMS = tree(WEIGHTS)
SITES = lora.find_sites(model, PARAMS, jnp.ones((3, 6)))


def factors(
    a: str = "lora_A.weight", b: str = "lora_B.weight", rename: Callable[[str], str] = str
) -> dict[str, np.ndarray]:
    """The factors under the keys that a tool has for them."""
    return {f"{rename(name)}.{key}": FACTORS[name][i] for name in FACTORS for i, key in enumerate((a, b))}


def alphas(alpha: Any, rename: Callable[[str], str] = str) -> dict[str, np.ndarray]:
    """A tensor for the alpha of each module."""
    return {f"{rename(name)}.alpha": np.asarray(alpha) for name in FACTORS}


def written(path: Path, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: np.asarray(value, order="C") for key, value in tensors.items()}, path, metadata=metadata)
    return path


def load(path: Path, **options: Any) -> lora.Adapter:
    return lora.peft.load(path, PARAMS, SITES, NAMES, **options)


def check(adapter: lora.Adapter, scales: Mapping[str, float] | float) -> None:
    """The adapter adds these factors, with a scale for all modules or one for each."""
    each = scales if isinstance(scales, Mapping) else dict.fromkeys(WEIGHTS, scales)
    merged = lora.merge(PARAMS, adapter)
    for name, (a, b) in FACTORS.items():
        found = merged
        for part in name.split("."):
            found = found[part]
        np.testing.assert_allclose(found["kernel"], (WEIGHTS[name] + each[name] * b @ a).T, rtol=1e-5, atol=1e-6)


def base(folder: Path, rename: Callable[[str], str] = str) -> Path:
    """The model as a Hugging Face checkpoint."""
    written(folder / "model.safetensors", {f"{rename(name)}.weight": weight for name, weight in WEIGHTS.items()})
    (folder / "config.json").write_text("{}", encoding="utf-8")
    return folder
