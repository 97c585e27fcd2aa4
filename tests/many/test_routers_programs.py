"""Routers in compiled programs: their costs, dtypes, meshes, and what does not fit."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, cast_floats, compiled, random_adapter
from test_routers import ADAPTERS, BANK, PARAMS, SITES, Constant, Identity, X, dense, normal, ones, random_keys

import lora_jax as lora
from lora_jax.many.routers import Arrow, Router, Strongest


def test_what_a_router_costs() -> None:
    """Two thin products of all slots, and one with the keys."""
    routed = jax.jit(lora.route(dense))
    x, params = jnp.ones((64, 128)), {"w": jnp.ones((128, 96))}
    sites = lora.find_sites(dense, params, x)
    bank = lora.AdapterBank.of([random_adapter(sites, seed=i, rank=4) for i in range(8)])
    router = lora.routers.arrow(bank)
    costs = routed.lower(params, bank, router, x).compile().cost_analysis()
    assert costs is not None
    expected = 2 * 64 * (128 * 96 + 32 * (128 + 96) + 8 * 128)
    assert expected <= costs["flops"] < 1.05 * expected
    (use,) = lora.route(dense).explain(params, bank, router, x).uses
    assert use.route == "mask" and use.flops == 2 * 64 * 32 * (128 + 96)


def test_bfloat16_keeps_its_dtype() -> None:
    params, x = cast_floats((PARAMS, X), jnp.bfloat16)
    router = lora.routers.arrow(BANK, top_k=3)
    found = compiled(lora.route(dense))(params, BANK, router, x)
    assert_close(found, compiled(lora.route(dense))(PARAMS, BANK, router, X).astype(jnp.bfloat16))


@pytest.mark.parametrize("axis_type", list(jax.sharding.AxisType)[:2])
def test_on_a_mesh(axis_type: Any) -> None:
    """Rows spread over devices, with automatic and with explicit axes."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    spec = jax.sharding.PartitionSpec
    place = lambda array, *names: jax.device_put(array, jax.sharding.NamedSharding(mesh, spec(*names)))  # noqa: E731
    x = normal(8, 6, seed=3)
    strongest = lora.routers.components(ADAPTERS)
    learned = lora.routers.learned(jax.random.key(0), BANK, top_k=2)
    for bank, router in ((BANK, lora.routers.arrow(BANK, top_k=2)), (BANK, learned), strongest):
        expected = compiled(lora.route(dense))(PARAMS, bank, router, x)
        with jax.set_mesh(mesh):
            held = {"w": place(PARAMS["w"], None, "model")}
            found = jax.jit(lora.route(dense))(held, bank, router, place(x, "data", None))
        assert_close(np.asarray(found), np.asarray(expected))


def activated() -> lora.Adapter:
    config = lora.LoraConfig(method="alora", invocation_tokens=(7,), targets="w", rank=2)
    return lora.init(jax.random.key(0), config, PARAMS, SITES)


ACTIVATED = activated()
OTHER = random_adapter(lora.find_sites(dense, {"w": normal(6, 5)}, X))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lora.routers.arrow(BANK, top_k=0), "top_k=0"),
        (lambda: lora.routers.arrow(BANK, top_k=cast(Any, 2.5)), "top_k=2.5 must be a positive integer"),
        (lambda: lora.routers.arrow(BANK, temperature=0.0), "temperature=0.0 must be positive"),
        (lambda: lora.routers.arrow(BANK, temperature=1e-46), "temperature=1e-46 must be positive"),
        (lambda: lora.routers.arrow(BANK, temperature=float("nan")), "temperature=nan must be positive"),
        (lambda: lora.routers.arrow(BANK, temperature=1e39), r"temperature=1e\+39 must be positive, and a float32"),
        (lambda: lora.routers.learned(jax.random.key(0), ADAPTERS[:1]), "of 1 adapters: a softmax over one"),
        (lambda: lora.routers.components([ADAPTERS[0], OTHER]), "they are for different models"),
        (lambda: lora.routers.components([ACTIVATED]), "so its terms cannot act on every token"),
        (lambda: lora.route(dense)(PARAMS, BANK, object(), X), "ids of type object: give slots"),
        (lambda: lora.routers.learned(jax.random.key(0), BANK, top_k=1), "no gradient"),
        (lambda: lora.routers.components(ADAPTERS, top_k=0), "top_k=0"),
        (lambda: lora.route(dense)(PARAMS, BANK, Identity({"v": X}), X), r"At 'w' .* none; nearest: v"),
        (lambda: lora.route(dense)(PARAMS, BANK, Identity({"w": X}), X), r"keys of shape \(3, 6\).* \(5, 6\)"),
        (lambda: lora.route(dense)(PARAMS, BANK, Constant(ones(BANK), 1.0), X[0]), None),
        (lambda: lora.route(dense).usage(PARAMS, BANK, cast(Router, jnp.zeros(5, int)), X), "usage is about routers"),
    ],
)
def test_what_does_not_fit(make: Callable[[], Any], message: str | None) -> None:
    if message is None:
        make()  # One row without an axis of rows.
        return
    with pytest.raises(lora.LoraError, match=message):
        make()


def test_a_router_that_gives_another_shape() -> None:
    @jax.tree_util.register_dataclass
    @dataclass(frozen=True)
    class Summed(Identity):
        def weights(self, scores: Any) -> Any:
            return scores.sum(-1)

    with pytest.raises(lora.ParameterError, match=r"Summed.weights gave shape \(5,\) for scores \(5, 3\) at w"):
        lora.route(dense)(PARAMS, BANK, Summed(random_keys(BANK)), X)


def test_routers_are_pytrees_of_their_keys() -> None:
    router = lora.routers.arrow(BANK)
    assert isinstance(jax.tree.map(lambda leaf: leaf, router), Arrow)
    assert isinstance(lora.routers.components(ADAPTERS)[1], Strongest)
    assert jax.tree.structure(router) == jax.tree.structure(lora.routers.arrow(BANK, temperature=3.0))
