"""Composition: sums are exact, truncation is optimal, what an adapter holds takes part or is refused by its path."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_same, merged, random_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lora_jax as lora
from lora_jax.adapter.site import Site
from lora_jax.adapter.updates import pytree
from lora_jax.compose.methods import METHODS
from lora_jax.methods import Dora, Gained, Rows, Shift, precompute
from lora_jax.paths import named_leaves

SEARCH = settings(max_examples=settings.default.max_examples // 4)  # each compiles a composition
EXPERTS: dict[str, Any] = {"in_axes": (2,), "out_axes": (3,), "batch_axes": (0, 1)}
SITES = (
    Site(path="dense", shape=(6, 5), dtype="float32", kind="dense", in_axes=(0,), out_axes=(1,)),
    Site(path="heads", shape=(2, 5, 3), dtype="float32", kind="dense", in_axes=(1,), out_axes=(0, 2)),
    Site(path="conv", shape=(3, 2, 4), dtype="float32", kind="conv", in_axes=(0, 1), out_axes=(2,), channel_axis=1),
    Site(path="table", shape=(9, 4), dtype="float32", kind="embedding", in_axes=(0,), out_axes=(1,)),
    Site(path="layers", shape=(5, 4, 3), dtype="float32", kind="dense", in_axes=(2,), out_axes=(0,), batch_axes=(1,)),
    Site(path="experts", shape=(2, 3, 4, 5), dtype="float32", kind="ragged", **EXPERTS),
)
FEW = (SITES[1], SITES[4])  # every other shape is another compilation
NAMES = tuple(METHODS)
THINNING = [name for name in NAMES if METHODS.find(name).rule.thin != "none"]
RANDOM = [name for name in NAMES if METHODS.find(name).random]


def needs(method: str) -> dict[str, Any]:
    """What a method cannot do without."""
    density = {"density": 0.5} if method in THINNING else {}
    return density | ({"key": jax.random.key(7)} if method in RANDOM else {})


def made(count: int = 2, ranks: Sequence[int] = (2, 3, 1), sites: Sequence[Site] = FEW) -> list[lora.Adapter]:
    return [random_adapter(sites, seed, ranks[seed]) for seed in range(count)]


def compose(adapters: Any, method: str, *args: Any, **options: Any) -> lora.Adapter:
    return lora.compose(adapters, *args, method=method, **(needs(method) | options))


delta_of = jax.jit(lambda update: update.delta())


def delta(adapter: lora.Adapter, path: str) -> np.ndarray:
    return np.asarray(delta_of(adapter[path]), np.float64) if path in adapter else np.zeros(())


def total(adapters: Sequence[lora.Adapter], weights: Sequence[float], path: str) -> np.ndarray:
    return sum(weight * delta(adapter, path) for adapter, weight in zip(adapters, weights, strict=True))


def layers(site: Site, value: np.ndarray) -> np.ndarray:
    """Every linear map of a stack as a matrix."""
    moved = value.transpose(*site.batch_axes, *site.in_axes, *site.out_axes)
    return moved.reshape(-1, site.fan_in, site.fan_out)


def near(actual: Any, desired: Any, tolerance: float = 2e-6) -> None:
    actual, desired = np.asarray(actual, np.float64), np.asarray(desired, np.float64)
    assert np.abs(actual - desired).max() <= tolerance * max(np.abs(desired).max(), 1e-6)


WEIGHTS = st.lists(st.floats(-2, 2, width=32), min_size=3, max_size=3)


@SEARCH
@given(weights=WEIGHTS, seed=st.integers(0, 99))
def test_cat_is_the_weighted_sum(weights: list[float], seed: int) -> None:
    adapters = [random_adapter(SITES, seed + i, rank) for i, rank in enumerate((1, 3, 2))]
    found = compose(adapters, "cat", weights)
    for site in SITES:
        assert found[site.path].rank == 6
        desired = total(adapters, weights, site.path)
        size = max(np.abs(delta(adapter, site.path)).max() for adapter in adapters)
        assert np.abs(delta(found, site.path) - desired).max() <= 2e-6 * size


@SEARCH
@given(weights=WEIGHTS, seed=st.integers(0, 99), rank=st.integers(1, 5))
def test_truncation_is_optimal(weights: list[float], seed: int, rank: int) -> None:
    """The error is that of a full singular value decomposition, layer by layer, and so is what is reported."""
    adapters = [random_adapter(FEW, seed + i, each) for i, each in enumerate((1, 3, 2))]
    report = lora.compose_report(adapters, weights, method="svd", rank=rank)
    for site, row in zip(FEW, report.rows, strict=True):
        desired = layers(site, total(adapters, weights, site.path))
        values = np.linalg.svd(desired, compute_uv=False)
        best = np.sqrt(np.square(values[:, rank:]).sum())
        off = np.linalg.norm(layers(site, delta(report.adapter, site.path)) - desired)
        size = np.sqrt(sum(np.square(delta(adapter, site.path)).sum() for adapter in adapters)) + 1e-30
        assert abs(off - best) <= 1e-5 * size * 2
        whole = np.square(values).sum()
        if whole > 1e-3 * size**2:
            assert abs(row.lost - best**2 / whole) < 1e-4
            assert abs(row.deviation - best / np.sqrt(whole)) < 1e-4


@pytest.mark.parametrize("method", NAMES)
def test_every_method(method: str) -> None:
    """Shapes are the sites', values are finite, and eager and compiled results are the same."""
    adapters = made()
    found = compose(adapters, method)
    assert list(found) == sorted(site.path for site in FEW)
    for site in FEW:
        assert delta(found, site.path).shape == site.shape
        assert np.isfinite(delta(found, site.path)).all()
        assert bool((found[site.path].scale == 1).all())
        assert found[site.path].scale.shape == site.batch_shape
    compiled = jax.jit(lambda adapters: compose(adapters, method))(adapters)
    assert jax.tree.structure(compiled) == jax.tree.structure(found)
    for site in FEW:
        near(delta(compiled, site.path), delta(found, site.path), 2e-5)


