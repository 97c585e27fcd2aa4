"""Joined products: which are chosen, what they compute, and what is kept beside them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, random_adapter

import lora_jax as lora
from lora_jax.engine import platforms
from lora_jax.engine.jaxprs import sub_programs

N, D, F, RANK = 64, 8, 32, 2


def fn(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["up"]) @ params["down"]


def setting(dtype: Any = jnp.float32, dropout: float = 0.0) -> tuple[Any, lora.Adapter, jax.Array]:
    draw = np.random.default_rng(0)
    params = {"up": draw.normal(size=(D, F)) / 3, "down": draw.normal(size=(F, D)) / 6}
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
    x = jnp.asarray(draw.normal(size=(N, D)), dtype)
    return params, random_adapter(lora.find_sites(fn, params, x), rank=RANK, dropout=dropout), x


def loss(strategy: Any, params: Any, key: Any = None) -> Any:
    adapted = lora.adapt(fn, strategy=strategy)
    return lambda adapter, x: jnp.sum(jnp.sin(adapted(params, adapter, x, lora_key=key).astype(jnp.float32)))


def wide_products(jaxpr: Any) -> list[tuple[int, ...]]:
    """Shapes of the operands and the result of products whose operands are both wider than the rank."""
    found = []
    for eqn in jaxpr.eqns:
        shapes = [var.aval.shape for var in (*eqn.invars, *eqn.outvars) if hasattr(var, "aval")]
        if eqn.primitive.name == "dot_general" and all(min(shape) > RANK for shape in shapes):
            found.append(tuple(size for shape in shapes for size in shape))
        found += [each for inner in sub_programs(eqn) for each in wide_products(inner.jaxpr)]
    return found


def test_it_is_one_product_forward_and_one_backward():
    params, adapter, x = setting()
    step = jax.make_jaxpr(jax.grad(loss("joined", params), (0, 1)))(adapter, x).jaxpr
    up, down, *backward = wide_products(step)
    assert (up, down) == ((N, D + RANK, D + RANK, F, N, F), (N, F + RANK, F + RANK, D, N, D))
    assert [(shape[:2], shape[-2:]) for shape in backward] == [((N, D + RANK), (N, F)), ((N, F + RANK), (N, D))]


def test_forward_mode_second_derivatives_and_lanes():
    params, adapter, x = setting()

    def found(strategy: Any) -> Any:
        gradient = jax.grad(loss(strategy, params), (0, 1))
        tangents = jax.tree.map(jnp.cos, (adapter, x))
        lanes = jax.vmap(lora.adapt(fn, strategy=strategy), (None, 0, 0))
        stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 1.5 * leaf]), (adapter, x))
        return jax.jvp(gradient, (adapter, x), tangents), lanes(params, *stacked)

    assert_close(found("joined"), found("factored"), factor=3)


def test_dropout_joins_forward_only():
    params, adapter, x = setting(dropout=0.5)
    got, want = (jax.grad(loss(each, params, jax.random.key(3)), (0, 1))(adapter, x) for each in ("joined", "factored"))
    assert_close(got, want, factor=3)


def test_several_adapters():
    params, adapter, x = setting()
    pair = adapter, lora.scale(adapter, 0.5)
    got, want = (lora.adapt(fn, strategy=each)(params, pair, x) for each in ("joined", "factored"))
    assert_close(got, want)


@pytest.mark.parametrize(("accelerated", "routes"), [(True, {"up": "joined", "down": "factored"}), (False, {})])
def test_it_is_chosen_by_bytes_where_these_decide(monkeypatch, accelerated, routes):
    monkeypatch.setattr(platforms, "accelerated", lambda: accelerated)
    params, adapter, x = setting(jnp.bfloat16)
    explained = lora.explain(fn, params, adapter, x)
    assert {use.path: use.route for use in explained.uses} == {"up": "factored", "down": "factored"} | routes
    copies = 2 * ((N + F) * (D + RANK) + N * RANK)
    assert {use.path: use.nbytes for use in explained.uses}["up"] == (copies if accelerated else 4 * N * RANK)
    backward = wide_products(jax.make_jaxpr(jax.grad(loss("auto", params), (0, 1)))(adapter, x).jaxpr)[2:]
    assert [shape[1] for shape in backward] == ([D + RANK, F + RANK] if accelerated else [D, F])


@pytest.mark.parametrize("policy", ["dots_saveable", "dots_with_no_batch_dims_saveable"])
def test_first_products_are_kept_in_the_dtype_of_the_input(monkeypatch, policy):
    monkeypatch.setattr(platforms, "accelerated", lambda: True)
    jax.clear_caches()  # JAX keeps what it traced for another platform.
    params, adapter, x = setting(jnp.bfloat16)
    remat = jax.checkpoint(lora.adapt(fn, strategy="factored"), policy=getattr(jax.checkpoint_policies, policy))
    _, back = jax.vjp(lambda adapter, x: remat(params, adapter, x), adapter, x)
    kept = [leaf for leaf in jax.tree.leaves(back) if getattr(leaf, "shape", ()) == (N, RANK)]
    assert kept and {leaf.dtype.name for leaf in kept} == {"bfloat16"}


def test_sites_that_read_one_value_read_one_copy_of_it(monkeypatch):
    """So that the backward pass has one sum of what their first products give to its gradient."""
    params, x = {name: jnp.ones((D, D)) for name in "qkv"}, jnp.ones((N, D))
    three = lambda params, x: [x @ params[name] for name in "qkv"]  # noqa: E731
    adapter = random_adapter(lora.find_sites(three, params, x), rank=RANK)
    for accelerated in (False, True):
        monkeypatch.setattr(platforms, "accelerated", lambda: accelerated)  # noqa: B023
        program = jax.make_jaxpr(lora.adapt(three, strategy="factored"))(params, adapter, x)
        assert [eqn.primitive.name for eqn in program.eqns].count("copy") == accelerated
    program = jax.make_jaxpr(lora.adapt(fn, strategy="factored"))(*setting())
    assert "copy" not in [eqn.primitive.name for eqn in program.eqns]


def test_first_products_have_a_name_for_policies():
    params, adapter, x = setting()
    policy = jax.checkpoint_policies.save_only_these_names("lora_hidden")
    remat = jax.checkpoint(lora.adapt(fn), policy=policy)
    _, back = jax.vjp(lambda adapter, x: remat(params, adapter, x), adapter, x)
    assert sum(leaf.shape == (N, RANK) for leaf in jax.tree.leaves(back) if hasattr(leaf, "shape")) == 2
