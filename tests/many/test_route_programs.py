"""Routing as a compiled program: what is compiled again, dropout, meshes, blocks."""

from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    assert_close,
    assert_same,
    compiled,
    random_adapter,
)
from test_route import ADAPTERS, PARAMS, SITES, X, dense

import lora_jax as lora
from lora_jax.engine.routing.forms import Form, block_product


def test_nothing_is_compiled_for_other_ids_or_another_bank() -> None:
    count = 0

    @jax.jit
    def run(bank: Any, ids: Any) -> Any:
        nonlocal count
        count += 1
        return lora.route(dense)(PARAMS, bank, ids, X)

    bank = lora.AdapterBank.empty(SITES, slots=5, rank=4)
    for slot in (1, 3, 4):
        bank = bank.put(slot, ADAPTERS[slot % 3])
        assert_close(run(bank, jnp.array([slot, 0, 0, slot]))[0], lora.adapt(dense)(PARAMS, ADAPTERS[slot % 3], X[0]))
    assert count == 1


@pytest.mark.parametrize("count", [8, 32])
def test_decoding_reads_the_base_and_its_slots_once(count: int) -> None:
    """64 rows of one token each: bytes of the compiled program, of those of the base's program and of the bank."""

    def gated(params: Any, x: Any) -> Any:
        return (jax.nn.silu(x @ params["gate"]) * (x @ params["up"])) @ params["down"]

    shapes = {"gate": (2048, 8192), "up": (2048, 8192), "down": (8192, 2048)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    x, ids = jax.ShapeDtypeStruct((64, 2048), jnp.float32), jax.ShapeDtypeStruct((64,), jnp.int32)
    sites = lora.find_sites(gated, params, x)
    bank = jax.eval_shape(lambda: lora.AdapterBank.empty(sites, count + 1, 16))

    def moved(fn: Any, *args: Any) -> float:
        program: Any = jax.jit(fn).lower(*args).compile()
        return program.cost_analysis()["bytes accessed"]

    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(bank))
    assert moved(lora.route(gated), params, bank, ids, x) < 1.15 * (moved(gated, params, x) + held)


@pytest.mark.parametrize("strategy", get_args(Form))
def test_dropout_is_each_rows_own_and_off_without_a_key(strategy: Form) -> None:
    """With a base of zeros and factors of ones on the diagonal, the result is what dropout leaves of the input."""
    params, x = {"w": jnp.zeros((6, 6))}, jnp.ones((4, 50, 6))
    linear = lambda params, x: x @ params["w"]  # noqa: E731
    config = lora.LoraConfig(rank=6, alpha=6, targets="w", dropout=0.25)
    fresh = lora.init(jax.random.key(0), config, params, lora.find_sites(linear, params, x))
    adapter = jax.tree.map(lambda leaf: jnp.eye(6) if leaf.ndim == 2 else leaf, fresh)
    routed, ids = lora.route(linear, strategy=strategy), [1, 0, 2, 1]
    run = lambda seed: routed(params, [adapter] * 2, ids, x, lora_key=jax.random.key(seed))  # noqa: E731
    assert_close(routed(params, [adapter] * 2, ids, x), x.at[1].set(0))
    found = np.asarray(run(1))
    np.testing.assert_array_equal(found, run(1))
    assert not found[1].any()
    own = found[[0, 2, 3]]
    np.testing.assert_allclose(np.unique(own), [0, 4 / 3], rtol=1e-6)
    assert (own[0] != own[1]).any() and (own[0] != own[2]).any() and (found != np.asarray(run(2))).any()
    assert abs(own.mean() - 1) < 0.1
    every = lora.route(linear, strategy="mask")(params, [adapter] * 2, ids, x, lora_key=jax.random.key(1))
    np.testing.assert_array_equal(found, every)


def test_dropout_differs_from_layer_to_layer_and_trains() -> None:
    params, x = {"w": jnp.stack([jnp.eye(6)] * 3)}, jnp.ones((2, 5, 6))
    scanned = lambda params, x: jax.lax.scan(lambda x, w: (x, x @ w), x, params["w"])[1]  # noqa: E731
    config = lora.LoraConfig(rank=6, alpha=6, targets="w", dropout=0.5)
    fresh = lora.init(jax.random.key(0), config, params, lora.find_sites(scanned, params, x))
    adapter = jax.tree.map(lambda leaf: jnp.stack([jnp.eye(6)] * 3) if leaf.ndim == 3 else leaf, fresh)

    @jax.jit
    def loss(adapters: Any) -> Any:
        ids = jnp.array([2, 1])
        found = lora.route(scanned)(params, adapters, ids, x, lora_key=jax.random.key(0))
        return jnp.sum(found[0] * 1.0 + found[1] * 2.0), found

    (_, found), gradient = jax.value_and_grad(loss, has_aux=True)([adapter, adapter])
    assert (found[0] != found[1]).any() and (found[1] != found[2]).any()
    for each in gradient:
        assert bool(jnp.isfinite(each["w"].a).all()) and float(jnp.abs(each["w"].b[0]).max()) > 0


