"""DoRA: its norms, its gradient, its start, several of it at once, and what it costs."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_same, random_adapter

import lora_jax as lora
from lora_jax.adapter.factors import outer
from lora_jax.adapter.site import Site
from lora_jax.adapter.updates import held
from lora_jax.methods.dora import changed_squares, squares

SITES = {
    "dense": Site(path="w", shape=(12, 7), dtype="float32", kind="dense", in_axes=(0,), out_axes=(1,)),
    "heads": Site(
        path="w", shape=(2, 6, 3, 4), dtype="float32", kind="dense", in_axes=(1,), out_axes=(3, 0), batch_axes=(2,)
    ),
    "conv": Site(path="w", shape=(3, 3, 2, 5), dtype="float32", kind="conv", in_axes=(0, 1, 2), out_axes=(3,)),
}


def weight(site: Site, dtype: str = "float32") -> jax.Array:
    return jax.random.normal(jax.random.key(1), site.shape).astype(dtype)


def dora(site: Site, seed: int = 0, dtype: str = "float32") -> lora.methods.Dora:
    made = jax.jit(lora.methods.Dora.around)(random_adapter([site], seed)["w"], weight(site, dtype))
    return replace(made, magnitude=made.magnitude * (1 + 0.1 * seed + 0.3 * jnp.cos(made.magnitude * 9)))


def norm(site: Site, value: jax.Array) -> np.ndarray:
    """Norms of columns, in the order of batch and output axes."""
    moved = np.moveaxis(np.asarray(value, np.float64), site.in_axes, range(-len(site.in_axes), 0))
    found = np.sqrt((moved**2).sum(tuple(range(-len(site.in_axes), 0))))
    left = sorted((*site.batch_axes, *site.out_axes))
    return found.transpose([left.index(axis) for axis in (*site.batch_axes, *site.out_axes)])


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_norms_are_those_of_the_sum(name: str, dtype: str) -> None:
    """In float32 accuracy for narrow weights too, which are never widened."""
    site = SITES[name]
    w, update = weight(site, dtype), random_adapter([site])["w"]
    found = jax.jit(lambda w, update: jnp.sqrt(changed_squares(site, w, squares(site, w), update.pairs())))(w, update)
    whole = jax.jit(lambda w, update: w.astype(jnp.float32) + outer(site, *update.pairs()[0]))(w, update)
    np.testing.assert_allclose(np.asarray(found), norm(site, whole), rtol=2e-6)


@pytest.mark.parametrize("name", SITES)
def test_columns_have_the_magnitude(name: str) -> None:
    site, update = SITES[name], dora(SITES[name])
    np.testing.assert_allclose(
        norm(site, jax.jit(lambda update, w: update.applied(w))(update, weight(site))),
        np.asarray(update.magnitude),
        rtol=1e-5,
    )


def test_a_column_of_zeros_stays_finite() -> None:
    site = SITES["dense"]
    w = weight(site).at[:, 2].set(0)
    update = lora.methods.Dora.around(replace(random_adapter([site])["w"], b=jnp.zeros((2, 7))), w)
    assert_same(update.applied(w), w)
    gradient = jax.jit(jax.grad(lambda update: update.applied(w).sum()))(update)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_changes_at_the_start(dtype: str) -> None:
    """PEFT computes norms in the weight's dtype: in bfloat16 17.7% of its outputs change."""
    site = SITES["dense"]
    w, x = weight(site, dtype), jax.random.normal(jax.random.key(2), (64, 12)).astype(dtype)
    update = lora.methods.Dora.around(replace(random_adapter([site])["w"], b=jnp.zeros((2, 7))), w)
    fn = lambda params, x: x @ params["w"]  # noqa: E731
    adapter = lora.Adapter({"w": update})
    with jax.disable_jit():
        assert_same(lora.adapt(fn)({"w": w}, adapter, x), fn({"w": w}, x))
    compiled = jax.jit(lora.adapt(fn))({"w": w}, adapter, x)
    if dtype == "bfloat16":
        assert_same(compiled, fn({"w": w}, x))
    assert_close(compiled, fn({"w": w}, x))
    assert_same(lora.merge({"w": w}, adapter)["w"], w)


