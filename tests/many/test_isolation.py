"""Rows are independent, forward and backward: what one adapter or one row holds reaches no other."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, random_adapter

import lora_jax as lora
from lora_jax.many.routers import Router

IDS = jnp.array([1, 0, 2, 1])
PARAMS = {
    "table": jax.random.normal(jax.random.key(0), (9, 4)),
    "kernel": jax.random.normal(jax.random.key(1), (3, 4, 5)),
    "w": jax.random.normal(jax.random.key(2), (5, 6)),
    "v": jax.random.normal(jax.random.key(3), (6, 3)),
}
TOKENS = jax.random.randint(jax.random.key(4), (4, 7), 0, 9)
NOISE = jnp.zeros((4, 7, 4))


def model(params, tokens, noise):
    """A look-up, a convolution and products, with a residual stream past one of them."""
    x = params["table"][tokens] + noise
    x = jax.lax.conv_general_dilated(
        x, params["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )  # fmt: skip
    y = jnp.tanh(x @ params["w"])
    return (y + y @ jnp.eye(6)) @ params["v"]


SITES = lora.find_sites(model, PARAMS, TOKENS, NOISE)
FIRST, SECOND = (random_adapter(SITES, seed=seed, rank=2) for seed in (0, 1))


def with_value(adapter: lora.Adapter, path: str, name: str, value: float) -> lora.Adapter:
    """The adapter with a number in one of its factors."""
    factor = np.array(getattr(adapter[path], name))
    factor[0, 0] = value
    return lora.Adapter({**adapter, path: replace(adapter[path], **{name: jnp.asarray(factor)})})


BROKEN = {
    f"{path}-{name}-{value}": with_value(SECOND, path, name, value)
    for path in SITES for name in "ab" for value in (np.nan, np.inf, 1e38)
}  # fmt: skip
ONE_HOT = jax.nn.one_hot(IDS, 3)


def run(first, second, ids, strategy, noise=NOISE, remat=False):
    fn = jax.checkpoint(model) if remat else model
    routed = jax.jit(lambda *pair: lora.route(fn, strategy=strategy)(PARAMS, pair, ids, TOKENS, noise))
    return routed(first, second)


def loss(first, second, ids, strategy, noise=NOISE):
    return jnp.sum(run(first, second, ids, strategy, noise) ** 2)


@cache
def rows_and_gradient(strategy: Any) -> Any:
    """Compiled once for all pairs of adapters."""
    ids, form = (ONE_HOT, "auto") if strategy == "weights" else (IDS, strategy)
    return jax.jit(lambda first, second: (run(first, second, ids, form), jax.grad(loss)(first, second, ids, form)))


@pytest.mark.parametrize("strategy", ["rows", "mask", "blocks", "weights"])
@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_adapter_stays_with_its_rows(how: str, strategy: Any) -> None:
    """Its neighbours' rows, and the gradients of these, are what they are beside a sound one."""
    both = rows_and_gradient(strategy)
    rows, gradient = both(FIRST, BROKEN[how])
    good_rows, good_gradient = both(FIRST, SECOND)
    assert_close(rows[jnp.array([0, 1, 3])], good_rows[jnp.array([0, 1, 3])])
    assert_close(gradient, good_gradient)
    if "nan" in how:
        assert not jnp.isfinite(rows[2]).all(), "a broken adapter's own rows say so"


@pytest.mark.parametrize("strategy", ["rows", "mask", "blocks", "weights"])
def test_an_input_that_is_not_finite_reaches_no_other_adapter(strategy: Any) -> None:
    """Neither does the gradient of a row whose loss is undefined; the row's own adapter is told."""
    ids, form = (ONE_HOT, "auto") if strategy == "weights" else (IDS, strategy)
    spoiled = NOISE.at[2, 0, 0].set(jnp.nan)
    first, second = jax.jit(jax.grad(loss, (0, 1)), static_argnums=3)(FIRST, SECOND, ids, form, spoiled)
    assert_close(first, jax.grad(loss)(FIRST, SECOND, ids, form))
    assert not jnp.isfinite(second["v"].b).all()


@pytest.mark.parametrize("strategy", ["rows", "mask", "blocks"])
def test_a_gradient_that_is_not_finite_reaches_no_other_adapter(strategy: Any) -> None:
    """The loss of a row overflows, though nothing in the model does."""
    scale = jnp.ones((4, 1, 1)).at[2].set(jnp.inf)

    def total(first, second):
        return jnp.sum(scale * run(first, second, IDS, strategy))

    first, second = jax.grad(total, (0, 1))(FIRST, SECOND)
    assert_close(first, jax.grad(lambda first: jnp.sum(run(first, SECOND, IDS, strategy)[jnp.array([0, 1, 3])]))(FIRST))
    assert all(not jnp.isfinite(update.b).all() for update in second.values())