@pytest.mark.parametrize("method", NAMES)
def test_weights_of_zero_give_the_base(method: str) -> None:
    if method == "slerp":
        found = compose(made(), method, [1.0, 0.0])
        near(delta(found, "dense"), delta(made()[0], "dense"))
        return
    found = compose(made(), method, [0.0, 0.0])
    for path in found:
        assert np.abs(delta(found, path)).max() < 1e-12


EXACT_ALONE = [name for name in NAMES if METHODS.find(name).rule.thin == "none"]


@pytest.mark.parametrize("method", [*EXACT_ALONE, "ties", "ties_svd", "knots", "magnitude_prune", "dare_ties_svd"])
def test_one_adapter_stays_what_it_is(method: str) -> None:
    """Alone at a parameter, an adapter is composed with nothing; at a density of one nothing is pruned."""
    (adapter,) = made(1)
    options = {"density": 1.0} if method in THINNING else {}
    both = method == "slerp"
    found = compose([adapter, lora.Adapter({})] if both else [adapter], method, [1, 0] if both else None, **options)
    for path in adapter:
        near(delta(found, path), delta(adapter, path), 3e-6)


@pytest.mark.parametrize("method", [name for name in NAMES if name not in RANDOM])
def test_order_does_not_matter(method: str) -> None:
    first, second = made()
    one, other = compose([first, second], method, [0.75, 0.25]), compose([second, first], method, [0.25, 0.75])
    for path in one:
        near(delta(one, path), delta(other, path), 1e-5)


@pytest.mark.parametrize("method", ["cat", "svd", "rank_one", "block", "peft_linear"])
def test_adapters_of_different_targets(method: str) -> None:
    first, second = made(sites=SITES[:4])
    first, second = first.without("conv"), second.without("table", "dense")
    found = compose([first, second], method, [0.5, -1.5])
    assert sorted(found) == sorted({*first, *second})
    near(delta(found, "conv"), -1.5 * delta(second, "conv"), 1e-5)
    near(delta(found, "table"), 0.5 * delta(first, "table"), 1e-5)


def test_stacks_are_composed_layer_by_layer() -> None:
    """Every layer and every expert as it is composed alone, the random methods apart, which draw for each."""
    site = SITES[4]
    alone = Site(path="layers", shape=(5, 3), dtype="float32", kind="dense", in_axes=(1,), out_axes=(0,))
    adapters = made()
    for method in sorted(set(NAMES) - set(RANDOM)):
        found = compose(adapters, method)[site.path]
        for layer in range(4):
            parts = [
                lora.Adapter({"layers": lora.LowRank(each.a[layer], each.b[layer], each.scale[layer], alone)})
                for each in (adapter[site.path] for adapter in adapters)
            ]
            near(np.asarray(delta_of(found))[:, layer], delta(compose(parts, method), "layers"), 1e-5)


def test_subtraction_leaves_the_other() -> None:
    first, second = made()
    both = lora.compose([first, second])
    back = lora.compose([both, second], [1, -1], method="svd", rank=2)
    for path in first:
        near(delta(back, path), delta(first, path), 1e-5)


