"""mlx-lm's adapters, `adapters.safetensors` and its own `adapter_config.json`, as PEFT's keys and a scale for each."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from lora_jax.errors import CheckpointError, listed
from lora_jax.io.formats.spellings import TABLES

_FIELDS = ("fine_tune_type", "lora_parameters", "lora_layers")
_PARTS = ("lora_a", "lora_b", "m")


class MlxAdapter(NamedTuple):
    """Tensors under PEFT's keys, the scale of each module (none without a config), and fields for PEFT's config."""

    arrays: dict[str, np.ndarray]
    scales: dict[str, float]
    fields: dict[str, Any]


def is_mlx_config(where: str, config: Mapping[str, Any] | None) -> bool:
    """Whether a config is mlx-lm's, which has the name of PEFT's.

    Raises:
      CheckpointError: it is one of a model that was trained in full.

    Example:
      >>> is_mlx_config("x", {"lora_parameters": {"rank": 8}}), is_mlx_config("x", {"peft_type": "LORA"})
      (True, False)
    """
    if config is None or "peft_type" in config or not any(field in config for field in _FIELDS):
        return False
    if config.get("fine_tune_type") == "full":
        raise CheckpointError(
            f"{where} is a model that mlx-lm fine-tuned in full, and no adapter. mlx_lm.fuse writes it as a model; "
            "lora-jax extract makes an adapter of what it differs by."
        )
    return True


def is_mlx(where: str, config: Mapping[str, Any] | None, keys: Iterable[str]) -> bool:
    """Whether a file is mlx-lm's by its keys, and its config, if there is one, too.

    Raises:
      CheckpointError: one of the two is mlx-lm's and the other is not.

    Example:
      >>> is_mlx("x", {"fine_tune_type": "lora"}, ["q.lora_a", "q.lora_b"]), is_mlx("x", None, ["q.lora_A.weight"])
      (True, False)
    """
    configured, found = is_mlx_config(where, config), any(key.endswith((".lora_a", ".lora_b")) for key in keys)
    if config is not None and configured != found:
        one, other = ("config is", "tensors are") if configured else ("tensors are", "config is")
        raise CheckpointError(
            f"{where}: its {one} mlx-lm's, and its {other} not. One of the two files belongs to another adapter."
        )
    return found


def from_mlx(where: str, config: Mapping[str, Any] | None, arrays: Mapping[str, np.ndarray]) -> MlxAdapter:
    """Lay mlx-lm's factors out as PEFT's: `x·lora_a·lora_b·scale` is what `scale·B·A` adds.

    Args:
      where: the file, for error messages.
      config: its `adapter_config.json`, or None.
      arrays: tensors by key: `lora_a` `[in, rank]`, `lora_b` `[rank, out]`, `m` of DoRA.

    Raises:
      CheckpointError: it holds what is no LoRA of a matrix, or its config means nothing or two things.

    Example:
      >>> tensors = {"q.lora_a": np.ones((4, 2)), "q.lora_b": np.ones((2, 3))}
      >>> found = from_mlx("x", {"lora_parameters": {"rank": 2, "scale": 20.0}}, tensors)
      >>> found.arrays["q.lora_A.weight"].shape, found.scales
      ((2, 4), {'q': 20.0})
    """
    found: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for key, array in arrays.items():
        module, _, part = key.rpartition(".")
        if part not in _PARTS or not module:
            found[key] = array
        elif part == "m":
            found[f"{module}.lora_magnitude_vector"] = _magnitude(where, module, array)
        else:
            found[_key(module, part)] = _matrix(where, key, array).T
            ranks[module] = array.shape[1 if part == "lora_a" else 0]
    own = (config or {}).get("lora_parameters")
    if config is not None and not isinstance(own, Mapping):
        raise CheckpointError(f"{where}: lora_parameters={own!r} in its config must be an object with rank and scale")
    given = own or {}
    scales = {name: _scale(where, name, given, rank) for name, rank in ranks.items()} if config is not None else {}
    dora = any(key.endswith(".lora_magnitude_vector") for key in found)
    return MlxAdapter(found, scales, {"lora_dropout": _number(where, given, "dropout", 0.0), "use_dora": dora})


def _key(module: str, part: str) -> str:
    name = part[-1].upper()
    table = module.rpartition(".")[2] in TABLES
    return f"{module}.lora_embedding_{name}" if table else f"{module}.lora_{name}.weight"


def _matrix(where: str, key: str, array: np.ndarray) -> np.ndarray:
    if array.ndim == 3:
        raise CheckpointError(
            f"{where}: {key} of shape {array.shape} is a stack for the experts of mlx-lm's own switch layers, whose "
            "names and layout other models do not have. Adapt other modules, or merge it in mlx-lm (mlx_lm.fuse)."
        )
    if array.ndim != 2:
        raise CheckpointError(f"{where}: {key} has shape {array.shape}, and mlx-lm's factors are matrices")
    return array


def _magnitude(where: str, module: str, array: np.ndarray) -> np.ndarray:
    if module.rpartition(".")[2] in TABLES:
        raise CheckpointError(
            f"{where}: {module} is a table with DoRA, which mlx-lm normalises by row and PEFT by column. Merge it in "
            "mlx-lm (mlx_lm.fuse)."
        )
    return array


def _scale(where: str, module: str, given: Mapping[str, Any], rank: int) -> float:
    """What mlx-lm multiplies by; it once multiplied by alpha over the rank too."""
    wanted, scale = given.get("rank"), _number(where, given, "scale", None)
    alpha = _number(where, given, "alpha", rank)
    if wanted is not None and wanted != rank:
        raise CheckpointError(f"{where}: {module} has rank {rank}, but its config says {wanted!r}")
    if alpha != rank:
        raise CheckpointError(
            f"{where}: lora_parameters have scale={scale:g} and alpha={alpha:g}, and which of them counts depends on "
            f"the version of mlx-lm: first it multiplied by scale·alpha/rank, {scale * alpha / rank:g}, later by the "
            f"scale alone, {scale:g}. Find out which, write that as the scale, and remove alpha."
        )
    return scale


def _number(where: str, given: Mapping[str, Any], field: str, default: float | None) -> float:
    value = given.get(field, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        known = listed(sorted(given)) or "nothing"
        raise CheckpointError(f"{where}: {field}={value!r} in lora_parameters must be a number; they have {known}")
    return float(value)
