"""Which base an adapter belongs to: what a checkpoint records of one, and whether another is it."""

from collections.abc import Mapping
from hashlib import sha256
from json import dumps
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapter.base import spell
from lora_jax.adapter.samples import sampled
from lora_jax.errors import CheckpointError
from lora_jax.paths import is_array, named_leaves

_SHOWN = 5


def describe_base(params: Any) -> dict[str, Any]:
    """What the notes of a checkpoint say of a base, as JSON can hold it.

    Shapes and dtypes of all parameters, and samples of the values of those that have some; of None nothing is said.
    """
    if params is None:
        return {"base": None}
    leaves, _ = named_leaves(params)
    return describe_recorded(leaves, sampled(leaves))


def describe_recorded(leaves: Mapping[str, Any] | None, values: Mapping[str, float]) -> dict[str, Any]:
    """The same of a base that is not at hand.

    Args:
      leaves: shapes and dtypes of all parameters by path, or None where only those of adapted ones are known.
      values: samples of values that another file has recorded, by path.
    """
    if leaves is None:
        return {"base": None, "values": dict(values)}
    shapes = _fingerprint(leaves)
    return {"base": {"sha256": _digest(shapes), "parameters": shapes, "values": dict(values)}}


def check_shapes(where: str, notes: Mapping[str, Any], params: Any) -> None:
    """Refuse parameters of other paths, shapes or dtypes than those recorded.

    Raises:
      CheckpointError: a parameter is missing, new, or has another shape or dtype.
    """
    given, base = _fingerprint(named_leaves(params)[0]), notes["base"]
    if base is not None and base["sha256"] == _digest(given):
        return
    expected = base["parameters"] if base is not None else _adapted(notes)
    known = set(expected) | (set(given) if base is not None else set())
    different = [path for path in sorted(known) if expected.get(path) != given.get(path)]
    if different:
        shown = "; ".join(_difference(path, expected.get(path), given.get(path)) for path in different[:_SHOWN])
        more = f"; and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
        raise CheckpointError(
            f"{where} belongs to another base: {len(different)} of {len(known)} parameters differ: {shown}{more}.\n"
            "Load it with the parameters it was trained on, or leave params out to load it without this check."
        )


def recorded_values(notes: Mapping[str, Any]) -> dict[str, float]:
    """Samples of the base's values by path; empty where none were recorded."""
    return (notes if notes["base"] is None else notes["base"]).get("values", {})


def base_shapes(notes: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct] | None:
    """The base's parameters by path, or None if they were not recorded."""
    base = notes["base"]
    return None if base is None else {path: unspelled(text) for path, text in base["parameters"].items()}


def adapted_shapes(notes: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """The adapted parameters by path."""
    return {path: unspelled(text) for path, text in _adapted(notes).items()}


def unspelled(text: str) -> jax.ShapeDtypeStruct:
    """Inverse of `spell`."""
    dtype, _, sizes = text.removesuffix("]").partition("[")
    return jax.ShapeDtypeStruct(tuple(int(size) for size in sizes.split(",") if size), jnp.dtype(dtype))


def _difference(path: str, expected: str | None, given: str | None) -> str:
    if given is None:
        return f"{path} ({expected}) is missing"
    return f"{path} ({given}) is new" if expected is None else f"{path} is {given}, not {expected}"


def _adapted(notes: Mapping[str, Any]) -> dict[str, str]:
    sites = {path: entry["site"] for path, entry in notes["updates"].items()}
    return {path: spell(jax.ShapeDtypeStruct(site["shape"], site["dtype"])) for path, site in sites.items()}


def _fingerprint(leaves: Mapping[str, Any]) -> dict[str, str]:
    return {path: spell(leaf) for path, leaf in sorted(leaves.items()) if is_array(leaf)}


def _digest(shapes: Mapping[str, str]) -> str:
    return sha256(dumps(shapes, sort_keys=True).encode()).hexdigest()
