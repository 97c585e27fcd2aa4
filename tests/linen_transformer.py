"""A compact decoder-only transformer over bytes, in Flax linen: somebody else's model, for tests.

RMSNorm before each block, rotary positions, grouped-query attention, SwiGLU, and an embedding that is also the
output head. The layers are one `nn.scan` (parameters stacked on axis 0, one compiled body) or, with `scan=False`,
unrolled into `layers_0`, `layers_1`, ... Given a `Cache`, the model continues a text instead of starting one.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

VOCABULARY = 256
"""Every byte is a token, so every text is in the vocabulary and nats per token are nats per byte."""

_Past = tuple[jax.Array, jax.Array] | None


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Shape of a `Transformer`.

    Attributes:
      layers: number of blocks.
      width: size of the residual stream.
      heads: query heads; they share `width` evenly, an even number of features each.
      kv_heads: key and value heads, each serving `heads / kv_heads` query heads.
      hidden: inner size of the SwiGLU block.
      scan: stack the layers under `nn.scan` rather than unroll them.
      remat: recompute each block in the backward pass instead of keeping its activations.
      dtype: dtype of the activations. Parameters, the loss of precision in norms and softmax, and logits are float32.

    Raises:
      ValueError: the sizes do not fit together.

    Example:
      >>> TransformerConfig(width=64, heads=4).head_dim
      16
    """

    layers: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int = 2
    hidden: int = 352
    scan: bool = True
    remat: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("layers", "width", "heads", "kv_heads", "hidden")}
        if any(size < 1 for size in sizes.values()):
            raise ValueError(f"every size of a transformer must be at least 1, got {sizes}")
        if self.width % (2 * self.heads):
            raise ValueError(f"width must be a multiple of 2 * heads, got width={self.width}, heads={self.heads}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}")

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.width // self.heads


class Cache(NamedTuple):
    """Keys and values of the text so far, stacked over layers, and how many positions they fill."""

    keys: jax.Array
    values: jax.Array
    filled: jax.Array

    @classmethod
    def empty(cls, config: TransformerConfig, batch: int, length: int) -> "Cache":
        """Room for `length` bytes of each of `batch` texts."""
        shape = (config.layers, batch, length, config.kv_heads, config.head_dim)
        return cls(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype), jnp.int32(0))


class Transformer(nn.Module):
    """Decoder-only transformer over bytes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> model = Transformer(TransformerConfig(layers=2, width=16, heads=2, kv_heads=1, hidden=32))
      >>> tokens = jnp.frombuffer(b"hello", jnp.uint8)[None]
      >>> variables = model.init(jax.random.key(0), tokens)
      >>> model.apply(variables, tokens).shape
      (1, 5, 256)
      >>> variables["params"]["layers"]["attn"]["query"]["kernel"].shape  # one stack for both layers
      (2, 16, 2, 8)
    """

    config: TransformerConfig

    @nn.compact
    def __call__(self, tokens: jax.Array, cache: Cache | None = None) -> Any:
        """Predict the next byte at every position.

        Args:
          tokens: `[batch, time]` bytes, of any integer dtype.
          cache: the text that the tokens continue.

        Returns:
          Float32 logits `[batch, time, 256]`; given a cache, also the cache with the tokens added.
        """
        dtype = self.config.dtype
        embed = nn.Embed(VOCABULARY, self.config.width, dtype=dtype, embedding_init=_EMBEDDING_INIT, name="embed")
        x = embed(tokens.astype(jnp.int32))
        start = jnp.int32(0) if cache is None else cache.filled
        x, past = self._layers(x, None if cache is None else (cache.keys, cache.values), start)
        logits = embed.attend(nn.RMSNorm(dtype=dtype, name="norm")(x)).astype(jnp.float32)
        return logits if past is None else (logits, Cache(*past, start + tokens.shape[1]))

    def _layers(self, x: jax.Array, past: _Past, start: jax.Array) -> tuple[jax.Array, _Past]:
        config = self.config
        block: Any = nn.remat(Block, prevent_cse=not config.scan) if config.remat else Block
        if config.scan:
            axes: Any = (0, nn.broadcast)
            stack = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=axes,
                length=config.layers,
            )
            return stack(config, name="layers")(x, past, start)
        filled = []
        for index in range(config.layers):
            layer_past = jax.tree.map(lambda stacked, index=index: stacked[index], past)
            x, layer_past = block(config, name=f"layers_{index}")(x, layer_past, start)
            filled.append(layer_past)
        return x, jax.tree.map(lambda *layers: jnp.stack(layers), *filled)


