"""The methods of composition by name, PEFT's `combination_type`: what each does to factors, and its settings.

Here are weighted sums (`cat`, `svd`, `slerp`, `knots`) and those that choose (`rank_one`, `block`); `ties`, `dare` and
`magnitude_prune` are in `ties_dare.py`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import svd
from lora_jax.adapter.factors import Array, is_traced
from lora_jax.adapter.registry import Table
from lora_jax.compose import ties_dare
from lora_jax.compose.factors import (
    Fused,
    Options,
    Part,
    compressed,
    energy,
    exactly,
    inner_product,
    joined,
    laid_out,
    largest,
    nameless,
    product,
    stacked,
    triplets,
)
from lora_jax.compose.ties_dare import PLAIN, TIES, Rule, merged
from lora_jax.errors import ConfigError

PARALLEL = 0.9995
"""Cosine from which on two updates count as parallel, and are interpolated along a line."""


def cat(parts: Sequence[Part], options: Options, key: Array | None) -> Fused:
    """Every term of every adapter: exact, and ranks add up."""
    return exactly(*joined(parts))


def truncated(parts: Sequence[Part], options: Options, key: Array | None) -> Fused:
    """The weighted sum, at a rank: no other factors of that rank are nearer to it."""
    return compressed(*joined(parts), largest(parts, options))


def slerp(parts: Sequence[Part], options: Options, key: Array | None) -> Fused:
    """Two updates interpolated along the circle through both; a weighted sum, with weights from their angle.

    References:
      Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985.
    """
    if len(parts) == 1:
        return truncated(parts, options, key)
    pairs = [(part.a, part.scale * part.b) for part in parts]
    first, inner, second = (inner_product(pairs[i], pairs[j]) for i, j in ((0, 0), (0, 1), (1, 1)))
    turned = along_circle(first, inner, second, jnp.stack([part.weight for part in parts]))
    parts = [part._replace(weight=weight) for part, weight in zip(parts, turned, strict=True)]
    return truncated(parts, options, key)


def along_circle(first: Array, inner: Array, second: Array, weights: Array) -> Array:
    """Weights of two vectors on the circle through both.

    Args:
      first: squared norm of the first vector.
      inner: product of both.
      second: squared norm of the second vector.
      weights: `[2]`, shares of the angle between them that add up to one.

    Returns:
      `[2]`; the shares themselves where the vectors are parallel, or one of them is zero.
    """
    size = jnp.sqrt(first * second)
    known = size > 0
    cosine = jnp.where(known, inner / jnp.where(known, size, 1), 1)
    parallel = jnp.abs(cosine) > PARALLEL
    angle = jnp.arccos(jnp.where(parallel, 0, cosine))
    return jnp.where(parallel, weights, jnp.sin(weights * angle) / jnp.sin(angle))


def knots(parts: Sequence[Part], options: Options, key: Array | None) -> Fused:
    """TIES in a basis that all updates share: the left singular vectors of the updates side by side.

    References:
      Stoica et al., KnOTS, arXiv 2410.19735.
    """
    outputs, core_b = jnp.linalg.qr(jnp.concatenate([part.scale * part.b for part in parts]).T)
    mine = jnp.split(core_b, _ends([part.rank for part in parts]), axis=1)
    inputs, cores = zip(*[jnp.linalg.qr(part.a.T) for part in parts], strict=True)
    core = jnp.concatenate([product(b, a.T) for b, a in zip(mine, cores, strict=True)], 1)
    shared = svd.exact(core, min(core.shape))
    # A direction without size has arbitrary vectors, which would take part in pruning and voting.
    real = shared.values > shared.values[0] * jnp.finfo(core.dtype).eps * max(core.shape)
    blocks = jnp.split(shared.right * real[:, None], _ends([basis.shape[1] for basis in inputs]), axis=1)
    aligned = [product(own, basis.T) for own, basis in zip(blocks, inputs, strict=True)]
    a = merged(aligned, jnp.stack([part.weight for part in parts]), TIES, options, key)
    b = shared.values[:, None] * product(shared.left, outputs.T)
    return compressed(a, b, largest(parts, options))


def _ends(sizes: Sequence[int]) -> list[int]:
    """Where all pieces but the last end."""
    return list(accumulate(sizes))[:-1]


def rank_one(parts: Sequence[Part], options: Options, key: Array | None) -> Fused:
    """The strongest of all adapters' singular terms, each as it is: by default half of as many as the ranks add up to.

    What one adapter does stays apart from what another does; a singular value decomposition of the sum mixes them.
    """
    found = [triplets(part.a, part.scale * part.b) for part in parts]
    values = jnp.concatenate([part.weight * each.values for part, each in zip(parts, found, strict=True)])
    root = jnp.sqrt(jnp.abs(values))[:, None]
    a = root * jnp.concatenate([each.left for each in found])
    b = jnp.sign(values)[:, None] * root * jnp.concatenate([each.right for each in found])
    rank = _half(parts) if options.rank is None else options.rank
    return _chosen(a, b, jnp.argsort(-jnp.abs(values)), jnp.arange(len(values)) < rank, rank)


def block(parts: Sequence[Part], options: Options, key: Array | None) -> Fused:
    """Whole adapters, those with most energy first, as many as fit into a rank.

    The rank is half of the sum by default, and at least that of the largest adapter, so that the strongest one fits.
    """
    a, b = joined(parts)
    sizes = jnp.stack([jnp.square(part.weight * part.scale) * energy(part.a, part.b) for part in parts])
    ranks = np.array([part.rank for part in parts])
    rank = max(_half(parts), ranks.max()) if options.rank is None else options.rank
    if rank < ranks.max():
        raise ConfigError(f"method='block' keeps whole adapters, and rank={rank} is less than their {ranks.max()}")
    by_size = jnp.argsort(-sizes)
    place = jnp.argsort(by_size)
    ends = jnp.cumsum(jnp.asarray(ranks)[by_size])[place]
    owner = np.repeat(np.arange(len(parts)), ranks)
    order = jnp.argsort(place[owner])
    return _chosen(a, b, order, (ends[owner] <= rank)[order], int(rank))


def _chosen(a: Array, b: Array, order: Array, keep: Array, rank: int) -> Fused:
    """The terms to keep, in order, filled up with zeros; the rest is lost."""
    a, b = a[order], b[order]
    first = min(rank, len(a))
    rest = jnp.where(keep, 0, 1)[:, None] * b
    return Fused(a[:first], (b - rest)[:first], energy(a, b), energy(a, rest))


def _half(parts: Sequence[Part]) -> int:
    total = sum(part.rank for part in parts)
    return total if len(parts) == 1 else total // 2


Fuse: TypeAlias = Callable[[Sequence[Part], Options, Array | None], Fused]
Tensors: TypeAlias = Callable[[Sequence[Array], Array, Options, Array | None], Array]


@dataclass(frozen=True)
class Method:
    """One way to make one adapter out of several.

    Attributes:
      fuse: what it does to the factors of one linear map.
      rule: what it does to vectors and other whole tensors.
      rank: whether it takes a rank.
      shared: whether it takes two adapters, with weights that are shares of one.
      dense: whether it forms matrices of the weight's size; stacks are then gone through one by one.
    """

    fuse: Fuse
    rule: Rule = PLAIN
    rank: bool = True
    shared: bool = False
    dense: bool = False

    @property
    def adds(self) -> bool:
        """Whether whole tensors are added up by weight."""
        return self.rule == PLAIN and not self.shared

    @property
    def random(self) -> bool:
        """Whether it draws random numbers."""
        return self.rule.thin == "random"

    def tensors(self, given: Sequence[Array], weights: Array, options: Options, key: Array | None) -> Array:
        """One vector out of several changes of it."""
        if self.shared and len(given) == 2:
            one, other = given
            weights = along_circle(product(one, one), product(one, other), product(other, other), weights)
        return merged(given, weights, self.rule, options, key)


METHODS: Table[Method] = Table("method", "A method of composition", __name__)
METHODS.entries.update({
    "cat": Method(cat, rank=False),
    "svd": Method(truncated),
    "linear": Method(truncated),
    "slerp": Method(slerp, shared=True),
    "knots": Method(knots, ties_dare.TIES),
    "peft_linear": Method(ties_dare.on_factors(PLAIN)),
    "rank_one": Method(rank_one),
    "block": Method(block),
})  # fmt: skip
for _name, _rule in {
    "ties": ties_dare.TIES,
    "dare_linear": ties_dare.DARE_LINEAR,
    "dare_ties": ties_dare.DARE_TIES,
    "magnitude_prune": ties_dare.MAGNITUDE_PRUNE,
}.items():
    METHODS.entries[_name] = Method(ties_dare.on_factors(_rule), _rule)
    METHODS.entries[f"{_name}_svd"] = Method(ties_dare.on_deltas(_rule), _rule, dense=True)


def fused(name: str, options: Options, updates: Sequence[Any], weights: Sequence[Array], key: Array | None) -> Fused:
    """What a method makes of the factors of updates, in the layout of their site.

    Each map of a stack is composed by itself, with a key of its own.

    Args:
      name: of the method.
      options: its settings.
      updates: of one parameter, with factors.
      weights: numbers, or `[*batch]`.
      key: for methods that draw random numbers.
    """
    return _fused(name, options, nameless(updates), tuple(weights), key)


def checked(
    name: str, rank: int | None, density: float | None, majority_sign: str | None, key: Array | None
) -> Options:
    """The settings of a composition.

    Raises:
      ConfigError: one is out of range, missing, or means nothing to the method.
    """
    method = METHODS.find(name)
    if rank is not None and not method.rank:
        raise ConfigError(f'method={name!r} keeps every term, so rank={rank} means nothing; for fewer: method="svd"')
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ConfigError(f"rank={rank!r} must be a positive integer")
    thins = method.rule.thin != "none"
    if thins and density is None:
        raise ConfigError(f"method={name!r} keeps a share of the entries: pass density=, such as 0.5")
    if density is not None and not thins:
        raise ConfigError(f"method={name!r} keeps all entries, so density={density} means nothing: leave it out")
    if density is not None and not 0 < density <= 1:
        raise ConfigError(f"density={density} must be above 0 and at most 1")
    if majority_sign is not None and not method.rule.elect:
        raise ConfigError(f"method={name!r} elects no signs, so majority_sign={majority_sign!r} means nothing")
    if majority_sign not in (None, "total", "frequency"):
        raise ConfigError(f'majority_sign={majority_sign!r} must be "total" or "frequency"')
    if method.random and key is None:
        raise ConfigError(f"method={name!r} drops random entries: pass key=jax.random.key(0), or any other key")
    return Options(rank, 1.0 if density is None else float(density), majority_sign or "total")


def weighed(count: int, weights: Any, method: Method) -> list[tuple[Array, float | None]]:
    """A weight for every adapter, as an array and as the number that it is, if that is known.

    Raises:
      ConfigError: they are not one for each, or not what the method needs.
    """
    if not count:
        raise ConfigError("There is nothing to compose: pass at least one adapter")
    default = 1 / count if method.shared else 1.0
    given = [default] * count if weights is None else list(weights)
    if len(given) != count:
        raise ConfigError(f"{len(given)} weights were given for {count} adapters: pass one for each")
    known = [None if is_traced(weight) else float(weight) for weight in given]
    numbers = [number for number in known if number is not None]
    if not all(map(math.isfinite, numbers)):
        raise ConfigError(f"weights={numbers} must be finite")
    if method.shared:
        _check_two(count, numbers)
    return [(jnp.asarray(weight, jnp.float32), number) for weight, number in zip(given, known, strict=True)]


def _check_two(count: int, numbers: Sequence[float]) -> None:
    if count != 2:
        raise ConfigError(f'method="slerp" goes from one adapter to another, and {count} were given: pass two')
    if len(numbers) == count and (min(numbers) < 0 or abs(sum(numbers) - 1) > 1e-6):
        raise ConfigError(f'weights={numbers} of method="slerp" must be shares of one, such as [0.25, 0.75]')


@partial(jax.jit, static_argnames=("name", "options"))
def _fused(name: str, options: Options, updates: Any, weights: Any, key: Array | None) -> Fused:
    parts = tuple(stacked(update, weight) for update, weight in zip(updates, weights, strict=True))
    method, size = METHODS.find(name), parts[0].a.shape[0]
    keys = None if key is None else jax.random.split(key, size)
    one = lambda given: method.fuse(given[0], options, given[1])  # noqa: E731
    # Matrices of the weight's size are formed one at a time.
    found = jax.lax.map(one, (parts, keys)) if method.dense else jax.vmap(one)((parts, keys))
    a, b = laid_out(updates[0].site, found.a, found.b)
    return Fused(a, b, found.whole.sum(), found.lost.sum())
