"""Custom kernels that are declared to be products: their weights are not formed, and nothing else changes."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers import assert_close, random_adapter
from jax.experimental import pallas as pl

import lora_jax as lora


@jax.custom_vjp
def plain_matmul(x, kernel):
    """A product whose gradient is its own: of the input it is half, so that one sees that it is used."""
    return x @ kernel


plain_matmul.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), lambda kept, g: (g @ kept[1].T / 2, kept[0].T @ g))
matmul = lora.rules.linear("...k,kn->...n")(plain_matmul)


@lora.rules.linear("emk,ekn->emn")
def experts(x, kernel, offset, *, twice=False):
    """A Pallas kernel over experts, with another array and something static."""

    def body(x_ref, kernel_ref, offset_ref, out_ref):
        times = 2 if twice else 1
        out_ref[...] = jnp.einsum("emk,ekn->emn", x_ref[...], kernel_ref[...]) + times * offset_ref[...]

    shape = jax.ShapeDtypeStruct((*x.shape[:2], kernel.shape[2]), x.dtype)
    return pl.pallas_call(body, out_shape=shape, interpret=True)(x, kernel, offset)


PARAMS = {
    "w": jax.random.normal(jax.random.key(0), (6, 5)),
    "experts": jax.random.normal(jax.random.key(1), (2, 5, 4)),
}
X = jax.random.normal(jax.random.key(2), (8, 6))


def model(params, x):
    hidden = jnp.tanh(matmul(x, params["w"])).reshape(2, 4, 5)
    return experts(hidden, params["experts"], jnp.zeros((1, 1, 1))).sum(0)


def product(params, x):
    return matmul(x, params["w"])


def adapter_of(fn: Any, *args: Any) -> lora.Adapter:
    return random_adapter(lora.find_sites(fn, PARAMS, *args))


def test_sites_and_forms() -> None:
    sites = lora.find_sites(model, PARAMS, X)
    assert {path: (site.kind, site.in_axes, site.out_axes, site.batch_axes) for path, site in sites.items()} == {
        "w": ("dense", (0,), (1,), ()), "experts": ("dense", (1,), (2,), (0,)),
    }  # fmt: skip
    shown = lora.explain(model, PARAMS, random_adapter(sites), X)
    assert [(use.path, use.primitive, use.route) for use in shown.uses] == [
        ("w", "plain_matmul", "factored"),
        ("experts", "experts", "factored"),
    ]


def test_adapted_is_merged() -> None:
    adapter = adapter_of(model, X)
    assert_close(lora.adapt(model)(PARAMS, adapter, X), model(lora.merge(PARAMS, adapter), X))
    assert_close(jax.jit(lora.adapt(model))(PARAMS, adapter, X), model(lora.merge(PARAMS, adapter), X))


def test_something_static_and_leading_axes() -> None:
    fn = lambda p, x: experts(matmul(x, p["w"]), p["experts"], jnp.ones((1, 1, 1)), twice=True)  # noqa: E731
    x = X.reshape(2, 4, 6)
    adapter = adapter_of(fn, x)
    assert_close(lora.adapt(fn)(PARAMS, adapter, x), fn(lora.merge(PARAMS, adapter), x))


def test_its_own_gradient_is_that_of_the_base_part() -> None:
    """The input's gradient through the kernel is the function's own; through the factors it is the true one."""
    adapter = adapter_of(product, X)
    update = adapter["w"]
    delta = update.scale * jnp.einsum("ri,ro->io", update.a, update.b)
    gradient = jax.grad(lambda x: lora.adapt(product)(PARAMS, adapter, x).sum())(X)
    assert_close(gradient, jnp.ones((8, 5)) @ (PARAMS["w"] / 2 + delta).T)
    found = jax.grad(lambda adapter: jnp.sin(lora.adapt(product)(PARAMS, adapter, X)).sum())(adapter)
    wanted = jax.grad(lambda adapter: jnp.sin(X @ lora.merge(PARAMS, adapter)["w"]).sum())(adapter)
    assert_close(found, wanted, factor=10)


def test_dropout_acts() -> None:
    adapter = random_adapter(lora.find_sites(product, PARAMS, X), dropout=0.5)
    found = [lora.adapt(product)(PARAMS, adapter, X, lora_key=jax.random.key(i)) for i in (0, 0, 1)]
    assert (found[0] == found[1]).all()
    assert not jnp.allclose(found[0], found[2])


def test_routed() -> None:
    """Labels go through it, to it, and past it."""
    fn = lambda p, x: jnp.tanh(matmul(x, p["w"])) @ p["experts"][0]  # noqa: E731
    adapters = [random_adapter(lora.find_sites(fn, PARAMS, X), seed=seed) for seed in (0, 1)]
    ids = jnp.array([1, 0, 2, 2, 1, 0, 0, 1])
    models = [PARAMS, *(lora.merge(PARAMS, each) for each in adapters)]
    wanted = jnp.stack([fn(models[slot], X)[row] for row, slot in enumerate(ids.tolist())])
    assert_close(lora.route(fn)(PARAMS, adapters, ids, X), wanted, factor=10)


@pytest.mark.parametrize("axis", [0, 1])
def test_another_function_under_vmap_is_none_of_it(axis: int) -> None:
    """Even where its shapes would fit: the axes may mean something else."""
    x = jax.random.normal(jax.random.key(3), (6, 6, 6))
    fn = lambda p, x: jax.vmap(lambda row: matmul(row, p["w"]), in_axes=axis, out_axes=axis)(x)  # noqa: E731
    adapter = adapter_of(fn, x)
    assert_close(lora.adapt(fn)(PARAMS, adapter, x), fn(lora.merge(PARAMS, adapter), x))


def test_under_remat_scan_and_grad() -> None:
    params = {"layers": jax.random.normal(jax.random.key(4), (3, 5, 5))}

    def fn(params, x):
        body = jax.checkpoint(lambda x, w: (jnp.tanh(matmul(x, w)), None))
        return jax.lax.scan(body, x, params["layers"])[0]

    x = X[:, :5]
    adapter = random_adapter(lora.find_sites(fn, params, x))
    assert [use.route for use in lora.explain(fn, params, adapter, x).uses] == ["factored"]
    assert_close(lora.adapt(fn)(params, adapter, x), fn(lora.merge(params, adapter), x), factor=10)


def test_an_undeclared_one_is_formed_and_says_what_to_do() -> None:
    fn = lambda p, x: plain_matmul(x, p["w"])  # noqa: E731
    (use,) = lora.explain(fn, PARAMS, adapter_of(fn, X), X).uses
    assert use.route == "materialised"
    assert "declare it with lora.rules.linear" in use.reason


@pytest.mark.parametrize("spec", ["k,kn", "k,kn->", "...k,kn->n", "kk,kn->n", "mk,kn->m", "k->k", "mk,kn->mz"])
def test_what_is_no_product_is_refused(spec: str) -> None:
    with pytest.raises(lora.ConfigError, match="input"):
        lora.rules.linear(spec)