def test_ids_from_outside_of_a_compiled_function() -> None:
    """They are known, but what is computed of them is not."""
    ids = jnp.array([1, 0, 3, 2])
    expected = compiled(lora.route(dense))(PARAMS, ADAPTERS, ids, X)
    assert_close(jax.jit(lambda x: lora.route(dense)(PARAMS, ADAPTERS, ids, x))(X), expected)


def test_dropout_that_cannot_be() -> None:
    key = {"lora_key": jax.random.key(0)}
    with pytest.raises(lora.ParameterError, match="A bank holds no dropout"):
        lora.route(dense)(PARAMS, lora.AdapterBank.of(ADAPTERS), [0] * 4, X, **key)
    unlike = [random_adapter(SITES, dropout=rate) for rate in (0.1, 0.2)]
    with pytest.raises(lora.ParameterError, match=r"w has dropout 0.1 in one adapter and 0.2 in another"):
        lora.route(dense)(PARAMS, unlike, [0] * 4, X, **key)
    with pytest.raises(lora.ConfigError, match="lora_key is one key here"):
        lora.route(dense)(PARAMS, ADAPTERS, [1] * 4, X, lora_key=(None, jax.random.key(0)))
    assert_close(
        compiled(lora.route(dense))(PARAMS, ADAPTERS, [1] * 4, X, **key),
        compiled(lora.adapt(dense))(PARAMS, ADAPTERS[0], X),
    )


@pytest.mark.parametrize("axis_type", list(jax.sharding.AxisType)[:2])
def test_on_a_mesh(axis_type: Any) -> None:
    """Examples spread over devices, with automatic and with explicit axes."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    spec = jax.sharding.PartitionSpec
    place = lambda array, *names: jax.device_put(array, jax.sharding.NamedSharding(mesh, spec(*names)))  # noqa: E731
    params = {"w": jax.device_put(np.float32(np.random.default_rng(0).normal(size=(6, 4))))}
    adapters = [random_adapter(lora.find_sites(dense, params, X), seed=i) for i in range(3)]
    expected = compiled(lora.route(dense))(params, adapters, [3, 0, 1, 2], X)
    for strategy in get_args(Form):
        with jax.set_mesh(mesh):
            held = {"w": place(params["w"], None, "model")}
            routed = jax.jit(lora.route(dense, strategy=strategy))
            found = routed(held, adapters, place(jnp.array([3, 0, 1, 2]), "data"), place(X, "data", None, None))
        assert_close(np.asarray(found), np.asarray(expected))


@pytest.mark.parametrize(("count", "slots"), [(1, 1), (7, 3), (64, 2), (100, 40)])
def test_products_in_blocks(count: int, slots: int) -> None:
    draw = np.random.default_rng(count)
    shapes = (count, 5), (slots, 2, 5), (slots, 2, 4)
    x, a, b = (jax.device_put(np.float32(draw.normal(size=shape))) for shape in shapes)
    for ids in (draw.integers(slots, size=count), np.zeros(count, int), np.full(count, slots - 1)):
        expected = np.einsum("ni,nri,nro->no", x, a[ids], b[ids])
        assert_close(jax.jit(block_product)(x, jnp.asarray(ids), a, b), jnp.asarray(expected))


def test_arguments_of_every_kind() -> None:
    """An argument that is None is no obstacle, and examples that come by keyword are named in the error."""
    params, x = {"w": jnp.arange(12.0).reshape(4, 3)}, jnp.arange(8.0).reshape(2, 4)
    adapter = random_adapter(lora.find_sites(lambda p, x: x @ p["w"], params, x))

    def fn(p, x, cache=None):
        return x @ p["w"]

    routed, ids = lora.route(fn), jnp.array([1, 0])
    assert_same(routed(params, [adapter], ids, x, None), routed(params, [adapter], ids, x))
    with pytest.raises(lora.ParameterError, match=r"by keyword \(x\)"):
        routed(params, [adapter], ids, x=x)


def test_axes_of_length_one_are_repeated() -> None:
    params, x = {"gain": jnp.arange(4.0), "w": jnp.ones((8, 3))}, jnp.arange(24.0).reshape(3, 2, 4)

    def fn(p, x):
        return (p["gain"][None, None] * x).reshape(3, -1) @ p["w"]

    adapter = random_adapter(lora.find_sites(fn, params, x)).without()
    rows = compiled(lora.route(fn))(params, [adapter], jnp.array([1, 0, 1]), x)
    assert_close(rows[1], fn(params, x)[1])
    assert_close(rows[::2], fn(lora.merge(params, adapter), x)[::2])
