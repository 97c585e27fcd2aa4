"""Merging: float32 arithmetic, one rounding, nothing else touched, nothing broken let through."""

import cProfile

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict
from helpers import assert_close, assert_same, random_adapter
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lora_jax.adapter.adapter import Adapter, scale
from lora_jax.adapter.site import Site
from lora_jax.adapter.updates import LowRank, Replace
from lora_jax.errors import MergeError, ParameterError
from lora_jax.merge import _by_layer, merge, merge_report


def site(path: str = "w", shape: tuple[int, ...] = (32, 16), dtype: str = "float32") -> Site:
    return Site(path=path, shape=shape, dtype=dtype, kind="dense", in_axes=(0,), out_axes=(1,))


def weight(dtype: object = jnp.float32, shape: tuple[int, ...] = (32, 16)) -> jax.Array:
    return jax.random.normal(jax.random.key(1), shape).astype(dtype)


def adapter(path: str = "w", seed: int = 0, size: float = 1.0) -> Adapter:
    return scale(random_adapter([site(path)], seed), size)


def reference(base: jax.Array, *adapters: Adapter) -> np.ndarray:
    """The exact sum, in float64."""
    total = np.asarray(base).astype(np.float64)
    for update in (adapter["w"] for adapter in adapters):
        a, b = np.asarray(update.a, np.float64), np.asarray(update.b, np.float64)
        total = total + float(update.scale) * np.einsum("ri,ro->io", a, b)
    return total


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_rounds_once_to_the_nearest(dtype: str) -> None:
    base, one, two = weight(dtype), adapter(seed=1, size=0.3), adapter(seed=2, size=0.3)
    merged = merge({"w": base}, [one, two])["w"]
    assert merged.dtype == dtype
    exact = reference(base, one, two)
    error = np.abs(np.asarray(merged).astype(np.float64) - exact)
    limits = jnp.finfo(dtype)
    half_ulp = np.maximum(np.abs(exact) * float(limits.eps), float(limits.smallest_subnormal)) / 2
    assert (error <= half_ulp + 1e-6).all()
    total = base.astype(jnp.float32) + (one["w"].delta() + two["w"].delta())
    assert_same(merged, total.astype(dtype))


def test_two_roundings_would_differ() -> None:
    base, parts = weight(jnp.bfloat16), [adapter(seed=1, size=1e-3), adapter(seed=2, size=1e-3)]
    with pytest.warns(UserWarning, match="rounding leaves"):
        at_once, in_turn = merge({"w": base}, parts), merge(merge({"w": base}, parts[0]), parts[1])
    assert (at_once["w"] != in_turn["w"]).any()


def steps_of_tracing(kernels: int) -> int:
    """How many calls of functions it takes to trace `jit(merge)`."""
    params = {f"w{i}": jnp.ones((4, 4)) for i in range(kernels)}
    given = random_adapter([site(path, (4, 4)) for path in params])
    profile = cProfile.Profile()
    profile.runcall(jax.jit(lambda params, given: merge(params, given)).trace, params, given)
    return sum(entry.callcount for entry in profile.getstats())


def test_tracing_takes_time_in_proportion_to_the_kernels() -> None:
    """Asking JAX anything about a traced value that it would have to explain costs a walk through the whole program."""
    few, many = steps_of_tracing(20), steps_of_tracing(80)
    assert many <= 4.2 * few


WRITES_WIDE = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="XLA for CPU writes slices through float32")


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=WRITES_WIDE)])
def test_a_stack_is_merged_one_layer_at_a_time(dtype: str) -> None:
    """Of all layers nothing is held but the parameter and its merged values."""
    layers = 16
    where = Site(
        path="w", shape=(layers, 64, 48), dtype=dtype, kind="dense", in_axes=(1,), out_axes=(2,), batch_axes=(0,)
    )
    params, given = {"w": weight(dtype, where.shape)}, random_adapter([where])
    program = _by_layer.lower(params["w"], [given["w"]]).compile().memory_analysis()
    assert program.temp_size_in_bytes + program.output_size_in_bytes <= 2 * params["w"].nbytes
    whole = jax.jit(merge)(params, given)["w"]
    one, other = (np.asarray(each, np.float32) for each in (merge(params, given)["w"], whole))
    np.testing.assert_allclose(one, other, rtol=float(jnp.finfo(dtype).eps), atol=1e-6)


