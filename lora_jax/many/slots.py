"""Slots of a bank: the factors of many adapters at one parameter, and how an adapter gets in and out."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapter.factors import Array, is_traced
from lora_jax.adapter.site import Site
from lora_jax.adapter.updates import LowRank, Update, held, pytree
from lora_jax.dtypes import promoted
from lora_jax.errors import ParameterError
from lora_jax.methods import Gained


@pytree("site")
@dataclass(frozen=True)
class Slots:
    """What a bank holds at one parameter.

    Attributes:
      a: `[*batch, slots, rank, *in]`, from slot 1 on; zeros in slots that are empty or leave this parameter as it is.
      b: `[*batch, slots, rank, *out]`, with every scale folded in.
      gain: `[*batch, slots, *out]` float32, what the base is multiplied by; None in a bank without gains.
      site: the parameter; static.
      broken: `[slots]` float32, NaN for slots that were given numbers that are not finite, for which zeros are kept;
        None where nobody looked.

    Example:
      >>> site = Site(path="w", shape=(4, 3), dtype="float32", kind="dense", in_axes=(0,), out_axes=(1,))
      >>> held = empty(site, 8, 2, False, jnp.float32)
      >>> held.count, held.rank, held.a.shape
      (8, 2, (7, 2, 4))
    """

    a: Any
    b: Any
    gain: Any
    site: Site
    broken: Any = None

    @property
    def count(self) -> int:
        """Number of slots, the base's included."""
        return self.a.shape[len(self.site.batch_axes)] + 1

    @property
    def rank(self) -> int:
        """Number of rank-one terms of every slot."""
        return self.a.shape[len(self.site.batch_axes) + 1]

    @property
    def keys_shape(self) -> tuple[int, ...]:
        """`[*batch, slots, *in]`: of what a router compares inputs with."""
        lead = len(self.site.batch_axes) + 1
        return (*self.a.shape[:lead], *self.a.shape[lead + 1 :])


@dataclass(frozen=True)
class Factors:
    """What an update adds: factors with every scale folded in, and a gain."""

    a: Any
    b: Any
    gain: Any
    rank: int


def factors(path: str, update: Update) -> Factors:
    """The factors of an update; refuses what is no low-rank change of the base by itself.

    What does not train has no gradient.
    """
    name, update = type(update).__name__, held(update)
    if isinstance(update, Gained):
        return Factors(update.a, update.b, update.gain, update.a.shape[len(update.site.batch_axes)])
    if update.reads_base:
        raise ParameterError(
            f"{path} has a {name}, which depends on the base: give the bank lora.methods.precompute(params, adapter)"
        )
    plain = update.low_rank()
    if plain is None:
        raise ParameterError(
            f"{path} has a {name}, which is no low-rank change: leave it out with adapter.without({path!r}), or merge "
            "it into the base if all adapters share it"
        )
    ((a, b),) = plain.pairs()
    return Factors(a, b, None, plain.rank)


def empty(site: Site, slots: int, rank: int, gains: bool, dtype: Any) -> Slots:
    """Slots that all are the base."""
    batch, into, out = site.batch_shape, site.sizes(site.in_axes), site.sizes(site.out_axes)
    gain = jnp.ones((*batch, slots - 1, *out), jnp.float32) if gains else None
    a, b = (jnp.zeros((*batch, slots - 1, rank, *sizes), dtype) for sizes in (into, out))
    return Slots(a, b, gain, site, jnp.zeros(slots - 1, jnp.float32))


