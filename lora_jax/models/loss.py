"""The loss of every trained token, without the logits of all tokens at once."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.errors import ParameterError

Head = Callable[[jax.Array], jax.Array]


class TokenLosses(NamedTuple):
    """What `token_losses` returns.

    Attributes:
      loss: `[batch, time]` float32, nats; 0 where nothing is trained on.
      correct: `[batch, time]` bool, whether the most probable token is the target; False where nothing is trained on.
    """

    loss: jax.Array
    correct: jax.Array


class _Chunk(NamedTuple):
    """Hidden states `[chunk, width]` and what should follow them, `[chunk]`."""

    hidden: jax.Array
    targets: jax.Array


def token_losses(
    head: Head,
    hidden: jax.Array,
    targets: jax.Array,
    trained: jax.Array,
    *,
    positions: int | None = None,
    chunk: int = 256,
) -> TokenLosses:
    """Cross-entropy of the targets, with the head applied only where tokens are trained on, some positions at a time.

    Logits `[chunk, vocabulary]` are all that ever exists of them; the backward pass computes those of a chunk again.
    It is a function of `hidden` and of what `head` closes over like any other: take its gradient, or adapt it.

    Args:
      head: from hidden states `[n, width]` to logits `[n, vocabulary]`.
      hidden: `[batch, time, width]`, after the last norm.
      targets: `[batch, time]` integers, the token that should follow; of no effect where nothing is trained on.
      trained: `[batch, time]` bool.
      positions: how many tokens there is room for, a static number of at least `trained.sum()`; all of them by default.
        Batches of the same number share one compiled program. Where it is too small, every loss is NaN.
      chunk: how many positions at a time.

    Returns:
      The losses, in place. Divide their sum by `trained.sum()` for the mean.

    Raises:
      ParameterError: the shapes do not fit each other, or there is room for no position.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> hidden, kernel = jnp.ones((1, 3, 4)), jnp.eye(4, 5)
      >>> losses = token_losses(lambda x: x @ kernel, hidden, jnp.array([[0, 1, 4]]), jnp.array([[False, True, True]]))
      >>> [round(float(each), 3) for each in losses.loss[0]]
      [0.0, 1.474, 2.474]
    """
    _check(hidden, targets, trained, positions, chunk)
    count = trained.size if positions is None else min(positions, trained.size)
    chunk = min(chunk, count)
    room = -(-count // chunk) * chunk
    # The last place is one too many: what is gathered there is zero, and what is put there is dropped.
    places = jnp.flatnonzero(trained, size=room, fill_value=trained.size)
    rows = hidden.reshape(-1, hidden.shape[-1]).at[places].get(mode="fill", fill_value=0)
    wanted = targets.reshape(-1).at[places].get(mode="fill", fill_value=0)
    chunks = jax.tree.map(lambda each: each.reshape(-1, chunk, *each.shape[1:]), _Chunk(rows, wanted))
    found = _over_chunks(head, chunks)
    loss, correct = (each.reshape(-1) for each in found)
    loss = jnp.where(trained.sum() > count, jnp.nan, loss)
    flat = TokenLosses(jnp.zeros(trained.size, loss.dtype), jnp.zeros(trained.size, bool))
    put = (whole.at[places].set(part, mode="drop") for whole, part in zip(flat, (loss, correct), strict=True))
    return TokenLosses(*(each.reshape(trained.shape) for each in put))


def _over_chunks(head: Head, chunks: _Chunk) -> TokenLosses:
    if len(chunks.targets) == 1:
        return jax.tree.map(lambda each: each[None], _of_chunk(head, jax.tree.map(lambda each: each[0], chunks)))

    def step(carry: None, each: _Chunk) -> tuple[None, TokenLosses]:
        return None, _of_chunk(head, each)

    return jax.lax.scan(jax.checkpoint(step, prevent_cse=False), None, chunks)[1]


def _of_chunk(head: Head, each: _Chunk) -> TokenLosses:
    logits = head(each.hidden).astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, each.targets[:, None], axis=-1)[:, 0]
    loss = jax.nn.logsumexp(logits, axis=-1) - chosen
    return TokenLosses(loss, logits.argmax(-1) == each.targets)


def _check(hidden: jax.Array, targets: jax.Array, trained: jax.Array, positions: int | None, chunk: int) -> None:
    if hidden.ndim != 3 or targets.shape != hidden.shape[:2] or trained.shape != hidden.shape[:2]:
        raise ParameterError(
            f"hidden {hidden.shape}, targets {targets.shape} and trained {trained.shape} must be [batch, time, width], "
            "[batch, time] and [batch, time]"
        )
    if chunk < 1 or (positions is not None and positions < 1):
        raise ParameterError(f"chunk={chunk} and positions={positions} must be at least 1")
