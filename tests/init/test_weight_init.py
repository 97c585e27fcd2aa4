"""Initialisers that read the weight: what they start at, that the model does not change, and what quantising takes."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_same

import lora_jax as lora
from lora_jax import svd

KEY = jax.random.key(0)
AWAY = ["pissa", "pissa_niter_4", "olora", "milora"]


def model(dtype="float32"):
    """A product, a stack of layers in another order of axes, and a convolution."""
    keys = jax.random.split(KEY, 3)
    params = {
        "dense": jax.random.normal(keys[0], (16, 12)),
        "stack": jax.random.normal(keys[1], (2, 12, 3, 4)),
        "conv": jax.random.normal(keys[2], (3, 12, 5)),
    }
    params = {name: leaf.astype(dtype) for name, leaf in params.items()}

    def fn(params, x):
        x = jnp.tanh(x @ params["dense"])

        def layer(x, w):
            return jnp.tanh(jnp.einsum("btd,dhk->bthk", x, w).reshape(x.shape)), None

        x = jax.lax.scan(layer, x, params["stack"])[0]
        return jax.lax.conv_general_dilated(x, params["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

    x = jax.random.normal(jax.random.key(5), (2, 7, 16)).astype(dtype)
    return fn, params, x, lora.find_sites(fn, params, x)


def start(init, dtype="float32", **fields):
    fn, params, x, sites = model(dtype)
    config = lora.LoraConfig(**{"rank": 4, "init": init, "targets": ("dense", "stack", "conv"), **fields})
    return fn, params, x, lora.init(KEY, config, params, sites)


def matrices(update, weight):
    """Every weight of a site as a matrix, and the scaled product of the factors that train."""
    site = update.site
    w = np.asarray(weight, np.float32).transpose(*site.batch_axes, *site.in_axes, *site.out_axes)
    w = w.reshape(-1, site.fan_in, site.fan_out)
    a, b = (np.asarray(each).reshape(len(w), update.rank, -1) for each in (update.a, update.b))
    scale = np.asarray(update.scale).reshape(-1, 1, 1)
    return zip(w, scale * np.einsum("nri,nro->nio", a, b), strict=True)


def rows():
    """Every pair of initialiser, method and dtype; all triples with `--full`."""
    found = itertools.product(
        enumerate(AWAY), enumerate(["lora", "dora", "lora-fa"]), enumerate(["float32", "bfloat16"])
    )
    for (i, init), (j, method), (k, dtype) in found:
        yield pytest.param(init, dtype, method, marks=() if (i + j + k) % 2 else pytest.mark.full)


@pytest.mark.parametrize(("init", "dtype", "method"), [*rows()])
def test_the_model_does_not_change(init, dtype, method):
    """In bfloat16 too, where PEFT's residual base is off by 3e-3."""
    fn, params, x, adapter = start(init, dtype, method=method)
    plain = jax.jit(fn)(params, x)
    with jax.disable_jit():
        same = lora.adapt(fn, strategy="factored")(params, adapter, x)
    if method != "dora":
        assert_close(same, plain, factor=0.1)
    assert_close(jax.jit(lora.adapt(fn))(params, adapter, x), plain)
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(adapter))
    assert_close(lora.merge(params, adapter), params)


@pytest.mark.parametrize("init", ["pissa", "milora"])
def test_products_are_singular_components(init):
    _, params, _, adapter = start(init)
    for path, update in adapter.items():
        for w, product in matrices(update, params[path]):
            u, s, v = np.linalg.svd(w, full_matrices=False)
            kept = slice(4) if init == "pissa" else slice(-4, None)
            assert_close(np.float32(product), np.float32((u[:, kept] * s[kept]) @ v[kept]), factor=10)