def test_input_and_untouched_leaves() -> None:
    params = {"w": weight(), "other": weight(), "name": "kept", "none": None}
    before = np.array(params["w"])
    merged = merge(params, adapter())
    assert merged is not params
    assert (merged["w"] != params["w"]).any()
    assert merged["other"] is params["other"]
    assert merged["name"] is params["name"]
    assert (np.asarray(params["w"]) == before).all()
    assert jax.tree.structure(merged) == jax.tree.structure(params)


def test_no_adapter_is_the_base() -> None:
    params = {"w": weight()}
    assert merge(params, [])["w"] is params["w"]
    assert merge(params, Adapter({}))["w"] is params["w"]


def test_stacked_weights_get_their_own_delta() -> None:
    stacked = Site(path="w", shape=(8, 3, 4), dtype="float32", kind="dense", in_axes=(0,), out_axes=(2,), batch_axes=(1,))  # fmt: skip  # noqa: E501
    made = random_adapter([stacked])
    update = made["w"]
    merged = merge({"w": jnp.zeros((8, 3, 4))}, made)["w"]
    for layer in range(3):
        assert_close(merged[:, layer], update.scale[layer] * update.a[layer].T @ update.b[layer])


def test_replace_alone_and_beside_factors() -> None:
    value = weight() + 3
    replaced = Adapter({"w": Replace(value, site())})
    assert_same(merge({"w": weight()}, replaced)["w"], value)
    both = merge({"w": weight()}, [adapter(), replaced])["w"]
    assert_same(both, value + adapter()["w"].delta())
    low = merge({"w": weight(jnp.bfloat16)}, replaced)["w"]
    assert_same(low, value.astype(jnp.bfloat16))


class Net(eqx.Module):
    w: jax.Array
    activation: object


class Cell(nnx.Module):
    def __init__(self) -> None:
        self.w = nnx.Param(weight())
        self.count = nnx.Variable(jnp.zeros((), jnp.int32))


TREES = {
    "dict": lambda: {"w": weight(), "b": jnp.ones(3)},
    "FrozenDict": lambda: FrozenDict({"w": weight(), "b": jnp.ones(3)}),
    "nnx.State": lambda: nnx.state(Cell()),
    "nnx.Module": Cell,
    "equinox": lambda: Net(weight(), jax.nn.relu),
    "boxed": lambda: {"w": nn.Partitioned(weight(), names=(None, "model")), "b": jnp.ones(3)},
}


@pytest.mark.parametrize("kind", TREES)
def test_trees(kind: str) -> None:
    params = TREES[kind]()
    merged = merge(params, adapter())
    assert type(merged) is type(params)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    expected = [weight() + adapter()["w"].delta() if leaf.shape == (32, 16) else leaf for leaf in _arrays(params)]
    assert_same(_arrays(merged), expected)


def _arrays(tree: object) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]


def test_numpy_leaves_stay_numpy() -> None:
    merged = merge({"w": np.asarray(weight(jnp.bfloat16))}, adapter())["w"]
    assert type(merged) is np.ndarray
    assert merged.dtype == jnp.bfloat16
    assert_same(merged, np.asarray(merge({"w": weight(jnp.bfloat16)}, adapter())["w"]))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_jit(rounding: str) -> None:
    params, key = {"w": weight(jnp.bfloat16)}, jax.random.key(0)
    compiled = jax.jit(lambda params, one: merge(params, one, rounding=rounding, key=key))
    for seed in (1, 2):
        one = adapter(seed=seed)
        assert_close(compiled(params, one), merge(params, one, rounding=rounding, key=key))
    assert compiled._cache_size() == 1


