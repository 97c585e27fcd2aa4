"""What a training step costs, in counts that are the same on every run: operations, bytes, compilations."""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers import assert_close, random_adapter

import lora_jax as lora
from benchmarks.harness import compilations
from benchmarks.steps import adapted_model, floor, full, least_flops, lora_step
from benchmarks.transformer import LINEARS, Shape, Transformer, token_batch

# The benchmark's model with every size but the heads divided by four, so that all its ratios stay the same.
SHAPE = Shape(layers=2, width=128, hidden=512, vocabulary=512, heads=8, batch=4, length=64)
TINY = replace(SHAPE, layers=1, width=16, hidden=32, vocabulary=16, length=8)


@cache
def cost(kind: Any, *args: Any) -> tuple[float, float]:
    """Operations and temporary bytes of a compiled training step."""
    compiled, _ = kind(*args).compile()
    return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(("strategy", "rank"), [("auto", 2), ("auto", 16), ("factored", 2), ("merged", 2)])
def test_a_step_computes_the_floor_the_thin_products_and_nothing_else(strategy: str, rank: int) -> None:
    flops, _ = cost(lora_step, SHAPE, rank, strategy)
    assert flops <= 1.01 * least_flops(SHAPE, rank, cost(floor, SHAPE)[0])


def test_no_gradient_of_the_base_is_computed() -> None:
    weight_gradients = 2 * SHAPE.tokens * sum(inner * outer for inner, outer in SHAPE.linears())
    assert cost(full, SHAPE)[0] > cost(floor, SHAPE)[0] + weight_gradients
    assert cost(lora_step, SHAPE, 2)[0] < cost(floor, SHAPE)[0] + 0.2 * weight_gradients


@pytest.mark.parametrize("rank", [8, 64])
def test_temporary_memory_stays_near_the_floors(rank: int) -> None:
    """In the benchmark's own model: at other sizes other arrays alternate in the same memory."""
    assert cost(lora_step, Shape(), rank)[1] <= 1.27 * cost(floor, Shape())[1]


def test_a_scanned_step_takes_no_more_than_its_floor_and_the_thin_products() -> None:
    one = replace(SHAPE, layers=1)  # a loop's body is counted once
    (flops, temporary), (least, least_temporary) = cost(lora_step, SHAPE, 2, "auto", True), cost(floor, SHAPE, True)
    assert flops <= 1.01 * least_flops(one, 2, least)
    assert temporary <= 1.27 * least_temporary


def test_the_form_of_a_product_follows_from_the_number_of_tokens() -> None:
    model = Transformer(SHAPE)
    params, adapter = adapted_model(model, SHAPE, 2)
    for tokens, route in ((8, "factored"), (512, "merged")):
        uses = lora.explain(model.apply, params, adapter, jnp.zeros((1, tokens), int)).uses
        assert len(uses) == 7 * SHAPE.layers
        assert {use.route for use in uses} == {route}


def test_an_adapter_and_its_optimizer_hold_twelve_bytes_per_trained_number() -> None:
    adapter, state = lora_step(TINY, 2).args[:2]
    count = 2 * sum(inner + outer for inner, outer in TINY.linears())
    held = jax.tree.leaves((list(adapter.values()), state))
    assert sum(leaf.nbytes for leaf in held if leaf.ndim) == 12 * count


def test_nothing_is_compiled_for_another_adapter_or_another_scale() -> None:
    model, tokens = Transformer(TINY), token_batch(TINY)
    params, adapter = adapted_model(model, TINY, 2)
    _, other = adapted_model(model, TINY, 2, seed=3)
    louder = lora.scale(adapter, 3.0)
    adapted = jax.jit(lora.adapt(model.apply))
    with compilations() as first:
        jax.block_until_ready(adapted(params, adapter, tokens))
    with compilations() as later:
        jax.block_until_ready([adapted(params, each, tokens) for each in (other, louder)])
    assert (len(first), later) == (1, [])


def test_nothing_is_compiled_again_in_training() -> None:
    step = lora_step(TINY, 2)
    jitted = jax.jit(step.fn)
    trained, moments, _ = jax.block_until_ready(jitted(*step.args))
    with compilations() as seen:
        jax.block_until_ready(jitted(trained, moments, *step.args[2:]))
    assert seen == []


def test_the_measured_model_is_the_one_meant() -> None:
    """All linear layers are adapted, and the adapted model is the merged one."""
    model, tokens = Transformer(TINY), token_batch(TINY)
    params, adapter = adapted_model(model, TINY, 2)
    adapter = lora.Adapter({path: replace(update, b=jnp.ones_like(update.b) / 9) for path, update in adapter.items()})
    assert [path.split("/")[-2] for path in adapter] == sorted(LINEARS[:4]) + sorted(LINEARS[4:])
    ours = jax.jit(lora.adapt(model.apply))(params, adapter, tokens)
    theirs = jax.jit(model.apply)(lora.merge(params, adapter), tokens)
    assert jnp.abs(ours - theirs).max() <= 1e-5 * jnp.abs(theirs).max()


def test_adapters_side_by_side_are_one_pair_of_thin_products() -> None:
    """Of any ranks and with any scales, where nothing is differentiated."""
    params, x = {"w": jnp.ones((64, 32))}, jnp.ones((4, 64))
    fn = lambda params, x: jnp.tanh(x @ params["w"])  # noqa: E731
    sites = lora.find_sites(fn, params, x)
    adapters = [lora.scale(random_adapter(sites, seed=i, rank=i + 1), 0.5) for i in range(3)]
    adapted = lora.adapt(fn, strategy="factored")
    products = lambda *given: str(jax.make_jaxpr(adapted)(params, *given)).count("dot_general")  # noqa: E731
    assert products(adapters, x) == products(adapters[:1], x) == 3
    separate = sum(adapted_delta(params, adapter, x) for adapter in adapters)
    assert_close(jnp.arctanh(adapted(params, adapters, x * 1e-3)), x @ params["w"] * 1e-3 + 1e-3 * separate)


def adapted_delta(params: Any, adapter: lora.Adapter, x: jax.Array) -> jax.Array:
    return x @ adapter["w"].delta()
