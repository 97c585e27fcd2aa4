"""Joined products: factors appended to the weight, so that a result is written once and rounded once.

Compilers for TPUs and GPUs write `x·W`, read it again to add the thin product, and write it once more. Appended along
the contraction, `[x, p]·[W; b]`, it is one product. For the gradient of the activation, `[g, z]·[Wᵀ; a]`, no rule of
one's own is needed: it is the transpose of `[u, v] = dx·[W | a]`, factors appended along the outputs and split off
again, for JAX transposes a split to a concatenation. So forward mode and higher derivatives stay as they are.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jax import lax

from lora_jax.engine.contract import flat, ordered
from lora_jax.engine.weight import RANK, Labelled, Weight


class Joint(NamedTuple):
    """The axes of a product of an activation and a weight, by their part in it.

    Attributes:
      batch: of both, and of the result.
      inner: of both, summed over.
      tokens: the activation's own.
      outer: the weight's own.
      out: of the result, in order.
    """

    batch: list[int]
    inner: list[int]
    tokens: list[int]
    outer: list[int]
    out: tuple[int, ...]

    @classmethod
    def of(cls, x: Sequence[int], weight: Sequence[int], out: Sequence[int]) -> "Joint":
        """By the axes of the activation, of the weight, and of the result."""
        both = [axis for axis in x if axis in weight]
        batch, inner = ([axis for axis in both if (axis in out) is kept] for kept in (True, False))
        tokens, outer = ([axis for axis in each if axis not in both] for each in (x, weight))
        return cls(batch, inner, tokens, outer, tuple(out))

    def fits(self, weight: Weight, x: Labelled) -> bool:
        """Whether the factors of every term divide the axes as the product does."""
        pairs = [ordered(term, x.axes, self.out) for term in weight.terms]
        first, second = {*self.batch, RANK, *self.inner}, {*self.batch, RANK, *self.outer}
        alike = all({*a.axes} == first and {*b.axes} == second for a, b in pairs)
        return alike and {*self.batch, *self.tokens, *self.outer} == {*self.out}

    def summed(
        self, x: Labelled, base: Labelled, thin: Sequence[Labelled], seconds: Sequence[Labelled], options: Any
    ) -> Any:
        """`[x, p]·[W; b]`: the product, plus for every term its first product times its second factor.

        Args:
          x: the activation.
          base: the base's weight.
          thin: the first product `p` of every term.
          seconds: the second factor `b` of every term.
          options: precision and dtype of the product, as of `jax.lax.dot_general`.
        """
        left, (i,), among = flat(x, self.batch, self.inner, self.tokens)
        right, (j,), _ = flat(base, self.batch, self.inner, self.outer)
        first = len(among)
        left = [left, *(flat(p, self.batch, [RANK], self.tokens, i == first)[0] for p in thin)]
        right = [right, *(flat(b, self.batch, [RANK], self.outer, j == first)[0] for b in seconds)]
        sums = ((i,), (j,)), (among, among)
        y = lax.dot_general(_appended(left, i), _appended(right, j), sums, **options)
        return self.result(y, x, base)

    def apart(
        self, x: Labelled, base: Labelled, firsts: Sequence[Labelled], options: Any
    ) -> tuple[Any, list[Labelled]]:
        """`x·[W | a]`, split into the base's product and the first product of every term; arguments as of `summed`."""
        left, (i,), among = flat(x, self.batch, self.inner, self.tokens)
        right, (j,), _ = flat(base, self.batch, self.inner, self.outer)
        first = len(among)
        parts = [right, *(flat(a, self.batch, self.inner, [RANK], j == first)[0] for a in firsts)]
        free = first + (j == first)
        both = lax.dot_general(left, _appended(parts, free), (((i,), (j,)), (among, among)), **options)
        u, *thin = lax.split(both, [part.shape[free] for part in parts], both.ndim - 1)
        axes = (*self.batch, *self.tokens, RANK)
        sizes = [x.size(axis) for axis in axes[:-1]]
        return self.result(u, x, base), [Labelled(v.reshape(*sizes, v.shape[-1]), axes) for v in thin]

    def result(self, y: Any, x: Labelled, base: Labelled) -> Any:
        """A flat product, with the axes of the result."""
        axes = (*self.batch, *self.tokens, *self.outer)
        shape = [(x if axis in x.axes else base).size(axis) for axis in axes]
        return Labelled(y.reshape(shape), axes).ordered(self.out).array


def _appended(parts: Sequence[Any], axis: int) -> Any:
    return lax.concatenate([part.astype(parts[0].dtype) for part in parts], axis)