def test_gradient_flows_through_a_merge() -> None:
    params, one = {"w": weight()}, adapter()
    grads = jax.grad(lambda one: (merge(params, one)["w"] ** 2).sum())(one)
    assert_close(grads["w"].b, 2 * one["w"].scale * one["w"].a @ merge(params, one)["w"], factor=10)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("spec", [("x", None), (None, "y"), ("y", "x")])
def test_sharded_is_unsharded(axis_type: AxisType, rounding: str, spec: tuple[str | None, ...]) -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type, axis_type))
    base, key = weight(jnp.bfloat16), jax.random.key(0)
    placed = NamedSharding(mesh, PartitionSpec(*spec))
    merged = merge({"w": jax.device_put(base, placed)}, adapter(), rounding=rounding, key=key)["w"]
    assert merged.sharding == placed
    assert_same(jax.device_get(merged), jax.device_get(merge({"w": base}, adapter(), rounding=rounding, key=key)["w"]))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_base_and_adapter(axis_type: AxisType) -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type, axis_type))
    placed = NamedSharding(mesh, PartitionSpec("x", "y"))
    one = adapter()
    factors = {"a": PartitionSpec(None, "x"), "b": PartitionSpec(None, "y"), "scale": PartitionSpec()}
    where = LowRank(**{name: NamedSharding(mesh, spec) for name, spec in factors.items()}, site=site())
    moved = jax.device_put(one, Adapter({"w": where}))
    merged = merge({"w": jax.device_put(weight(), placed)}, moved)["w"]
    assert merged.sharding == placed
    assert_close(jax.device_get(merged), jax.device_get(merge({"w": weight()}, one)["w"]))


def test_uncommitted_stays_uncommitted() -> None:
    assert not merge({"w": weight()}, adapter())["w"].committed


# Stochastic rounding


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_stochastic_rounding_is_unbiased_and_picks_a_neighbour(dtype: str) -> None:
    base, one = weight(dtype), adapter(size=0.1)
    exact = np.asarray(base.astype(jnp.float32) + one["w"].delta(), np.float64)
    draw = jax.jit(jax.vmap(lambda key: merge({"w": base}, one, rounding="stochastic", key=key)["w"]))
    samples = np.asarray(draw(jax.random.split(jax.random.key(0), 2000))).astype(np.float64)
    spacing = np.maximum(np.abs(exact) * float(jnp.finfo(dtype).eps), float(jnp.finfo(dtype).smallest_subnormal))
    assert (np.abs(samples - exact) <= spacing * 1.001).all()
    assert (np.ptp(samples, axis=0) > 0).mean() > 0.9
    error = samples.mean(axis=0) - exact
    assert (np.abs(error) <= 5 * 0.5 * spacing / np.sqrt(len(samples))).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_stochastic_rounding_keeps_what_is_exact(dtype: str) -> None:
    limits = jnp.finfo(dtype)
    odd = [0.0, -0.0, 1.0, -1.5, float(limits.max), float(limits.min), float(limits.tiny), -float(limits.tiny)]
    base = jnp.asarray(odd * 4, jnp.float32).reshape(-1, 2).astype(dtype)
    nothing = LowRank(jnp.zeros((1, 16)), jnp.zeros((1, 2)), jnp.float32(1.0), site(shape=(16, 2)))
    merged = merge({"w": base}, Adapter({"w": nothing}), rounding="stochastic", key=jax.random.key(0))["w"]
    assert_same(merged, base)


def test_stochastic_rounding_of_float32_is_the_nearest() -> None:
    params = {"w": weight()}
    assert_same(merge(params, adapter(), rounding="stochastic", key=jax.random.key(0)), merge(params, adapter()))


