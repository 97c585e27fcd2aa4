"""Trained tokens and biases on B: what they compute, where they may be, and that no table is copied."""

import jax
import jax.numpy as jnp
import pytest
from helpers import assert_close, assert_same

import lora_jax as lora

KEY = jax.random.key(0)
TOKENS = jnp.asarray([[1, 7, 3], [0, 2, 7]])
PARAMS = {
    "embed": {"embedding": jax.random.normal(KEY, (11, 4))},
    "up": {"kernel": jax.random.normal(jax.random.key(1), (4, 4)), "bias": jnp.arange(4.0)},
    "norm": {"kernel": jnp.eye(4)},
}


def tied(params, tokens):
    x = params["embed"]["embedding"][tokens]
    x = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"][None, None]) @ params["norm"]["kernel"]
    return x @ params["embed"]["embedding"].T


SITES = lora.find_sites(tied, PARAMS, TOKENS)


def start(**fields):
    return lora.init(KEY, lora.LoraConfig(**{"targets": ("up",), **fields}), PARAMS, SITES)


def trained(adapter):
    return jax.tree.map(lambda leaf, train: leaf + 0.7 * train, adapter, lora.trainable(adapter))


def test_rows_start_as_they_are_and_act_on_both_uses() -> None:
    adapter = start(trainable_tokens=(7, 2))
    rows = adapter["embed/embedding"]
    assert_same(rows.value, PARAMS["embed"]["embedding"][jnp.asarray([7, 2])])
    run = jax.jit(lora.adapt(tied))
    assert_close(run(PARAMS, adapter, TOKENS), tied(PARAMS, TOKENS))
    moved = trained(adapter)
    table = PARAMS["embed"]["embedding"].at[jnp.asarray([7, 2])].set(moved["embed/embedding"].value)
    merged = lora.merge(PARAMS, moved)
    assert_close(merged["embed"]["embedding"], table)
    assert_close(run(PARAMS, moved, TOKENS), tied(merged, TOKENS))


def test_gradient_is_that_of_the_rows_of_the_whole_table() -> None:
    adapter = start(trainable_tokens={"embed": (7, 2)})
    loss = lambda params, adapter: jnp.square(lora.adapt(tied)(params, adapter, TOKENS)).sum()  # noqa: E731
    ours = jax.grad(loss, argnums=1)(PARAMS, adapter)["embed/embedding"].value
    whole = jax.grad(lambda params: jnp.square(tied(params, TOKENS)).sum())(PARAMS)["embed"]["embedding"]
    assert_close(ours, whole[jnp.asarray([7, 2])])


def test_the_table_is_not_copied() -> None:
    table = {"e": jnp.ones((50_000, 64))}
    tokens = jnp.arange(16)
    fn = lambda params, tokens: jnp.tanh(params["e"][tokens])  # noqa: E731
    sites = lora.find_sites(fn, table, tokens)
    adapter = lora.Adapter({"e": lora.methods.Rows(jnp.ones((3, 64)), sites["e"], (3, 9, 27))})
    step = jax.jit(jax.grad(lambda adapter: lora.adapt(fn)(table, adapter, tokens).sum()))
    memory = step.lower(adapter).compile().memory_analysis().temp_size_in_bytes
    assert memory <= 4 * 3 * 50_000 + 100_000
    assert table["e"].nbytes > 10 * 4 * 3 * 50_000


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trainable_tokens": (1, 11)}, "row 11 of 'embed/embedding', which has 11 rows"),
        ({"trainable_tokens": {"head": (1,)}}, "'head' hits 0 of the look-up tables"),
        ({"trainable_tokens": (1,), "targets": ("up", "embed")}, "is adapted or trained in full too"),
        ({"trainable_tokens": (1,), "train": ("embed",)}, "is adapted or trained in full too"),
        ({"lora_bias": True, "targets": ("norm",)}, "'norm/kernel' has no bias beside it"),
    ],
)
def test_what_hits_nothing_or_too_much_is_refused(fields, message) -> None:
    with pytest.raises(lora.MatchError, match=message):
        start(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trainable_tokens": (-1,)}, "must be a row number"),
        ({"trainable_tokens": (1, 1)}, "none of them twice"),
        ({"trainable_tokens": {"embed": ()}}, "at least one"),
        ({"trainable_tokens": "embed"}, "must be numbers of rows"),
        ({"trainable_tokens": 1.5}, "must be numbers of rows"),
        ({"lora_bias": True, "bias": "all"}, "choose one"),
        ({"lora_bias": 1}, "must be True or False"),
    ],
)
def test_configs_that_say_nothing_are_refused(fields, message) -> None:
    with pytest.raises(lora.ConfigError, match=message):
        lora.LoraConfig(**fields)


def test_rows_have_no_scale() -> None:
    with pytest.raises(TypeError, match=r"embed/embedding has rows trained in full.*adapter.without"):
        lora.scale(start(trainable_tokens=(1,)), 0.5)


def test_a_bias_on_b_is_an_addition_to_the_bias() -> None:
    adapter = start(lora_bias=True, rank=2, alpha=3)
    assert float(adapter["up/bias"].scale) == 1.5
    assert_same(lora.adapt(tied)(PARAMS, adapter, TOKENS), lora.adapt(tied)(PARAMS, adapter.without("up/bias"), TOKENS))
    moved = trained(adapter)
    merged = lora.merge(PARAMS, moved)
    assert_close(merged["up"]["bias"], PARAMS["up"]["bias"] + 1.5 * 0.7)
    assert_close(jax.jit(lora.adapt(tied))(PARAMS, moved, TOKENS), tied(merged, TOKENS))
    assert_close(lora.merge(PARAMS, lora.scale(moved, 2.0))["up"]["bias"], PARAMS["up"]["bias"] + 2.1)


def test_stacked_biases_have_the_scale_of_their_layer() -> None:
    params = {"w": jnp.ones((3, 4, 4)), "bias": jnp.zeros((3, 4))}
    fn = lambda params, x: jax.lax.scan(lambda x, p: (x @ p["w"] + p["bias"][None], None), x, params)[0]  # noqa: E731
    sites = lora.find_sites(fn, params, jnp.ones((2, 4)))
    adapter = lora.init(KEY, lora.LoraConfig(targets=("w",), lora_bias=True), params, sites)
    assert adapter["bias"].scale.shape == (3,)
    moved = trained(adapter)
    assert_close(lora.adapt(fn)(params, moved, jnp.ones((2, 4))), fn(lora.merge(params, moved), jnp.ones((2, 4))))


def test_saved_and_loaded(tmp_path) -> None:
    adapter = trained(start(trainable_tokens=(7, 2), lora_bias=True))
    lora.save(tmp_path / "a", adapter, params=PARAMS)
    loaded = lora.load(tmp_path / "a", PARAMS)
    assert_same(loaded, adapter)
    assert loaded["embed/embedding"].rows == (7, 2)
