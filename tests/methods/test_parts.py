"""Parts of fused kernels with factors of their own: what they act on, train, and become elsewhere."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, assert_same, random_adapter

import lora_jax as lora

KEY = jax.random.key(0)
PARAMS = {
    "h": {"c_attn": {"kernel": jax.random.normal(KEY, (3, 6, 18))}, "c_proj": {"kernel": jnp.ones((3, 6, 6))}},
    "qkv": jax.random.normal(jax.random.key(1), (6, 3, 2, 4)),
}
X = jax.random.normal(jax.random.key(2), (2, 6))
PARTS = {"c_attn": {"q": (0, 6), "v": (12, 18)}, "qkv": {"k": (1, 2), "halves": (0, 1, 2)}}
PATH = "h/c_attn/kernel"


def fn(params, x):
    def layer(x, w):
        q, _, v = jnp.split(x @ w["c_attn"]["kernel"], 3, -1)
        return jnp.tanh(q * v) @ w["c_proj"]["kernel"], None

    x = jax.lax.scan(layer, x, params["h"])[0]
    return jnp.einsum("bd,dthk->bthk", x, params["qkv"])


SITES = lora.find_sites(fn, PARAMS, X)


def start(**fields: Any) -> lora.Adapter:
    given = {"targets": ("c_attn", "qkv"), "parts": PARTS, "rank": 2, **fields}
    return lora.init(KEY, lora.LoraConfig(**given), PARAMS, SITES)


def trained(**fields: Any) -> lora.Adapter:
    """Every trained leaf moved by random numbers."""
    adapter, draw = start(**fields), np.random.default_rng(0)
    move = lambda leaf, trains: leaf + jnp.float32(0.3 * draw.normal(size=leaf.shape)) * trains  # noqa: E731
    return jax.tree.map(move, adapter, lora.trainable(adapter))


def test_each_part_has_its_own_factors() -> None:
    """Rank and alpha are those of a module of its name; keys are not adapted."""
    adapter = trained(rank_pattern={"c_attn/q": 1, "v": 3}, alpha_pattern={"c_attn/v": 9})
    update = adapter[PATH]
    assert update.a.shape == (3, 4, 6)
    a, b = np.asarray(update.a), np.asarray(update.b)
    wanted = np.zeros((3, 6, 18), np.float32)
    wanted[..., :6] = 2 * np.einsum("lri,lro->lio", a[:, :1], b[:, :1, :6])
    wanted[..., 12:] = 9 / 3 * np.einsum("lri,lro->lio", a[:, 1:], b[:, 1:, 12:])
    assert_close(lora.merge(PARAMS, adapter)["h"]["c_attn"]["kernel"] - PARAMS["h"]["c_attn"]["kernel"], wanted)


def test_columns_along_any_output_axis() -> None:
    delta = lora.merge(PARAMS, trained())["qkv"] - PARAMS["qkv"]
    assert bool((delta[:, 1] != 0).all())
    assert bool((delta[:, :, 0] != 0).all())
    assert not delta[:, 0, 1].any()
    assert not delta[:, 2, 1].any()


def test_starts_as_the_base_and_trains_inside_of_the_parts() -> None:
    """Also with an optimizer that has momentum and decay: what is outside has no effect, and a gradient of zero."""
    adapter = start()
    adapted = lora.adapt(fn)
    assert_same(adapted(PARAMS, adapter, X), fn(PARAMS, X))
    assert len({*np.asarray(adapter[PATH].a).round(6).ravel().tolist()}) == adapter[PATH].a.size, "no A is shared"
    loss = lambda adapter: jnp.sum(jnp.sin(adapted(PARAMS, adapter, X)))  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(trained())
    merged = jax.grad(lambda adapter: jnp.sum(jnp.sin(fn(lora.merge(PARAMS, adapter), X))))(trained())
    assert_close(gradient, merged, factor=10)
    assert not gradient[PATH].b[:, :2, 6:].any()
    assert gradient[PATH].b[:, :2, :6].any()
    tx = lora.optimizer(optax.adamw(0.1), adapter)
    updates, _ = tx.update(gradient, tx.init(adapter), adapter)
    assert not optax.apply_updates(adapter, updates)[PATH].b[:, :2, 6:].any()


def test_adapted_is_merged_and_routed() -> None:
    adapter = trained()
    assert_close(lora.adapt(fn)(PARAMS, adapter, X), fn(lora.merge(PARAMS, adapter), X), factor=10)
    found = lora.route(fn)(PARAMS, [adapter, random_adapter(SITES)], jnp.array([1, 0]), X)
    assert_close(found, jnp.stack([fn(lora.merge(PARAMS, adapter), X)[0], fn(PARAMS, X)[1]]), factor=10)
    assert_close(lora.merge(PARAMS, lora.compose([adapter])), lora.merge(PARAMS, adapter), factor=10)


def test_saves_and_loads(tmp_path: Path) -> None:
    """As it is in our format; as one A, and zeros in B, in PEFT's."""
    adapter = trained(alpha_pattern={"c_attn/v": 1})
    lora.save(tmp_path / "own", adapter, params=PARAMS)
    assert_same(lora.load(tmp_path / "own", PARAMS), adapter)
    kept = adapter.without("qkv")
    names = lora.peft.Names([("h/{m}/kernel", "h.{i}.{m}")])
    lora.peft.save(tmp_path / "peft", kept, names, sites=SITES)
    assert_close(lora.merge(PARAMS, lora.peft.load(tmp_path / "peft", PARAMS, SITES, names)), lora.merge(PARAMS, kept))


def test_goes_through_json() -> None:
    config = lora.LoraConfig(targets=("c_attn",), parts=PARTS)
    assert lora.LoraConfig(**json.loads(json.dumps(asdict(config)))) == config
    assert hash(config) == hash(lora.LoraConfig(targets=("c_attn",), parts=PARTS))


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"parts": {"c_attn": {"q": (0, 99)}}}, r"'q' has columns 0 to 99 along axis 2, and h/c_attn/kernel"),
        ({"parts": {"c_attn": {"q": (0, 3, 1)}}}, "along axis 1"),
        ({"parts": {"c_attn": {"q": (3, 3)}}}, "start and stop"),
        ({"parts": {"c_attn": {"q": 3}}}, "start and stop"),
        ({"parts": {"c_attn": {}}}, "start and stop"),
        ({"parts": {"mlp": {"q": (0, 3)}}}, "parts: 'mlp' hits none of the adapted parameters"),
        ({"rank_pattern": {"c_attn/z": 3}}, "rank_pattern: 'c_attn/z' matches none"),
        ({"rank_pattern": {"c_attn/q": (1, 2, 3)}}, "one rank and one alpha"),
        ({"method": "dora"}, 'parts=.* are for method="lora"'),
        ({"init": "pissa"}, "is adapted in parts, and init='pissa' reads the whole of it"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(lora.LoraError, match=why):
        start(**fields)