class Block(nn.Module):
    """One layer: attention and a feed-forward block, each added to the residual stream."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array, past: _Past, start: jax.Array) -> tuple[jax.Array, _Past]:
        """Map activations `[batch, time, width]`, and extend this layer's keys and values if there are some."""
        dtype = self.config.dtype
        mixed, past = Attention(self.config, name="attn")(nn.RMSNorm(dtype=dtype, name="attn_norm")(x), past, start)
        x = x + mixed
        return x + SwiGLU(self.config, name="mlp")(nn.RMSNorm(dtype=dtype, name="mlp_norm")(x)), past


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array, past: _Past, start: jax.Array) -> tuple[jax.Array, _Past]:
        """Mix positions; `start` is the position of the first."""
        config = self.config

        def heads(name: str, count: int) -> jax.Array:
            return nn.DenseGeneral((count, config.head_dim), name=name, **_dense(config))(x)

        positions = start + jnp.arange(x.shape[1])
        query = rotary(heads("query", config.heads), positions)
        key, value = rotary(heads("key", config.kv_heads), positions), heads("value", config.kv_heads)
        mask = None
        if past is not None:
            key = jax.lax.dynamic_update_slice_in_dim(past[0], key, start, axis=1)
            value = jax.lax.dynamic_update_slice_in_dim(past[1], value, start, axis=1)
            past = key, value
            mask = (jnp.arange(key.shape[1])[None, :] <= positions[:, None])[None, None]
        mixed = jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=mask is None)
        return nn.DenseGeneral(config.width, axis=(-2, -1), name="out", **_dense(config))(mixed), past


class SwiGLU(nn.Module):
    """Gated feed-forward block: `down(silu(gate(x)) * up(x))`."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map activations `[..., width]`."""
        gate = nn.Dense(self.config.hidden, name="gate", **_dense(self.config))(x)
        up = nn.Dense(self.config.hidden, name="up", **_dense(self.config))(x)
        return nn.Dense(self.config.width, name="down", **_dense(self.config))(nn.silu(gate) * up)


def rotary(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotate pairs of features by angles proportional to the position.

    Args:
      x: `[batch, time, heads, head_dim]`.
      positions: `[time]`.

    References:
      Su et al., RoFormer, arXiv 2104.09864.
    """
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-jnp.arange(half) / half)
    angles = (positions[:, None] * frequencies[None, :])[None, :, None, :]
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)


_EMBEDDING_INIT = nn.initializers.normal(0.02)


def _dense(config: TransformerConfig) -> dict[str, Any]:
    return {"use_bias": False, "dtype": config.dtype, "dot_general": _flat_dot_general}


def _flat_dot_general(x: jax.Array, kernel: jax.Array, dimensions: Any, **options: Any) -> jax.Array:
    """`lax.dot_general` with the leading axes of `x` made one.

    XLA's CPU backend takes about twice as long for a kernel's gradient when batch and time are contracted as two axes.
    """
    (axes, kernel_axes), batch = dimensions
    lead = x.ndim - len(axes)
    flat = x.reshape(-1, *x.shape[lead:])
    dimensions = (tuple(axis - lead + 1 for axis in axes), kernel_axes), batch
    out = jax.lax.dot_general(flat, kernel, dimensions, **options)
    return out.reshape(*x.shape[:lead], *out.shape[1:])