def test_the_norm_is_a_constant_in_the_gradient() -> None:
    """Section 4.3 of the paper: the gradient of V is `m / ‖V‖` times that of the weight, without the projection."""
    site, update, w = SITES["dense"], dora(SITES["dense"]), weight(SITES["dense"])
    direction = jax.random.normal(jax.random.key(3), site.shape)
    gradient = jax.grad(lambda update: (held(update).applied(w) * direction).sum())(update)
    whole = w + outer(site, *update.pairs()[0])
    gain = update.magnitude / jnp.linalg.norm(whole, axis=0)
    by_b = update.scale * update.a @ (direction * gain[None])
    assert_close(gradient.b, by_b)
    assert_close(gradient.magnitude, (direction * whole).sum(0) / jnp.linalg.norm(whole, axis=0))
    assert not any(bool(leaf.any()) for leaf in (gradient.base_squares, gradient.strength, gradient.scale))


def test_several_adapters_do_not_depend_on_their_order() -> None:
    """The effect on the base of each adds up; in PEFT the second acts on the result of the first."""
    site = SITES["dense"]
    w, x = weight(site), jax.random.normal(jax.random.key(2), (5, 12))
    plain = random_adapter([site], seed=3)["w"]
    adapters = [lora.Adapter({"w": update}) for update in (dora(site, 1), plain, dora(site, 2))]
    fn = lambda params, x: x @ params["w"]  # noqa: E731
    params = {"w": w}
    outputs = [lora.adapt(fn)(params, tuple(order), x) for order in (adapters, adapters[::-1])]
    assert_close(*outputs)
    assert_close(outputs[0], fn(lora.merge(params, adapters), x))
    alone = sum(lora.adapt(fn)(params, each, x) - fn(params, x) for each in adapters)
    assert_close(outputs[0], fn(params, x) + alone, factor=2)


@pytest.mark.parametrize("factor", [0.0, 0.25, 1.0, -1.0])
def test_scaling_interpolates(factor: float) -> None:
    update, w = dora(SITES["dense"]), weight(SITES["dense"])
    scaled = lora.scale(lora.Adapter({"w": update}), factor)["w"]
    assert_close(scaled.applied(w), w + factor * (update.applied(w) - w), factor=2)


def test_a_replaced_base_is_refused() -> None:
    site = SITES["dense"]
    whole = lora.Replace(weight(site), replace(site, kind="dense"))
    given = ({"w": weight(site)}, (lora.Adapter({"w": dora(site)}), lora.Adapter({"w": whole})))
    with pytest.raises(lora.ParameterError, match="has a Dora in another that was made for the base's own value"):
        lora.merge(*given)


def test_init_needs_values() -> None:
    params = {"w": jax.ShapeDtypeStruct((12, 7), jnp.float32)}
    sites = lora.find_sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 12)))
    config = lora.LoraConfig(method="dora", targets="w")
    with pytest.raises(lora.ParameterError, match=r"value of w is needed .*method='dora'.*pass arrays"):
        lora.init(jax.random.key(0), config, params, sites)
    with pytest.raises(lora.ConfigError, match=r"method='dorra' is not a method; choose one of: .*dora, .*lora"):
        lora.LoraConfig(method="dorra")


