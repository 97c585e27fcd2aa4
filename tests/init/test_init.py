"""How adapters start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.adapter.site import Site, Sites
from lora_jax.adapter.updates import LowRank, Replace
from lora_jax.config.config import LoraConfig
from lora_jax.errors import ConfigError, MatchError, ParameterError
from lora_jax.init import init, initialisers, register
from lora_jax.init.random import orthogonal

KEY = jax.random.key(7)
PARAMS = {
    "dense": {"kernel": np.full((64, 32), 0.5, "float32"), "bias": np.arange(32.0, dtype="float32")},
    "heads": np.ones((64, 4, 8), "float32"),
    "layers": {"kernel": np.ones((3, 16, 8), jnp.bfloat16)},
    "experts": np.ones((2, 3, 16, 8), "float32"),
    "conv": {"kernel": np.ones((3, 3, 8, 16), "float32")},
    "embed": {"embedding": np.ones((50, 16), "float32")},
    "norm": {"scale": np.ones(5, jnp.bfloat16), "count": np.ones((), "int32")},
}


def site(path, kind, into, out, batch=()):
    leaf = PARAMS
    for part in path.split("/"):
        leaf = leaf[part]
    axes = {"in_axes": into, "out_axes": out, "batch_axes": batch}
    return Site(path=path, shape=leaf.shape, dtype=str(leaf.dtype), kind=kind, **axes)


FOUND = [
    site("dense/kernel", "dense", (0,), (1,)),
    site("heads", "dense", (0,), (1, 2)),
    site("layers/kernel", "dense", (1,), (2,), (0,)),
    site("experts", "ragged", (2,), (3,), (0, 1)),
    site("conv/kernel", "conv", (0, 1, 2), (3,)),
    site("embed/embedding", "embedding", (0,), (1,)),
]
SITES = Sites(FOUND, (*(item.path for item in FOUND), "dense/bias", "norm/scale", "norm/count"))
ALL = ("dense", "heads", "layers", "experts", "conv", "embed")


def start(key=KEY, params=PARAMS, **fields):
    return init(key, LoraConfig(**{"targets": ALL, **fields}), params, SITES)


def only(path, **fields):
    return start(targets=(path,), **fields)[path]


def test_shapes_dtypes_and_scales():
    adapter = start(rank=4, rank_pattern={"layers": 2}, dropout=0.1)
    assert set(adapter) == set(SITES)
    for path, update in adapter.items():
        rank = 2 if path == "layers/kernel" else 4
        assert isinstance(update, LowRank)
        assert update.site is SITES[path]
        assert update.dropout == 0.1
        assert (update.a.shape, update.b.shape) == (SITES[path].a_shape(rank), SITES[path].b_shape(rank))
        assert update.a.dtype == update.b.dtype == update.scale.dtype == jnp.float32
        assert update.scale.shape == SITES[path].batch_shape
        assert (np.asarray(update.scale) == 2).all()


@pytest.mark.parametrize("name", ["default", "gaussian"])
@pytest.mark.parametrize("path", list(SITES))
def test_the_delta_is_exactly_zero(name, path):
    assert not np.asarray(only(path, init=name).delta()).any()


@pytest.mark.parametrize(("path", "fan_in"), [("heads", 64), ("experts", 16), ("conv/kernel", 72)])
def test_default_is_uniform_in_the_fan_in_of_one_map(path, fan_in):
    a = np.asarray(only(path, rank=64).a)
    assert abs(a).max() <= fan_in**-0.5
    np.testing.assert_allclose(a.std(), (3 * fan_in) ** -0.5, rtol=0.05)


def test_gaussian_has_standard_deviation_one_over_rank():
    np.testing.assert_allclose(np.asarray(only("conv/kernel", init="gaussian", rank=32).a).std(), 1 / 32, rtol=0.05)


@pytest.mark.parametrize("name", ["default", "gaussian"])
def test_look_up_tables_start_with_a_zero(name):
    update = only("embed/embedding", init=name, rank=32)
    assert not np.asarray(update.a).any()
    np.testing.assert_allclose(np.asarray(update.b).std(), 1, rtol=0.1)


@pytest.mark.parametrize(
    ("path", "param_dtype"), [("experts", "float32"), ("conv/kernel", "bfloat16"), ("embed/embedding", "bfloat16")]
)
def test_orthogonal_factors_are_random_with_product_zero(path, param_dtype):
    update = only(path, init="orthogonal", rank=6, param_dtype=param_dtype)
    assert update.a.dtype == jnp.float32
    assert abs(np.asarray(update.delta())).max() < 1e-6
    assert np.asarray(update.a).std() > 0.03
    assert np.asarray(update.b).std() > 0.03


def test_orthogonal_follows_peft():
    """A is `(randn(in, r/2) @ Q[0::2]).T / 10` in PEFT, so its Gram matrix in rank space has rank r/2."""
    site = Site(path="w", shape=(4096, 8), dtype="float32", kind="dense", in_axes=(0,), out_axes=(1,))
    a, _ = orthogonal(KEY, site, 4, "float32")
    values = np.linalg.svd(np.asarray(a), compute_uv=False)
    np.testing.assert_allclose(values[:2], [6.4, 6.4], rtol=0.1)
    assert values[2] < 1e-4


def test_orthogonal_needs_an_even_rank():
    with pytest.raises(ConfigError, match=r"^dense/kernel: .* even rank, not 3"):
        start(init="orthogonal", rank_pattern={"dense": 3})


def test_every_layer_and_expert_has_factors_of_its_own():
    for path in ("layers/kernel", "experts"):
        a = np.asarray(start()[path].a).reshape(-1, 8, 16)
        assert len({layer.tobytes() for layer in a}) == len(a)


def test_factors_depend_on_path_and_key_alone():
    whole, part = start(), start(targets=("dense", "experts"), rank_pattern={"dense": 4})
    np.testing.assert_array_equal(whole["experts"].a, part["experts"].a)
    shuffled = dict(reversed(PARAMS.items()))
    np.testing.assert_array_equal(whole["heads"].a, start(params=shuffled)["heads"].a)
    assert (np.asarray(whole["heads"].a) != np.asarray(start(key=jax.random.key(8))["heads"].a)).any()
    assert (np.asarray(whole["heads"].a) != np.asarray(whole["dense/kernel"].a)).any()


def test_factors_of_a_layer_do_not_depend_on_the_number_of_layers():
    def first(count):
        axes = {"in_axes": (1,), "out_axes": (2,), "batch_axes": (0,)}
        site = Site(path="w", shape=(count, 4, 5), dtype="float32", kind="dense", **axes)
        params = {"w": np.ones(site.shape, "float32")}
        return np.asarray(init(KEY, LoraConfig(targets=("w",)), params, Sites([site]))["w"].a[0])

    np.testing.assert_array_equal(first(2), first(5))


def test_raw_keys_give_the_same_factors():
    raw = jax.random.key_data(KEY)
    np.testing.assert_array_equal(only("heads", key=raw).a, only("heads").a)
    np.testing.assert_array_equal(only("heads", key=np.asarray(raw)).a, only("heads").a)


def test_shapes_are_enough_without_full_training():
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), PARAMS)
    jax.tree.map(np.testing.assert_array_equal, start(), start(params=shapes))
    with pytest.raises(ParameterError, match=r"value of norm/scale is needed .*norm.*shapes only"):
        start(params=shapes, train=("norm",))
    abstract = jax.eval_shape(lambda params: start(params=params, train=("norm",)), PARAMS)
    assert abstract["norm/scale"].value.shape == (5,)


def test_jit_and_out_shardings_give_the_same_adapter():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    adapter = jax.jit(lambda key, params: start(key, params, train=("norm",)), out_shardings=sharding)(KEY, PARAMS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), adapter, start(train=("norm",)))
    assert adapter["dense/kernel"].a.sharding == sharding


def test_full_training_starts_from_a_copy_of_the_value():
    params = {**PARAMS, "dense": {"kernel": jnp.full((64, 32), 0.5), "bias": jnp.arange(32.0)}}
    adapter = start(params=params, targets=("heads",), train=("dense", "norm"))
    assert set(adapter) == {"heads", "dense/kernel", "dense/bias", "norm/scale"}  # no integer counter
    kernel, scale = adapter["dense/kernel"], adapter["norm/scale"]
    assert isinstance(kernel, Replace)
    assert kernel.site is SITES["dense/kernel"]
    assert isinstance(scale, Replace)
    assert (scale.site.kind, scale.site.dtype) == ("full", "bfloat16")
    assert scale.value.dtype == jnp.float32  # a float32 master of a bfloat16 parameter
    kernel.value.delete()
    np.testing.assert_array_equal(params["dense"]["kernel"], 0.5)


def test_full_training_never_loses_precision():
    assert start(targets=("heads",), bias="all", param_dtype="bfloat16")["dense/bias"].value.dtype == jnp.float32
    assert start(targets=("heads",), train=("norm",), param_dtype="bfloat16")["norm/scale"].value.dtype == jnp.bfloat16
    with pytest.raises(ParameterError, match="floating-point"):
        start(targets=("heads",), train=("norm/count",))


def test_sites_of_other_parameters_are_refused():
    with pytest.raises(ParameterError, match=r"site 'heads' is float32\[64, 4, 8\], but params has float32\[64, 32\]"):
        start(params={**PARAMS, "heads": np.ones((64, 32), "float32")})
    with pytest.raises(ParameterError, match=r"site 'heads' is float32.*float16"):
        start(params={**PARAMS, "heads": np.ones((64, 4, 8), "float16")})
    with pytest.raises(ParameterError, match="site 'heads' is not among these parameters"):
        start(params={name: leaf for name, leaf in PARAMS.items() if name != "heads"})
    with pytest.raises(MatchError, match="nothing_like_it"):
        start(targets=("nothing_like_it",))


def test_registered_initialisers_join():
    if "test-ones" not in initialisers():

        @register("test-ones")
        def ones(key, site, rank, dtype):
            return jnp.ones((rank, site.fan_in), dtype), jnp.ones((rank, site.fan_out), dtype)

    assert (np.asarray(start(init="test-ones")["experts"].b) == 1).all()
    with pytest.raises(ConfigError, match="'test-ones' exists already"):
        register("test-ones")
    with pytest.raises(ConfigError, match="PEFT has no init='test-ones'"):
        LoraConfig(init="test-ones").to_peft()
