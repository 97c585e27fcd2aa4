"""The same training step elsewhere: written by hand, with `flax.nnx.LoRALinear`, and with qwix."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from benchmarks.steps import Step, descend
from benchmarks.transformer import LINEARS, Shape, Transformer, initial, next_token_loss, token_batch


class FlatDense(nn.Dense):
    """`nn.Dense` on tokens flattened to one axis, which makes its weight gradient twice as fast."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)


class HandDense(nn.Dense):
    """LoRA written into the layer: tokens flattened, both factors stored rank first."""

    rank: int = 8

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        a = self.variable("lora", "a", lambda: jnp.ones((self.rank, x.shape[-1])) / x.shape[-1]).value
        b = self.variable("lora", "b", lambda: jnp.zeros((self.rank, self.features))).value
        flat = x.reshape(-1, x.shape[-1])
        y = flat @ jax.lax.stop_gradient(kernel) + (flat @ a.T) @ (2.0 * b)
        return y.reshape(*x.shape[:-1], -1)


def by_hand(shape: Shape, rank: int) -> Step:
    """The best that plain autodiff gives when the model itself is rewritten."""

    def dense(features: int, **kwargs: Any) -> nn.Module:
        return HandDense(features, rank=rank, **kwargs)

    model, tokens = Transformer(shape, dense), token_batch(shape)
    variables = initial(model, shape)

    def loss(factors: Any, params: Any, tokens: Any) -> Any:
        return next_token_loss(model.apply({"params": params, "lora": factors}, tokens), tokens)

    return descend("hand-written", loss, variables["lora"], variables["params"], tokens)


def qwix_step(shape: Shape, rank: int) -> Step:
    """qwix on the unchanged linen model."""
    import qwix

    model, tokens = Transformer(shape), token_batch(shape)
    paths = f".*/({'|'.join(LINEARS)})"
    model = qwix.apply_lora_to_model(model, qwix.LoraProvider(module_path=paths, rank=rank, alpha=2.0 * rank))
    leaves = flatten_dict(initial(model, shape))
    factors = {path: leaf for path, leaf in leaves.items() if "lora" in path[-1]}
    params = {path: leaf for path, leaf in leaves.items() if path not in factors}

    def loss(factors: Any, params: Any, tokens: Any) -> Any:
        return next_token_loss(model.apply(unflatten_dict({**params, **factors}), tokens), tokens)

    return descend("qwix", loss, factors, params, tokens)


class _NnxBlock(nnx.Module):
    def __init__(self, shape: Shape, rank: int, rngs: nnx.Rngs):
        def linear(inputs: int, outputs: int) -> nnx.Module:
            return nnx.LoRALinear(inputs, outputs, lora_rank=rank, use_bias=False, rngs=rngs)

        self.heads = shape.heads
        self.norms = nnx.List([nnx.RMSNorm(shape.width, rngs=rngs) for _ in range(2)])
        self.q, self.k, self.v, self.o = (linear(shape.width, shape.width) for _ in range(4))
        self.gate, self.up = (linear(shape.width, shape.hidden) for _ in range(2))
        self.down = linear(shape.hidden, shape.width)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norms[0](x)
        q, k, v = (layer(y).reshape(*y.shape[:-1], self.heads, -1) for layer in (self.q, self.k, self.v))
        x = x + self.o(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))
        y = self.norms[1](x)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y))


class _NnxTransformer(nnx.Module):
    def __init__(self, shape: Shape, rank: int, rngs: nnx.Rngs):
        self.embed = nnx.Embed(shape.vocabulary, shape.width, rngs=rngs)
        self.blocks = nnx.List([_NnxBlock(shape, rank, rngs) for _ in range(shape.layers)])
        self.norm = nnx.RMSNorm(shape.width, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.norm(x))


def nnx_step(shape: Shape, rank: int) -> Step:
    """The same model in NNX, built from `nnx.LoRALinear`."""
    tokens = token_batch(shape)
    graph, factors, rest = nnx.split(_NnxTransformer(shape, rank, nnx.Rngs(0)), nnx.LoRAParam, ...)

    def loss(factors: Any, rest: Any, tokens: Any) -> Any:
        return next_token_loss(nnx.merge(graph, factors, rest)(tokens), tokens)

    return descend("flax.nnx.LoRALinear", loss, factors, rest, tokens)