@pytest.mark.parametrize("transform", ["jvp", "vmap", "hessian", "remat"])
def test_under_transformations(transform: str) -> None:
    """In the form that brings all rows and all slots together."""
    broken, factor = BROKEN["w-a-nan"], FIRST["w"].b

    def own(b, second=broken):
        first = lora.Adapter({**FIRST, "w": replace(FIRST["w"], b=b)})
        rows = run(first, second, IDS, "mask", remat=transform == "remat")
        return jnp.sum(rows[jnp.array([0, 1, 3])] ** 2) + 0 * jnp.sum(jnp.where(jnp.isnan(rows), 0, rows))

    run_it = {
        "jvp": lambda fn: jax.jvp(fn, (factor,), (factor,)),
        "vmap": lambda fn: jax.vmap(jax.grad(fn))(jnp.stack([factor, 2 * factor])),
        "hessian": lambda fn: jax.hessian(fn)(factor),
        "remat": lambda fn: jax.grad(fn)(factor),
    }[transform]
    assert_close(*jax.jit(lambda: (run_it(own), run_it(lambda b: own(b, SECOND))))())


def test_a_weight_of_zero_has_a_gradient_and_keeps_a_slot_out() -> None:
    """What the weight would do is known where the slot is sound; a broken slot leaves the others' as they are."""

    def of_weights(weights, second):
        return loss(FIRST, second, weights, "auto")

    gradient = jax.grad(of_weights)(ONE_HOT, SECOND)
    step = 1e-3
    moved = of_weights(ONE_HOT.at[0, 2].add(step), SECOND) - of_weights(ONE_HOT.at[0, 2].add(-step), SECOND)
    np.testing.assert_allclose(gradient[0, 2], moved / (2 * step), rtol=2e-2)
    beside = jax.grad(of_weights)(ONE_HOT, BROKEN["w-b-nan"])
    assert_close(beside[jnp.array([0, 1, 3]), :2], gradient[jnp.array([0, 1, 3]), :2])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Own(Router):
    """The adapter whose key an input is most like."""

    keys: Any

    def weights(self, scores: Any) -> Any:
        return jax.nn.softmax(scores)


def test_routers_keep_a_row_that_is_not_finite_to_itself() -> None:
    """Its weights are undefined; the keys' gradient from it goes nowhere."""
    params, x = {"w": PARAMS["w"]}, jax.random.normal(jax.random.key(5), (4, 5))

    def fn(params, x):
        return x @ params["w"]

    adapters = [lora.Adapter({"w": each["w"]}) for each in (FIRST, SECOND)]
    router = Own({"w": jax.random.normal(jax.random.key(6), (2, 5))})

    def total(router, x, kept):
        rows = lora.route(fn)(params, adapters, router, x)
        return jnp.sum(jnp.where(kept, rows, 0) ** 2), rows

    kept = jnp.array([True, True, False, True])[:, None]
    gradient = jax.jit(jax.grad(total, has_aux=True))
    found, rows = gradient(router, x.at[2, 0].set(jnp.nan), kept)
    wanted, sound = gradient(router, x, kept)
    assert_close((found, rows[jnp.array([0, 1, 3])]), (wanted, sound[jnp.array([0, 1, 3])]))
    assert jnp.isnan(rows[2]).any()


@pytest.mark.parametrize("make", [lambda pair: pair, lora.AdapterBank.of], ids=["list", "of"])
def test_what_can_be_seen_is_refused(make: Any) -> None:
    """Outside of a compiled function."""
    with pytest.raises(lora.ParameterError, match="w holds numbers that are not finite in the adapter of slot 2"):
        lora.route(model)(PARAMS, make([FIRST, BROKEN["w-a-nan"]]), IDS, TOKENS, NOISE)


def test_what_overflows_in_the_banks_dtype_is_refused() -> None:
    """The check comes after the cast."""
    bank = lora.AdapterBank.empty(SITES, slots=3, rank=2, dtype=jnp.float16)
    with pytest.raises(lora.ParameterError, match=r"holds numbers that are not finite: .* overflows float16"):
        bank.put(1, lora.scale(FIRST, 1e6))
