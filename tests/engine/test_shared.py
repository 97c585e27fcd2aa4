"""Products that layers have in common are one function of the program, whatever else the layers differ in."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers import assert_close, merged_model, random_adapter

import lora_jax as lora

LAYERS, WIDTH = 6, 8


def deep(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Layers without a loop."""
    for layer in range(LAYERS):
        with jax.named_scope(f"layer_{layer}"):
            x = x + jnp.tanh(x @ params[f"w{layer}"])
    return x


def setting() -> tuple[dict[str, jax.Array], lora.Adapter, jax.Array]:
    keys = jax.random.split(jax.random.key(0), LAYERS + 1)
    params = {f"w{layer}": jax.random.normal(keys[layer], (WIDTH, WIDTH)) / 4 for layer in range(LAYERS)}
    x = jax.random.normal(keys[-1], (4, WIDTH), jnp.bfloat16).astype(jnp.float32)
    return params, random_adapter(lora.find_sites(deep, params, x)), x


def functions(fn: Any, *args: Any) -> int:
    """How many functions for adapted products the lowered program has."""
    return jax.jit(fn).lower(*args).as_text().count("func.func private @lora_product")


def gradient(params: Any, adapter: lora.Adapter, x: jax.Array) -> Any:
    return jax.grad(lambda adapter, x: lora.adapt(deep)(params, adapter, x).sum(), argnums=(0, 1))(adapter, x)


def test_equal_products_are_one_function() -> None:
    params, adapter, x = setting()
    assert functions(lora.adapt(deep), params, adapter, x) == 1
    assert functions(gradient, params, adapter, x) <= 4, "forward and backward, of the first layer and of the others"
    assert_close(jax.jit(lora.adapt(deep))(params, adapter, x), merged_model(deep)(params, adapter, x))


@pytest.mark.parametrize("change", ["rank", "dtype", "start"])
def test_different_products_are_not(change: str) -> None:
    params, adapter, x = setting()
    first = adapter["w0"]
    assert isinstance(first, lora.LowRank)
    if change == "dtype":
        params |= {"w0": params["w0"].astype(jnp.bfloat16)}
        sites = lora.find_sites(deep, params, x)
        other = lora.Adapter({"w0": random_adapter([sites["w0"]])["w0"]})
    else:
        other = random_adapter([first.site], rank=3)
    given = (adapter, other) if change == "start" else (adapter.without("w0"), other)
    assert functions(lora.adapt(deep), params, given, x) == 2


def test_profiles_name_the_layer() -> None:
    """The call is in the scopes of the operation that it stands for, and the function in none."""
    params, adapter, x = setting()
    text = jax.jit(lora.adapt(deep)).lower(params, adapter, x).compile().as_text()
    assert all(f"layer_{layer}/" in text for layer in range(LAYERS))
    assert "layer_0/" not in text.partition("layer_1/")[2].partition("layer_0/")[0]