def test_olora_is_the_start_of_a_qr_decomposition():
    _, params, _, adapter = start("olora", alpha=4)
    for path, update in adapter.items():
        for w, product in matrices(update, params[path]):
            q, r = np.linalg.qr(w.T)  # PyTorch's weight
            assert_close(np.float32(product), np.float32((q[:, :4] @ r[:4]).T), factor=10)


def decaying(shape, seed=0):
    """A matrix whose singular values fall as a weight's do."""
    draw = np.random.default_rng(seed)
    u, _ = np.linalg.qr(draw.normal(size=(shape[0], min(shape))))
    v, _ = np.linalg.qr(draw.normal(size=(shape[1], min(shape))))
    return np.float32((u * np.arange(1.0, 1 + min(shape)) ** -0.6) @ v.T)


def test_randomised_triplets_hold_as_much_energy():
    matrix = decaying((96, 64))
    exact, found = svd.exact(matrix, 8), svd.randomised(KEY, matrix, 8, 4)
    held = lambda triplets: float(jnp.square(triplets.left @ matrix @ triplets.right.T).sum())  # noqa: E731
    assert held(found) > 0.999 * held(exact)
    assert_close(found.left @ found.left.T, jnp.eye(8))
    assert_same(found, svd.randomised(KEY, matrix, 8, 4))


def test_a_loaded_adapter_draws_nothing_again(tmp_path: Path):
    """PEFT repeats the random decomposition on loading, and gets another base."""
    fn, params, x, adapter = start("pissa_niter_2")
    lora.save(tmp_path / "a", adapter)
    assert_same(lora.load(tmp_path / "a"), adapter)
    names = lora.peft.Names([("stack", "stack.{i}"), ("dense", "dense")])
    moved = jax.tree.map(lambda leaf, trains: leaf + 0.1 * trains, adapter, lora.trainable(adapter)).without("conv")
    lora.peft.save(tmp_path / "peft", moved, names, sites=model()[3])
    files = lora.peft.read_peft(tmp_path / "peft")
    assert {len(module.a) for module in files.modules.values()} == {8}
    loaded = lora.peft.load(tmp_path / "peft", params, model()[3], names)
    assert_close(lora.merge(params, loaded), lora.merge(params, moved))
    assert fn is not None and x is not None


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_absorbing_pays_for_the_start_once(method):
    fn, params, x, adapter = start("pissa", method=method)
    adapter = jax.tree.map(lambda leaf, trains: leaf * (1 + 0.1 * trains), adapter, lora.trainable(adapter))
    rest, factors = lora.absorb(params, adapter)
    assert all(update.a_start is None for update in factors.values())
    adapted = jax.jit(lora.adapt(fn))
    assert_close(adapted(rest, factors, x), adapted(params, adapter, x), factor=3)
    cost = lambda params, adapter: jax.jit(lora.adapt(fn)).lower(params, adapter, x).compile().cost_analysis()["flops"]  # noqa: E731
    assert cost(rest, factors) < cost(params, adapter)
    assert_same(params, model()[1])
    assert lora.absorb(params, factors)[0]["dense"] is params["dense"]


@pytest.mark.parametrize(("init", "shape"), [("pissa", (16, 12)), ("olora", (16, 12)), ("milora", (16, 12))])
def test_a_rank_that_does_not_fit_is_an_error(init, shape):
    """PEFT makes factors of a lower rank than the config says."""
    with pytest.raises(lora.ConfigError, match=rf"^dense: rank 13 is more than a {shape[0]} × {shape[1]} matrix has"):
        start(init, rank=13, targets=("dense",))


def test_numbers_in_names():
    with pytest.raises(lora.ConfigError, match=r"init='pissa_niter_0' is not an initialiser.*pissa_niter_N"):
        lora.LoraConfig(init="pissa_niter_0")
    with pytest.raises(lora.ConfigError, match="init='gaussian_3' is not an initialiser"):
        lora.LoraConfig(init="gaussian_3")
    peft = {"peft_type": "LORA", "target_modules": ["q"], "init_lora_weights": "pissa_niter_16"}
    config = lora.LoraConfig.from_peft(peft)
    assert config.init == "pissa_niter_16"
    assert config.to_peft()["init_lora_weights"] == "pissa_niter_16"


