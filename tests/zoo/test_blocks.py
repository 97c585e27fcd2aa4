"""Blocks of code bases that are not in the registry, from their published shapes and equations."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from zoo_model import Model, Row, check_merged, check_routed, check_sites, numbers, tokens

WIDTH, HEADS, HEAD, HIDDEN, LAYERS, VOCABULARY = 16, 4, 8, 24, 3, 32


def shapes(**sizes: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(size, jnp.float32) for name, size in sizes.items()}


BLOCK = shapes(
    q=(WIDTH, HEADS, HEAD), k=(WIDTH, HEADS, HEAD), v=(WIDTH, HEADS, HEAD), o=(HEADS, HEAD, WIDTH),
    up=(WIDTH, HIDDEN), down=(HIDDEN, WIDTH),
)  # fmt: skip
OUTSIDE = shapes(table=(VOCABULARY, WIDTH), head=(WIDTH, VOCABULARY))
SITES = [f"layer_{i}/{name}" for i in range(LAYERS) for name in BLOCK]


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def block(x: jax.Array, w: Any) -> jax.Array:
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, w[name]) for name in "qkv")
    x = x + jnp.einsum("bthk,hkd->btd", attention(q, k, v), w["o"])
    return x + jnp.einsum("btf,fd->btd", jax.nn.silu(jnp.einsum("btd,df->btf", x, w["up"])), w["down"])


def layers() -> Model:
    """Layers apart, with a kernel for each head."""
    params = {**OUTSIDE, **{f"layer_{i}": BLOCK for i in range(LAYERS)}}

    def fn(params: Any, ids: jax.Array) -> jax.Array:
        x = params["table"][ids]
        for i in range(LAYERS):
            x = block(x, params[f"layer_{i}"])
        return x @ params["head"]

    return Model(fn, numbers(params), (tokens(),))


def gemma() -> Model:
    """Gemma's einsum kernels, with key and value in one, gate and up in one, soft caps and a tied table."""
    layer = shapes(
        q_einsum=(HEADS, WIDTH, HEAD), kv_einsum=(2, 2, WIDTH, HEAD), attn_vec_einsum=(HEADS, HEAD, WIDTH),
        gating_einsum=(2, HIDDEN, WIDTH), linear=(HIDDEN, WIDTH),
    )  # fmt: skip
    params = {"embedder": shapes(input_embedding=(VOCABULARY, WIDTH)), **{f"layer_{i}": layer for i in range(2)}}

    def fn(params: Any, ids: jax.Array) -> jax.Array:
        table = params["embedder"]["input_embedding"]
        x = table[ids] * jnp.sqrt(WIDTH).astype(table.dtype)
        for i in range(2):
            w = params[f"layer_{i}"]
            q = jnp.einsum("BTD,NDH->BTNH", x, w["q_einsum"]) * HEAD**-0.5
            k, v = jnp.einsum("BSD,CKDH->CBSKH", x, w["kv_einsum"])
            logits = jnp.tanh(jnp.einsum("BTKGH,BSKH->BTKGS", q.reshape(*q.shape[:2], 2, 2, HEAD), k) / 50) * 50
            mixed = jnp.einsum("BTKGS,BSKH->BTKGH", jax.nn.softmax(logits), v).reshape(q.shape)
            x = x + jnp.einsum("BTNH,NHD->BTD", mixed, w["attn_vec_einsum"])
            gate = jnp.einsum("...F,NHF->...NH", x, w["gating_einsum"])
            x = x + jnp.einsum("...H,HF->...F", nn.gelu(gate[..., 0, :]) * gate[..., 1, :], w["linear"])
        return jnp.tanh(jnp.dot(x, table.T) / 30) * 30

    return Model(fn, numbers(params), (tokens(),))


def flat() -> Model:
    """All weights of a layer in one buffer, as optimizers of shards keep them."""
    model = layers()
    params = {**OUTSIDE, "buffer": jax.ShapeDtypeStruct((2, WIDTH * HIDDEN), jnp.float32)}

    def fn(params: Any, ids: jax.Array) -> jax.Array:
        up, down = params["buffer"][0].reshape(WIDTH, HIDDEN), params["buffer"][1].reshape(HIDDEN, WIDTH)
        return (jax.nn.silu(params["table"][ids] @ up) @ down) @ params["head"]

    return model._replace(fn=fn, params=numbers(params))


ALL, HEAD_PATH = len(SITES) + 2, ("head",)
ROWS = {
    "as they are": Row(layers, ALL, HEAD_PATH, {"table": "embedding"}),
    "gemma": Row(gemma, 11, ("embedder/input_embedding",), {"layer_0/gating_einsum": "dense"}),
    "slices of a buffer": Row(flat, 2, HEAD_PATH, plain="buffer"),
}
pytestmark = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


def test_sites(row: Row) -> None:
    check_sites(row)


def test_routed(row: Row) -> None:
    check_routed(row)


def test_adapted_is_merged(row: Row) -> None:
    check_merged(row)
