"""DoRA: the direction of a weight gets low-rank factors, the length of each of its columns trains by itself.

Norms of the columns of the adapted weight are found without forming it: `‖W + ab‖² = ‖W‖² + 2⟨W, ab⟩ + ‖ab‖²`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lora_jax.adapter.adapter import Adapter
from lora_jax.adapter.by_path import check_parameters
from lora_jax.adapter.factors import Array, joined, over, widened
from lora_jax.adapter.registry import Start, register_method
from lora_jax.adapter.site import Site
from lora_jax.adapter.updates import Change, LowRank, Update, pytree
from lora_jax.paths import named_leaves

_EXACT = jax.lax.Precision.HIGHEST


@register_method("dora", lora_bias=False)
@pytree("site", "dropout")
@dataclass(frozen=True, kw_only=True)
class Dora(LowRank):
    """Weight-decomposed low-rank factors: the model sees `m · (W + ΔW) / ‖W + ΔW‖`, column by column.

    A column is what one output reads (of a look-up table: one feature, over all rows); its norm is a constant in the
    gradient, as in section 4.3 of the paper. Norms are computed in float32 from the factors, the kept squares of `W`,
    and `W` times the first factor: no array of the weight's size is formed, and at the start nothing changes, in
    bfloat16 too. Of several DoRA adapters each has its own norm, and their effects on the base add up, in any order.

    Differs from PEFT, where norms are computed in the dtype of the weight, dropout acts on the base's product too, at
    the price of a second one, and a second active adapter acts on the result of the first. `scaled` interpolates
    between the base and the whole effect; PEFT's `set_scale` changes the norm too.

    Attributes:
      a, b, scale, site, dropout, a_start, b_start: as in `LowRank`.
      magnitude: `[*batch, *out]`, trained; PEFT's `lora_magnitude_vector`.
      base_squares: `[*batch, *out]` float32, not trained; squared norm of each column of the frozen weight.
      strength: `[*batch]` float32, not trained; share of the effect, 1 unless scaled.

    Example:
      >>> import lora_jax as lora
      >>> params = {"w": jnp.arange(12.0).reshape(4, 3)}
      >>> fn, x = lambda params, x: x @ params["w"], jnp.ones((2, 4))
      >>> config = lora.LoraConfig(method="dora", rank=2, targets="w")
      >>> adapter = lora.init(jax.random.key(0), config, params, lora.find_sites(fn, params, x))
      >>> adapter["w"].magnitude.shape, bool(jnp.allclose(lora.adapt(fn)(params, adapter, x), fn(params, x)))
      ((3,), True)

    References:
      Liu et al., DoRA, arXiv 2402.09353.
    """

    magnitude: Array
    base_squares: Array
    strength: Array
    notes: ClassVar[tuple[str, ...]] = ("scale", "strength", "base_squares")
    reads_base: ClassVar[bool] = True

    @classmethod
    def start(cls, given: Start) -> Self:
        """Factors from the config's initialiser, around the weight."""
        return cls.around(LowRank.start(given), given.weight(), given.dtype)

    @classmethod
    def around(cls, factors: LowRank, weight: Array, dtype: Any = jnp.float32) -> Self:
        """The given factors with the magnitude of the weight they change, such that nothing else changes.

        Args:
          factors: the low-rank part.
          weight: the frozen parameter.
          dtype: of the magnitude; float64 beside a float64 weight, whose norms a narrower one would round.
        """
        base = squares(factors.site, weight)
        size = jnp.sqrt(changed_squares(factors.site, weight, base, factors.pairs()))
        magnitude = size if size.dtype.itemsize > 4 else size.astype(dtype)
        return replace(cls.beside(factors, base), magnitude=magnitude)

    @classmethod
    def beside(cls, factors: LowRank, base_squares: Array) -> Self:
        """The given factors with the magnitude that the weight's columns have without them.

        Args:
          factors: the low-rank part.
          base_squares: `[*batch, *out]`, squared norms of the weight's columns.
        """
        known = {field.name: getattr(factors, field.name) for field in fields(LowRank)}
        size = jnp.sqrt(base_squares)
        return cls(**known, magnitude=size, base_squares=base_squares, strength=jnp.ones_like(factors.scale))

    def trains(self) -> Self:
        """True on both factors and the magnitude, False on the rest."""
        return replace(super().trains(), magnitude=True)

    def axes(self) -> Self:
        """The site's axes along each array."""
        columns = (*self.site.batch_axes, *self.site.out_axes)
        return replace(super().axes(), magnitude=columns, base_squares=columns, strength=self.site.batch_axes)

    def change(self, weight: Array) -> Change:
        """The parameter and the pairs of factors, both with the gain that gives columns their magnitude."""
        here = beside(weight, self)
        pairs, rank = here.pairs(), len(here.site.batch_axes)
        gain = here._gain(weight, pairs)
        part = over(here.strength, gain)
        folded = jnp.expand_dims(gain * part, rank)
        pairs = tuple((a, b * folded.astype(b.dtype)) for a, b in pairs)
        return Change(weight, pairs, 1 + part * (gain - 1))

    def _gain(self, weight: Array, pairs: tuple[tuple[Array, Array], ...]) -> Array:
        """`[*batch, *out]` float32: magnitude over norm, at full strength; 1 where a column is zero."""
        fixed = jax.lax.stop_gradient((weight, self.base_squares, pairs))
        norm = jnp.sqrt(changed_squares(self.site, *fixed))
        return jnp.where(norm > 0, self.magnitude.astype(norm.dtype) / jnp.where(norm > 0, norm, 1), 1)

    def absorbed(self, weight: Array) -> tuple[Array, Self]:
        """The parameter without the start, and the update with the norms of that one."""
        weight, update = super().absorbed(weight)
        return weight, replace(update, base_squares=squares(self.site, weight))

    def scaled(self, factor: Any) -> Self:
        """The same update with `strength * factor`."""
        return replace(self, strength=self.strength * jnp.asarray(factor, self.strength.dtype))