def test_pure() -> None:
    """Nothing given is written, and the same arguments give the same numbers bit for bit."""
    adapters = made()
    copies = jax.tree.map(np.array, adapters)
    for method in NAMES:
        assert_same(compose(adapters, method), compose(adapters, method))
    assert_same(adapters, copies)


def test_weights_are_differentiable_and_never_recompile() -> None:
    adapters = made(sites=SITES[:1])
    traces = []

    @jax.jit
    def loss(weights: jax.Array) -> jax.Array:
        traces.append(weights)
        return jnp.sum(lora.compose(adapters, weights)["dense"].delta() ** 2)

    gradient = jax.grad(loss)(jnp.float32([1, 2]))
    sums = [total(adapters, weights, "dense") for weights in ([1, 2],)]
    near(gradient, [2 * (sums[0] * delta(adapter, "dense")).sum() for adapter in adapters], 1e-5)
    count = len(traces)
    jax.block_until_ready([jax.grad(loss)(jnp.float32([w, 1])) for w in (0.1, -3)])
    assert len(traces) == count


def test_the_sum_is_what_the_model_with_both_computes() -> None:
    params = {"w": jax.random.normal(jax.random.key(0), (4, 3))}
    fn, x = lambda params, x: jnp.tanh(x @ params["w"]), jax.random.normal(jax.random.key(1), (2, 4))
    adapters = made(sites=list(lora.find_sites(fn, params, x).values()))
    adapted = lora.adapt(fn)
    assert_close(adapted(params, lora.compose(adapters), x), adapted(params, tuple(adapters), x))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_factors(kind: AxisType) -> None:
    site = Site(path="w", shape=(3, 16, 8), dtype="float32", kind="dense", in_axes=(1,), out_axes=(2,), batch_axes=(0,))
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
    adapters = [random_adapter([site], seed, 2 + seed) for seed in range(2)]

    def spread(adapter: lora.Adapter) -> lora.Adapter:
        update, place = (
            adapter["w"],
            lambda leaf, *axes: jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*axes))),
        )
        a, b = place(update.a, None, None, "x"), place(update.b, None, None, ("x", "y"))
        return lora.Adapter({"w": replace(update, a=a, b=b, scale=place(update.scale))})

    sharded = [spread(adapter) for adapter in adapters]
    for method in ("cat", "svd", "ties"):
        # Through the host: an array that leaves an explicit mesh by `device_put` keeps the mesh in its type.
        on_one = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), compose(sharded, method))
        near(delta(on_one, "w"), delta(compose(adapters, method), "w"), 1e-5)
    near(lora.canonical(sharded[0])["w"].values, lora.canonical(adapters[0])["w"].values, 1e-5)


# Methods of adapting, mixed; and what has no factors.


@pytest.fixture
def model() -> tuple[Any, Any, jax.Array, lora.Sites]:
    params = {
        "embed": jax.random.normal(jax.random.key(0), (9, 8)),
        "up": {"kernel": jax.random.normal(jax.random.key(1), (8, 6)), "bias": jnp.ones(6)},
        "norm": jnp.ones(6),
    }
    fn = lambda p, x: (p["embed"][x] @ p["up"]["kernel"] + p["up"]["bias"][None]) * p["norm"][None]  # noqa: E731
    x = jnp.arange(9)
    return fn, params, x, lora.find_sites(fn, params, x)


def trained(model: Any, seed: int = 0, **fields: Any) -> lora.Adapter:
    """An adapter in which everything that trains has moved."""
    _, params, _, sites = model
    adapter = lora.init(jax.random.key(seed), lora.LoraConfig(**({"targets": ("up.kernel",), "rank": 2} | fields)), params, sites)  # fmt: skip  # noqa: E501
    draw = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf, train: leaf + np.float32(0.3 * draw.normal(size=leaf.shape)) if train else leaf,
        adapter, lora.trainable(adapter),
    )  # fmt: skip


def test_methods_mix(model: Any) -> None:
    fields = [{"method": name} for name in ("lora", "lora-fa", "lora-xs", "adalora", "vera")] + [{"init": "pissa"}]
    adapters = [trained(model, seed, **each) for seed, each in enumerate(fields)]
    found = lora.compose(adapters, [0.5, -1, 2, 1, 0.25, 1])
    parts = [lora.scale(each, w) for each, w in zip(adapters, (0.5, -1, 2, 1, 0.25, 1), strict=True)]
    assert_close(merged(model[1], found), merged(model[1], *parts))
    assert type(found["up/kernel"]) is lora.LowRank


