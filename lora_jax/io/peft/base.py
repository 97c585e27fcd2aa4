"""The base that a PEFT adapter was saved with: samples of its values in the file's metadata, which PEFT ignores."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from lora_jax.adapter.base import spell
from lora_jax.adapter.samples import Matrix, sampled, sampled_matrices
from lora_jax.adapter.site import Site
from lora_jax.errors import CheckpointError
from lora_jax.io.names.names import Target
from lora_jax.paths import is_array

BASE = "lora_jax.base"
"""The key of a safetensors file's metadata under which they are."""
_TORCH = "torch "
"""Before names of PyTorch's weights; other keys are paths of JAX's parameters."""
_MODULES = 16
"""How many of PyTorch's weights are sampled: another base differs in all."""

_Item = TypeVar("_Item")


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


def modules_of(
    targets: Mapping[str, Sequence[Target]], sites: Mapping[str, Site], leaves: Mapping[str, Any]
) -> dict[str, float]:
    """Samples of some of the base's weights as PyTorch has them, by which a checkpoint on disk can be told.

    Left out are weights that differ in more than the order of their axes: parts of modules, rotated and scaled ones.

    Args:
      targets: what PyTorch calls the adapted parameters.
      sites: of these.
      leaves: the base's parameters by path.
    """
    found: dict[str, Matrix] = {}
    for path, target in ((path, each) for path, named in targets.items() for each in named):
        site, part = sites[path], target.part
        whole = (part.start, part.slice.total, part.rotary, part.gain) == (0, site.fan_out, 0, 1.0)
        if site.kind == "dense" and path in leaves and whole and not target.parameter:
            key = f"{_TORCH}{target.name}.weight {site.dtype}[{site.fan_out},{site.fan_in}]"
            found[key] = Matrix(leaves[path], site.out_axes, site.in_axes, target.index)
    return sampled_matrices(_some(found))


def weights_of(weights: Mapping[str, Any]) -> dict[str, float]:
    """The same of a checkpoint's weights, by their names."""
    return sampled(_some({f"{_TORCH}{name} {spell(weight)}": weight for name, weight in weights.items()}))


def _some(found: Mapping[str, _Item]) -> dict[str, _Item]:
    return {key: found[key] for key in sorted(found)[:: max(-(-len(found) // _MODULES), 1)]}


def checkpoint_values(base: Mapping[str, float]) -> dict[str, tuple[str, float]]:
    """The samples of weights as PyTorch has them, by name: dtype and shape, and the value."""
    keys = {key: key.removeprefix(_TORCH).rpartition(" ") for key in base if key.startswith(_TORCH)}
    return {name: (spelled, base[key]) for key, (name, _, spelled) in keys.items()}


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