@pytree("site", "dropout")
@dataclass(frozen=True)
class Gained(Update):
    """DoRA with its gain computed once, for evaluation: the model sees `gain · W + Σ_r a[r] ⊗ b[r]`.

    Made by `precompute`. Nothing trains, and the weight is not read for norms any more.

    Attributes:
      a: `[*batch, rank, *in]`.
      b: `[*batch, rank, *out]`, with scale and gain folded in.
      gain: `[*batch, *out]` float32.
      site, dropout: as in `LowRank`.

    Example:
      >>> site = Site(path="w", shape=(4, 3), dtype="float32", kind="dense", in_axes=(0,), out_axes=(1,))
      >>> update = Gained(jnp.zeros((1, 4)), jnp.zeros((1, 3)), jnp.full(3, 2.0), site)
      >>> update.applied(jnp.ones((4, 3))).tolist()[0]
      [2.0, 2.0, 2.0]
    """

    a: Array
    b: Array
    gain: Array
    site: Site
    dropout: float = 0.0
    notes: ClassVar[tuple[str, ...]] = ("gain",)
    reads_base: ClassVar[bool] = True

    def trains(self) -> Self:
        """False everywhere."""
        return jax.tree.map(lambda leaf: False, self)

    def axes(self) -> Self:
        """The site's axes along each array."""
        batch, into, out = self.site.batch_axes, self.site.in_axes, self.site.out_axes
        return replace(self, a=(*batch, None, *into), b=(*batch, None, *out), gain=(*batch, *out))

    def change(self, weight: Array) -> Change:
        """The parameter with the gain, plus the factors."""
        return Change(weight, ((self.a, self.b),), self.gain)

    def scaled(self, factor: Any) -> Self:
        """The factors, and the distance of the gain from one, times `factor`."""
        return replace(self, b=self.b * factor, gain=1 + factor * (self.gain - 1))


def precompute(params: Any, adapter: Adapter) -> Adapter:
    """Compute DoRA's gains once, for evaluation: no norms in every call.

    Args:
      params: the base's parameters that the adapter is for.
      adapter: any adapter; updates other than DoRA stay as they are.

    Returns:
      An adapter that computes the same, and does not train. Keep the one that it came from to save or go on training.

    Raises:
      ParameterError: the adapter does not fit these parameters.

    Example:
      >>> import lora_jax as lora
      >>> params = {"w": jnp.arange(12.0).reshape(4, 3)}
      >>> fn, x = lambda params, x: x @ params["w"], jnp.ones((2, 4))
      >>> config = lora.LoraConfig(method="dora", rank=2, targets="w")
      >>> adapter = lora.init(jax.random.key(0), config, params, lora.find_sites(fn, params, x))
      >>> fixed = lora.methods.precompute(params, adapter)
      >>> bool(jnp.allclose(lora.adapt(fn)(params, fixed, x), lora.adapt(fn)(params, adapter, x)))
      True
    """
    leaves, _ = named_leaves(params)
    check_parameters(adapter, leaves)
    return Adapter({
        path: _gained(update, leaves[path]) if isinstance(update, Dora) else update for path, update in adapter.items()
    })  # fmt: skip


