"""Resized adapters: the same function in another form, or the nearest one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_same, random_adapter

import lora_jax as lora

PARAMS = {
    "table": jax.random.normal(jax.random.key(0), (7, 6)),
    "layers": {"w": jax.random.normal(jax.random.key(1), (3, 6, 6))},
    "head": {"kernel": jax.random.normal(jax.random.key(2), (6, 7)), "bias": jnp.zeros(7)},
}
TOKENS = jnp.array([0, 3, 6])


def fn(params: Any, tokens: jax.Array) -> jax.Array:
    x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), params["table"][tokens], params["layers"]["w"])[0]
    return x @ params["head"]["kernel"] + params["head"]["bias"][None]


SITES = lora.find_sites(fn, PARAMS, TOKENS)
ADAPTED, BASE = jax.jit(lora.adapt(fn)), jax.jit(fn)


def trained(rank: int = 2, **fields: Any) -> lora.Adapter:
    config = lora.LoraConfig(**{"rank": rank, "targets": ("table", "w", "head"), **fields})
    train, fixed = lora.partition(lora.init(jax.random.key(3), config, PARAMS, SITES))
    move = lambda leaf: leaf + np.float32(0.1 * np.cos(np.arange(leaf.size).reshape(leaf.shape)))  # noqa: E731
    return lora.combine(jax.tree.map(move, train), fixed)


@pytest.mark.parametrize("fields", [{}, {"init": "pissa"}, {"method": "dora"}, {"bias": "all"}], ids=str)
def test_up_keeps_the_function_and_trains(fields: dict[str, Any]) -> None:
    adapter = trained(**fields)
    larger = lora.resize(adapter, rank=5)
    assert larger["layers/w"].a.shape == (3, 5, 6)
    merged, before = lora.merge(PARAMS, larger), lora.merge(PARAMS, adapter)
    assert_close(merged, before)
    assert_close(ADAPTED(PARAMS, larger, TOKENS), BASE(before, TOKENS))
    slope = jax.jit(jax.grad(lambda adapter: ADAPTED(PARAMS, adapter, TOKENS).sum()))(larger)
    assert slope["layers/w"].b[:, 2:].any()
    lora.summary(larger)


@pytest.mark.parametrize("fields", [{}, {"init": "pissa"}, {"method": "dora"}, {"rslora": True}], ids=str)
def test_up_and_down_again_is_the_same(fields: dict[str, Any]) -> None:
    adapter = trained(**fields)
    again = lora.resize(lora.resize(adapter, rank=6), rank=4)
    assert again["head/kernel"].rank == 4
    assert_close(lora.merge(PARAMS, again), lora.merge(PARAMS, adapter), factor=10)


def test_down_is_the_nearest() -> None:
    adapter = random_adapter(SITES, rank=4)
    smaller = lora.resize(adapter, rank=1)
    for layer in range(3):
        whole, kept = (np.asarray(each["layers/w"].delta()[layer]) for each in (adapter, smaller))
        left = np.linalg.svd(whole, compute_uv=False)[1:]
        assert np.linalg.norm(whole - kept) == pytest.approx(np.linalg.norm(left), rel=1e-4)
    assert_same(smaller["layers/w"].scale, adapter["layers/w"].scale)


def test_ranks_by_pattern() -> None:
    mixed = lora.resize(trained(), rank={"w": 3, "head": 1})
    assert [mixed[path].rank for path in ("table", "layers/w", "head/kernel")] == [2, 3, 1]
    with pytest.raises(lora.MatchError, match=r"'hed' hits no low-rank update; nearest: head/kernel"):
        lora.resize(trained(), rank={"hed": 3})


def test_more_targets() -> None:
    adapter = trained(targets=("w",))
    config = lora.LoraConfig(rank=3, targets=("w", "head"), train=("table",))
    wider = lora.resize(adapter, like=lora.init(jax.random.key(5), config, PARAMS, SITES))
    assert {path: getattr(update, "rank", None) for path, update in wider.items()} == {
        "head/kernel": 3, "layers/w": 3, "table": None,
    }  # fmt: skip
    assert_close(BASE(lora.merge(PARAMS, wider), TOKENS), BASE(lora.merge(PARAMS, adapter), TOKENS))


@pytest.mark.parametrize(
    "fields",
    [{}, {"targets": ("w",), "train": ("table", "head")}, {"targets": ("w",), "trainable_tokens": (1, 2)}],
    ids=str,
)
def test_new_rows_of_a_table_are_the_bases_own(fields: dict[str, Any]) -> None:
    adapter = trained(**fields)
    wider = PARAMS | {
        "table": jnp.concatenate([PARAMS["table"], jnp.ones((2, 6))]),
        "head": {"kernel": jnp.concatenate([PARAMS["head"]["kernel"], jnp.ones((6, 2))], 1), "bias": jnp.zeros(9)},
    }
    with pytest.raises(lora.ParameterError, match="not the parameters it was trained on"):
        lora.merge(wider, adapter)
    grown = lora.resize(adapter, params=wider)
    before, after = lora.merge(PARAMS, adapter), lora.merge(wider, grown)
    assert_close(after["table"][:7], before["table"])
    assert_close(after["table"][7:], jnp.ones((2, 6)))
    assert_close(after["head"]["kernel"][:, :7], before["head"]["kernel"])
    assert_close(after["head"]["kernel"][:, 7:], jnp.ones((6, 2)))
    new = jnp.array([1, 8])
    assert_close(ADAPTED(wider, grown, new), BASE(after, new))
    with pytest.raises(lora.ParameterError, match="only get more rows or columns"):
        lora.resize(grown, params=PARAMS)


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(lora.ConfigError, match="rank= or like=, or params="):
        lora.resize(trained())
    for method in ("vera", "adalora", "lora-xs"):
        adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets=("w",), method=method), PARAMS, SITES)
        if isinstance(adapter["layers/w"], lora.LowRank):
            with pytest.raises(lora.ParameterError, match=rf"'layers/w' has a {type(adapter['layers/w']).__name__}"):
                lora.resize(adapter, rank=3)
