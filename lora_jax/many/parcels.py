"""What is sent for one slot of a bank: an adapter's own rows, in parts whose sizes do not depend on its rank."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapter.factors import Array, is_traced
from lora_jax.adapter.updates import LowRank, Update
from lora_jax.engine.meshes import explicit
from lora_jax.errors import ParameterError
from lora_jax.many.slots import Factors, Slots, check_finite, check_fits, factors, finite


class Parcel(NamedTuple):
    """What is written into a slot at one parameter.

    Attributes:
      a, b: parts `[*batch, size, ...]` for each of `sizes`: rows of the adapter, or zeros.
      starts: `[parts]` int32: at which row of the slot each part begins.
      gain: `[*batch, *out]`, or None in a bank without gains.
      broken: float32, NaN for numbers that are not finite, else 0.
    """

    a: Sequence[Any]
    b: Sequence[Any]
    starts: Any
    gain: Any
    broken: Any


def sizes(rank: int) -> list[int]:
    """Sizes of the parts of a slot, of which some add up to any rank that it can hold.

    So one program writes adapters of every rank, and parts without rows need not be sent.

    Example:
      >>> sizes(16), sizes(10)
      ([8, 4, 2, 1, 1], [5, 3, 1, 1])
    """
    found = []
    while rank:
        found.append((rank + 1) // 2)
        rank //= 2
    return found


def starts(rank: int, room: int) -> list[int]:
    """At which row of a slot each part begins: from 0 on those with the rows of an adapter, from `rank` on the zeros.

    Example:
      >>> starts(9, 10), starts(2, 10)
      ([0, 5, 8, 9], [2, 7, 0, 1])
    """
    found, full, free = [], 0, rank
    for size in sizes(room):
        if full + size <= rank:
            found.append(full)
            full += size
        else:
            found.append(free)
            free += size
    return found


def blank(held: Slots) -> Parcel:
    """The parcel of the base, on the device: nothing of it is sent."""
    site, lead = held.site, len(held.site.batch_axes)

    def zeros(array: Array) -> list[Array]:
        shape = array.shape
        return [jnp.zeros((*shape[:lead], size, *shape[lead + 2 :]), array.dtype) for size in sizes(held.rank)]

    gain = None if held.gain is None else jnp.ones((*site.batch_shape, *held.gain.shape[lead + 1 :]), jnp.float32)
    return Parcel(zeros(held.a), zeros(held.b), jnp.asarray(starts(0, held.rank), jnp.int32), gain, jnp.float32(0))


def parcel(held: Slots, update: Update, base: Parcel) -> Parcel:
    """What is sent for an update: its rows and gain in place of those of the base.

    Raises:
      ParameterError: the slot has no room for it, it is no low-rank change, or not finite.
    """
    check_fits(held.site, update.site)
    path, lead = held.site.path, len(held.site.batch_axes)
    found = _factors(path, update)
    if found.gain is not None and held.gain is None:
        raise ParameterError(f"{path} has a gain: make the bank with AdapterBank.empty(..., gains=True)")
    if found.rank > held.rank:
        raise ParameterError(
            f"{path} has rank {found.rank}, the bank has room for {held.rank}: make it with a higher rank, or "
            "compress the adapter with lora.compose"
        )
    with np.errstate(over="ignore"):  # What overflows is refused below.
        a, b = (each.astype(held.a.dtype) for each in (found.a, found.b))
    check_finite(path, (a, b, found.gain))
    whole, broken = finite(Factors(a, b, found.gain, found.rank))
    places = starts(found.rank, held.rank)
    a, b = (_filled(mine, theirs, places, lead) for mine, theirs in ((base.a, whole.a), (base.b, whole.b)))
    return Parcel(a, b, np.asarray(places, np.int32), base.gain if whole.gain is None else whole.gain, broken)


def _filled(base: Sequence[Any], array: Any, places: Sequence[int], axis: int) -> list[Any]:
    """The parts of the base, with the rows of an array for those that begin within it."""
    lead, rank = (slice(None),) * axis, array.shape[axis]
    return [
        array[(*lead, slice(start, start + part.shape[axis]))] if start < rank else part
        for part, start in zip(base, places, strict=True)
    ]


def _factors(path: str, update: Update) -> Factors:
    """The factors of an update, as NumPy's arrays where their values are there, so that nothing is compiled."""
    if any(map(is_traced, jax.tree.leaves(update))):
        return factors(path, update)
    if type(update) is not LowRank or update.a_start is not None:
        found = factors(path, update)
        a, b = np.asarray(found.a), np.asarray(found.b)
        return Factors(a, b, None if found.gain is None else np.asarray(found.gain), found.rank)
    a, b, scale = (np.asarray(each) for each in (update.a, update.b, update.scale))
    wide = b.astype(np.float32) * scale.reshape(scale.shape + (1,) * (b.ndim - scale.ndim))
    return Factors(a, wide.astype(b.dtype), None, update.rank)


def written(held: Slots, slot: Array, new: Parcel, *, sure: bool) -> Slots:
    """The slots with a parcel in one of them, counted from 0.

    Args:
      held: what is written in place.
      slot: which; one that there is not is left alone.
      new: what comes in.
      sure: whether the slot is known to be there, so that what it holds need not be read.
    """
    lead, inside = len(held.site.batch_axes), None if sure else (slot >= 0) & (slot < held.count - 1)
    gain = None if held.gain is None else _put(held.gain, new.gain, {lead: slot}, inside)
    broken = None if held.broken is None else _put(held.broken, new.broken, {0: slot}, inside)
    a, b = held.a, held.b
    for mine, theirs, row in zip(new.a, new.b, new.starts, strict=True):
        place = {lead: slot, lead + 1: row}
        a, b = _put(a, mine, place, inside), _put(b, theirs, place, inside)
    return Slots(a, b, gain, held.site, broken)


def _put(array: Array, new: Any, place: Mapping[int, Any], inside: Array | None) -> Array:
    """An array with a piece of one slot at a place, by axis, of which the first is that of the slots."""
    where: Any = explicit(array)
    if where is None:
        return _updated(array, new, place, inside)
    update: Any = jax.sharding.auto_axes(_updated, out_sharding=where)
    with jax.sharding.use_abstract_mesh(where.mesh):  # How the piece is spread over the mesh is left to the compiler.
        return update(array, new, place, inside)


def _updated(array: Array, new: Any, place: Mapping[int, Any], inside: Array | None) -> Array:
    new = jnp.expand_dims(new, min(place)).astype(array.dtype)
    starts = [place.get(axis, 0) for axis in range(array.ndim)]
    if inside is not None:
        new = jnp.where(inside, new, jax.lax.dynamic_slice(array, starts, new.shape))
    return jax.lax.dynamic_update_slice(array, new, starts)
