"""The base that a PEFT adapter was saved with: samples of its values in the file's metadata, which PEFT ignores."""

import json
import math
from collections.abc import Mapping
from typing import Any

from lora_jax.adapter.base import spell
from lora_jax.errors import CheckpointError
from lora_jax.paths import is_array

BASE = "lora_jax.base"
"""The key of a safetensors file's metadata under which they are."""


def base_of(leaves: Mapping[str, Any], values: Mapping[str, float]) -> dict[str, float]:
    """What a file records of a base.

    Args:
      leaves: its parameters, or their shapes and dtypes, by path.
      values: samples of those that have some.

    Example:
      >>> import jax.numpy as jnp
      >>> base_of({"kernel": jnp.ones((4, 3))}, {"kernel": 14.5})
      {'kernel float32[4,3]': 14.5}
    """
    return {f"{path} {spell(leaves[path])}": value for path, value in sorted(values.items()) if path in leaves}


def base_in(where: str, metadata: Mapping[str, str]) -> dict[str, float]:
    """What the metadata of a file record; empty if they do not.

    Raises:
      CheckpointError: that is damaged.
    """
    try:
        found = json.loads(metadata.get(BASE, "{}"))
        if isinstance(found, dict) and all(isinstance(v, (int, float)) and math.isfinite(v) for v in found.values()):
            return found
    except (ValueError, RecursionError):
        pass
    raise CheckpointError(f"{where}: {BASE} in its metadata is no JSON object of numbers. Copy the file again.")


def recorded_for(base: Mapping[str, float], leaves: Mapping[str, Any]) -> dict[str, float]:
    """What is recorded of parameters that have the path, the shape and the dtype they had then."""
    arrays = {path: leaf for path, leaf in leaves.items() if is_array(leaf)}
    keys = {path: f"{path} {spell(leaf)}" for path, leaf in arrays.items()}
    return {path: base[key] for path, key in keys.items() if key in base}
