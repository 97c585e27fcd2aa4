"""Strength of an adapter: everywhere, where patterns say, static and traced."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers import assert_same, random_adapter

import lora_jax as lora
from lora_jax.adapter.site import Site

PATHS = ("block_0/attn/query/kernel", "block_0/mlp/up/kernel", "block_10/attn/query/kernel", "head/kernel")
SITES = [Site(path=path, shape=(4, 3), dtype="float32", kind="dense", in_axes=(0,), out_axes=(1,)) for path in PATHS]
ADAPTER = random_adapter(SITES)


def factors(scaled: lora.Adapter) -> list[float]:
    return [round(float(scaled[path].scale / ADAPTER[path].scale), 4) for path in PATHS]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((0.5,), [0.5] * 4),
        ((0.5, "block_0"), [0.5, 0.5, 1, 1]),
        ((0.5, "query"), [0.5, 1, 0.5, 1]),
        ((0.5, ("head", "query")), [0.5, 1, 0.5, 0.5]),
        ((0.5, ("block_0", "query")), [0.5, 0.5, 0.5, 1]),
        ((2, r"block_\d+/attn/query"), [2, 1, 2, 1]),
        ((2, ()), [1, 1, 1, 1]),
        (({"block_0": 0.5, "head": 0},), [0.5, 0.5, 1, 0]),
        (({},), [1, 1, 1, 1]),
    ],
    ids=str,
)
def test_strength_by_pattern(arguments: Any, expected: list[float]) -> None:
    assert factors(lora.scale(ADAPTER, *arguments)) == expected
    factor, where = arguments[0], arguments[1:]
    assert factors(jax.jit(lambda factor: lora.scale(ADAPTER, factor, *where))(factor)) == expected
    assert_same(lora.scale(ADAPTER, *arguments)["head/kernel"].a, ADAPTER["head/kernel"].a)


def test_gradient_in_the_strength_of_a_block() -> None:
    effect = lambda factor: jnp.square(lora.scale(ADAPTER, {"head": factor})["head/kernel"].delta()).sum()  # noqa: E731
    assert float(jax.grad(effect)(1.0)) == pytest.approx(2 * float(effect(1.0)), rel=1e-4)


def test_what_is_trained_in_full_stands_beside_what_is_scaled() -> None:
    bias = Site(path="head/bias", shape=(3,), dtype="float32", kind="full")
    both = lora.Adapter(dict(ADAPTER) | {"head/bias": lora.Replace(jnp.ones(3), bias)})
    assert_same(lora.scale(both, 0.5, where="block_0")["head/bias"], both["head/bias"])
    with pytest.raises(TypeError, match="head/bias is trained in full"):
        lora.scale(both, 0.5, where="head")


def test_patterns_are_strict() -> None:
    with pytest.raises(lora.MatchError, match=r"'block_1' hits nothing that is adapted; nearest: .*block_1"):
        lora.scale(ADAPTER, {"block_1": 0.5})
    with pytest.raises(lora.MatchError, match=r"'block_0' and 'query' both hit 'block_0/attn/query/kernel'"):
        lora.scale(ADAPTER, {"block_0": 0.5, "query": 2})
    with pytest.raises(lora.ParameterError, match="where='head' beside a mapping"):
        lora.scale(ADAPTER, {"block_0": 0.5}, where="head")
