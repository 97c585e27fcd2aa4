"""What depends on what: heads, look-ups and choices, activations, dead code, and what find_sites did not find."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, merged, random_adapter

import lora_jax as lora

DRAW = np.random.default_rng(0)
P = {name: jax.device_put(np.float32(DRAW.normal(size=(4, 4)))) for name in ("q", "k", "v", "o", "up", "head")}
X = jax.device_put(np.float32(DRAW.normal(size=(3, 4))))
IDS = jnp.array([0, 2, 1])


def block(p, x):
    """One block, whose keys and values are returned for a cache."""
    q, k, v = x @ p["q"], jnp.sin(x @ p["k"]), x @ p["v"]
    x = x + jax.nn.softmax(q @ k.T) @ v @ p["o"]
    return x + jnp.tanh(x) @ p["up"], (k, v)


def logits(p, x):
    hidden, cache = block(p, x)
    return hidden @ p["head"], cache


def loss(p, x):
    out, _ = logits(p, x)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(out), IDS[:, None], 1)
    return -chosen.mean() + 1e-3 * jnp.square(block(p, x)[0]).mean()


def one_hot_loss(p, x):
    out, _ = logits(p, x)
    return -jnp.sum(jax.nn.log_softmax(out) * jax.nn.one_hot(IDS, 4))


def in_chunks(p, x):
    hidden, _ = block(p, x)
    step = lambda total, h: (total + jax.nn.logsumexp(h @ p["head"]), None)  # noqa: E731
    return jax.lax.scan(step, jnp.float32(0), hidden)[0]


HEADS = {
    "logits and cache": (logits, {"head"}),
    "loss with a penalty": (loss, {"head"}),
    "loss of one-hot targets": (one_hot_loss, {"head"}),
    "loss in chunks": (in_chunks, {"head"}),
    "temperature": (lambda p, x: logits(p, x)[0] / 0.7, {"head"}),
    "biased and masked": (lambda p, x: logits(p, x)[0] + p["q"][:1] + jnp.float32([[0, 0, 0, -9]]), {"head"}),
    "two heads": (lambda p, x: (block(p, x)[0] @ p["head"], block(p, x)[0] @ p["q"]), {"head"}),
    "backbone": (block, set()),
    "compiled": (jax.jit(lambda p, x: jax.jit(logits)(p, x)), {"head"}),
}


@pytest.mark.parametrize("name", HEADS)
def test_head(name: str) -> None:
    fn, heads = HEADS[name]
    assert {path for path, site in lora.find_sites(fn, P, X).items() if site.head} >= heads
    assert name != "backbone" or not any(site.head for site in lora.find_sites(fn, P, X).values())


def chosen(p, x):
    expert = jnp.argmax(x @ p["q"], -1)
    return x @ p["up"] + p["k"][expert]


KINDS = {
    "look-up": (lambda p, x: p["k"][IDS] @ p["up"], {"k": "embedding", "up": "dense"}),
    "one-hot": (lambda p, x: jax.nn.one_hot(IDS, 4) @ p["k"], {"k": "embedding"}),
    "iota": (lambda p, x: (IDS[:, None] == jnp.arange(4)[None]).astype(jnp.float32) @ p["k"], {"k": "embedding"}),
    "bias of an expert": (chosen, {"q": "dense", "up": "dense"}),
    "permuted outputs": (lambda p, x: x @ p["up"][:, IDS], {"up": "dense"}),
    "permuted inputs": (lambda p, x: x[:, :3] @ jnp.take(p["up"], IDS, 0), {"up": "dense"}),
    "sampled rows": (lambda p, x: jnp.tanh(x @ p["up"]) @ p["head"][IDS].T, {"up": "dense", "head": "dense"}),
}


@pytest.mark.parametrize("name", KINDS)
def test_kind(name: str) -> None:
    fn, kinds = KINDS[name]
    sites = lora.find_sites(fn, P, X)
    assert {path: site.kind for path, site in sites.items()} == kinds
    adapter = random_adapter(sites)
    assert_close(lora.adapt(fn)(P, adapter, X), fn(merged(P, adapter), X))


def test_a_permuted_weight_has_the_axes_of_its_parameter() -> None:
    site = lora.find_sites(lambda p, x: x @ p["up"][:, IDS], P, X)["up"]
    assert (site.in_axes, site.out_axes, site.batch_axes) == ((0,), (1,), ())


def test_what_is_not_returned_is_no_use() -> None:
    def fn(p, x):
        _ = jnp.linalg.norm(p["up"]), x @ p["q"]
        return jax.jit(lambda w: (w.sum(), x @ w))(p["up"])[1]

    sites = lora.find_sites(fn, P, X)
    assert set(sites) == {"up"}
    adapter = random_adapter(sites)
    assert [use.primitive for use in lora.explain(fn, P, adapter, X).uses] == ["dot_general"]


def test_each_use_is_explained_once() -> None:
    layers = {"w": jnp.stack([P["up"], P["q"]])}
    body = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
    fn = lambda p, x: jax.lax.scan(body, x, p["w"])[0]  # noqa: E731
    adapter = random_adapter(lora.find_sites(fn, layers, X))
    assert len(lora.explain(fn, layers, adapter, X).uses) == 1


def test_what_was_not_found_is_said(caplog: pytest.LogCaptureFixture) -> None:
    fn = lambda p, x: x @ jnp.tanh(p["up"]) @ p["head"]  # noqa: E731
    sites = lora.find_sites(fn, {name: P[name] for name in ("up", "head")}, X)
    (missed,) = sites.missed
    assert (missed.path, missed.shape) == ("up", (4, 4))
    assert "tanh" in missed.reason and "up" in str(sites) and "tanh" in str(sites)
    assert not caplog.records  # half of the parameters, no more
    lora.find_sites(fn, {"up": jnp.ones((4, 9)), "head": jnp.ones((9, 2))}, X)
    assert "up" in caplog.text


def test_a_position_table_is_not_missed() -> None:
    fn = lambda p, x: jnp.tanh(jnp.tanh(x @ p["q"]) + p["k"][:3]) @ p["head"]  # noqa: E731
    assert lora.find_sites(fn, P, X).missed == ()


NARROW = {"w": P["up"].astype(jnp.float8_e4m3fn), "scale": 2 * jnp.ones((1, 4)), "head": P["head"]}


def test_a_float8_weight_inside_of_a_scale_is_no_site() -> None:
    fn = lambda p, x: ((x @ p["w"].astype(jnp.float32)) * p["scale"]) @ p["head"]  # noqa: E731
    sites = lora.find_sites(fn, NARROW, X)
    assert set(sites) == {"head"} and "scale" in {each.path: each.reason for each in sites.missed}["w"]


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.int8])
def test_adapters_are_beside_what_a_program_makes_of_codes(dtype: Any) -> None:
    params = NARROW | {"w": (8 * P["up"]).astype(dtype)}
    fn = lambda p, x: (x @ ((p["w"].astype(jnp.float32) - 1) * p["scale"]).T) @ p["head"]  # noqa: E731
    sites = lora.find_sites(fn, params, X)
    assert sites["w"].codes and not sites["head"].codes
    adapter = random_adapter([sites["w"]])
    weight = (params["w"].astype(jnp.float32) - 1) * params["scale"] + adapter["w"].delta()
    assert_close(lora.adapt(fn)(params, adapter, X), (X @ weight.T) @ params["head"])
    with pytest.raises(lora.MergeError, match="merged into codes"):
        lora.merge(params, adapter)


def test_codes_in_other_axes_than_the_layer_have_sites_by_hand() -> None:
    """Blocks in axes of their own: only who wrote the program knows which site that is."""
    params = {"layer": {"q": jnp.arange(-8, 8, dtype=jnp.int8).reshape(2, 2, 4), "scale": jnp.ones((2, 1, 4))}}
    dense = lambda p: (p["layer"]["q"].astype(jnp.float32) * p["layer"]["scale"]).reshape(4, 4)  # noqa: E731
    fn = lambda p, x: x @ dense(p)  # noqa: E731
    sites = lora.find_sites(fn, params, X)
    assert not sites and "lora_jax.Site(path='layer/q', ...)" in str(sites)
    with pytest.raises(lora.MatchError, match=r"lora_jax\.quantise"):
        lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets="layer"), params, sites)
    site = lora.Site(path="layer/q", shape=(2, 2, 4), dtype="int8", kind="dense", in_axes=(0, 1), out_axes=(2,))
    adapter = random_adapter([site])
    expected = X @ (dense(params) + adapter["layer/q"].delta().reshape(4, 4))
    assert_close(lora.adapt(fn)(params, adapter, X), expected)
    hidden = lambda p, x: x @ jnp.tanh(p["layer"]["q"].astype(jnp.float32)).reshape(4, 4)  # noqa: E731
    with pytest.raises(lora.ParameterError, match="holds codes, and tanh uses them otherwise"):
        lora.adapt(hidden)(params, adapter, X)


def test_dropout_where_a_weight_is_formed_warns() -> None:
    fn = lambda p, x: x @ (p["up"] * jnp.tri(4))  # noqa: E731
    adapter = random_adapter(lora.find_sites(fn, P, X), dropout=0.5)
    with pytest.warns(UserWarning, match="up has dropout"):
        lora.adapt(fn)(P, adapter, X, lora_key=jax.random.key(0))


@pytest.mark.parametrize("z", [X + 1j * X[::-1], X], ids=["complex", "real"])
def test_complex_parameters_have_complex_factors(z: jax.Array) -> None:
    params = {"w": P["up"] + 1j * P["q"]}
    fn = lambda p, z: z @ p["w"]  # noqa: E731
    sites = lora.find_sites(fn, params, z)
    adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets="w"), params, sites)
    assert adapter["w"].a.dtype == adapter["w"].b.dtype == jnp.complex64
    grown = jax.tree.map(lambda leaf, trains: leaf + 0.5 if trains else leaf, adapter, lora.trainable(adapter))
    assert_close(lora.adapt(fn)(params, grown, z), fn(lora.merge(params, grown), z), jnp.float32)
    with pytest.raises(lora.ConfigError, match="real parameters"):
        lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets="w", init="pissa"), params, sites)