def test_dora_composes_inside_of_its_norm(model: Any) -> None:
    fn, params, x, _ = model
    first, second = trained(model, 0, method="dora"), trained(model, 1, method="dora")
    adapted = jax.jit(lambda adapter: lora.adapt(fn)(params, adapter, x))
    alone = lora.compose([first])
    assert isinstance(alone["up/kernel"], Dora)
    assert_close(adapted(alone), adapted(first))
    assert_close(adapted(lora.compose([first, second], [1, 0])), adapted(first))
    assert_close(adapted(lora.compose([first, second], [0, 0])), fn(params, x))
    both = lora.compose([first, second], [0.5, 0.5])["up/kernel"]
    sizes = [each["up/kernel"].magnitude for each in (first, second)]
    near(both.magnitude, (sizes[0] + sizes[1]) / 2)
    near(delta(lora.Adapter({"w": both}), "w"), total([first, second], [0.5, 0.5], "up/kernel"))
    scaled = lora.compose([lora.scale(first, 0.25), second])["up/kernel"]
    assert_same(scaled, lora.compose([first, second], [0.25, 1])["up/kernel"])
    for method in ("svd", "slerp", "ties_svd", "dare_linear"):
        found = compose([first, second], method)["up/kernel"]
        assert isinstance(found, Dora)
        assert bool(jnp.isfinite(found.applied(params["up"]["kernel"])).all())


def test_dora_without_its_norm_adds_up_exactly(model: Any) -> None:
    fn, params, x, _ = model
    dora, plain = trained(model, 0, method="dora"), trained(model, 1)
    with pytest.raises(lora.ParameterError, match=r"'up/kernel' has updates of different kinds .*precompute"):
        lora.compose([dora, plain])
    fixed = precompute(params, dora)
    found = lora.compose([fixed, plain], [0.5, -2])
    assert isinstance(found["up/kernel"], Gained)
    desired = lora.adapt(fn)(params, (lora.scale(fixed, 0.5), lora.scale(plain, -2)), x)
    assert_close(lora.adapt(fn)(params, found, x), desired)


def test_biases_modules_and_rows_take_part(model: Any) -> None:
    params = model[1]
    config = {"lora_bias": True, "trainable_tokens": {"embed": (1, 4)}, "train": ("norm",)}
    first = trained(model, 0, **config)
    second = trained(model, 1, **(config | {"trainable_tokens": {"embed": (4, 7)}}))
    kinds = {path: type(update) for path, update in first.items()}
    assert kinds == {"embed": Rows, "norm": lora.Replace, "up/bias": Shift, "up/kernel": lora.LowRank}
    found = lora.compose([first, second], [0.5, 1.5], params=params)
    assert found["embed"].rows == (1, 4, 7)
    base, _ = named_leaves(params)
    for path in first:
        changes = [np.asarray(each[path].applied(base[path]) - base[path]) for each in (first, second)]
        near(found[path].applied(base[path]) - base[path], 0.5 * changes[0] + 1.5 * changes[1], 1e-5)
    shares = lora.compose([first.without("embed"), second.without("embed")], [0.25, 0.75])
    near(shares["norm"].value, 0.25 * first["norm"].value + 0.75 * second["norm"].value)
    again = lora.compose([first, second.without("embed", "norm")])
    assert_close(again["embed"].value, first["embed"].value)
    for method in ("slerp", "ties", "dare_linear", "rank_one"):
        made = compose([first, second], method, params=params)
        assert set(made) == set(first)
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(made))


def test_whole_values_are_thinned_by_their_difference_to_the_base(model: Any) -> None:
    params = model[1]
    adapter = trained(model, 0, train=("norm",))
    found = lora.compose([adapter], method="ties", density=0.5, params=params)
    change, whole = found["norm"].value - params["norm"], adapter["norm"].value - params["norm"]
    assert int((jnp.abs(change) > 0).sum()) == 3
    near(change[jnp.abs(change) > 0], whole[jnp.abs(change) > 0], 1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1, 1]}, r"norm is trained in full, and values can be composed with weights \[1.0, 1.0\] only"),
        ({"method": "ties", "density": 0.5}, r"norm is trained in full, and values can be composed entry by entry"),
    ],
)
def test_whole_values_need_the_base(model: Any, options: dict[str, Any], message: str) -> None:
    adapters = [trained(model, seed, train=("norm",)) for seed in range(2)]
    with pytest.raises(lora.ParameterError, match=message):
        lora.compose(adapters, **options)
    assert set(lora.compose([each.without("norm") for each in adapters], **options)) == {"up/kernel"}


