"""Flax NNX modules, split into functions; nothing about them is changed."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx

from lora_jax.nnx import functional
from table.registry import Draw, Model, case


def layer(name: str, make: Callable[..., nnx.Module], sites: dict[str, str], *shapes: Any, **facts: Any) -> None:
    """Add a module applied to random arrays (or to integers, given as arrays)."""

    def build(draw: Draw) -> Model:
        graph, state = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
        args = tuple(draw(*shape) if isinstance(shape, tuple) else shape for shape in shapes)
        return Model(*functional(nnx.merge(graph, draw.fill(state))), args)

    case("nnx", sites, name, **facts)(build)


affine = partial(layer, affine=True)
affine("linear", partial(nnx.Linear, 4, 3), {"kernel": "dense io"}, (2, 5, 4))
affine(
    "linear_general", partial(nnx.LinearGeneral, (3, 4), (2, 3), axis=(-2, -1)), {"kernel": "dense iioo"}, (2, 5, 3, 4)
)
affine("einsum", partial(nnx.Einsum, "btd,ndh->btnh", (2, 4, 3), (2, 3)), {"kernel": "dense oio"}, (2, 5, 4))
affine("embed", partial(nnx.Embed, 7, 4), {"embedding": "embedding io"}, jnp.array([[1, 6, 0]]))
affine("conv", partial(nnx.Conv, 2, 4, (3, 2), 2, padding="CIRCULAR"), {"kernel": "conv iiio"}, (2, 5, 6, 2))
affine(
    "conv_reflect_grouped", partial(nnx.Conv, 4, 4, (3, 2), padding="REFLECT", feature_group_count=2), {"kernel": "conv iiio"}, (2, 5, 6, 4), variant=True,
)  # fmt: skip
affine("conv_transpose", partial(nnx.ConvTranspose, 2, 3, (3, 2), (2, 1)), {"kernel": "conv iiio"}, (2, 5, 6, 2))
layer(
    "attention", partial(nnx.MultiHeadAttention, num_heads=2, in_features=4, qkv_features=6, decode=False),
    {"query/kernel": "dense ioo", "key/kernel": "dense ioo", "value/kernel": "dense ioo", "out/kernel": "dense iio"}, (2, 5, 4),
)  # fmt: skip


class Tied(nnx.Module):
    """A language model in four lines: look-up, block, tied output."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed, self.up = nnx.Embed(7, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, tokens):
        return self.embed.attend(self.embed(tokens) + jnp.tanh(self.up(self.embed(tokens))))


layer(
    "tied_attend", Tied, {"embed/embedding": "embedding io", "up/kernel": "dense io"}, jnp.array([[1, 6, 0], [3, 3, 2]])
)


class Shared(nnx.Module):
    """One module under two names, raw parameters of equal shape, and an activation of that shape."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(4, 4, rngs=rngs)
        self.again = self.first
        self.a, self.b = (nnx.Param(rngs.params.normal((4, 4))) for _ in "ab")

    def __call__(self, x):
        x = self.again(jnp.tanh(self.first(x)))
        return jnp.tanh(x @ self.a) @ self.b @ (x @ x)


layer("shared_and_raw", Shared, {"again/kernel": "dense io", "a": "dense io", "b": "dense io"}, (4, 4))


class Block(nnx.Module):
    """A residual block, to be stacked."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm, self.drop = nnx.LayerNorm(4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs, deterministic=True)
        self.up, self.down = nnx.Linear(4, 5, rngs=rngs), nnx.Linear(5, 4, rngs=rngs)

    def __call__(self, x):
        return x + self.drop(self.down(nnx.silu(self.up(self.norm(x)))))


class Stack(nnx.Module):
    """Blocks made by `nnx.vmap`, scanned by `nnx.scan`."""

    remat = False

    def __init__(self, rngs: nnx.Rngs):
        make = nnx.split_rngs(splits=3)(nnx.vmap(Block, in_axes=0, out_axes=0))
        self.layers = make(rngs)

    def __call__(self, x):
        block = nnx.remat(Block.__call__) if self.remat else Block.__call__
        return nnx.scan(lambda x, layer: block(layer, x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


class RematStack(Stack):
    """The same, with every block rematerialised."""

    remat = True


class Ensemble(Stack):
    """The blocks side by side."""

    def __call__(self, x):
        return nnx.vmap(Block.__call__, in_axes=(0, None))(self.layers, x)


STACKED = {"layers/up/kernel": "dense bio", "layers/down/kernel": "dense bio"}
layer("scan", Stack, STACKED, (2, 4))
layer("scan_of_remat", RematStack, STACKED, (2, 4))
layer("ensemble", Ensemble, STACKED, (2, 4))
layer(
    "jit",
    lambda rngs: nnx.Sequential(nnx.Linear(4, 3, rngs=rngs), nnx.jit(nnx.relu)),
    {"layers/0/kernel": "dense io"},
    (2, 4),
)
layer(
    "recurrent", lambda rngs: nnx.RNN(nnx.SimpleCell(4, 3, rngs=rngs)),
    {"cell/dense_i/kernel": "dense io", "cell/dense_h/kernel": "dense io"}, (2, 5, 4),
)  # fmt: skip
