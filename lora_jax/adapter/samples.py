"""Samples of a base's values: what tells it from another base of the same shapes, for a few hundred numbers each."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from lora_jax.adapter.factors import is_traced
from lora_jax.paths import is_array

COUNT = 256
"""How many of a parameter's values are looked at."""
_GOLDEN, _ROOT = 0.6180339887498949, 0.4142135623730951
_SIGNIFICANT = 9
"""Digits that are kept: values are compared in float64, whatever the order of a sum."""


def sampled(leaves: Mapping[str, Any]) -> dict[str, float]:
    """A weighted sum of up to `COUNT` values of every parameter, spread evenly over it, in float64.

    It does not depend on how a parameter is placed, nor on its dtype as long as that holds the same values. Left out
    are parameters without values (abstract or traced) and those that are no numbers. Of parameters spread over several
    processes every process must ask, and for the same.

    Example:
      >>> sampled({"w": np.ones((2, 2), np.float32)}) == sampled({"w": jax.numpy.ones((2, 2), "bfloat16")})
      True
      >>> sampled({"w": np.arange(4.0)}) == sampled({"w": np.arange(4.0)[::-1]})
      False
    """
    known = {path: leaf for path, leaf in leaves.items() if _has_numbers(leaf)}
    parts = {path: _parts(leaf) for path, leaf in known.items()}  # All are asked for before the first is waited for.
    sums = np.array([_sum(leaf.size, parts[path]) for path, leaf in known.items()], np.float64)
    spread = np.array([not _is_whole(leaf) for leaf in known.values()], bool)
    if spread.any():
        sums[spread] = _over_processes(sums[spread])
    return {path: float(f"{value:.{_SIGNIFICANT}g}") for path, value in zip(known, sums, strict=True)}


def differ(one: float, other: float) -> bool:
    """Whether two sums are of different values."""
    return abs(one - other) > 10.0 ** (2 - _SIGNIFICANT) * max(abs(one), abs(other))


def _has_numbers(leaf: Any) -> bool:
    if not is_array(leaf) or is_traced(leaf) or not isinstance(leaf, (jax.Array, np.ndarray)) or not leaf.size:
        return False
    return not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _is_whole(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray) or leaf.is_fully_addressable


def _positions(size: int) -> np.ndarray:
    """Flat positions, spread evenly and never in step with an axis; all of them where there are few."""
    if size <= COUNT:
        return np.arange(size)
    return np.unique((np.modf((np.arange(COUNT) + 0.5) * _GOLDEN)[0] * size).astype(np.int64))


def _parts(leaf: Any) -> list[tuple[np.ndarray, Any]]:
    """Which of the positions lie in every piece that this process has, and the values there; no value is in two."""
    flat = _positions(leaf.size)
    positions = np.array(np.unravel_index(flat, leaf.shape) if leaf.ndim else [], np.int64).reshape(
        leaf.ndim, len(flat)
    )
    if isinstance(leaf, np.ndarray):
        return [(np.ones(positions.shape[1], bool), leaf[tuple(positions)])]
    pieces = {str(shard.index): shard for shard in leaf.addressable_shards if _is_whole(leaf) or shard.replica_id == 0}
    return [_part(shard, leaf.shape, positions) for shard in pieces.values()]


def _part(shard: Any, shape: tuple[int, ...], positions: np.ndarray) -> tuple[np.ndarray, Any]:
    bounds = np.array([axis.indices(size)[:2] for axis, size in zip(shard.index, shape, strict=True)], np.int64)
    starts, stops = bounds.reshape(-1, 2).T[..., None]
    inside = ((positions >= starts) & (positions < stops)).all(0)
    # All positions of a piece are read, so that its program depends on nothing but the piece's shape.
    local = tuple(np.clip(positions - starts, 0, stops - starts - 1))
    on_host = next(iter(shard.data.devices())).platform == "cpu"
    return inside, np.asarray(shard.data)[local] if on_host else shard.data[local]


def _sum(size: int, parts: list[tuple[np.ndarray, Any]]) -> float:
    weights = 1.0 + np.modf(_positions(size) * _ROOT)[0]
    return float(sum(np.dot(weights[inside], _plain(values)[inside]) for inside, values in parts))


def _plain(values: Any) -> np.ndarray:
    """In float64, with numbers for what is none: they are to be compared, not computed with."""
    numbers = np.atleast_1d(np.asarray(values))
    if np.iscomplexobj(numbers):
        return _plain(np.real(numbers)) + np.e * _plain(np.imag(numbers))
    return np.nan_to_num(numbers.astype(np.float64), nan=2.0, posinf=3.0, neginf=5.0)


def _over_processes(sums: np.ndarray) -> np.ndarray:
    """The sums of all processes, added; as bits, because JAX would make them float32."""
    gathered = np.asarray(multihost_utils.process_allgather(sums.view(np.uint32)))
    return gathered.reshape(-1, 2 * len(sums)).view(np.float64).sum(0)