def test_rows_need_shares_row_by_row(model: Any) -> None:
    tables = [{"embed": (1, 4)}, {"embed": (4, 7)}]
    adapters = [trained(model, seed, trainable_tokens=rows) for seed, rows in enumerate(tables)]
    with pytest.raises(lora.ParameterError, match=r"embed \(row 1\).*adapter.without\('embed'\)"):
        lora.compose(adapters, [0.5, 0.5])


def test_different_kinds_are_refused_by_path(model: Any) -> None:
    with pytest.raises(lora.ParameterError, match=r"'up/kernel' has updates of different kinds \(LowRank, Replace\)"):
        lora.compose([trained(model), trained(model, 1, targets=("embed",), train=("up.kernel",))])


def test_adapters_of_other_models_are_refused() -> None:
    first = random_adapter([SITES[0]])
    other = random_adapter([replace(SITES[0], shape=(6, 7))])
    with pytest.raises(lora.ParameterError, match=r"'dense' is of another kind in each adapter: .*\(6, 5\).*\(6, 7\)"):
        lora.compose([first, other])
    with pytest.raises(lora.ParameterError, match="'dense'"):
        lora.compose([first], params={"other": jnp.ones(3)})


def test_an_update_without_factors_is_refused() -> None:
    @pytree("site")
    class Mine(lora.Replace):
        pass

    site = SITES[0]
    assert set(lora.compose([lora.Adapter({"dense": Mine(jnp.ones(site.shape), site)})])) == {"dense"}

    @pytree("site", "dropout")
    class Other(lora.LowRank):
        def low_rank(self) -> None:
            return None

    update = random_adapter([site])["dense"]
    with pytest.raises(lora.ParameterError, match=r"'dense' has a Other, which has no low-rank factors"):
        lora.compose([lora.Adapter({"dense": Other(update.a, update.b, update.scale, site)})])


def test_dropout_is_the_common_rate() -> None:
    same = [random_adapter(SITES[:2], seed, dropout=0.1) for seed in range(2)]
    assert {update.dropout for update in lora.compose(same).values()} == {0.1}
    mixed = lora.compose([same[0], random_adapter(SITES[:1], 3)])
    assert {update.dropout for update in mixed.values()} == {0.0}


def test_bfloat16_factors_are_composed_in_float32() -> None:
    adapters = [jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), each) for each in made(sites=SITES[:1])]
    exact = lora.compose(adapters)
    assert exact["dense"].a.dtype == exact["dense"].b.dtype == jnp.float32
    widened = [jax.tree.map(lambda leaf: leaf.astype(jnp.float32), each) for each in adapters]
    near(delta(exact, "dense"), total(widened, [1, 1], "dense"))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no such method": ({"method": "sum"}, r"method='sum' is not a method of composition; choose one of: block, cat"),
    "no density": ({"method": "ties"}, r"method='ties' keeps a share of the entries: pass density="),
    "a density of zero": ({"method": "dare_ties", "density": 0.0}, r"density=0.0 must be above 0"),
    "a density of two": ({"method": "ties_svd", "density": 2.0}, r"at most 1"),
    "a density for svd": ({"method": "svd", "density": 0.5}, r"density=0.5 means nothing"),
    "no key": ({"method": "dare_linear", "density": 0.5}, r"method='dare_linear' drops random entries: pass key="),
    "a rank for cat": ({"rank": 4}, r"rank=4 means nothing; for fewer: method=\"svd\""),
    "a rank of zero": ({"method": "svd", "rank": 0}, r"rank=0 must be a positive integer"),
    "half a rank": ({"method": "svd", "rank": 1.5}, r"rank=1.5 must be"),
    "a sign for svd": ({"method": "svd", "majority_sign": "total"}, r"elects no signs"),
    "an unknown sign": ({"method": "ties", "density": 0.5, "majority_sign": "most"}, r"'most' must be \"total\""),
    "too few weights": ({"weights": [1.0]}, r"1 weights were given for 2 adapters"),
    "an infinite weight": ({"weights": [1.0, float("inf")]}, r"must be finite"),
    "weights of slerp": ({"method": "slerp", "weights": [1.0, 1.0]}, r"shares of one"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_are_refused(case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(lora.ConfigError, match=message):
        lora.compose(made(), **options)


def test_counts_are_refused() -> None:
    with pytest.raises(lora.ConfigError, match="at least one"):
        lora.compose([])
    with pytest.raises(lora.ConfigError, match="3 were given: pass two"):
        lora.compose(made(3), method="slerp")
    with pytest.raises(TypeError, match="Expected an Adapter"):
        lora.compose(["a", "b"])
