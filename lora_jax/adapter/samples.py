"""Samples of a base's values: what tells it from another base of the same shapes, for a few hundred numbers each."""

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

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
    return _sums({path: (leaf, _all_of(leaf.shape)) for path, leaf in known.items()})


class Matrix(NamedTuple):
    """A matrix of outputs and inputs, and where in an array its elements are.

    Attributes:
      leaf: the array.
      out_axes, in_axes: its axes that are the outputs and the inputs, in their order.
      place: positions along its other axes, in order.
    """

    leaf: Any
    out_axes: tuple[int, ...]
    in_axes: tuple[int, ...]
    place: tuple[int, ...] = ()


def sampled_matrices(matrices: Mapping[str, Matrix]) -> dict[str, float]:
    """What `sampled` gives for arrays `[out, in]` of the same values.

    Example:
      >>> kernel = np.arange(6.0).reshape(2, 3)
      >>> sampled_matrices({"w": Matrix(kernel, (1,), (0,))}) == sampled({"w": kernel.T})
      True
    """
    known = {name: each for name, each in matrices.items() if _has_numbers(each.leaf)}
    return _sums({name: (each.leaf, _of_matrix(each)) for name, each in known.items()})


class _Spots(NamedTuple):
    """Where to look: numbers of the elements, which weigh them, and `[axes, elements]` where they are."""

    numbers: np.ndarray
    positions: np.ndarray


def _all_of(shape: tuple[int, ...]) -> _Spots:
    numbers = _positions(prod(shape))
    return _Spots(numbers, _unraveled(numbers, shape))


def _of_matrix(matrix: Matrix) -> _Spots:
    shape = matrix.leaf.shape
    outs, ins = (tuple(shape[axis] for axis in axes) for axes in (matrix.out_axes, matrix.in_axes))
    numbers = _positions(prod(outs) * prod(ins))
    positions = np.empty((len(shape), len(numbers)), np.int64)
    others = [axis for axis in range(len(shape)) if axis not in (*matrix.out_axes, *matrix.in_axes)]
    positions[others] = np.array(matrix.place, np.int64)[:, None]
    positions[list(matrix.out_axes)] = _unraveled(numbers // prod(ins), outs)
    positions[list(matrix.in_axes)] = _unraveled(numbers % prod(ins), ins)
    return _Spots(numbers, positions)


def _unraveled(numbers: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    found = np.unravel_index(numbers, shape) if shape else []
    return np.array(found, np.int64).reshape(len(shape), len(numbers))


def _sums(spots: Mapping[str, tuple[Any, _Spots]]) -> dict[str, float]:
    """The weighted sum of every array's elements at its spots."""
    # All are asked for before the first is waited for.
    parts = {name: _parts(leaf, where.positions) for name, (leaf, where) in spots.items()}
    sums = np.array([_sum(where.numbers, parts[name]) for name, (_, where) in spots.items()], np.float64)
    spread = np.array([not _is_whole(leaf) for leaf, _ in spots.values()], bool)
    if spread.any():
        sums[spread] = _over_processes(sums[spread])
    return {name: float(f"{value:.{_SIGNIFICANT}g}") for name, value in zip(spots, sums, strict=True)}


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


def _parts(leaf: Any, positions: np.ndarray) -> list[tuple[np.ndarray, Any]]:
    """Which of the positions lie in every piece that this process has, and the values there; no value is in two."""
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


def _sum(numbers: np.ndarray, parts: list[tuple[np.ndarray, Any]]) -> float:
    weights = 1.0 + np.modf(numbers * _ROOT)[0]
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
