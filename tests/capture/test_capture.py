"""What `capture` collects is what NumPy computes from the same activations, however the program is written."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_same
from jax import lax
from table import CASES

import lora_jax as lora
from benchmarks.harness import compilations
from lora_jax.capture.collect import observing_step, split, zeros
from lora_jax.errors import ConfigError, MatchError, ParameterError

DRAW = np.random.default_rng(3)


def normal(*shape):
    return jax.device_put(np.float32(DRAW.normal(size=shape)))


def moments(tokens):
    """Second moment, sum and number of inputs `[..., fan_in]`, in float64."""
    rows = np.asarray(tokens, np.float64).reshape(-1, np.shape(tokens)[-1])
    return rows.T @ rows, rows.sum(0), len(rows)


def assert_moments(found, tokens, factor=1.0):
    for actual, desired in zip((found.second, found.total, found.count), moments(tokens), strict=True):
        assert_close(np.asarray(actual), np.float32(desired), factor=factor)


def everything(fn, params, batches, what="inputs", targets=r".*", **options):
    return lora.capture(fn, params, batches, what, config=lora.LoraConfig(rank=2, targets=targets), **options)


LAYERS = {"w": normal(3, 4, 6), "v": normal(3, 6, 4)}


def block(x, p):
    return x + jnp.tanh(x @ p["w"]) @ p["v"], None


def activations(x):
    """The inputs of `w` and `v` in every layer."""
    found = []
    for i in range(3):
        hidden = jnp.tanh(x @ LAYERS["w"][i])
        found.append((x, hidden))
        x = x + hidden @ LAYERS["v"][i]
    return found


def unrolled(p, x):
    for i in range(3):
        x, _ = block(x, jax.tree.map(lambda leaf, i=i: leaf[i], p))
    return x


def indexed(p, x):
    def body(i, x):
        return block(x, {name: lax.dynamic_index_in_dim(leaf, i, keepdims=False) for name, leaf in p.items()})[0]

    return lax.fori_loop(0, 3, body, x)


def forever(p, x):
    def go_on(c):
        return c[0] < 3

    return lax.while_loop(go_on, lambda c: (c[0] + 1, block(c[1], jax.tree.map(lambda leaf: leaf[c[0]], p))[0]), (0, x))


def backwards(p, x):
    flipped = jax.tree.map(lambda leaf: leaf[::-1], p)
    return lax.scan(block, x, flipped, reverse=True)


def in_pairs(p, x):
    """The first layer, then a scan over the other two, of stacks that are transposed on the way."""
    x, _ = block(x, jax.tree.map(lambda leaf: leaf[0], p))
    swapped = jax.tree.map(lambda leaf: leaf[1:].swapaxes(1, 2), p)
    return lax.scan(lambda x, q: block(x, jax.tree.map(jnp.transpose, q)), x, swapped)


WAYS = {
    "scan": lambda p, x: lax.scan(block, x, p),
    "scan unrolled": lambda p, x: lax.scan(block, x, p, unroll=3),
    "remat": lambda p, x: lax.scan(jax.checkpoint(block), x, p),
    "scan inside jit": jax.jit(lambda p, x: lax.scan(block, x, p)),
    "layer by layer": unrolled,
    "indexed": indexed,
    "while": forever,
    "backwards": backwards,
    "in pairs": in_pairs,
    "in a branch": lambda p, x: lax.cond(x.sum() < 1e9, lambda x: lax.scan(block, x, p)[0], lambda x: x, x),
    "with a gradient inside": lambda p, x: jax.grad(lambda x: lax.scan(block, x, p)[0].sum())(x),
}


@pytest.mark.parametrize("way", WAYS)
def test_stacked_layers(way):
    batches = [(normal(2, 5, 4),), (normal(2, 5, 4),)]
    captured = everything(WAYS[way], LAYERS, batches)
    assert set(captured) == {"w", "v"}
    seen = [activations(x) for (x,) in batches]
    for j, name in enumerate("wv"):
        for i in range(3):
            layer = jax.tree.map(lambda leaf, i=i: leaf[i], captured[name])
            assert_moments(layer, np.concatenate([np.asarray(each[i][j]) for each in seen]))


def test_several_axes():
    params = {"q": normal(4, 2, 3), "o": normal(2, 3, 4), "flat": normal(6, 5), "turned": normal(3, 2, 5)}

    def fn(p, x):
        heads = jnp.einsum("btd,dnh->btnh", x, p["q"])
        y = jnp.einsum("btnh,nhd->btd", heads, p["o"])
        z = jnp.einsum("btnh,nhe->bte", heads, p["flat"].reshape(2, 3, 5))
        turned = p["turned"].transpose(1, 0, 2).reshape(6, 5)[::-1]
        return y.sum() + z.sum() + (heads.reshape(*x.shape[:2], 6)[..., ::-1] @ turned).sum()

    x = normal(2, 5, 4)
    captured = everything(fn, params, [(x,)])
    heads = np.einsum("btd,dnh->btnh", x, params["q"])
    assert_moments(captured["q"], x)
    assert_moments(captured["o"], heads.reshape(10, 6))
    assert_moments(captured["flat"], heads.reshape(10, 6))
    assert_moments(captured["turned"], heads.swapaxes(2, 3).reshape(10, 6))


def test_experts_see_their_own_tokens():
    params = {"dense": normal(3, 4, 5), "ragged": normal(3, 4, 5), "chosen": normal(3, 4, 5)}
    sizes, chosen = jnp.array([2, 0, 4]), jnp.array([2, 0, 2, 2, 0, 2])

    def fn(p, x, batches):
        chosen_rows = jnp.einsum("ti,tio->to", x, p["chosen"][chosen])
        return jnp.einsum("eti,eio->eto", batches, p["dense"]), lax.ragged_dot(x, p["ragged"], sizes), chosen_rows

    x, batches = normal(6, 4), normal(3, 2, 4)
    captured = everything(fn, params, [(x, batches)])
    rows = {
        "dense": list(batches),
        "ragged": [x[:2], x[:0], x[2:]],
        "chosen": [x[np.asarray(chosen) == i] for i in range(3)],
    }
    for path, each in rows.items():
        for i in range(3):
            assert_moments(jax.tree.map(lambda leaf, i=i: leaf[i], captured[path]), each[i])


def test_an_input_shared_by_experts_counts_for_each():
    params = {"w": normal(3, 4, 5)}
    fn = lambda p, x, y: (jnp.einsum("eti,eio->eto", y, p["w"]), jnp.einsum("ti,eio->teo", x, p["w"]))  # noqa: E731
    x, y = normal(6, 4), normal(3, 2, 4)
    captured = everything(fn, params, [(x, y)])
    for i in range(3):
        assert_moments(jax.tree.map(lambda leaf, i=i: leaf[i], captured["w"]), np.concatenate([y[i], x]))


@pytest.mark.parametrize("options", [{}, {"strides": (2, 1), "padding": "VALID"}, {"kernel_dilation": 2}])
def test_convolutions_see_patches(options):
    conv = nn.Conv(5, (3, 2), **options)
    x = normal(2, 7, 6, 3)
    variables = conv.init(jax.random.key(0), x)
    captured = everything(conv.apply, variables, [(x,)], targets=r".*kernel")["params/kernel"]
    # Every number of a patch is the output of a kernel that is zero elsewhere.
    eye = jnp.eye(18).reshape(3, 2, 3, 18)
    every = nn.Conv(18, (3, 2), use_bias=False, **options)
    assert_moments(captured, every.apply({"params": {"kernel": eye}}, x))


def test_tied_tables_and_uses_in_several_places():
    params = {"table": normal(7, 4), "w": normal(4, 4)}

    def fn(p, tokens):
        x = p["table"][tokens]
        return (x @ p["w"] + (2 * x) @ p["w"]) @ p["table"].T

    tokens = jnp.array([[0, 3, 3, 6]])
    x = np.asarray(params["table"])[np.asarray(tokens)]
    assert_moments(everything(fn, params, [(tokens,)], targets=("w",))["w"], np.concatenate([x, 2 * x]))
    with pytest.raises(ParameterError, match="'table' as it is a look-up table"):
        everything(fn, params, [(tokens,)])


def test_a_mask_leaves_tokens_out():
    x, labels = normal(2, 5, 4), jnp.array([[1, -100, 2, 3, -100], [-100, -100, 1, 1, 1]])
    fn = lambda p, x, labels: lax.scan(block, x, p)  # noqa: E731
    kept = np.asarray(labels) != -100
    captured = everything(fn, LAYERS, [(x, labels)], mask=lambda x, labels: labels != -100)
    for i, (seen, hidden) in enumerate(activations(x)):
        assert_moments(jax.tree.map(lambda leaf, i=i: leaf[i], captured["w"]), np.asarray(seen)[kept])
        assert_moments(jax.tree.map(lambda leaf, i=i: leaf[i], captured["v"]), np.asarray(hidden)[kept])
    few = everything(fn, LAYERS, [(x, labels)], "components", mask=lambda x, labels: labels != -100)
    np.testing.assert_array_equal(few["w"].count, kept.sum())
    with pytest.raises(ParameterError, match=r"mask has shape \(3,\), but the inputs of [wv] run over \(2, 5\)"):
        everything(fn, LAYERS, [(x, labels)], mask=lambda x, labels: jnp.ones(3, bool))


def centred(tokens):
    rows = np.asarray(tokens, np.float64).reshape(-1, np.shape(tokens)[-1])
    _, sizes, right = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    return sizes**2, right


@pytest.mark.parametrize(("decay", "passes", "error"), [(1.0, 1, 2e-3), (0.3, 1, 0.2), (0.3, 3, 2e-3)])
def test_components_are_those_of_all_inputs(decay, passes, error):
    """The sine of the largest angle to the exact subspace; in one pass it depends on how fast components fall off."""
    draw, spectrum = np.random.default_rng(0), np.exp(-decay * np.arange(40))
    rotation = np.linalg.qr(draw.normal(size=(40, 40)))[0]
    batches = [(jax.device_put(np.float32(1 + draw.normal(size=(50, 40)) * spectrum @ rotation)),) for _ in range(4)]
    config = lora.LoraConfig(rank=4, targets=("w",))
    options = {"config": config, "rho": 1.0, "passes": passes}
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    found = lora.capture(fn, {"w": normal(40, 3)}, batches, "components", **options)["w"]
    energies, right = centred(np.concatenate([x for (x,) in batches]))
    overlap = np.linalg.svd(np.asarray(found.vectors) @ right[:4].T, compute_uv=False)
    assert 1 - overlap.min() ** 2 < error**2
    np.testing.assert_allclose(found.energies, energies[:4], rtol=max(error**2, 1e-3))
    np.testing.assert_allclose(found.explained, energies[:4] / energies.sum(), rtol=max(error**2, 1e-3))
    np.testing.assert_allclose(found.vectors @ found.vectors.T, np.eye(4), atol=1e-5)
    assert (np.asarray(found.vectors)[range(4), np.abs(found.vectors).argmax(1)] > 0).all()


def test_components_of_every_layer():
    batches = [(normal(40, 4),), (normal(40, 4),)]
    found = everything(WAYS["scan"], LAYERS, batches, "components")
    assert found["w"].vectors.shape == (3, 4, 4)
    for i in range(3):
        energies, right = centred(np.concatenate([activations(x)[i][0] for (x,) in batches]))
        np.testing.assert_allclose(found["w"].energies[i], energies, rtol=1e-3)
        np.testing.assert_allclose(np.abs(np.asarray(found["w"].vectors[i]) @ right.T), np.eye(4), atol=5e-3)


def test_gradients_are_averaged():
    def loss(p, x, scale):
        return (scale * lax.scan(block, x, p)[0] ** 2).mean()

    batches = [(normal(3, 4), 1.0), (normal(3, 4), 2.0)]
    captured = everything(loss, LAYERS, batches, "gradient")
    exact = [jax.grad(loss)(LAYERS, *batch) for batch in batches]
    for name in LAYERS:
        assert_close(captured[name].mean, (exact[0][name] + exact[1][name]) / 2)
        assert float(captured[name].count) == 2
    half = everything(loss, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), LAYERS), batches, "gradient")
    assert half["w"].mean.dtype == jnp.float32
    with pytest.raises(ParameterError, match="a gradient is that of a scalar loss"):
        everything(lambda p, x, scale: x @ p["w"][0], LAYERS, batches, "gradient", targets=("w",))


def test_bfloat16_models_accumulate_in_float32():
    x = normal(4096, 8).astype(jnp.bfloat16)
    found = everything(lambda p, x: x @ p["w"], {"w": normal(8, 2).astype(jnp.bfloat16)}, [(x,)] * 3)["w"]
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    assert_moments(found, np.tile(np.asarray(x, np.float64), (3, 1)))


@pytest.mark.parametrize("stacked", [False, True])
def test_wide_inputs_are_summed_by_panels(stacked):
    x, w = normal(2, 3, 1100), normal(2, 1100, 2)
    scan = lambda p, x: lax.scan(lambda c, xw: (c, xw[0] @ xw[1]), 0, (x, p["w"]))[1]  # noqa: E731
    apart = lambda p, x: jnp.einsum("bti,bio->bto", x, p["w"])  # noqa: E731
    found = everything(scan if stacked else apart, {"w": w}, [x])["w"]
    for i in range(2):
        np.testing.assert_allclose(found.second[i], moments(x[i])[0], atol=1e-4)


def test_the_result_is_a_function_of_the_arguments():
    batches = [(normal(9, 4),), (normal(9, 4),)]
    for what in ("inputs", "components"):
        run = partial(everything, WAYS["scan"], LAYERS, batches, what)
        assert_same(run(), run())
        assert_same(run(), everything(WAYS["scan"], LAYERS, iter(batches), what, progress=True))


def test_nothing_compiles_twice():
    batches = [(normal(9, 4),) for _ in range(5)]
    everything(WAYS["scan"], LAYERS, batches[:1])
    with compilations() as once:
        everything(WAYS["scan"], LAYERS, batches[:1])
    with compilations() as often:
        everything(WAYS["scan"], LAYERS, batches)
    assert len(often) == len(once) == 1  # the step


def compiled_step(fn, params, *batch, mask=None):
    """The program that adds a batch to the second moments of the inputs of every parameter."""
    sites = list(lora.find_sites(fn, params, *batch).values())
    state = zeros("inputs", sites, dict.fromkeys(params, 1), seed=0)
    return observing_step(fn, sites, mask).lower(state, *split((params, batch))).compile()


def test_memory_is_that_of_the_statistics():
    """They are added to in place, even those of layers in a loop, and the program's own results are dropped."""
    layers = {"w": jnp.zeros((6, 1024, 1024))}
    fn = lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0] @ jnp.ones((1024, 9999))  # noqa: E731
    memory = compiled_step(fn, layers, normal(32, 1024)).memory_analysis()
    one = 4 * 1024 * 1024
    assert memory.alias_size_in_bytes >= 6 * one * 3 / 4  # the panels of a symmetric matrix
    assert memory.temp_size_in_bytes < 3 * one