def test_values_are_needed():
    _, params, _, sites = model()
    shapes = jax.eval_shape(lambda: params)
    config = lora.LoraConfig(init="pissa", targets=("dense",))
    with pytest.raises(lora.ParameterError, match=r"value of dense is needed .*init='pissa'"):
        lora.init(KEY, config, shapes, sites)
    abstract = jax.eval_shape(lambda key, params: lora.init(key, config, params, sites), KEY, params)
    assert abstract["dense"].a_start.shape == (8, 16)


# LoftQ


def coarse(weight):
    return jnp.round(weight * 2) / 2


@pytest.mark.parametrize("alpha", [1, 4, 32])
def test_loftq_knows_the_scale(alpha):
    """PEFT's ignores it, and is off unless `alpha == rank`."""
    _, params, _, adapter = start("default", alpha=alpha)
    fitted, quantised = lora.loftq(adapter, params, coarse)
    merged = lora.merge(quantised, fitted)
    for path, update in fitted.items():
        assert_same(quantised[path], coarse(params[path]))
        assert_same(update.scale, adapter[path].scale)
        error = lambda tree, path=path: float(jnp.linalg.norm(tree[path] - params[path]))  # noqa: E731
        assert error(merged) < 0.9 * error(quantised)
    rest = np.asarray(params["dense"] - quantised["dense"])
    values = np.linalg.svd(rest, compute_uv=False)
    np.testing.assert_allclose(np.linalg.norm(merged["dense"] - params["dense"]), np.linalg.norm(values[4:]), rtol=1e-4)


def test_loftq_alternates():
    _, params, _, adapter = start("default")
    fitted, quantised = lora.loftq(adapter, params, coarse, steps=3)
    weight, change = np.asarray(params["dense"]), np.zeros((16, 12))
    for _ in range(3):
        rounded = np.round((weight - change) * 2) / 2
        u, s, v = np.linalg.svd(weight - rounded, full_matrices=False)
        change = (u[:, :4] * s[:4]) @ v[:4]
    assert_close(quantised["dense"], np.float32(rounded))
    assert_close(fitted["dense"].delta(), np.float32(change), factor=10)
    with pytest.raises(lora.ConfigError, match="steps=0 must be at least 1"):
        lora.loftq(adapter, params, coarse, steps=0)
    with pytest.raises(lora.ParameterError, match="holds a Dora; loftq fits plain low-rank factors"):
        lora.loftq(start("default", method="dora")[3], params, coarse)


@pytest.mark.parametrize("start", ["lora-xs", "pissa", "loftq"])
def test_a_stack_is_decomposed_one_layer_at_a_time(start):
    """However many layers there are, the workspace is that of one."""

    def temporaries(layers):
        params = {"w": jnp.zeros((layers, 64, 48))}
        fn = lambda params, x: jax.lax.scan(lambda x, w: (x @ w @ w.T, None), x, params["w"])[0]  # noqa: E731
        sites = lora.find_sites(fn, params, jnp.ones((2, 64)))
        fields = {"method": start} if start == "lora-xs" else {"init": start} if start == "pissa" else {}
        config = lora.LoraConfig(rank=4, targets="w", **fields)

        def make(params):
            adapter = lora.init(KEY, config, params, sites)
            return lora.loftq(adapter, params, lambda w: w.round(1))[0] if start == "loftq" else adapter

        return jax.jit(make).lower(params).compile().memory_analysis().temp_size_in_bytes

    per_layer = (temporaries(24) - temporaries(8)) / 16
    kept = 1 if start == "loftq" else 0  # what quantising took away, for the next step
    assert per_layer <= (kept + 0.1) * 64 * 48 * 4