def _gained(update: Dora, weight: Array) -> Gained:
    _, pairs, gain = update.change(weight)
    assert gain is not None
    return Gained(*joined(update.site, pairs), gain, update.site, update.dropout)


def squares(site: Site, weight: Array) -> Array:
    """`[*batch, *out]` float32: the squared norm of each column of a weight.

    Example:
      >>> site = Site(path="w", shape=(2, 3), dtype="float32", kind="dense", in_axes=(0,), out_axes=(1,))
      >>> squares(site, jnp.ones((2, 3))).tolist()
      [2.0, 2.0, 2.0]
    """
    summed = jnp.sum(jnp.square(widened(weight)), site.in_axes)
    left = sorted((*site.batch_axes, *site.out_axes))
    return jnp.transpose(summed, [left.index(axis) for axis in (*site.batch_axes, *site.out_axes)])


def changed_squares(site: Site, weight: Array, base_squares: Array, pairs: Sequence[tuple[Array, Array]]) -> Array:
    """The same for the weight plus the products of its factors; never below zero.

    Args:
      site: the roles of the weight's axes.
      weight: the frozen parameter, in any dtype.
      base_squares: `squares` of it.
      pairs: factors `[*batch, rank, *in]` and `[*batch, rank, *out]`, scales folded in.
    """
    where = jax.typeof(base_squares).sharding
    sums: Any = partial(_changed_squares, site)
    if AxisType.Explicit in where.mesh.axis_types:  # How sums over sharded axes are spread is left to the compiler.
        sums = jax.sharding.auto_axes(sums, out_sharding=where)
    return sums(weight, base_squares, pairs)


def beside(weight: Array, tree: Any) -> Any:
    """A tree of small arrays on the mesh of a weight, replicated if they are on none, where its axes are explicit."""
    mesh = jax.typeof(weight).sharding.mesh
    if AxisType.Explicit not in mesh.axis_types:
        return tree
    elsewhere = lambda leaf: jax.typeof(leaf).sharding.mesh != mesh  # noqa: E731
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, whole) if elsewhere(leaf) else leaf, tree)


def _changed_squares(site: Site, weight: Array, base_squares: Array, pairs: Sequence[tuple[Array, Array]]) -> Array:
    a, b = joined(site, [(widened(a), widened(b)) for a, b in pairs])
    batch, into, out = (list(axes) for axes in (site.batch_axes, site.in_axes, site.out_axes))
    r, s = len(site.shape), len(site.shape) + 1
    met = _met(site, weight, a)
    gram = jnp.einsum(a, [*batch, r, *into], a, [*batch, s, *into], [*batch, r, s], precision=_EXACT)
    mixed = jnp.einsum(gram, [*batch, r, s], b, [*batch, s, *out], [*batch, r, *out], precision=_EXACT)
    change = jnp.sum(b * (2 * met + mixed), len(batch))
    return jnp.maximum(base_squares + change, 0)


def _met(site: Site, weight: Array, a: Array) -> Array:
    """`[*batch, rank, *out]`: the weight contracted with `a`, as exact as in float32.

    A narrow weight is not widened, which would be an array of its size: `a` is split into parts of its dtype instead,
    whose products with it are exact in float32.
    """
    batch, into, out = (list(axes) for axes in (site.batch_axes, site.in_axes, site.out_axes))
    r = len(site.shape)
    narrow = jnp.dtype(weight.dtype).itemsize == 2
    parts = _split(a, weight.dtype) if narrow else [a]
    found = jnp.einsum(
        jnp.concatenate(parts, len(batch)), [*batch, r, *into],
        weight if narrow else widened(weight), list(range(len(site.shape))),
        [*batch, r, *out], precision=_EXACT, preferred_element_type=jnp.float32,
    )  # fmt: skip
    return sum(jnp.split(found, len(parts), len(batch)), jnp.zeros((), jnp.float32))


def _split(a: Array, dtype: jnp.dtype) -> list[Array]:
    """Three arrays of a narrow dtype that add up to `a`, to float32 accuracy."""
    parts = []
    for _ in range(3):
        parts.append(a.astype(dtype))
        a = a - parts[-1].astype(a.dtype)
    return parts