def heads(x, p):
    """The parameters read the same."""
    return x + jnp.stack([jnp.einsum("ti,io->to", jnp.tanh(x), each) for each in p.values()]).sum()


def heads_apart(x, p):
    """The parameters read values of the same shape."""
    return x + jnp.stack([jnp.tanh(i * x) @ each for i, each in enumerate(p.values(), 1)]).sum()


def stacked(block):
    return lambda p, x: lax.scan(lambda x, p: (block(x, p), None), x, p)[0]


SHARING = {
    "scan": stacked,
    "remat": lambda block: stacked(jax.checkpoint(block)),
    "jit": lambda block: stacked(jax.jit(block)),
    "layer by layer": lambda block: lambda p, x: [block(x, {name: w[i] for name, w in p.items()}) for i in range(2)],
    "branch": lambda block: lambda p, x: lax.cond(x.sum() < 1e9, stacked(block), lambda p, x: x, p, x),
}


@pytest.mark.parametrize("mask", [None, lambda x: x[:, 0] > 0])
@pytest.mark.parametrize("way", SHARING)
def test_what_several_sites_read_is_multiplied_once(way, mask):
    x, params = normal(256, 64), {name: normal(2, 64, 3) for name in "qkv"}

    def operations(block, names):
        chosen = {name: params[name] for name in names}
        return compiled_step(SHARING[way](block), chosen, x, mask=mask).cost_analysis()["flops"]

    assert operations(heads, "qkv") < 1.5 * operations(heads, "q")
    assert operations(heads_apart, "qkv") > 2.5 * operations(heads_apart, "q")
    found = everything(SHARING[way](heads), params, [x], mask=mask)
    assert_same(found["q"], found["k"])
    assert_same(found["q"], found["v"])


