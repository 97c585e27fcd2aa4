"""Devices: a mesh out of `data=2,fsdp=4,tensor=2`, batches over it, and several processes that train one adapter."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lora_jax.errors import LoraError

AXES = ("data", "fsdp", "tensor")
"""Over `data` and `fsdp` go the rows of a batch, over `fsdp` and `tensor` the base."""
_ROWS = ("data", "fsdp")


class MeshError(LoraError, ValueError):
    """A mesh that means nothing, or for which there are not as many devices."""


def sizes_of(text: str) -> dict[str, int]:
    """The sizes of a mesh by the names of its axes, all of `AXES`.

    Raises:
      MeshError: an axis is unknown or has no size.

    Example:
      >>> sizes_of("data=2,tensor=4")
      {'data': 2, 'fsdp': 1, 'tensor': 4}
    """
    sizes: dict[str, int] = dict.fromkeys(AXES, 1)
    for each in text.split(","):
        name, _, size = each.strip().partition("=")
        if name not in sizes or not size.isdecimal() or int(size) < 1:
            raise MeshError(f"--mesh {text}: {each!r} is none of {', '.join(f'{axis}=NUMBER' for axis in AXES)}")
        sizes[name] = int(size)
    return sizes


def mesh_of(text: str) -> Mesh:
    """A mesh of all devices.

    Raises:
      MeshError: it means nothing, or has another number of devices than there are.

    Example:
      >>> mesh_of(f"data={jax.device_count()}").axis_names
      ('data', 'fsdp', 'tensor')
    """
    sizes = sizes_of(text)
    if (wanted := int(np.prod(list(sizes.values())))) != jax.device_count():
        raise MeshError(
            f"--mesh {text} is for {wanted} devices, and there are {jax.device_count()}: sizes multiply to that number"
        )
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def join(environment: Mapping[str, str] = os.environ) -> None:
    """Join the other processes, if the environment names a coordinator as `jax.distributed` reads it."""
    if environment.get("JAX_COORDINATOR_ADDRESS") and not jax.distributed.is_initialized():
        jax.distributed.initialize(
            environment["JAX_COORDINATOR_ADDRESS"],
            int(environment.get("JAX_NUM_PROCESSES", "1")),
            int(environment.get("JAX_PROCESS_ID", "0")),
        )


def spread(batch: Any, mesh: Mesh | None) -> Any:
    """Put a batch on the devices: its second axis, the rows, over `data` and `fsdp`.

    Every process has the whole batch, as a batch is a function of the seed and the step, and puts its own part.
    """
    if mesh is None:
        return batch
    place = NamedSharding(mesh, PartitionSpec(None, _ROWS))
    return jax.tree.map(lambda leaf: _placed(np.asarray(leaf), place), batch)


def like(tree: Any, places: Any) -> Any:
    """Put arrays, which every process has in full, where those of another tree are.

    >>> like({"a": np.ones(2)}, {"a": jax.numpy.zeros(2)})["a"].tolist()
    [1.0, 1.0]
    """

    def put(leaf: Any, other: jax.Array) -> jax.Array:
        return _placed(np.asarray(leaf), other.sharding) if isinstance(other.sharding, NamedSharding) else leaf

    return jax.tree.map(put, tree, places)


def everywhere(tree: Any, mesh: Mesh | None) -> Any:
    """A tree whose leaves that are on one device only, such as counts, have a copy on every device of the mesh."""
    if mesh is None:
        return tree
    place = NamedSharding(mesh, PartitionSpec())

    def put(leaf: jax.Array) -> jax.Array:
        return leaf if isinstance(leaf.sharding, NamedSharding) else _placed(np.asarray(leaf), place)

    return jax.tree.map(put, tree)


def _placed(array: np.ndarray, place: Any) -> jax.Array:
    return jax.make_array_from_callback(array.shape, place, lambda index: array[index])


def check_rows(rows: int, mesh: Mesh | None) -> None:
    """Refuse a batch whose rows cannot be spread evenly.

    Raises:
      MeshError: they cannot.
    """
    over = 1 if mesh is None else int(np.prod([mesh.shape[axis] for axis in _ROWS]))
    if rows % over:
        raise MeshError(f"--batch {rows} rows cannot be spread over data x fsdp = {over}: take a multiple of {over}")
