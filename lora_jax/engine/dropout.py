"""Dropout: each low-rank term drops elements of its own input, with a key from the parameter's path and use.

Only the input of the first factor is dropped, never the weight, so that merging needs no correction. A loop folds the
number of the iteration into the keys of its body; an adapter without a key has no dropout.
"""

from collections.abc import Sequence
from typing import Any
from zlib import crc32

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.adapter.adapter import Adapter
from lora_jax.engine.context import Context
from lora_jax.engine.meshes import explicit, varying
from lora_jax.engine.weight import Labelled, Term, Weight
from lora_jax.errors import ConfigError


def dropout_keys(given: Any, adapters: Sequence[Adapter]) -> tuple[Any, ...]:
    """A key for each adapter, of one or several that a call was given; none at all without dropout.

    Raises:
      ConfigError: there are several, and not as many as adapters.
    """
    drops = any(update.dropout for adapter in adapters for update in adapter.values())
    if isinstance(given, (tuple, list)):
        if len(given) != len(adapters):
            raise ConfigError(
                f"lora_key has {len(given)} keys for {len(adapters)} adapters: give one for each, or a single one"
            )
        return tuple(given) if drops else ()
    if given is None or not drops:
        return ()
    if jnp.issubdtype(given.dtype, jax.dtypes.prng_key) and given.ndim:
        raise ConfigError(f"lora_key has shape {given.shape}: give one key, or a tuple of them, tuple(lora_key)")
    return tuple(jax.random.fold_in(given, number) for number in range(len(adapters)))


def drops(ctx: Context, term: Term) -> bool:
    """Whether a term has dropout here."""
    return bool(term.dropout and ctx.keys) and ctx.keys[term.adapter] is not None


def masks(ctx: Context, weight: Weight, x: Labelled) -> list[Any]:
    """For each term the elements of the activation that its own dropout keeps; None for all."""
    return [
        _survivors(x, term.dropout, _key(ctx, term.path, term.adapter)) if drops(ctx, term) else None
        for term in weight.terms
    ]


def inputs(ctx: Context, weight: Weight, x: Labelled) -> list[Labelled]:
    """What each term reads: the activation, with that term's own dropout where there is a key."""
    pairs = zip(weight.terms, masks(ctx, weight, x), strict=True)
    return [dropped(x, term.dropout, mask) for term, mask in pairs]


def dropped(x: Labelled, rate: float, mask: Any) -> Labelled:
    """The activation with survivors scaled up, to keep the expectation, and the rest zero; all of it without mask."""
    if mask is None:
        return x
    return Labelled(jnp.where(mask, x.array / (1.0 - rate), jnp.zeros((), x.array.dtype)), x.axes)


def _key(ctx: Context, path: str, adapter: int) -> Any:
    """The key of this use: folded from the adapter's key in this region by parameter path and use."""
    uses = sum(1 for known, _ in ctx.log.order if known == path)
    index = ctx.log.order.setdefault((path, ctx.trail), uses)
    key = ctx.keys[adapter]
    for part in (crc32(path.encode()), index):
        key = jax.random.fold_in(key, part)
    return key


def _survivors(x: Labelled, rate: float, key: Any) -> Any:
    """Which elements of the activation dropout keeps.

    Inside a `shard_map` that tracks varying values (`check_vma`), every shard of the activation draws for itself.
    """
    for axis in varying(x.array):
        key = jax.random.fold_in(key, lax.axis_index(axis))
    return jax.random.bernoulli(key, 1.0 - rate, x.array.shape, out_sharding=explicit(x.array))
