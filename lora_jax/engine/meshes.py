"""Sharding: where the arrays of low-rank products go on a mesh, so that sharded programs stay as they are.

On automatic mesh axes the compiler places every array, and all there is to do is not to stand in its way: no
axes are merged. On explicit axes the placement is part of an array's type, and a product has to say where it goes.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lora_jax.adapter.sharding import mesh_axes
from lora_jax.engine.bases import View


class NamedAxes(Protocol):
    """An array whose axes have ids."""

    @property
    def array(self) -> Any:
        """The array."""
        ...

    @property
    def axes(self) -> Sequence[int]:
        """Ids of its axes."""
        ...


def typeof(array: Any) -> Any:
    """The type of an array, or of the numbers of a quantised one."""
    return array.aval if isinstance(array, View) else jax.typeof(array)


def spread(*arrays: Any) -> bool:
    """Whether an array may be spread over devices in a way that merging its axes would disturb."""
    meshes = [typeof(array).sharding.mesh for array in arrays]
    return any(mesh.size > 1 and any(kind is not AxisType.Manual for kind in mesh.axis_types) for mesh in meshes)


def explicit(array: Any) -> NamedSharding | None:
    """The sharding of an array that lives on a mesh with explicit axes."""
    sharding = typeof(array).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def placed(axes: Sequence[int], *owners: NamedAxes) -> NamedSharding | None:
    """Where an array with these axes goes on an explicit mesh: each axis stays where its owner has it.

    Args:
      axes: ids of the axes of the array to place.
      owners: arrays that have these axes; the first one that spreads an axis over the mesh decides on it. An axis
        that none of them spreads is replicated, and so is one whose mesh axes are taken by an axis before it.

    Returns:
      None where no owner lives on a mesh with explicit axes.
    """
    meshes = [sharding.mesh for owner in owners if (sharding := explicit(owner.array))]
    return NamedSharding(meshes[0], _spec(axes, owners)) if meshes else None


def _spec(axes: Sequence[int], owners: Sequence[NamedAxes]) -> PartitionSpec:
    known: dict[int, Any] = {}
    for owner in owners:
        entries = zip(owner.axes, typeof(owner.array).sharding.spec.partitions, strict=True)
        known = {**{axis: entry for axis, entry in entries if entry is not None}, **known}
    spec, taken = [], set()
    for axis in axes:
        entry = known.get(axis)
        names = {*mesh_axes(entry)}
        spec.append(None if names & taken else entry)
        taken |= names
    return PartitionSpec(*spec)


def follow(array: Any, axes: Sequence[int], base: NamedAxes) -> Any:
    """The array with its axes where `base` has them, and on the same kind of mesh, if explicit axes are involved."""
    here, mesh = typeof(array).sharding, typeof(base.array).sharding.mesh
    there = NamedSharding(mesh, _spec(axes, [base]))
    kinds = {*here.mesh.axis_types, *mesh.axis_types}
    return array if AxisType.Explicit not in kinds or here == there else jax.sharding.reshard(array, there)


def here(array: Any) -> Any:
    """The array, replicated, on the mesh of this point of a program, if that is another kind of mesh."""
    mesh, own = jax.sharding.get_abstract_mesh(), typeof(array).sharding.mesh
    if mesh.empty or own.empty or mesh.axis_types == own.axis_types:
        return array
    return jax.sharding.reshard(array, NamedSharding(mesh, PartitionSpec(*[None] * array.ndim)))


def constrained(array: Any, where: Any) -> Any:
    """The array placed as a program asks for at this point; anything but a sharding asks for nothing."""
    if not isinstance(where, jax.sharding.Sharding):
        return array
    if AxisType.Explicit in typeof(array).sharding.mesh.axis_types:
        return jax.sharding.reshard(array, where)
    return jax.lax.with_sharding_constraint(array, where)


def unreduced(where: NamedSharding | None) -> bool:
    """Whether a product is asked to leave its partial sums on the devices."""
    return where is not None and bool(where.spec.unreduced)


def varying(array: Any) -> list[str]:
    """The mesh axes of a `shard_map` along which an array is known to differ."""
    return sorted(typeof(array).manual_axis_type.varying)


def mesh_of(eqn: Any) -> AbstractContextManager[Any]:
    """Enter the mesh an equation was written for: in a mesh, `jax.sharding.auto_axes` gives its body another."""
    avals = [var.aval for var in eqn.outvars if hasattr(var.aval, "sharding")]
    mesh = next((aval.sharding.mesh for aval in avals if not aval.sharding.mesh.empty), None)
    here = jax.sharding.get_abstract_mesh()
    if mesh is None or here.empty or here == mesh:
        return nullcontext()
    return jax.sharding.use_abstract_mesh(mesh)
