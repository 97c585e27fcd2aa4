"""Initialisers that start from data: EVA, CorDA and LoRA-GA are their formulas, and keep the model as it is."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_same, cast_floats
from jax import lax

import lora_jax as lora
from lora_jax.adapter.site import Site
from lora_jax.capture.captured import Inputs
from lora_jax.errors import ConfigError, ParameterError
from lora_jax.init.corda import corda
from lora_jax.init.lora_ga import lora_ga

DRAW = np.random.default_rng(5)
KEY = jax.random.key(2)


def normal(*shape):
    return jax.device_put(np.float32(DRAW.normal(size=shape) / np.sqrt(shape[-1])))


PARAMS = {"q": normal(12, 2, 6), "o": normal(2, 6, 12), "layers": {"w": normal(3, 12, 16), "v": normal(3, 16, 12)}}
BATCHES = [(jax.device_put(np.float32(DRAW.normal(size=(4, 25, 12)) * np.linspace(3, 0.2, 12))),) for _ in range(3)]


def model(p, x):
    x = x + jnp.einsum("btnh,nhd->btd", jnp.einsum("btd,dnh->btnh", x, p["q"]), p["o"])
    return lax.scan(lambda x, w: (x + jnp.tanh(x @ w["w"]) @ w["v"], None), x, p["layers"])[0]


def loss(p, x):
    return (model(p, x) ** 2).mean()


READS = {"eva": "components", "corda-ipm": "inputs", "corda-kpm": "inputs", "lora-ga": "gradient"}


@cache
def captures(what):
    """Statistics of the model on the batches."""
    return lora.capture(loss, PARAMS, BATCHES, what, config=lora.LoraConfig(rank=4), passes=3)


SITES = lora.find_sites(model, PARAMS, *BATCHES[0])
DELTA = jax.jit(lambda update: update.delta())
RUN, ADAPTED = jax.jit(model), jax.jit(lora.adapt(model))
SLOPE = jax.jit(jax.grad(lambda adapter: (ADAPTED(PARAMS, adapter, *BATCHES[0]) ** 2).mean()))


def start(init, params=PARAMS, **fields):
    what = READS.get(init) or READS[init.split(":")[0].replace("-whitened", "")]
    config = lora.LoraConfig(**{"rank": 4, "init": init, **fields})
    sites = lora.find_sites(model, params, *BATCHES[0])
    return lora.init(KEY, config, params, sites, captures(what))


ALL = ["eva", "eva-whitened", "corda-ipm", "corda-kpm", "lora-ga", "lora-ga:ArBr:gd_scale", "lora-ga:random:weight_svd"]


@pytest.mark.parametrize("init", ALL)
def test_the_model_starts_as_the_base(init):
    adapter = start(init)
    assert_close(ADAPTED(PARAMS, adapter, *BATCHES[0]), RUN(PARAMS, *BATCHES[0]))
    for update in adapter.values():
        assert not np.asarray(DELTA(update)).any()  # exactly: the start is taken off in float32
        assert np.asarray(update.a).any()
    moved = SLOPE(adapter)
    assert all(np.asarray(update.b).any() for update in moved.values())


@pytest.mark.parametrize("init", ["eva", "corda-ipm", "lora-ga"])
def test_in_bfloat16_too(init):
    half = cast_floats(PARAMS, jnp.bfloat16)
    x = BATCHES[0][0].astype(jnp.bfloat16)
    adapter = start(init, half)
    base, adapted = RUN(half, x), ADAPTED(half, adapter, x)
    assert adapted.dtype == jnp.bfloat16
    assert_close(adapted, base)
    assert_same(lora.merge(half, adapter), half)


def layers(path):
    """Matrices `[fan_in, fan_out]` of a site and of what was captured there, layer by layer."""
    site = SITES[path]
    gradient = captures("gradient")[path].mean
    weight = PARAMS["layers"][path[-1]] if path.startswith("layers") else PARAMS[path]
    shape = (-1, site.fan_in, site.fan_out)
    stacked = jax.tree.map(lambda leaf: leaf[None], captures("inputs")[path])
    moments = captures("inputs")[path] if site.batch_axes else stacked
    rows = zip(weight.reshape(shape), gradient.reshape(shape), moments.second, moments.count, strict=True)
    return [tuple(np.asarray(each, np.float64) for each in row) for row in rows]


def factors(update):
    count = int(np.prod(update.site.batch_shape))
    a, b = (np.asarray(each, np.float64).reshape(count, update.rank, -1) for each in (update.a, update.b))
    return zip(a, b, strict=True)


@pytest.mark.parametrize("path", list(SITES))
def test_eva_spans_what_varies_most(path):
    update = start("eva")[path]
    assert not np.asarray(update.b).any()
    assert update.a_start is None
    moments = captures("inputs")[path]
    second, total = (np.asarray(each, np.float64) for each in (moments.second, moments.total))
    size = SITES[path].fan_in
    for (a, _), c, mean, n in zip(
        factors(update), second.reshape(-1, size, size), total.reshape(-1, size), np.ravel(moments.count), strict=True
    ):
        values, vectors = np.linalg.eigh(c - np.outer(mean, mean) / n)
        np.testing.assert_allclose(np.abs(np.sum(a * vectors.T[::-1][:4], axis=1)), 1, atol=1e-3)
        assert values[-1] > 0
    white = start("eva-whitened")[path]
    singular = np.sqrt(np.asarray(captures("components")[path].energies))[..., :4]
    lead = (..., *[None] * len(SITES[path].in_axes))
    assert_close(white.a, jnp.asarray(np.asarray(update.a) / np.sqrt(singular)[lead], jnp.float32))


@pytest.mark.parametrize("keep", ["ipm", "kpm"])
def test_corda_is_its_formula(keep):
    adapter = start(f"corda-{keep}")
    pairs = [pair for path, each in adapter.items() for pair in zip(factors(each), layers(path), strict=True)]
    for (a, b), (w, _, second, count) in pairs:
        c = second / count
        c = c / np.trace(c) * len(c) + 0.01 * np.eye(len(c))
        left, sizes, right = np.linalg.svd(c @ w, full_matrices=False)
        part = slice(0, 4) if keep == "ipm" else slice(-4, None)
        product = np.linalg.inv(c) @ left[:, part] @ np.diag(sizes[part]) @ right[part]
        np.testing.assert_allclose(2 * a.T @ b, product, atol=2e-4 * np.abs(product).max())
        np.testing.assert_allclose(np.linalg.norm(b, axis=1) ** 2 * 2, sizes[part], rtol=1e-3)


def test_corda_of_white_inputs_is_the_svd_of_the_weight():
    site = Site(path="", shape=(6, 5), dtype="float32", kind="dense", in_axes=(0,), out_axes=(1,))
    weight, inputs = normal(6, 5), Inputs(7 * jnp.eye(6), jnp.zeros(6), jnp.float32(3))
    a, b = corda(KEY, site, 2, "float32", weight=weight, scale=jnp.float32(1), inputs=inputs)
    left, sizes, right = np.linalg.svd(np.asarray(weight))
    np.testing.assert_allclose(a.T @ b, left[:, :2] @ np.diag(sizes[:2]) @ right[:2], atol=1e-5)


def test_corda_of_few_inputs_is_finite():
    """With fewer tokens than inputs the second moment has no inverse of its own."""
    fn, params = (lambda p, x: x @ p["w"]), {"w": normal(64, 32)}
    config = lora.LoraConfig(rank=4, init="corda-ipm", targets=("w",))
    captured = lora.capture(fn, params, [normal(3, 64)], "inputs", config=config)
    update = lora.init(KEY, config, params, lora.find_sites(fn, params, normal(3, 64)), captured)["w"]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(update))


FIRST, SECOND = range(4), range(4, 8)
DIRECTIONS = {"ArB2r": (FIRST, SECOND), "A2rBr": (SECOND, FIRST), "ArBr": (range(1, 8, 2), range(0, 8, 2))}


def lengths(size, w, values, first):
    """How long rows of A are, and rows of B beside the singular values of the gradient."""
    if size == "weight_svd":
        return 1, np.linalg.norm(w, 2) / values[first]
    return {"stable": (1, w.shape[1] ** 0.25 / 4), "gd_scale": (1 / 2, 1 / 2), "unit": (1, 1)}[size]


@pytest.mark.parametrize("direction", [*DIRECTIONS, "random"])
@pytest.mark.parametrize("size", ["stable", "weight_svd", "gd_scale", "unit"])
def test_lora_ga_is_its_formula(direction, size):
    adapter = start(f"lora-ga:{direction}:{size}")
    for path, update in adapter.items():
        for (a, b), (w, g, _, _) in zip(factors(update), layers(path), strict=True):
            left, values, right = np.linalg.svd(g, full_matrices=False)
            for_a, for_b = (list(each) for each in DIRECTIONS.get(direction, (FIRST, FIRST)))
            if direction == "random":
                for_a = for_b = np.abs(a @ left[:, :8]).argmax(1)
                assert len({*for_a}) == 4
            of_a, of_b = lengths(size, w, values, for_b[0])
            np.testing.assert_allclose(np.linalg.norm(a, axis=1), of_a, rtol=1e-4)
            np.testing.assert_allclose(np.linalg.norm(b, axis=1), of_b * values[for_b], rtol=1e-2)
            np.testing.assert_allclose(np.abs(np.sum(a * left.T[for_a], 1)), of_a, rtol=1e-2)
            np.testing.assert_allclose(np.abs(np.sum(b * right[for_b], 1)), of_b * values[for_b], rtol=1e-2)


def test_lora_ga_is_the_default_of_peft():
    assert_same(start("lora-ga"), start("lora-ga:ArB2r:stable"))


def test_signs_do_not_depend_on_the_solver():
    site = Site(path="", shape=(6, 5), dtype="float32", kind="dense", in_axes=(0,), out_axes=(1,))
    g = normal(6, 5)
    given = {"weight": g, "scale": jnp.float32(1), "size": "unit"}
    a, b = lora_ga(KEY, site, 2, "float32", gradient=g, **given)
    assert_close(lora_ga(KEY, site, 2, "float32", gradient=-g, **given), (a, b))


ONLY_Q = lora.LoraConfig(rank=4, init="eva", targets=("q",))


def test_data_that_are_missing_or_of_another_model():
    config = lora.LoraConfig(rank=4, init="eva")
    with pytest.raises(ParameterError, match=r"init=.eva. starts from captured components, not from captured=None:"):
        lora.init(KEY, config, PARAMS, SITES)
    with pytest.raises(ParameterError, match=r"captured components, not from captured inputs"):
        lora.init(KEY, config, PARAMS, SITES, captures("inputs"))
    part = lora.capture(model, PARAMS, BATCHES[:1], "components", config=lora.LoraConfig(targets=("q", "o")))
    with pytest.raises(ParameterError, match=r"components of 'layers/v' were not captured \(nearest: "):
        lora.init(KEY, config, PARAMS, SITES, part)
    other = lora.capture(lambda p, x: x @ p["q"], {"q": normal(5, 3)}, [normal(9, 5)], "components", config=ONLY_Q)
    with pytest.raises(ParameterError, match=r"components of 'q' have shape \(5, 5\) where this model needs \(5, 12\)"):
        lora.init(KEY, ONLY_Q, PARAMS, SITES, other)
    with pytest.raises(ConfigError, match=r"layers/v: init='eva' with rank 40 needs as many components, and 8 were"):
        start("eva", rank=40)
    with pytest.raises(ConfigError, match=r"layers/v: init='corda-ipm' has rank 13, and the matrix \(16, 12\)"):
        start("corda-ipm", rank=13, targets=("v",))
    with pytest.raises(ConfigError, match=r"layers/v: init='lora-ga' uses 14 singular vectors"):
        start("lora-ga", rank=7, targets=("v",))


def test_init_with_data_under_jit():
    config = lora.LoraConfig(rank=4, init="corda-ipm")
    run = jax.jit(lambda key, params, captured: lora.init(key, config, params, SITES, captured))
    for one, other in zip(
        jax.tree.leaves(run(KEY, PARAMS, captures("inputs"))), jax.tree.leaves(start("corda-ipm")), strict=True
    ):
        assert_close(one, other, factor=100)


def test_ranks_go_where_the_variance_is():
    config = lora.LoraConfig(rank=3)
    shares = {path: np.asarray(each.explained).reshape(-1, 8)[:, :6] for path, each in captures("components").items()}
    everything = np.sort(np.concatenate([each.ravel() for each in shares.values()]))[::-1]
    least = everything[3 * 8 - 1]  # eight layers of rank 3
    new = lora.redistribute(config, captures("components"))
    for path, each in shares.items():
        wanted = tuple((each >= least).sum(1))
        given = new.ranks_for(path)
        assert (given if isinstance(given, tuple) else (given,) * len(wanted)) == wanted
    assert isinstance(new.ranks_for("layers/w"), tuple)
    same = lora.redistribute(config, captures("components"), rho=1.0)
    assert {same.ranks_for(path) for path in SITES} == {3}
    assert lora.LoraConfig(rank=4, rank_pattern=[["w", [1, 2, 3]]]).ranks_for("layers/w") == (1, 2, 3)


def test_a_site_without_rank_is_left_out():
    components = {path: captures("components")[path] for path in ("q", "o")}
    dull = jax.tree.map(jnp.zeros_like, components["o"])
    captured = lora.Captured("components", {"q": components["q"], "o": dull})
    config = lora.LoraConfig(rank=4, init="eva", targets=("q", "o"))
    new = lora.redistribute(config, captured)
    assert (new.rank_for("q"), new.exclude) == (8, ("o",))
    assert set(lora.init(KEY, new, PARAMS, SITES, captured)) == {"q"}
    by_regex = lora.redistribute(lora.LoraConfig(rank=4, targets=r"q|o", exclude=r"layers/.*"), captured)
    assert by_regex.exclude == r"(?:layers/.*)|o"
    with pytest.raises(ConfigError, match="12 components may be kept and 8 were captured"):
        lora.redistribute(config, captured, rho=3.0)
    with pytest.raises(ConfigError, match="needs captured components and rho >= 1, not 'inputs'"):
        lora.redistribute(config, captures("inputs"))


@pytest.mark.parametrize(("rslora", "adjust", "scale"), [(False, True, 2), (False, False, None), (True, True, None)])
def test_scales_follow_ranks(rslora, adjust, scale):
    config = lora.LoraConfig(rank=4, alpha=8, rslora=rslora, init="eva")
    new = lora.redistribute(config, captures("components"), adjust_scale=adjust)
    adapter = lora.init(KEY, new, PARAMS, SITES, captures("components"))
    for path, update in adapter.items():
        ranks = np.broadcast_to(new.ranks_for(path), update.scale.shape)
        alphas = 8 * ranks / 4 if adjust else np.full(ranks.shape, 8)
        exact = scale or alphas / (np.sqrt(ranks) if rslora else ranks)
        np.testing.assert_allclose(update.scale, np.broadcast_to(exact, update.scale.shape), rtol=1e-6)


@pytest.mark.parametrize("init", ["default", "gaussian", "eva", "corda-kpm", "lora-ga"])
def test_layers_of_different_rank(init):
    """Every layer starts as if its rank were all layers', beside zeros; a layer of rank 0 is the base, and stays it."""
    fields = {"rank_pattern": {"w": (3, 0, 5), "v": 3}, "alpha_pattern": {"w": (6, 1, 20)}, "targets": ("w", "v")}
    data = captures(READS[init]) if init in READS else None
    config = lora.LoraConfig(init=init, **fields)
    adapter = lora.init(KEY, config, PARAMS, SITES, data)
    update = adapter["layers/w"]
    assert (update.a.shape, update.b.shape) == ((3, 5, 12), (3, 5, 16))
    assert update.scale.tolist() == [2, 1, 4]
    for i, (rank, scale) in enumerate([(3, 2), (0, 1), (5, 4)]):
        assert not np.asarray(update.a[i, rank:]).any()
        assert not np.asarray(update.b[i, rank:]).any()
        if rank:
            alone = lora.LoraConfig(
                init=init, **{**fields, "rank_pattern": {"w": rank, "v": 3}, "alpha_pattern": {"w": scale * rank}}
            )
            exact = lora.init(KEY, alone, PARAMS, SITES, data)["layers/w"]
            assert_close(update.a[i, :rank], exact.a[i])
            assert_close(update.b[i, :rank], exact.b[i])
    grads = SLOPE(adapter)
    for i, rank in enumerate([3, 0, 5]):
        assert not np.asarray(grads["layers/w"].a[i, rank:]).any()
        assert not np.asarray(grads["layers/w"].b[i, rank:]).any()
    assert_close(ADAPTED(PARAMS, adapter, *BATCHES[0]), RUN(PARAMS, *BATCHES[0]))


def test_ranks_that_do_not_fit_the_stack():
    with pytest.raises(ConfigError, match=r"layers/w is a stack of 3 layers or experts, and rank_pattern or alpha"):
        lora.init(KEY, lora.LoraConfig(rank_pattern={"w": (1, 2)}), PARAMS, SITES)
    with pytest.raises(ConfigError, match=r"has 3 ranks and 2 alphas"):
        lora.init(KEY, lora.LoraConfig(rank_pattern={"w": (1, 2, 3)}, alpha_pattern={"w": (1, 2)}), PARAMS, SITES)
    with pytest.raises(ConfigError, match="must be a positive integer"):
        lora.LoraConfig(rank_pattern={"w": (0, 0)})
    with pytest.raises(ConfigError, match="no ranks or alphas by layer of a stack"):
        lora.LoraConfig(targets=("w",), rank_pattern={"w": (1, 2, 3)}).to_peft()
