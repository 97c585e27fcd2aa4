"""TIES, DARE and magnitude pruning: drop entries of every update, elect the sign of each entry, add up the rest.

PEFT's `ties`, `dare_linear`, `dare_ties` and `magnitude_prune` do that to A and to B, each by itself, so that the
product has cross terms of one adapter's B and another's A. Their forms in `_svd` do it to the updates themselves, as in
the papers, at the price of matrices of the weight's size.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax import svd
from lora_jax.adapter.factors import Array
from lora_jax.compose.factors import Fused, Options, Part, balanced, compressed, exactly, largest, product


class Rule(NamedTuple):
    """How tensors become one.

    Attributes:
      thin: which entries go first: the smallest, random ones, or none.
      elect: whether an entry is the mean over those tensors whose sign there is the majority's; otherwise the sum.
    """

    thin: Literal["smallest", "random", "none"]
    elect: bool


PLAIN = Rule("none", elect=False)
TIES = Rule("smallest", elect=True)
DARE_LINEAR = Rule("random", elect=False)
DARE_TIES = Rule("random", elect=True)
MAGNITUDE_PRUNE = Rule("smallest", elect=False)


def on_factors(rule: Rule) -> Callable[[Sequence[Part], Options, Array | None], Fused]:
    """The rule on A and on B, each by itself, as in PEFT; smaller ranks are filled up with zeros."""

    def fuse(parts: Sequence[Part], options: Options, key: Array | None) -> Fused:
        strengths = jnp.stack([part.weight * part.scale for part in parts])
        roots = jnp.sqrt(jnp.abs(strengths))
        # The sign on one side only, or it would cancel.
        signed = jnp.where(strengths < 0, -roots, roots)
        keys = [None, None] if key is None else list(jax.random.split(key))
        a = merged([part.a for part in parts], signed, rule, options, keys[0])
        b = merged([part.b for part in parts], roots, rule, options, keys[1])
        return exactly(a, b) if options.rank is None else compressed(a, b, options.rank)

    return fuse


def on_deltas(rule: Rule) -> Callable[[Sequence[Part], Options, Array | None], Fused]:
    """The rule on the updates as matrices, and the best approximation of the result of a rank."""

    def fuse(parts: Sequence[Part], options: Options, key: Array | None) -> Fused:
        deltas = [product(part.a.T, part.scale * part.b) for part in parts]
        whole = merged(deltas, jnp.stack([part.weight for part in parts]), rule, options, key)
        return balanced(svd.exact(whole, min(whole.shape)), largest(parts, options))

    return fuse


def merged(tensors: Sequence[Array], weights: Array, rule: Rule, options: Options, key: Array | None) -> Array:
    """One tensor out of several, by a rule.

    Args:
      tensors: of one shape, but for the length of the first axis, where shorter ones are filled up with zeros.
      weights: `[len(tensors)]`. They count after signs are elected, as in PEFT.
      rule: what to do.
      options: density, and how signs are elected.
      key: for random entries.

    Example:
      >>> given = [jnp.float32([4, 1, -2]), jnp.float32([2, -1, 3])]
      >>> merged(given, jnp.ones(2), TIES, Options(density=0.7), None).tolist()
      [3.0, 0.0, 3.0]

    References:
      Yadav et al., TIES-Merging, arXiv 2306.01708. Yu et al., DARE, arXiv 2311.03099.
    """
    thinned = [_thinned(tensor, i, rule, options, key) for i, tensor in enumerate(tensors)]
    longest = max(tensor.shape[0] for tensor in thinned)
    stacked = jnp.stack([_filled(tensor, longest) for tensor in thinned])
    weighted = stacked * weights.reshape(-1, *[1] * (stacked.ndim - 1))
    if not rule.elect:
        return weighted.sum(0)
    agreeing = majority(stacked, options.majority_sign)
    return (weighted * agreeing).sum(0) / jnp.maximum(agreeing.sum(0), 1)


def majority(stacked: Array, how: str) -> Array:
    """Which entries of `[tensors, ...]` have the sign of the sum (`total`), or of most tensors (`frequency`)."""
    signs = jnp.sign(stacked)
    elected = (stacked if how == "total" else signs).sum(0, keepdims=True)
    return signs == jnp.where(elected >= 0, 1, -1)


def kept(tensor: Array, count: int) -> Array:
    """Which entries are the `count` largest in magnitude; of equal ones the first.

    Bisection on the bits, whose order is that of the magnitudes: a pass over the entries for each bit, where sorting
    takes about fifty times as long.

    Example:
      >>> kept(jnp.float32([1, -3, 2, -2]), 2).tolist()
      [False, True, True, False]
    """
    if count == 0:
        return jnp.zeros(tensor.shape, bool)
    width = jnp.finfo(tensor.dtype).bits
    unsigned = jnp.dtype(f"uint{width}")
    bits = jax.lax.bitcast_convert_type(jnp.abs(tensor), unsigned).reshape(-1)

    def step(i: Array, least: Array) -> Array:
        tried = least | (jnp.ones((), unsigned) << (width - 2 - i).astype(unsigned))
        return jnp.where((bits >= tried).sum() >= count, tried, least)

    least = jax.lax.fori_loop(0, width - 1, step, jnp.zeros((), unsigned))
    above, level = bits > least, bits == least
    return (above | (level & (jnp.cumsum(level) <= count - above.sum()))).reshape(tensor.shape)


def _thinned(tensor: Array, position: int, rule: Rule, options: Options, key: Array | None) -> Array:
    if rule.thin == "none" or options.density >= 1:
        return tensor
    if rule.thin == "smallest":
        return jnp.where(kept(tensor, int(options.density * tensor.size)), tensor, 0)
    assert key is not None, "checked before anything is traced"
    chosen = jax.random.bernoulli(jax.random.fold_in(key, position), options.density, tensor.shape)
    return jnp.where(chosen, tensor / options.density, 0)


def _filled(tensor: Array, length: int) -> Array:
    return jnp.pad(tensor, [(0, length - tensor.shape[0]), *[(0, 0)] * (tensor.ndim - 1)])
