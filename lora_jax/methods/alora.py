"""aLoRA: factors that act from an invocation sequence on, so that what comes before it is the base's own."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import jax.numpy as jnp

from lora_jax.adapter.adapter import Adapter
from lora_jax.adapter.factors import Array
from lora_jax.adapter.registry import Start, register_method
from lora_jax.adapter.updates import LowRank, pytree
from lora_jax.errors import ConfigError


@register_method("alora", lora_bias=False)
@pytree("site", "dropout", "invocation_tokens")
@dataclass(frozen=True, kw_only=True)
class ALora(LowRank):
    """Low-rank factors that act only on tokens from the last invocation sequence of an example on.

    Keys and values of what comes before are those of the base, and a cache of them serves every aLoRA adapter. Which
    tokens that are, the weights cannot know: run it with `lora_jax.route` and the ids of `lora_jax.methods.invoked`.
    Adapted without them, or merged, it is refused. In PEFT files it is LoRA with `alora_invocation_tokens`.

    Differs from PEFT, which counts from the end of the padded row: here padding on either side makes no difference.

    Attributes:
      a, b, scale, site, dropout, a_start, b_start: as in `LowRank`.
      invocation_tokens: the sequence; static.

    Example:
      >>> import jax, lora_jax as lora
      >>> params = {"embed": jnp.eye(9, 4), "w": jnp.ones((4, 3))}
      >>> fn, tokens = lambda params, tokens: params["embed"][tokens] @ params["w"], jnp.array([[1, 7, 8, 2]])
      >>> sites = lora.find_sites(fn, params, tokens)
      >>> config = lora.LoraConfig(method="alora", invocation_tokens=(7, 8), targets="w")
      >>> adapter = lora.init(jax.random.key(0), config, params, sites)
      >>> ids = lora.methods.invoked(tokens, adapter)
      >>> ids
      Array([[0, 1, 1, 1]], dtype=int32)
      >>> lora.route(fn, token_axes=1)(params, [adapter], ids, tokens).shape
      (1, 4, 3)

    References:
      Greenewald et al., Activated LoRA, arXiv 2504.12397.
    """

    invocation_tokens: tuple[int, ...]
    waits: ClassVar[str] = (
        "an aLoRA update, which acts only after its invocation tokens: run lora.route(fn, token_axes=1) with the ids "
        "of lora.methods.invoked(tokens, adapter)"
    )

    @classmethod
    def start(cls, given: Start) -> Self:
        """Factors from the config's initialiser."""
        if given.site.kind == "conv":
            raise ConfigError("aLoRA acts on tokens, and a convolution reads several at once; leave it out: exclude=")
        return cls.after(LowRank.start(given), given.invocation_tokens)

    @classmethod
    def after(cls, factors: LowRank, sequence: Sequence[int]) -> Self:
        """The given factors, which act after a sequence of tokens."""
        known = {field.name: getattr(factors, field.name) for field in fields(factors)}
        return cls(**known, invocation_tokens=tuple(sequence))


def invoked(tokens: Any, invocation: Adapter | Sequence[int], slot: Any = 1) -> Array:
    """Ids for `lora_jax.route`: `slot` from the last invocation sequence of each example on, 0 before it.

    An example without the sequence is the base's. While generating, take the ids of the prompt: tokens that come after
    an invocation have the slot of the last of them.

    Args:
      tokens: `[batch, tokens]` integers.
      invocation: the sequence, or an adapter that knows it.
      slot: where the adapter is in the bank: a number, or `[batch]` of them, for examples with different adapters.

    Returns:
      `[batch, tokens]` int32.

    Raises:
      ConfigError: the sequence is empty, the adapter has none, or its updates have different ones.

    Example:
      >>> invoked(jnp.array([[5, 1, 5, 2], [3, 3, 3, 3]]), (5,))
      Array([[0, 0, 1, 1],
             [0, 0, 0, 0]], dtype=int32)
    """
    sequence = _sequence(invocation)
    tokens = jnp.asarray(tokens)
    length = tokens.shape[1]
    places = jnp.arange(length)
    ahead = jnp.pad(tokens, ((0, 0), (0, len(sequence))))
    begins = jnp.broadcast_to(places <= length - len(sequence), tokens.shape)  # The whole sequence is in the row.
    for offset, token in enumerate(sequence):
        begins = begins & (ahead[:, offset : offset + length] == token)
    places = jnp.broadcast_to(places, tokens.shape)
    last = jnp.max(jnp.where(begins, places, -1), axis=1, keepdims=True)
    slots = jnp.broadcast_to(jnp.asarray(slot, jnp.int32).reshape(-1, 1), (len(tokens), 1))
    return jnp.where((last >= 0) & (places >= last), slots, 0)


def _sequence(invocation: Adapter | Sequence[int]) -> tuple[int, ...]:
    given = invocation
    if isinstance(given, Adapter):
        found = {update.invocation_tokens for update in given.values() if isinstance(update, ALora)}
        if len(found) != 1:
            raise ConfigError(f"This adapter has {len(found)} invocation sequences: {sorted(found)}; give one")
        (given,) = found
    if not len(given):
        raise ConfigError("The invocation sequence is empty")
    return tuple(map(int, given))
