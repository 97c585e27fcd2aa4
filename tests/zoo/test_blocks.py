"""Blocks of code bases that are not in the registry, from their published shapes and equations."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from zoo_model import Model, Row, check_merged, check_quantised, check_routed, check_sites, numbers, pixels, tokens

WIDTH, HEADS, HEAD, HIDDEN, LAYERS, VOCABULARY = 16, 4, 8, 24, 3, 32


def shapes(**sizes: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(size, jnp.float32) for name, size in sizes.items()}


BLOCK = shapes(
    q=(WIDTH, HEADS, HEAD), k=(WIDTH, HEADS, HEAD), v=(WIDTH, HEADS, HEAD), o=(HEADS, HEAD, WIDTH),
    up=(WIDTH, HIDDEN), down=(HIDDEN, WIDTH),
)  # fmt: skip
OUTSIDE = shapes(table=(VOCABULARY, WIDTH), head=(WIDTH, VOCABULARY))
SITES = [f"layer_{i}/{name}" for i in range(LAYERS) for name in BLOCK]


def attention(q: jax.Array, k: jax.Array, v: jax.Array, bias: Any = 0.0) -> jax.Array:
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) + bias
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), v)


def block(weight: Callable[[jax.Array], jax.Array], x: jax.Array, layer: Any, bias: Any = 0.0) -> jax.Array:
    """A layer whose weights pass through `weight` before they are used."""
    w = jax.tree.map(weight, layer)
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, w[name]) for name in "qkv")
    x = x + jnp.einsum("bthk,hkd->btd", attention(q, k, v, bias), w["o"])
    return x + jnp.einsum("btf,fd->btd", jax.nn.silu(jnp.einsum("btd,df->btf", x, w["up"])), w["down"])


def layers(weight: Callable[[jax.Array], jax.Array] = lambda w: w, **outside: Any) -> Model:
    """Layers apart, each with its weights through `weight`."""
    params = {**OUTSIDE, **outside, **{f"layer_{i}": BLOCK for i in range(LAYERS)}}

    def fn(params: Any, ids: jax.Array) -> jax.Array:
        x = weight(params["table"])[ids]
        for i in range(LAYERS):
            x = block(weight, x, params[f"layer_{i}"])
        return x @ weight(params["head"])

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


def t5x() -> Model:
    """T5X: tokens as one-hot rows times the table, and a relative position bias looked up the same way."""
    params = {**OUTSIDE, **shapes(rel_embedding=(HEADS, 8)), "layer_0": BLOCK}

    def fn(params: Any, ids: jax.Array) -> jax.Array:
        x = jnp.dot(jax.nn.one_hot(ids, VOCABULARY), params["table"])
        distance = jnp.clip(jnp.arange(8)[None, :] - jnp.arange(8)[:, None], -4, 3) + 4
        buckets = (distance[None] == jnp.arange(8)[:, None, None]).astype(x.dtype)
        bias = jax.lax.dot_general(params["rel_embedding"], buckets, (((1,), (0,)), ((), ())))
        return block(lambda w: w, x, params["layer_0"], bias) @ params["head"]

    return Model(fn, numbers(params), (tokens(),))


def stacked_then_scanned() -> Model:
    """simply: layers apart in the tree, stacked by the program and scanned over."""
    params = {**OUTSIDE, **{f"layer_{i}": BLOCK for i in range(LAYERS)}}

    def fn(params: Any, ids: jax.Array) -> jax.Array:
        stack = jax.tree.map(lambda *ws: jnp.stack(ws), *(params[f"layer_{i}"] for i in range(LAYERS)))
        turn = jax.checkpoint(lambda x, layer: (block(lambda w: w, x, layer), None))
        return jax.lax.scan(turn, params["table"][ids], stack)[0] @ params["head"]

    return Model(fn, numbers(params), (tokens(),))


def gathered() -> Model:
    """xlstm-jax: fully sharded data parallel by hand, weights gathered inside `shard_map`."""
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    model = layers(lambda w: jax.lax.all_gather(w, "fsdp", axis=0, tiled=True))
    inside = jax.shard_map(model.fn, mesh=mesh, in_specs=(P("fsdp"), P()), out_specs=P(), check_vma=False)
    return model._replace(fn=inside)


def experts() -> Model:
    """Tokens sorted by expert and one ragged product for all of them, as in gemma, MaxText and eqx-zoo."""
    params = shapes(router=(WIDTH, 4), up=(4, WIDTH, HIDDEN), down=(4, HIDDEN, WIDTH), head=(WIDTH, VOCABULARY))

    def fn(params: Any, x: jax.Array) -> jax.Array:
        rows = x.reshape(-1, WIDTH)
        chosen = jnp.argmax(rows @ params["router"], -1)
        order = jnp.argsort(chosen)
        sizes = jnp.bincount(chosen, length=4)
        hidden = jax.nn.silu(jax.lax.ragged_dot(rows[order], params["up"], sizes))
        out = jax.lax.ragged_dot(hidden, params["down"], sizes)[jnp.argsort(order)]
        return (x + out.reshape(x.shape)) @ params["head"]

    return Model(fn, numbers(params), (pixels(2, 8, WIDTH),))


def flat() -> Model:
    """All weights of a layer in one buffer, as optimizers of shards keep them."""
    model = layers()
    params = {**OUTSIDE, "buffer": jax.ShapeDtypeStruct((2, WIDTH * HIDDEN), jnp.float32)}

    def fn(params: Any, ids: jax.Array) -> jax.Array:
        up, down = params["buffer"][0].reshape(WIDTH, HIDDEN), params["buffer"][1].reshape(HIDDEN, WIDTH)
        return (jax.nn.silu(params["table"][ids] @ up) @ down) @ params["head"]

    return model._replace(fn=fn, params=numbers(params))


def one_device() -> Any:
    return jax.sharding.NamedSharding(Mesh(jax.devices()[:1], ("x",)), P())


ALL, HEAD_PATH = len(SITES) + 2, ("head",)
THROUGH = {
    "as they are": lambda w: w,
    "levanter, by names for remat": partial(checkpoint_name, name="weights"),
    "MaxText, from the host": lambda w: jax.device_put(w, one_device()),
    "with a vector": lambda w: w * jnp.arange(1.0, w.shape[-1] + 1),
    "plus nothing": lambda w: w + 0.0,
    "padded": lambda w: jnp.pad(w, [(0, 2)] + [(0, 0)] * (w.ndim - 1))[: w.shape[0]],
    "at a stated precision": lambda w: jax.lax.reduce_precision(w, 8, 23),
}
ROWS = {
    **{name: Row(partial(layers, weight), ALL, HEAD_PATH, {"table": "embedding"}) for name, weight in THROUGH.items()},
    "gemma": Row(gemma, 11, ("embedder/input_embedding",), {"layer_0/gating_einsum": "dense"}),
    "T5X": Row(t5x, 9, HEAD_PATH, {"table": "embedding"}),
    "stacked, then scanned": Row(stacked_then_scanned, ALL, HEAD_PATH),
    "gathered in shard_map": Row(gathered, ALL, HEAD_PATH, routed="(?!)"),
    "experts": Row(experts, 4, HEAD_PATH, {"up": "ragged"}, routed="head|router"),
    "slices of a buffer": Row(flat, 2, HEAD_PATH, plain="buffer"),
}
pytestmark = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


def test_sites(row: Row) -> None:
    check_sites(row)


def test_routed(row: Row) -> None:
    check_routed(row)


def test_adapted_is_merged(row: Row) -> None:
    check_merged(row)


def test_quantised(row: Row) -> None:
    check_quantised(row)