def test_sites_that_share_one_of_their_inputs():
    params, x = {name: normal(4, 3) for name in ("q", "k", "rounded")}, normal(6, 4)

    def fn(p, x):
        rounded = x.astype(jnp.bfloat16) @ p["rounded"].astype(jnp.bfloat16)
        return x @ p["q"], x @ p["k"], (2 * x) @ p["k"], rounded

    found = everything(fn, params, [x])
    assert_moments(found["q"], x)
    assert_moments(found["k"], np.concatenate([x, 2 * x]))
    assert_moments(found["rounded"], x.astype(jnp.bfloat16))


def test_anything_may_be_an_argument():
    fn = lambda p, x, mode, flag: x @ p["w"] if mode == "on" and flag else x  # noqa: E731
    x = normal(5, 4)
    assert_moments(everything(fn, {"w": normal(4, 2)}, [(x, "on", True)])["w"], x)
    assert_moments(everything(lambda p, x: x @ p["w"], {"w": normal(4, 2)}, [x])["w"], x)


def test_what_cannot_be_captured_is_refused():
    fn, params, x = (lambda p, x: x @ p["w"]), {"w": normal(4, 2)}, normal(5, 4)
    with pytest.raises(ConfigError, match="what='input'; choose one of inputs, components, gradient"):
        everything(fn, params, [x], "input")
    with pytest.raises(ConfigError, match="batches is empty"):
        everything(fn, params, [])
    with pytest.raises(ConfigError, match="passes=2 needs a collection"):
        everything(fn, params, iter([x]), "components", passes=2)
    with pytest.raises(MatchError, match="nothing"):
        everything(fn, params, [x], targets=("nothing",))
    with pytest.raises(ParameterError, match=r"captured at w is NaN or infinite"):
        everything(fn, params, [x.at[0, 0].set(jnp.nan)])
    with pytest.raises(ParameterError, match=r"w has 4 inputs, but the program uses it in parts of 2"):
        everything(lambda p, x: x[:, :2] @ p["w"][:2] + x[:, 2:] @ p["w"][2:], params, [x])
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    inside = jax.shard_map(fn, mesh=mesh, in_specs=(spec(), spec("d")), out_specs=spec("d"))
    with pytest.raises(ParameterError, match="w is used inside shard_map"):
        everything(inside, params, [normal(4, 4)])


