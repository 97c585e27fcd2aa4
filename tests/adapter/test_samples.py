"""Samples of a base's values: the same however a parameter is placed, others for other values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lora_jax.adapter.samples import COUNT, differ, sampled

VALUES = np.random.default_rng(0).standard_normal((8, 6, 40)).astype(np.float32)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("spec", [(), ("x",), (None, "y"), ("x", "y"), (("x", "y"),), (None, None, "y")], ids=str)
def test_placement_changes_nothing(spec: tuple, axis_type: AxisType) -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    placed = jax.device_put(VALUES, NamedSharding(mesh, PartitionSpec(*spec)))
    assert not differ(sampled({"w": placed})["w"], sampled({"w": VALUES})["w"])


@pytest.mark.parametrize("make", [jnp.asarray, np.asfortranarray, lambda v: np.asarray(v, np.float64)])
def test_the_same_values(make) -> None:
    assert not differ(sampled({"w": make(VALUES)})["w"], sampled({"w": VALUES})["w"])


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v * np.float32(1 + 1e-5),
        lambda v: v[::-1],
        lambda v: v[:, ::-1],
        lambda v: v[..., ::-1],
        lambda v: v + np.float32(1e-5),
        lambda v: v.astype(jnp.bfloat16),
        lambda v: np.where(np.arange(40) % 2, v, np.nan),
    ],
)
def test_other_values(change) -> None:
    assert differ(sampled({"w": change(VALUES)})["w"], sampled({"w": VALUES})["w"])


@pytest.mark.parametrize("shape", [(), (1,), (3,), (COUNT,), (COUNT + 1,), (2, 0), (1000, 1)], ids=str)
def test_shapes(shape: tuple[int, ...]) -> None:
    assert ("w" in sampled({"w": np.ones(shape)})) == (0 not in shape)


@pytest.mark.parametrize("dtype", ["int8", "uint32", "bool", "float8_e4m3fn", "complex64", "bfloat16", "int4"])
def test_dtypes(dtype: str) -> None:
    one = sampled({"w": jnp.ones((4, 4), dtype)})["w"]
    assert differ(one, sampled({"w": jnp.zeros((4, 4), dtype)})["w"])


def test_what_has_no_values_is_left_out() -> None:
    abstract = jax.ShapeDtypeStruct((3,), jnp.float32)
    assert sampled({"a": abstract, "key": jax.random.key(0), "n": 3, "w": np.ones(2)}).keys() == {"w"}
    jax.jit(lambda w: w + len(sampled({"w": w})))(jnp.ones(2))
