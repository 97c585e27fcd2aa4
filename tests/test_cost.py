"""What a training step costs, in counts that are the same on every run: operations, bytes, compilations."""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import lora_jax as lora
from benchmarks.harness import compilations
from benchmarks.steps import adapted_model, floor, full, least_flops, lora_step
from benchmarks.transformer import LINEARS, Shape, Transformer, initial, token_batch

# The benchmark's model with every size but the heads divided by four, so that all its ratios stay the same.
SHAPE = Shape(layers=2, width=128, hidden=512, vocabulary=512, heads=8, batch=4, length=64)
RANKS = (2, 16)  # as 8 and 64 there


@cache
def cost(kind: Any, *args: Any) -> tuple[float, float]:
    """Operations and temporary bytes of a compiled training step."""
    compiled, _ = kind(*args).compile()
    return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("strategy", ["auto", "factored", "merged"])
def test_a_step_computes_the_floor_the_thin_products_and_nothing_else(strategy: str, rank: int) -> None:
    flops, _ = cost(lora_step, SHAPE, rank, strategy)
    assert flops <= 1.01 * least_flops(SHAPE, rank, cost(floor, SHAPE)[0])


def test_no_gradient_of_the_base_is_computed() -> None:
    weight_gradients = 2 * SHAPE.tokens * sum(inner * outer for inner, outer in SHAPE.linears())
    assert cost(full, SHAPE)[0] > cost(floor, SHAPE)[0] + weight_gradients
    assert cost(lora_step, SHAPE, 2)[0] < cost(floor, SHAPE)[0] + 0.2 * weight_gradients


def test_few_tokens_are_not_merged_for() -> None:
    few = replace(SHAPE, batch=1, length=16)
    flops, _ = cost(lora_step, few, 16)
    assert flops <= 1.02 * least_flops(few, 16, cost(floor, few)[0])


def test_a_scanned_step_does_no_more_than_an_unrolled_one() -> None:
    one = replace(SHAPE, layers=1)
    body = cost(lora_step, one, 2)[0] - cost(floor, one)[0]
    assert cost(lora_step, one, 2, "auto", True)[0] - cost(floor, one, True)[0] <= 1.1 * body


@pytest.mark.parametrize("rank", RANKS)
def test_temporary_memory_stays_near_the_floors(rank: int) -> None:
    assert cost(lora_step, SHAPE, rank)[1] <= 1.27 * cost(floor, SHAPE)[1]


def test_an_adapter_and_its_optimizer_take_sixteen_bytes_per_parameter() -> None:
    step = lora_step(SHAPE, 2)
    adapter, state = step.args[:2]
    count = sum(update.a.size + update.b.size for update in adapter.values())
    assert count == 2 * sum(inner + outer for inner, outer in SHAPE.linears())
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((adapter, state)) if leaf.ndim)
    assert held == 12 * count  # parameters and two moments; the gradient is the fourth


def test_nothing_is_compiled_for_another_adapter_or_another_scale() -> None:
    small = replace(SHAPE, layers=1, width=16, hidden=32, vocabulary=16, length=4)
    model, tokens = Transformer(small), token_batch(small)
    params, adapter = adapted_model(model, small, 2)
    _, other = adapted_model(model, small, 2, seed=3)
    louder = lora.scale(adapter, 3.0)
    adapted = jax.jit(lora.adapt(model.apply))
    with compilations() as first:
        jax.block_until_ready(adapted(params, adapter, tokens))
    with compilations() as seen:
        jax.block_until_ready([adapted(params, each, tokens) for each in (other, louder)])
    assert len(first) == 1
    assert seen == []


def test_nothing_is_compiled_again_in_training() -> None:
    small = replace(SHAPE, layers=1, width=16, hidden=32, vocabulary=16, length=4)
    step = lora_step(small, 2)
    jitted = jax.jit(step.fn)
    trained, moments, _ = jax.block_until_ready(jitted(*step.args))
    with compilations() as seen:
        jax.block_until_ready(jitted(trained, moments, *step.args[2:]))
    assert seen == []


@pytest.mark.parametrize("strategy", ["auto", "factored", "merged"])
def test_the_measured_step_is_the_right_one(strategy: str) -> None:
    """Its loss and its gradients are those of the merged model."""
    small = replace(SHAPE, layers=1, width=32, hidden=64, vocabulary=16, length=8)
    model, tokens = Transformer(small), token_batch(small)
    params, adapter = adapted_model(model, small, 2)
    adapter = lora.Adapter({path: replace(update, b=jnp.ones_like(update.b) / 9) for path, update in adapter.items()})
    adapted = lora.adapt(model.apply, strategy=strategy)
    assert {path.split("/")[-2] for path in adapter} == set(LINEARS)
    ours = jax.jit(adapted)(params, adapter, tokens)
    theirs = jax.jit(model.apply)(lora.merge(params, adapter), tokens)
    assert jnp.abs(ours - theirs).max() <= 1e-5 * jnp.abs(theirs).max()
