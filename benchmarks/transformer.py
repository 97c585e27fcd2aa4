"""The model that is measured: a plain decoder-only transformer in Flax linen, as a user would write it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of a batch of tokens."""

    layers: int = 4
    width: int = 512
    hidden: int = 2048
    vocabulary: int = 2048
    heads: int = 8
    batch: int = 4
    length: int = 256

    @property
    def tokens(self) -> int:
        """Tokens in a batch."""
        return self.batch * self.length

    def linears(self) -> list[tuple[int, int]]:
        """Inputs and outputs of every linear layer: q, k, v, o, gate, up and down of each block."""
        attention = [(self.width, self.width)] * 4
        return self.layers * [
            *attention,
            (self.width, self.hidden),
            (self.width, self.hidden),
            (self.hidden, self.width),
        ]


LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
Dense = Callable[..., nn.Module]


class Attention(nn.Module):
    """Causal multi-head attention."""

    heads: int
    dense: Dense = nn.Dense

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        q, k, v = (self.dense(width, use_bias=False, name=name)(x) for name in "qkv")
        q, k, v = (y.reshape(*y.shape[:-1], self.heads, -1) for y in (q, k, v))
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return self.dense(width, use_bias=False, name="o")(y.reshape(x.shape))


class Block(nn.Module):
    """A pre-norm block: attention, then a gated feed-forward layer."""

    shape: Shape
    dense: Dense = nn.Dense

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + Attention(self.shape.heads, self.dense, name="attention")(nn.RMSNorm(name="norm_1")(x))
        y = nn.RMSNorm(name="norm_2")(x)
        gate = self.dense(self.shape.hidden, use_bias=False, name="gate")(y)
        up = self.dense(self.shape.hidden, use_bias=False, name="up")(y)
        return x + self.dense(self.shape.width, use_bias=False, name="down")(nn.silu(gate) * up)


class _Step(nn.Module):
    """A block with the signature of a scan body."""

    shape: Shape
    dense: Dense = nn.Dense

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return Block(self.shape, self.dense, name="block")(x), None


class Transformer(nn.Module):
    """Token logits; the output head is the embedding table.

    Attributes:
      shape: sizes.
      dense: what the linear layers are made of.
      scan: whether the layers are stacked under `nn.scan` instead of unrolled.
    """

    shape: Shape
    dense: Dense = nn.Dense
    scan: bool = False

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(self.shape.vocabulary, self.shape.width, name="embed")
        x = embed(tokens)
        if self.scan:
            stack = nn.scan(_Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.shape.layers)
            x, _ = stack(self.shape, self.dense, name="layers")(x, None)
        else:
            for layer in range(self.shape.layers):
                x = Block(self.shape, self.dense, name=f"layer_{layer}")(x)
        return embed.attend(nn.RMSNorm(name="norm")(x))


def next_token_loss(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Mean cross-entropy of every token given those before it."""
    logs = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(logs, tokens[:, 1:, None], axis=-1).mean()


def token_batch(shape: Shape) -> jax.Array:
    """Random tokens."""
    return jax.random.randint(jax.random.key(1), (shape.batch, shape.length), 0, shape.vocabulary)


def initial(model: nn.Module, shape: Shape) -> Any:
    """Initial variables of a model."""
    return jax.jit(model.init)(jax.random.key(0), token_batch(shape))
