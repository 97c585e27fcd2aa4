"""Decoders of every family: scanned and unrolled, cached, packed, padded, rematerialised, adapted."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, random_adapter
from tiny_models import OF_FAMILY, tiny_directory

import lora_jax as lora
from lora_jax.models import Model, empty_cache, load

# Between them they have every kind of attention, window, rope, norm and MLP.
USUAL = ("qwen2", "mixtral", "gemma3_text", "gpt2", "gpt_oss")
FAMILIES = [name if name in USUAL else pytest.param(name, marks=pytest.mark.full) for name in OF_FAMILY]
BATCH, TIME = 2, 14
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 61, (BATCH, TIME)))


@cache
def directory(family: str) -> Path:
    return tiny_directory(Path(mkdtemp()) / family, family)


@cache
def model(family: str, unrolled: bool = False) -> Model:
    return load(directory(family), unrolled=unrolled)


@cache
def logits(family: str) -> Any:
    return jax.jit(model(family).apply)(model(family).params, TOKENS)


@pytest.mark.parametrize("family", FAMILIES)
def test_scanned_and_unrolled_layers_compute_the_same(family: str):
    each = model(family, True)
    assert_close(jax.jit(each.apply)(each.params, TOKENS), logits(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_continues_texts_as_if_they_were_read_at_once(family: str):
    own = model(family)
    run = jax.jit(own.apply)
    read, stored = run(own.params, TOKENS[:, :6], cache=empty_cache(own.config, BATCH, TIME + 3))
    pieces = [read]
    for place in range(6, TIME):
        read, stored = run(own.params, TOKENS[:, place : place + 1], cache=stored)
        pieces.append(read)
    assert (int(stored.filled), stored.positions.tolist()) == (TIME, [TIME] * BATCH)
    assert_close(jnp.concatenate(pieces, 1), logits(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_that_share_a_row_do_not_see_each_other(family: str):
    own = model(family)
    row, sizes = TOKENS.reshape(1, -1)[:, : TIME + 5], (TIME, 5)
    positions = jnp.concatenate([jnp.arange(size) for size in sizes])[None]
    segments = jnp.repeat(jnp.array([1, 2]), jnp.array(sizes))[None]
    packed = jax.jit(own.apply)(own.params, row, positions=positions, segments=segments)
    assert_close(packed[:, :TIME], logits(family)[:1])
    assert_close(packed[:, TIME:], logits(family)[1:, :5])


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_padding_before_a_text_changes_nothing(family: str):
    own = model(family)
    padded = jnp.concatenate([jnp.zeros((BATCH, 3), TOKENS.dtype), TOKENS], 1)
    places = jnp.arange(TIME + 3)[None]
    segments = jnp.broadcast_to(places >= 3, padded.shape).astype(jnp.int32)
    positions = jnp.maximum(places - 3, 0)
    run = jax.jit(own.apply)
    read, stored = run(
        own.params, padded[:, :-1], positions=jnp.broadcast_to(positions, padded.shape)[:, :-1],
        segments=segments[:, :-1], cache=empty_cache(own.config, BATCH, TIME + 3),
    )  # fmt: skip
    last, _ = run(own.params, padded[:, -1:], cache=stored)
    assert_close(jnp.concatenate([read, last], 1)[:, 3:], logits(family))


def test_logits_are_the_head_of_hidden_states_and_float32():
    own = load(directory("gemma2"), dtype=jnp.bfloat16)
    hidden = own.hidden(own.params, TOKENS)
    assert (hidden.shape, hidden.dtype) == ((BATCH, TIME, 24), jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(own.params)} == {jnp.dtype("bfloat16")}
    assert own.head(own.params, hidden).dtype == jnp.float32
    assert_close(own.head(own.params, hidden), own.apply(own.params, TOKENS), "bfloat16")
    assert_close(own.apply(own.params, TOKENS), logits("gemma2"), "bfloat16", factor=4)


@pytest.mark.parametrize(
    ("remat", "unrolled"),
    [
        (True, False),
        pytest.param("dots_saveable", True, marks=pytest.mark.full),
        pytest.param(jax.checkpoint_policies.nothing_saveable, False, marks=pytest.mark.full),
    ],
    ids=["all", "dots_saveable", "nothing_saveable"],
)
def test_what_is_kept_for_the_backward_pass_changes_no_gradient(remat: Any, unrolled: bool):
    own, other = model("qwen2", unrolled), load(directory("qwen2"), remat=remat, unrolled=unrolled)
    gradient = lambda each: jax.jit(jax.grad(lambda p: (each.apply(p, TOKENS) ** 2).mean()))(each.params)  # noqa: E731
    assert_close(gradient(other), gradient(own))
    text = str(jax.make_jaxpr(lambda p: other.apply(p, TOKENS))(own.params))
    assert "remat" in text or "checkpoint" in text


def test_an_unknown_policy_is_an_error():
    with pytest.raises(lora.ConfigError, match="dots_saveable"):
        load(directory("qwen2"), remat="dots")


def test_the_length_is_held_against_what_the_model_has():
    own = model("gpt2")
    with pytest.raises(lora.ParameterError, match="64 positions"):
        own.apply(own.params, jnp.zeros((1, 65), int))
    with pytest.raises(lora.ParameterError, match="64 positions"):
        own.apply(own.params, jnp.zeros((1, 2), int), cache=empty_cache(own.config, 1, 65))
    with pytest.raises(lora.ParameterError, match="3 tokens are more than the 2 places"):
        own.apply(own.params, jnp.zeros((1, 3), int), cache=empty_cache(own.config, 1, 2))
    with pytest.raises(lora.ParameterError, match="batch, time"):
        own.apply(own.params, jnp.zeros(3, int))


@pytest.mark.parametrize(
    ("family", "unrolled"),
    [
        ("gpt_oss", False),
        ("phi3", True),
        *(
            pytest.param(*each, marks=pytest.mark.full)
            for each in [("qwen3_moe", False), ("llama", True), ("gpt2", False)]
        ),
    ],
)
def test_adapted_equals_merged_and_nothing_is_formed(family: str, unrolled: bool):
    own = model(family, unrolled)
    sites = lora.find_sites(own.apply, own.params, TOKENS)
    adapter = random_adapter([site for site in sites.values() if site.kind != "embedding"])
    adapted = jax.jit(lora.adapt(own.apply))(own.params, adapter, TOKENS)
    assert_close(adapted, jax.jit(own.apply)(lora.merge(own.params, adapter), TOKENS), factor=10)
    assert "formed" not in str(lora.explain(own.apply, own.params, adapter, TOKENS))
