"""Haiku transforms."""

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

from table.registry import Draw, Model, case


def layer(name: str, forward: Any, sites: dict[str, str], *shapes: Any, **facts: Any) -> None:
    """Add a transformed function of random arrays (or of integers, given as arrays)."""

    def build(draw: Draw) -> Model:
        model = hk.without_apply_rng(hk.transform(forward))
        args = tuple(draw(*shape) if isinstance(shape, tuple) else shape for shape in shapes)
        return Model(model.apply, draw.fill(jax.eval_shape(model.init, jax.random.key(0), *args)), args)

    case("haiku", sites, name, **facts)(build)


layer("linear", lambda x: hk.Linear(3)(x), {"linear/w": "dense io"}, (2, 5, 4), affine=True)
layer("conv2d", lambda x: hk.Conv2D(4, (3, 2), 2)(x), {"conv2_d/w": "conv iiio"}, (2, 5, 6, 2), affine=True)
layer(
    "conv_transpose",
    lambda x: hk.Conv1DTranspose(3, 3, 2)(x),
    {"conv1_d_transpose/w": "conv ioi"},
    (2, 5, 2),
    affine=True,
)
layer("embed", lambda t: hk.Embed(7, 4)(t), {"embed/embeddings": "embedding io"}, jnp.array([[1, 6, 0]]), affine=True)
layer(
    "attention", lambda x: hk.MultiHeadAttention(2, 3, w_init=hk.initializers.Constant(1))(x, x, x),
    {f"multi_head_attention/{name}/w": "dense io" for name in ("query", "key", "value", "linear")}, (2, 5, 4),
)  # fmt: skip
layer(
    "layer_stack", lambda x: hk.layer_stack(3)(lambda x: hk.Linear(4)(jax.nn.relu(hk.Linear(5)(x))))(x),
    {"__layer_stack_no_per_layer/linear/w": "dense bio", "__layer_stack_no_per_layer/linear_1/w": "dense bio"}, (2, 4),
)  # fmt: skip
layer(
    "recurrent", lambda x: hk.dynamic_unroll(hk.VanillaRNN(3), x, jnp.zeros((2, 3)))[0],
    {"vanilla_rnn/linear/w": "dense io", "vanilla_rnn/linear_1/w": "dense io"}, (5, 2, 4),
)  # fmt: skip
