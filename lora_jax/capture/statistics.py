"""Running sums over a site's inputs: second moments, and a sketch of them that principal components are read off.

Each starts at zero, takes in inputs as they come, and is finished once. While it is collected its arrays have one axis
for the whole stack of a site's linear maps, and live in references that a running program adds to.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import jax
import jax.numpy as jnp

from lora_jax.adapter.site import Site
from lora_jax.adapter.updates import pytree
from lora_jax.capture.captured import Components, Inputs
from lora_jax.engine.hooks import add_at

_PANEL = 512
"""Columns of a panel of a symmetric product."""


@pytree()
@dataclass(frozen=True)
class Moments:
    """What `Inputs` are computed from: the same, but of the symmetric matrix little more than a half.

    Attributes:
      panels: of the second moment, `[maps, rows, columns]` each.
      total, count: as of `Inputs`.
    """

    panels: Any
    total: Any
    count: Any

    @classmethod
    def zero(cls, site: Site, maps: int, components: int, key: Any) -> Self:
        """Nothing seen yet."""
        size = site.fan_in
        parts = tuple(jnp.zeros((maps, rows.stop - rows.start, size - rows.start)) for rows in panels(size))
        return cls(parts, jnp.zeros((maps, size)), jnp.zeros(maps))

    def add(self, maps: Any, tokens: Any, kept: Any) -> None:
        """Take in the inputs `[*maps, tokens, fan_in]` of the maps with these numbers; the arrays are references."""
        tokens, counts = _masked(tokens, kept)
        add_gram(self.panels, maps, tokens)
        add_at(self.total, maps, tokens.sum(-2, dtype=jnp.float32))
        add_at(self.count, maps, counts)

    def again(self) -> Self:
        """What another pass over the data starts from: there is nothing to refine."""
        return jax.tree.map(jnp.zeros_like, self)

    def finish(self, components: int) -> Inputs:
        """The statistic of one map."""
        return Inputs(whole(self.panels), self.total, self.count)


@pytree()
@dataclass(frozen=True)
class Sketch:
    """What `Components` are computed from: the second moment times a few test vectors, in `fan_in × few` numbers.

    Attributes:
      test: `[maps, fan_in, few]`, orthonormal columns.
      product: `[maps, fan_in, few]`, the sum of `x (xᵀ test)` over tokens.
      total, count: as of `Inputs`.
      energy: `[maps]`, the sum of `xᵀx`.
    """

    test: Any
    product: Any
    total: Any
    count: Any
    energy: Any

    @classmethod
    def zero(cls, site: Site, maps: int, components: int, key: Any) -> Self:
        """Nothing seen yet; random test vectors, the same for all sites with as many inputs."""
        size, few = site.fan_in, min(2 * components + 8, site.fan_in)
        test = jnp.linalg.qr(jax.random.normal(jax.random.fold_in(key, size), (size, few)))[0]
        test = jnp.tile(test, (maps, 1, 1))
        return cls(test, jnp.zeros((maps, size, few)), jnp.zeros((maps, size)), jnp.zeros(maps), jnp.zeros(maps))

    def add(self, maps: Any, tokens: Any, kept: Any) -> None:
        """Take in the inputs `[*maps, tokens, fan_in]` of the maps with these numbers; the arrays are references."""
        tokens, counts = _masked(tokens, kept)
        along = products("...ti,...ik->...tk", tokens, self.test[...][maps].astype(tokens.dtype))
        add_at(self.product, maps, products("...ti,...tk->...ik", tokens, along.astype(tokens.dtype)))
        add_at(self.total, maps, tokens.sum(-2, dtype=jnp.float32))
        add_at(self.count, maps, counts)
        add_at(self.energy, maps, jnp.square(tokens.astype(jnp.float32)).sum((-2, -1)))

    def again(self) -> Self:
        """The start of another pass, which looks where this one found most: one step of subspace iteration."""
        return replace(jax.tree.map(jnp.zeros_like, self), test=jnp.linalg.qr(self._centred())[0])

    def _centred(self) -> Any:
        """The product with the inputs' mean taken off: `C·test` for `C` the sum of `(x - mean)(x - mean)ᵀ`."""
        mean = self.total / jnp.maximum(self.count, 1)[..., None]
        return self.product - self.total[..., None] * products("...i,...ik->...k", mean, self.test)[..., None, :]

    def finish(self, components: int) -> Components:
        """Components of one map from the Nyström approximation `(C·T)(TᵀC·T)⁺(C·T)ᵀ`."""
        product = self._centred()
        inner = products("ik,il->kl", self.test, product)
        values, basis = jnp.linalg.eigh((inner + inner.T) / 2)
        sound = values > values[-1] * len(values) * jnp.finfo(jnp.float32).eps
        roots = jnp.where(sound, jax.lax.rsqrt(jnp.where(sound, values, 1.0)), 0.0)
        left, sizes, _ = jnp.linalg.svd(products("ik,kl->il", product, basis * roots[None]), full_matrices=False)
        mean = self.total / jnp.maximum(self.count, 1)
        energy = self.energy - jnp.vdot(self.total, mean)
        return Components(oriented(left.T[:components]), jnp.square(sizes[:components]), energy, self.count)


def oriented(rows: Any) -> Any:
    """The rows with signs that make the entry of largest size positive, so that they do not depend on the solver."""
    largest = jnp.take_along_axis(rows, jnp.abs(rows).argmax(-1, keepdims=True), -1)
    return jnp.where(largest < 0, -rows, rows)


def _masked(tokens: Any, kept: Any) -> tuple[Any, Any]:
    """The tokens with zeros for those left out, and how many there are."""
    lead: Sequence[int] = tokens.shape[:-2]
    if kept is None:
        return tokens, jnp.full(lead, tokens.shape[-2], jnp.float32)
    kept = jnp.broadcast_to(kept, tokens.shape[:-1]).astype(bool)
    return jnp.where(kept[..., None], tokens, jnp.zeros((), tokens.dtype)), kept.sum(-1, dtype=jnp.float32)


def products(subscripts: str, *operands: Any) -> Any:
    """An einsum in float32 at full precision."""
    return jnp.einsum(
        subscripts, *operands, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )  # fmt: skip


def panels(size: int) -> list[slice]:
    """The rows of each panel of a symmetric matrix; a panel holds the columns from its first row on.

    >>> panels(1200)
    [slice(0, 512, None), slice(512, 1024, None), slice(1024, 1200, None)]
    """
    return [slice(start, min(start + _PANEL, size)) for start in range(0, size, _PANEL)]


def add_gram(refs: tuple[Any, ...], maps: Any, x: Any) -> None:
    """Add `xᵀx` of `[*maps, tokens, size]` to the panels `[all maps, rows, columns]` of a symmetric matrix."""
    for ref, rows in zip(refs, panels(x.shape[-1]), strict=True):
        add_at(ref, maps, products("...ti,...tj->...ij", x[..., rows], x[..., rows.start :]))


def whole(given: tuple[Any, ...]) -> Any:
    """The symmetric matrix of its panels `[rows, columns]`.

    >>> whole((jnp.array([[1.0, 2.0], [2.0, 5.0]]),)).tolist()
    [[1.0, 2.0], [2.0, 5.0]]
    """
    size = given[0].shape[-1]
    upper = jnp.concatenate([jnp.pad(panel, [(0, 0), (size - panel.shape[-1], 0)]) for panel in given])
    number = jnp.arange(size) // _PANEL
    return jnp.where(number[:, None] <= number[None], upper, upper.T)
