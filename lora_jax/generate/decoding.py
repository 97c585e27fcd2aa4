"""Continuing token by token: compiled programs that read prompts into a cache, and write a few tokens more."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.generate.sampling import Sampling, sample
from lora_jax.models.cache import Cache

Forward = Callable[[Any, jax.Array, jax.Array, jax.Array, Cache], tuple[jax.Array, Cache]]
"""`(weights, tokens, positions, segments, cache)` to logits after the last token, `[batch, vocabulary]`, and the cache.

The weights are whatever it needs: parameters, or those with an adapter, or with a bank and the slots of the rows.
"""

_SHORT, _LONG = 32, 256
"""Tokens that are read at once, of prompts up to the longer of the two and beyond."""


class State(NamedTuple):
    """Where the texts are.

    Attributes:
      cache: of all tokens but the last.
      logits: `[batch, vocabulary]`, what comes next.
      done: `[batch]`, whether a text has ended.
      key: for drawing tokens.
    """

    cache: Cache
    logits: jax.Array
    done: jax.Array
    key: jax.Array


class Prompts(NamedTuple):
    """Prompts of different lengths as one matrix, the shorter ones padded on the left.

    Attributes:
      tokens: `[batch, time]`.
      lengths: `[batch]`.
      width: how many are read at once; divides `time`.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    width: int


def padded(prompts: Sequence[Sequence[int]]) -> Prompts:
    """Prompts as one matrix whose width is a multiple of how many tokens are read at once.

    >>> padded([[5, 6], [7]]).tokens[:, -3:].tolist()
    [[0, 5, 6], [0, 0, 7]]
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    width = _SHORT if lengths.max() <= _LONG else _LONG
    time = -(-int(lengths.max()) // width) * width
    tokens = np.zeros((len(prompts), time), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[time - len(prompt) :] = prompt
    return Prompts(tokens, lengths, width)


def places(prompts: Prompts, more: int, limit: int = 0) -> int:
    """Places of a cache for prompts and `more` tokens, of which there are few kinds so that few programs are compiled.

    Args:
      prompts: the prompts.
      more: how many tokens may follow.
      limit: positions of the model; 0 for any number.

    Example:
      >>> places(padded([[1, 2, 3]]), 40)
      128
    """
    needed = prompts.tokens.shape[1] + more
    room = max(128, 1 << (needed - 1).bit_length())
    return min(room, max(needed, limit)) if limit else room


@partial(jax.jit, static_argnames=("forward", "width"), donate_argnames="cache")
def read(
    forward: Forward,
    weights: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    cache: Cache,
    key: jax.Array,
    *,
    width: int,
) -> State:
    """Read prompts into a cache, `width` tokens at a time; how many times is no part of the program.

    Args:
      forward: the model; one compiled program for each.
      weights: what it needs.
      tokens: `[batch, room]` of which the last `time` are the prompts' as `padded` gives them.
      lengths: `[batch]`, of the prompts.
      cache: empty, or of the texts that they go on with; then prompts fill whole parts of `width`.
      key: for drawing tokens.
      width: how many at once.
    """
    room, time, before = tokens.shape[1], lengths.max(), cache.positions
    first = room - (time + width - 1) // width * width

    def step(carry: tuple[jax.Array, Cache, jax.Array]) -> tuple[jax.Array, Cache, jax.Array]:
        start, cache, _ = carry
        part = jax.lax.dynamic_slice_in_dim(tokens, start, width, axis=1)
        positions = (start + jnp.arange(width))[None, :] - (room - lengths)[:, None]
        own = jnp.maximum(positions, 0) + before[:, None]
        logits, cache = forward(weights, part, own, (positions >= 0).astype(jnp.int32), cache)
        return start + width, cache, logits

    shape = jax.eval_shape(step, (first, cache, None))[2]
    start = (first, cache, jnp.zeros(shape.shape, shape.dtype))
    _, cache, logits = jax.lax.while_loop(lambda carry: carry[0] < room, step, start)
    return State(cache, logits, jnp.zeros(lengths.shape, bool), key)


@partial(jax.jit, static_argnames=("forward", "steps"), donate_argnames="state")
def write(
    forward: Forward,
    weights: Any,
    state: State,
    sampling: Sampling,
    ends: jax.Array,
    limit: jax.Array,
    *,
    steps: int,
) -> tuple[jax.Array, State]:
    """Write up to `steps` tokens more, and no more once all texts have ended.

    Args:
      forward: the model.
      weights: what it needs.
      state: where the texts are.
      sampling: how tokens are chosen.
      ends: `[n]`, tokens that end a text.
      limit: how many tokens at most, a number that is no part of the program.
      steps: room for so many.

    Returns:
      Tokens `[batch, steps]`, with -1 where none was written, and the state after them.
    """
    batch = state.done.shape[0]

    def more(carry: tuple[jax.Array, jax.Array, State]) -> jax.Array:
        return (carry[0] < jnp.minimum(steps, limit)) & ~carry[2].done.all()

    def step(carry: tuple[jax.Array, jax.Array, State]) -> tuple[jax.Array, jax.Array, State]:
        index, written, state = carry
        key, now = jax.random.split(state.key)
        token = sample(now, state.logits, sampling)
        column = jnp.where(state.done, -1, token)[:, None]
        written = jax.lax.dynamic_update_slice(written, column, (0, index))
        done = state.done | (token[:, None] == ends[None, :]).any(-1)
        positions, segments = state.cache.positions[:, None], jnp.ones((batch, 1), jnp.int32)
        logits, cache = forward(weights, token[:, None], positions, segments, state.cache)
        return index + 1, written, State(cache, logits, done, key)

    empty = jnp.full((batch, steps), -1, jnp.int32)
    _, written, state = jax.lax.while_loop(more, step, (jnp.int32(0), empty, state))
    return written, state