def test_stochastic_rounding_draws_by_path_and_key() -> None:
    params = {"w": weight(jnp.bfloat16), "v": weight(jnp.bfloat16)}
    one = Adapter({**adapter(size=1e-3), **adapter("v", size=1e-3)})

    def draw(seed: int, tree: Adapter = one):
        return merge(params, tree, rounding="stochastic", key=jax.random.key(seed))

    assert_same(draw(0), draw(0))
    assert (draw(0)["w"] != draw(1)["w"]).any()
    assert (draw(0)["w"] != draw(0)["v"]).any()
    assert_same(draw(0)["w"], draw(0, one.without("v"))["w"])


def test_stochastic_rounding_saves_what_rounding_to_nearest_loses() -> None:
    base = jax.random.normal(jax.random.key(3), (256, 256)).astype(jnp.bfloat16)
    made = random_adapter([site(shape=(256, 256))])
    delta = made["w"].delta()
    one = scale(made, 1e-3 * jnp.linalg.norm(base.astype(jnp.float32)) / jnp.linalg.norm(delta))
    delta = one["w"].delta()

    def survival(**options) -> float:
        kept = merge({"w": base}, one, **options)["w"].astype(jnp.float32) - base.astype(jnp.float32)
        return float(jnp.vdot(kept, delta) / jnp.vdot(delta, delta))

    assert survival() < 0.7
    assert survival(rounding="stochastic", key=jax.random.key(0)) == pytest.approx(1.0, abs=0.1)


# Refusals


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_adapter_is_refused(value: float) -> None:
    made = adapter()["w"]
    broken = Adapter({"w": LowRank(made.a.at[0, 0].set(value), made.b, made.scale, made.site)})
    with pytest.raises(MergeError, match=r"16 NaN or infinite entries in 'w'.*diverged"):
        merge({"w": weight()}, broken)


def test_overflow_and_broken_base_are_refused() -> None:
    with pytest.raises(MergeError, match="overflows float16"):
        merge({"w": weight(jnp.float16)}, adapter(size=1e6))
    with pytest.raises(MergeError, match="The base itself is NaN"):
        merge({"w": weight().at[0, 0].set(jnp.nan)}, adapter())
    with pytest.raises(MergeError, match="overflows float8_e4m3fn"):
        merge({"w": weight(jnp.float8_e4m3fn)}, adapter(size=1e4), rounding="stochastic", key=jax.random.key(0))


def test_every_broken_path_is_counted() -> None:
    params = {name: weight() for name in "wvu"}
    broken = Adapter({name: adapter(name, size=np.inf)[name] for name in "wvu"})
    with pytest.raises(MergeError, match=r"'u' and 2 more parameters \(v, w\)"):
        merge(params, broken)


def test_wrong_trees_are_refused_with_the_nearest_paths() -> None:
    with pytest.raises(ParameterError, match=r"adapts 'w', which these parameters do not have; nearest: params/w"):
        merge({"params": {"w": weight()}}, adapter())
    with pytest.raises(ParameterError, match=r"'w' has shape \(16, 32\), but the adapter.*\(32, 16\)"):
        merge({"w": weight().T}, adapter())
    with pytest.raises(TypeError, match="Expected an Adapter or a sequence of them, got a list of dict"):
        merge({"w": weight()}, [{"w": adapter()["w"]}])


def test_two_replacements_are_refused() -> None:
    replaced = Adapter({"w": Replace(weight(), site())})
    with pytest.raises(ParameterError, match=r"'w' is trained in full by more than one adapter.*without\('w'\)"):
        merge({"w": weight()}, [replaced, replaced])


def test_arrays_that_do_not_fit_their_site_are_refused() -> None:
    made = adapter()["w"]
    wrong = LowRank(made.a[:, :1], made.b, made.scale, made.site)
    with pytest.raises(
        ParameterError, match=r"at 'w' has arrays of shapes .*\(2, 1\), \(2, 16\)\] where its site needs .*\(2, 32\)"
    ):
        merge({"w": weight()}, [Adapter({"w": wrong}), adapter()])
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), adapter())
    with pytest.raises(ParameterError, match="take one of them"):
        merge({"w": weight()}, stacked)
    with pytest.raises(ParameterError, match=r"shapes \[\(32, 1\)\] where its site needs \[\(32, 16\)\]"):
        merge({"w": weight()}, Adapter({"w": Replace(jnp.ones((32, 1)), site())}))


