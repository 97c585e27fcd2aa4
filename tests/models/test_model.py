"""The transformer of the command line: causality, its two layouts, its cache, sampling, and LoRA beside it."""

from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_same, random_adapter

import lora_jax as lora
from lora_jax.models import Cache, Transformer, TransformerConfig, generate
from lora_jax.models.transformer import rotary

CONFIG = TransformerConfig(layers=2, width=16, heads=4, kv_heads=2, hidden=24)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 12)), jnp.uint8)


@cache
def build(config: TransformerConfig = CONFIG) -> tuple[Transformer, Any]:
    model = Transformer(config)
    return model, jax.jit(model.init)(jax.random.key(0), TOKENS)


def unrolled(variables: Any) -> Any:
    params = dict(variables["params"])
    stacked = params.pop("layers")
    layers = {f"layers_{index}": jax.tree.map(lambda leaf, index=index: leaf[index], stacked) for index in range(2)}
    return {"params": params | layers}


def test_it_is_causal():
    model, variables = build()
    apply = jax.jit(model.apply)
    logits, changed = apply(variables, TOKENS), apply(variables, TOKENS.at[:, 7].add(1))
    assert_same(changed[:, :7], logits[:, :7])
    assert bool((changed[:, 7:] != logits[:, 7:]).any(axis=(0, 2)).all())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_and_parameters_are_float32_whatever_the_activations_are(dtype: str):
    model = Transformer(replace(CONFIG, dtype=dtype))
    logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), TOKENS)
    assert (logits.shape, logits.dtype) == ((2, 12, 256), jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    cache = Cache.empty(model.config, 2, 12)
    assert cache.keys.dtype == jax.eval_shape(model.apply, variables, TOKENS, cache)[1].keys.dtype == dtype


def test_scanned_unrolled_and_rematerialised_layers_compute_the_same():
    _, variables = build()

    def loss_and_gradient(config: TransformerConfig, variables: Any) -> Any:
        model = Transformer(config)
        return jax.jit(jax.value_and_grad(lambda variables: (model.apply(variables, TOKENS) ** 2).mean()))(variables)

    loss, gradient = loss_and_gradient(CONFIG, variables)
    assert_close(loss_and_gradient(replace(CONFIG, remat=True), variables), (loss, gradient))
    result = loss_and_gradient(replace(CONFIG, scan=False, remat=True), unrolled(variables))
    assert_close(result, (loss, unrolled(gradient)))


@pytest.mark.parametrize("scan", [True, False])
def test_a_cache_continues_a_text_as_if_it_were_read_at_once(scan: bool):
    model, variables = build(replace(CONFIG, scan=scan))
    apply = jax.jit(model.apply)
    logits, cache = apply(variables, TOKENS[:, :5], Cache.empty(CONFIG, 2, 12))
    pieces = [logits]
    for position in range(5, 12):
        logits, cache = apply(variables, TOKENS[:, position : position + 1], cache)
        pieces.append(logits)
    assert int(cache.filled) == 12
    assert_close(jnp.concatenate(pieces, axis=1), apply(variables, TOKENS))


def test_rotary_scores_depend_on_the_distance_alone():
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    score = lambda a, b: float((rotary(query, jnp.array([a])) * rotary(key, jnp.array([b]))).sum())  # noqa: E731
    assert score(3, 1) == pytest.approx(score(12, 10), abs=1e-5)
    assert score(3, 1) != pytest.approx(score(3, 2), abs=1e-3)


@pytest.mark.parametrize("bad", [{"layers": 0}, {"width": 18}, {"heads": 3, "width": 18}, {"kv_heads": 3}])
def test_sizes_that_do_not_fit_are_refused(bad: dict[str, int]):
    with pytest.raises(ValueError, match="must be"):
        replace(CONFIG, **bad)


def test_sampling_without_temperature_takes_the_most_probable_byte():
    model, variables = build()
    text, apply = TOKENS, jax.jit(model.apply)
    for _ in range(4):
        text = jnp.concatenate([text, apply(variables, text)[:, -1:].argmax(-1).astype(jnp.uint8)], axis=1)
    assert_same(generate(variables, model, TOKENS, 4), text[:, 12:])


def test_sampling_depends_on_the_key_alone():
    model, variables = build()
    draw = partial(generate, variables, model, TOKENS, 8, temperature=1.0)
    assert_same(draw(key=jax.random.key(1)), draw(key=jax.random.key(1)))
    assert not np.array_equal(draw(key=jax.random.key(1)), draw(key=jax.random.key(2)))


@pytest.mark.parametrize("scan", [True, False])
def test_every_linear_layer_and_the_tied_embedding_are_sites(scan: bool):
    model, variables = build(replace(CONFIG, scan=scan))
    sites = lora.find_sites(model.apply, jax.eval_shape(lambda: variables), TOKENS)
    assert len(sites) == (8 if scan else 15)
    query = sites[f"params/{'layers' if scan else 'layers_0'}/attn/query/kernel"]
    assert (query.batch_shape, query.a_shape(3)[-2:], query.b_shape(3)[-3:]) == (
        (2,) if scan else (),
        (3, 16),
        (3, 4, 4),
    )
    assert (sites["params/embed/embedding"].uses, sites["params/embed/embedding"].head) == (2, True)
    adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2), variables, sites)
    assert set(adapter) == set(sites) - {"params/embed/embedding"}


@pytest.mark.parametrize("changes", [{"remat": True}, {"scan": False}], ids=str)
def test_adapted_equals_merged_with_gradients(changes: dict[str, bool]):
    model, variables = build(replace(CONFIG, **changes))
    adapter = random_adapter(lora.find_sites(model.apply, variables, TOKENS))

    @partial(jax.jit, static_argnums=0)
    def loss_and_gradient(model_of: Any, adapter: lora.Adapter) -> Any:
        return jax.value_and_grad(lambda adapter: (model_of(adapter) ** 2).mean())(adapter)

    adapted = loss_and_gradient(lambda adapter: lora.adapt(model.apply)(variables, adapter, TOKENS), adapter)
    merged = loss_and_gradient(lambda adapter: model.apply(lora.merge(variables, adapter), TOKENS), adapter)
    assert_close(adapted, merged, factor=10)


def test_the_sampler_can_be_adapted_too():
    model, variables = build()
    adapter = random_adapter(lora.find_sites(model.apply, variables, TOKENS))
    adapted = jax.jit(lambda variables, adapter: lora.adapt(generate)(variables, adapter, model, TOKENS, 6))
    assert_same(adapted(variables, adapter), generate(lora.merge(variables, adapter), model, TOKENS, 6))
