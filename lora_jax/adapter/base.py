"""Whether parameters have the values of the base that an adapter was saved with."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from lora_jax.adapter.adapter import Adapter, scale
from lora_jax.adapter.samples import differ, sampled
from lora_jax.adapter.updates import LowRank, Replace, exact_sum
from lora_jax.errors import CheckpointError, listed


def check_values(where: str, recorded: Mapping[str, float], leaves: Mapping[str, Any], adapter: Adapter) -> None:
    """Refuse parameters whose values are not those recorded; of those without values nothing is known.

    Args:
      where: the adapter's file, for the error.
      recorded: what `sampled` gave for the base that the adapter was saved with, by path.
      leaves: the parameters by path.
      adapter: the adapter.

    Raises:
      CheckpointError: they are another revision of the base, or this adapter is in them already.
    """
    replaced = {path for path, update in adapter.items() if isinstance(update, Replace)}  # Their values do not matter.
    given = sampled({path: leaf for path, leaf in leaves.items() if path in recorded and path not in replaced})
    different = sorted(path for path, value in given.items() if differ(recorded[path], value))
    if not different:
        return
    advice = 'Load it with the parameters it was trained on, or pass base="any" to load it for these all the same.'
    if _is_merged(different, adapter, leaves, recorded):
        raise CheckpointError(
            f"{where} is merged into these parameters already: without it, {listed(different)} would have the values "
            f"that were recorded, and with it its change would count twice. {advice}"
        )
    raise CheckpointError(
        f"{where} belongs to another base of the same shapes: samples of the values differ at {len(different)} of "
        f"{len(given)} parameters: {listed(different)}. {advice}"
    )


def agreed(recorded: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """What several adapters that become one record of their base, all together.

    Args:
      recorded: samples of values by what they are of, for every adapter's file; empty where none were recorded.

    Raises:
      CheckpointError: two adapters have different bases.

    Example:
      >>> agreed({"one": {"w": 1.5}, "other": {}})
      {'w': 1.5}
    """
    found: dict[str, float] = {}
    for where, samples in recorded.items():
        if different := sorted(key for key in samples.keys() & found.keys() if differ(samples[key], found[key])):
            first = next(name for name, each in recorded.items() if different[0] in each)
            raise CheckpointError(
                f"{where} belongs to another base than {first}: samples of the values differ at {listed(different)}. "
                "What they change cannot be added up."
            )
        found |= samples
    return found


def check_choice(base: str) -> None:
    """Refuse a value of `base` that means nothing.

    Raises:
      CheckpointError: it does.
    """
    if base not in ("same", "any"):
        raise CheckpointError(f'base={base!r} must be "same" or "any"')


def spell(leaf: Any) -> str:
    """Dtype and shape of an array.

    Example:
      >>> spell(jnp.ones((4, 3)))
      'float32[4,3]'
    """
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _is_merged(paths: list[str], adapter: Adapter, leaves: Mapping[str, Any], recorded: Mapping[str, float]) -> bool:
    """Whether taking the adapter off these parameters gives what was recorded, up to the rounding of a merge."""
    if not all(isinstance(adapter.get(path), LowRank) for path in paths):
        return False  # Whole tensors and DoRA's gains cannot be taken off.
    without = scale(Adapter({path: adapter[path] for path in paths}), -1.0)
    restored = sampled({path: exact_sum(leaves[path], [without[path]]) for path in paths})
    size = sampled({path: jnp.abs(leaves[path]) for path in paths})
    rounding = {path: 4 * float(jnp.finfo(leaves[path].dtype).eps) for path in paths}
    return all(abs(restored[path] - recorded[path]) <= rounding[path] * size[path] for path in paths)
