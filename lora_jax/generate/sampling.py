"""Choosing the next token: greedy, or drawn at a temperature from the tokens that top-k, top-p and min-p leave."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lora_jax.errors import ConfigError


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen: a pytree of numbers, so that others need no other program.

    Filters act in the order below, each on what the former leaves, and at least one token is left.

    Attributes:
      temperature: what logits are divided by; 0 takes the most probable token, whatever else is given.
      top_k: how many of the most probable tokens are left; 0 for all.
      top_p: the least of the most probable tokens whose probabilities sum to it are left; 1 for all.
      min_p: tokens less probable than this share of the most probable one are left out; 0 for none.

    Raises:
      ConfigError: by `checked`, a number is out of range.

    Example:
      >>> Sampling(temperature=0.7, top_p=0.9).checked().top_k
      0
    """

    temperature: jax.Array | float = 0.0
    top_k: jax.Array | int = 0
    top_p: jax.Array | float = 1.0
    min_p: jax.Array | float = 0.0

    def checked(self) -> "Sampling":
        """The same.

        Raises:
          ConfigError: a number is out of range.
        """
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature={self.temperature} must be 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise ConfigError(f"top_k={self.top_k} must be 0 (all tokens) or how many are left")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p={self.min_p} must be from 0 to 1")
        return self


def sample(key: jax.Array, logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Choose a token for every row.

    Args:
      key: for all rows.
      logits: `[batch, vocabulary]`.
      sampling: how; each of its numbers may be traced.

    Returns:
      Tokens `[batch]`, int32.

    Example:
      >>> sample(jax.random.key(0), jnp.array([[0.1, 2.0, -1.0]]), Sampling()).tolist()
      [1]
    """
    logits = logits.astype(jnp.float32)
    greedy = logits.argmax(-1)

    def drawn() -> jax.Array:
        warm = logits / jnp.maximum(sampling.temperature, 1e-6)
        return jax.random.categorical(key, jnp.where(kept(warm, sampling), warm, -jnp.inf))

    # A branch and not a choice: greedy decoding sorts nothing.
    return jax.lax.cond(jnp.asarray(sampling.temperature) > 0, drawn, lambda: greedy).astype(jnp.int32)


def kept(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Which tokens top-k, top-p and min-p leave, of logits that are divided by the temperature already.

    Args:
      logits: `[batch, vocabulary]` float32.
      sampling: the filters.

    Example:
      >>> kept(jnp.array([[1.0, 3.0, 2.0]]), Sampling(top_k=2)).tolist()
      [[False, True, True]]
    """
    order = jnp.argsort(logits, axis=-1, descending=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    rank = jax.lax.broadcasted_iota(jnp.int32, ranked.shape, ranked.ndim - 1)
    left = (rank < sampling.top_k) | (jnp.asarray(sampling.top_k) <= 0)
    shares = jax.nn.softmax(jnp.where(left, ranked, -jnp.inf), axis=-1)
    # Of a token the more probable ones: it is left while they do not reach the sum.
    left &= (jnp.cumsum(shares, axis=-1) - shares < sampling.top_p) | (jnp.asarray(sampling.top_p) >= 1)
    left &= ranked - ranked[..., :1] >= jnp.log(sampling.min_p)
    left |= rank == 0
    return jnp.put_along_axis(jnp.zeros_like(left), order, left, axis=-1, inplace=False)