def test_integer_parameters_are_refused() -> None:
    with pytest.raises(MergeError, match="'w' is int8, and a delta cannot be merged into integers"):
        merge({"w": jnp.ones((32, 16), jnp.int8)}, adapter())


def test_options_are_checked() -> None:
    with pytest.raises(MergeError, match='must be "nearest" or "stochastic"'):
        merge({"w": weight()}, adapter(), rounding="up")
    with pytest.raises(MergeError, match="pass key="):
        merge({"w": weight()}, adapter(), rounding="stochastic")


# The report


@pytest.mark.parametrize(
    ("relative", "unchanged", "survival"),
    [(1e-1, 0.02, 1.00), (1e-2, 0.18, 1.00), (1e-3, 0.78, 0.53), (3e-4, 0.93, 0.18)],
)
def test_report_measures_what_bfloat16_loses(relative: float, unchanged: float, survival: float) -> None:
    base = jax.random.normal(jax.random.key(3), (256, 256)).astype(jnp.bfloat16)
    made = random_adapter([site(shape=(256, 256))], rank=8)
    ratio = jnp.linalg.norm(base.astype(jnp.float32)) / jnp.linalg.norm(made["w"].delta())
    report = merge_report({"w": base}, scale(made, relative * ratio))
    (row,) = report.rows
    assert row.relative == pytest.approx(relative, rel=1e-3)
    assert row.unchanged == pytest.approx(unchanged, abs=0.05)
    assert row.survival == pytest.approx(survival, abs=0.06)
    assert report.warnings == (("w",) if survival < 0.9 else ())
    assert ('rounding="stochastic"' in repr(report)) == ("⚠" in repr(report)) == (survival < 0.9)


def test_report_of_exact_merges() -> None:
    params = {"w": weight(), "v": weight(jnp.bfloat16)}
    zero = scale(adapter("v"), 0.0)
    report = merge_report(params, [adapter(), zero])
    assert [(row.path, row.dtype, row.survival) for row in report.rows] == [
        ("v", "bfloat16", 1.0),
        ("w", "float32", pytest.approx(1.0)),
    ]
    assert report.rows[0].unchanged == 1.0
    assert report.rows[0].relative == 0.0
    assert not report.warnings


def test_report_of_a_replacement() -> None:
    value = weight() * (1 + 1e-4)
    report = merge_report({"w": weight(jnp.bfloat16)}, Adapter({"w": Replace(value, site(dtype="bfloat16"))}))
    assert 0 < report.rows[0].relative < 1e-2


def test_report_refuses_wrong_trees() -> None:
    with pytest.raises(ParameterError, match="nearest: other"):
        merge_report({"other": weight()}, adapter())


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "bfloat16", "float16"])
def test_a_delta_that_rounding_swallows_is_not_lost_in_silence(dtype: str) -> None:
    params, small = {"w": jnp.ones((32, 16), dtype), "v": weight()}, adapter(size=1e-4)
    said = rf"rounding leaves 0% at 'w' \({dtype}\).*stochastic"
    if dtype.startswith("float8"):
        with pytest.raises(MergeError, match=rf"{said}.*force=True"):
            merge(params, small)
    with pytest.warns(UserWarning, match=said) as warned:
        merged = merge(params, small, force=True)
    assert len(warned) == 1
    assert_same(merged, params)
    assert merge_report(params, small).warnings == ("w",)
    merge(params, small, rounding="stochastic", key=jax.random.key(0))
    merge(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), small)
    jax.jit(merge)(params, small)
    merge(params, adapter(size=1.0))
