"""What is computed again in the backward pass instead of being kept, and that it changes nothing else."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers import assert_gradients_close, merged_model

import lora_jax as lora
from lora_jax.engine.recompute import Frame

TOKENS, WIDTH = 64, 16


def gated(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    gate, up = jnp.tanh(x @ params["gate"]), x @ params["up"]
    return jnp.sin(jax.nn.silu(gate) * up @ params["down"])


def normalised(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    h = jnp.sin(x @ params["gate"])
    h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + 1e-6) * params["scale"][None]
    return jnp.sin(h @ params["down"])


def plain(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    h = jnp.sin(x @ params["gate"]) + jnp.cos(x @ params["up"])
    return jnp.sin(h @ params["down"])


def setting(fn: Callable[..., Any]) -> tuple[dict[str, jax.Array], lora.Adapter, jax.Array]:
    keys = iter(jax.random.split(jax.random.key(0), 8))
    params = {name: jax.random.normal(next(keys), (WIDTH, WIDTH)) / 4 for name in ("gate", "up", "down")}
    params["scale"] = jnp.linspace(0.5, 1.5, WIDTH)
    x = jax.random.normal(next(keys), (TOKENS, WIDTH))
    sites = lora.find_sites(fn, params, x)
    adapter = lora.init(next(keys), lora.LoraConfig(rank=2, targets=tuple(sites)), params, sites)
    return params, jax.tree.map(lambda leaf: leaf + 0.1, adapter), x


def kept_bytes(fn: Callable[..., Any], params: Any, adapter: lora.Adapter, x: jax.Array) -> int:
    """Bytes of what `jax.vjp` holds for the backward pass; one array held twice counts once."""
    adapted = lora.adapt(fn)
    _, pullback = jax.vjp(lambda adapter: adapted(params, adapter, x), adapter)
    return sum({id(leaf): leaf.nbytes for leaf in jax.tree.leaves(pullback)}.values())


@pytest.mark.parametrize("fn", [gated, normalised])
def test_cheap_inputs_are_not_kept(fn: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    params, adapter, x = setting(fn)
    ours = kept_bytes(fn, params, adapter, x)
    monkeypatch.setattr(Frame, "recomputed", lambda self, atom: None)
    assert ours <= kept_bytes(fn, params, adapter, x) - TOKENS * WIDTH * 4


def test_inputs_that_would_cost_more_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    params, adapter, x = setting(plain)
    ours = kept_bytes(plain, params, adapter, x)
    monkeypatch.setattr(Frame, "recomputed", lambda self, atom: None)
    assert ours == kept_bytes(plain, params, adapter, x)


@pytest.mark.parametrize("fn", [gated, normalised, plain])
def test_gradients_are_the_same(fn: Callable[..., Any]) -> None:
    params, adapter, x = setting(fn)

    def gradient(run: Callable[..., jax.Array]) -> lora.Adapter:
        return jax.jit(jax.grad(lambda adapter: jnp.sum(run(params, adapter, x) ** 2)))(adapter)

    assert_gradients_close(gradient(lora.adapt(fn)), gradient(merged_model(fn)))


def test_second_derivatives_see_through_it() -> None:
    params, adapter, x = setting(gated)

    def curvature(run: Callable[..., jax.Array]) -> jax.Array:
        slope = jax.grad(lambda a, x: jnp.sum(run(params, a, x)))
        return jax.grad(lambda x: jnp.sum(slope(adapter, x)["down"].a ** 2))(x)

    assert_gradients_close(curvature(lora.adapt(gated)), curvature(merged_model(gated)))