def test_sharded_inputs_give_the_same():
    fn, params, x = (lambda p, x: jnp.tanh(x @ p["w"])), {"w": normal(4, 2)}, normal(8, 4)
    for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
        mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
        with jax.set_mesh(mesh):
            spread = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d")))
            assert_moments(everything(fn, params, [spread])["w"], x)


COMBINED = {
    "plain-sum_of_weights", "plain-concatenation", "plain-concatenated_inputs", "plain-padding", "plain-tiled",
    "plain-rolled", "plain-stacked_then_scanned", "plain-chosen_by_a_flag", "plain-ensemble_of_convolutions",
    "plain-ensemble_of_one_input", "plain-complex_pair", "plain-complex_phases",
}  # fmt: skip
"""Rows of which the program combines several weights, or parts of one, before they meet an input."""


@pytest.mark.parametrize("case", [case for case in CASES if case.method == "lora"], ids=lambda case: case.id)
def test_every_model_of_the_shared_table(case):
    """Each is captured, or refused for a reason that the program leaves no way around."""
    targets = tuple(path for path, site in case.found.items() if site.kind != "embedding")
    if not targets:
        return
    run = partial(lora.capture, case.model.fn, case.model.params, [case.model.args], "inputs")
    try:
        captured = run(config=lora.LoraConfig(targets=targets))
    except ParameterError as error:
        reason = str(error)
    else:
        for path, found in captured.items():
            site = case.found[path]
            assert found.second.shape == (*site.batch_shape, site.fan_in, site.fan_in)
        return
    unseen = bool(case.materialised) or case.id in COMBINED
    why = ["in parts of", "groups", "inside shard_map", "complex inputs", *(["No input of"] if unseen else [])]
    assert any(each in reason for each in why), reason


def test_printed_and_flattened():
    captured = everything(WAYS["scan"], LAYERS, [normal(9, 4)])
    assert "second [3, 4, 4]" in repr(captured)
    assert_same(jax.tree.map(lambda leaf: leaf, captured)["w"], captured["w"])
    with pytest.raises(KeyError, match="'x' was not captured; nearest: v, w"):
        captured["x"]
