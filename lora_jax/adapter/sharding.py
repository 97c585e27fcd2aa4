"""adapter_sharding: factors laid out over a mesh beside the parameters they adapt."""

from collections.abc import Collection, Mapping
from math import prod
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from lora_jax.adapter.adapter import Adapter
from lora_jax.adapter.by_path import check_parameters
from lora_jax.adapter.updates import Replace, Update
from lora_jax.errors import ParameterError, listed
from lora_jax.paths import named_leaves


def adapter_sharding(adapter: Adapter, params: Any, *, axes: Collection[str] | None = None) -> Adapter:
    """Derive where an adapter's arrays go from where the parameters are.

    A follows the input axes of its parameter and B the output axes; both, and the scale, follow its stacked
    axes (layers, experts); the rank axis is replicated. So the thin products need no more communication
    than the base's own, and the gradients and the optimizer's state are spread in the same way. What is
    trained in full goes where its parameter is.

    Along mesh axes that parameters are gathered over before each use (`fsdp`), following them makes a gather of every
    factor too, though factors are small. Name the other axes (`axes=("tensor",)`), and factors are whole along those
    that you leave out: more bytes on each device, fewer collectives. `docs/scale.md` has figures of both.

    Args:
      adapter: the adapter, or the tree of `jax.ShapeDtypeStruct` that `jax.eval_shape` makes of `init`.
      params: the parameters: arrays, or `jax.ShapeDtypeStruct` with shardings.
      axes: names of the mesh axes that factors may be spread over; None for all. What is trained in full follows its
        parameter along all of them.

    Returns:
      An `Adapter` with a sharding for every array: `out_shardings` for `jax.jit` of `init`, a target for
      `jax.device_put`.

    Raises:
      ParameterError: an adapted parameter is missing, shaped differently, or on no known device; or its mesh has none
        of `axes`.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> from lora_jax.adapter.sharding import adapter_sharding
      >>> mesh = jax.make_mesh((1,), ("model",))
      >>> params = {"w": jax.device_put(jnp.ones((4, 3)), NamedSharding(mesh, P(None, "model")))}
      >>> sites = lora.find_sites(lambda params, x: x @ params["w"], params, jnp.ones((2, 4)))
      >>> start = lambda key: lora.init(key, lora.LoraConfig(rank=2, targets="w"), params, sites)
      >>> places = adapter_sharding(jax.eval_shape(start, jax.random.key(0)), params)
      >>> adapter = jax.jit(start, out_shardings=places)(jax.random.key(0))
      >>> adapter["w"].a.sharding.spec, adapter["w"].b.sharding.spec
      (P(None, None), P(None, 'model'))
    """
    leaves, _ = named_leaves(params)
    check_parameters(adapter, leaves)
    placed = {path: _shardings(update, leaves, axes) for path, update in adapter.items()}
    return Adapter(placed, None if adapter.checksum is None else checksum_place(placed))


def checksum_place(places: Any) -> Any:
    """Where the checksum of an adapter goes whose arrays have these shardings: with them, a copy on every device."""
    own = getattr(places, "checksum", None)
    first = next(iter(jax.tree.leaves(places)), None)
    return own if own is not None else _follow(first, ()) if isinstance(first, Sharding) else None


def _shardings(update: Update, leaves: Mapping[str, Any], only: Collection[str] | None) -> Any:
    path = update.site.path
    base = getattr(leaves[path], "sharding", None)
    if not isinstance(base, (NamedSharding, SingleDeviceSharding)):
        where = "no sharding" if base is None else f"a {type(base).__name__}"
        raise ParameterError(
            f"{path!r} has {where}, so there is nothing that its factors could follow. Put the parameters on devices "
            "first: jax.device_put(params, ...) with a jax.sharding.NamedSharding for each of them."
        )
    if only is not None and isinstance(base, NamedSharding) and not isinstance(update, Replace):
        base = _along(path, base, only)
    return jax.tree.map(lambda axes: _follow(base, axes), update.axes(), is_leaf=lambda axes: isinstance(axes, tuple))


def _along(path: str, base: NamedSharding, only: Collection[str]) -> NamedSharding:
    """The sharding along some axes of its mesh."""
    if isinstance(only, str) or not {*only} <= {*base.mesh.axis_names}:
        raise ParameterError(
            f"axes={only!r}: the mesh of {path!r} has {listed(base.mesh.axis_names)}; name some of these"
        )
    kept = [tuple(name for name in mesh_axes(entry) if name in only) for entry in base.spec]
    spec = [None if not each else each[0] if len(each) == 1 else each for each in kept]
    return NamedSharding(base.mesh, PartitionSpec(*spec))


def mesh_axes(entry: Any) -> tuple[str, ...]:
    """The mesh axes of an entry of a partition spec.

    Example:
      >>> mesh_axes(None), mesh_axes("fsdp"), mesh_axes(("data", "fsdp"))
      ((), ('fsdp',), ('data', 'fsdp'))
    """
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def shards(mesh: Any, entry: Any) -> int:
    """Into how many shards a mesh splits an axis with this entry of a partition spec."""
    return prod(mesh.shape[name] for name in mesh_axes(entry))


def _follow(base: Sharding, axes: tuple[int | None, ...]) -> Sharding:
    if not isinstance(base, NamedSharding):
        return base
    spec = dict(enumerate(base.spec))
    return NamedSharding(base.mesh, PartitionSpec(*[spec.get(axis) if axis is not None else None for axis in axes]))