def compiled_step(method: str, dtype: str, width: int = 512) -> tuple[int, int]:
    """Temporary bytes, and operations, of a gradient of one product."""
    params = {"w": jnp.ones((width, width), dtype)}
    x = jnp.ones((256, width), dtype)
    fn = lambda params, x: jnp.tanh(x @ params["w"])  # noqa: E731
    sites = lora.find_sites(fn, params, x)
    adapter = lora.init(jax.random.key(0), lora.LoraConfig(method=method, targets="w"), params, sites)
    run = lora.adapt(fn, strategy="factored")
    step = jax.grad(lambda adapter, x, params: run(params, adapter, x).sum().astype(jnp.float32), argnums=(0, 1))
    program = jax.jit(step).lower(adapter, x, params).compile()
    analysis = program.cost_analysis()
    return program.memory_analysis().temp_size_in_bytes, int(analysis["flops"])


def test_no_array_of_the_weights_size_is_formed() -> None:
    (plain, plain_flops), (memory, flops) = (compiled_step(method, "float32") for method in ("lora", "dora"))
    size, tokens, rank = 512 * 512, 256, 8
    # The product without the gain is kept for the gradient of the magnitude, and its gradient is an array too.
    assert memory - plain <= 2 * 4 * tokens * 512 + 4 * 64 * rank * 512
    # One product of the weight and A, and a few operations for each output.
    assert flops - plain_flops <= 2 * size * rank + 12 * tokens * 512 + 64 * rank * 512


def test_norms_are_computed_once_outside_a_loop() -> None:
    """Under remat and scan the norm of each layer is computed once, not again in the backward pass."""
    params = {"w": jnp.ones((4, 16, 16))}
    fn = lambda params, x: jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, params["w"])[0]  # noqa: E731
    x = jnp.ones((2, 16))
    config = lora.LoraConfig(method="dora", rank=2, targets="w")
    adapter = lora.init(jax.random.key(0), config, params, lora.find_sites(fn, params, x))
    loss = partial(lambda params, adapter: lora.adapt(fn)(params, adapter, x).sum(), params)
    assert str(jax.make_jaxpr(jax.grad(loss))(adapter)).count(" sqrt ") == 1


def test_gains_are_computed_once_for_evaluation() -> None:
    params = {"w": jax.random.normal(jax.random.key(0), (3, 12, 12))}
    fn = lambda params, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]  # noqa: E731
    x = jax.random.normal(jax.random.key(2), (4, 12))
    site = lora.find_sites(fn, params, x)["w"]
    made = lora.methods.Dora.around(random_adapter([site])["w"], params["w"])
    adapter = lora.Adapter({"w": replace(made, magnitude=made.magnitude * 1.5)})
    fixed = lora.methods.precompute(params, adapter)
    assert_close(lora.adapt(fn)(params, fixed, x), lora.adapt(fn)(params, adapter, x))
    assert_close(lora.merge(params, fixed), lora.merge(params, adapter))
    assert_close(lora.merge(params, lora.scale(fixed, 0.5)), lora.merge(params, lora.scale(adapter, 0.5)))
    assert "sqrt" not in str(jax.make_jaxpr(lora.adapt(fn))(params, fixed, x))
    assert not any(jax.tree.leaves(lora.trainable(fixed)))
    with pytest.raises(lora.CheckpointError, match="PEFT's files have no place for 'w', which is a Gained"):
        lora.peft.save("never-written", fixed)


def test_a_float64_base_is_itself_at_the_start() -> None:
    """Magnitudes beside it are not rounded to float32, whatever the factors are."""
    with jax.enable_x64(True):
        params = {"w": jax.random.normal(jax.random.key(0), (6, 5), jnp.float64)}
        x, fn = jax.random.normal(jax.random.key(1), (3, 6), jnp.float64), lambda params, x: x @ params["w"]
        sites = lora.find_sites(fn, params, x)
        config = lora.LoraConfig(rank=2, targets="w", method="dora")
        adapter = lora.init(jax.random.key(2), config, params, sites)
        assert adapter["w"].magnitude.dtype == jnp.float64
        assert_same(lora.adapt(fn)(params, adapter, x), fn(params, x))
        assert_same(lora.merge(params, adapter), params)