def stacked(site: Site, parts: Sequence[Factors | None], slots: int, rank: int) -> Slots:
    """The factors of several adapters in slots 1, 2, ..., padded with zeros."""
    gains = any(part is not None and part.gain is not None for part in parts)
    sound = [part and finite(part) for part in parts]
    parts = [each and each[0] for each in sound]
    flags = [jnp.float32(0) if each is None else jnp.asarray(each[1]) for each in sound]
    broken = jnp.stack([*flags, *[jnp.float32(0)] * (slots - 1 - len(parts))])
    dtype = promoted(*(part.a for part in parts if part is not None))
    blank, lead = empty(site, 2, rank, gains, dtype), len(site.batch_axes)

    def stack(name: str, axis: int) -> Any:
        zero = jnp.take(getattr(blank, name), 0, lead)
        given = [zero if part is None or getattr(part, name) is None else getattr(part, name) for part in parts]
        padded = [grown(each, zero.shape) for each in given]
        return jnp.stack([*padded, *[zero] * (slots - 1 - len(parts))], axis)

    return Slots(stack("a", lead), stack("b", lead), stack("gain", lead) if gains else None, site, broken)


def finite(found: Factors) -> tuple[Factors, Any]:
    """Factors of which zeros stand for numbers that are not finite, and float32: NaN if there were any, else 0.

    What can be seen to be finite stays as it is.
    """
    given = [found.a, found.b, found.gain]
    if not any(is_traced(each) for each in given if each is not None):
        return found, np.float32(0)  # It has been checked.
    sound = [None if each is None else jnp.isfinite(each) for each in given]
    a, b, gain = (
        each if here is None else jnp.where(here, each, jnp.zeros((), each.dtype))
        for each, here in zip(given, sound, strict=True)
    )
    whole = jnp.stack([here.all() for here in sound if here is not None]).all()
    return Factors(a, b, gain, found.rank), jnp.where(whole, 0.0, jnp.nan).astype(jnp.float32)


def grown(array: Any, shape: Sequence[int]) -> Any:
    """An array padded with zeros to a shape; NumPy's stays NumPy's, so that nothing is compiled."""
    pads = [(0, after - before) for before, after in zip(array.shape, shape, strict=True)]
    if not any(after for _, after in pads):
        return array
    return np.pad(array, pads) if isinstance(array, np.ndarray) else jnp.pad(array, pads)


def check_finite(path: str, arrays: Sequence[Any], slot: str = "") -> None:
    """Refuse numbers that are not finite, where they can be seen.

    Args:
      path: the parameter.
      arrays: what a bank is to hold, in its dtype, which may be too narrow; None for nothing.
      slot: which adapter has them, for the message.

    Raises:
      ParameterError: some number is not finite.
    """
    for leaf in arrays:
        if leaf is None or is_traced(leaf) or np.isfinite(np.asarray(leaf, promoted(leaf.dtype, np.float32))).all():
            continue
        raise ParameterError(
            f"{path} holds numbers that are not finite{slot}: the adapter is broken, or overflows {leaf.dtype}"
        )


def check_fits(mine: Site, its: Site) -> None:
    """Refuse another parameter, or another use of it, than that of a bank.

    Raises:
      ParameterError: shape or axes differ.
    """
    names = ("shape", "batch_axes", "in_axes", "out_axes")
    if any(getattr(mine, name) != getattr(its, name) for name in names):
        raise ParameterError(
            f"{mine.path} has shape {mine.shape} with axes in {mine.in_axes}, out {mine.out_axes} in the bank, and "
            f"{its.shape} with {its.in_axes}, {its.out_axes} in the adapter: they are for different models"
        )


@partial(jax.jit, static_argnums=2)
def _at(array: Array, slot: Array, axis: int) -> Array:
    return jax.lax.dynamic_index_in_dim(array, slot, axis, keepdims=False)


def taken(path: str, held: Slots, slot: int) -> LowRank:
    """What is in a slot, as plain factors; refuses a gain."""
    lead, position = len(held.site.batch_axes), jnp.int32(slot - 1)
    if held.gain is not None and not is_traced(held.gain) and bool((_at(held.gain, position, lead) != 1).any()):
        raise ParameterError(f"Slot {slot} has a gain at {path}: keep the adapter that was put there")
    a, b = (_at(each, position, lead) for each in (held.a, held.b))
    return LowRank(a, b, jnp.ones(held.site.batch_shape, jnp.float32), held.site)
