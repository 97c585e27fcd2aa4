"""Sums over devices: an adapted tensor-parallel layer has as many as its base, of as many bytes."""

import re
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lora

N, D, F, RANK = 64, 32, 64, 2
SPECS = dict.fromkeys(("q", "k", "v", "gate", "up"), P(None, "model")) | dict.fromkeys(("o", "down"), P("model"))
BYTES = {"bf16": 2, "f32": 4}


def fn(params: Any, x: jax.Array) -> jax.Array:
    q, k, v = (x @ params[name] for name in "qkv")
    x = x + jnp.tanh(q * k + v) @ params["o"]
    return x + (jax.nn.silu(x @ params["gate"]) * (x @ params["up"])) @ params["down"]


def sums(step: Any, *args: Any) -> tuple[int, int]:
    """How many sums over devices a compiled program has, and their bytes."""
    text = jax.jit(step).lower(*args).compile().as_text()
    results = re.findall(r" = (\(.*?\)|\S+) all-reduce(?:-start)?\(", text)
    found = [each for result in results for each in re.findall(r"(\w+)\[([\d,]*)\]", result)]
    return len(results), sum(BYTES[dtype] * prod(int(n) for n in dims.split(",") if n) for dtype, dims in found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("trains", [True, False])
def test_as_many_as_the_base(trains, dtype):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    at = lambda shape, spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))  # noqa: E731
    shapes = dict.fromkeys("qkvo", (D, D)) | {"gate": (D, F), "up": (D, F), "down": (F, D)}
    params, x = {name: at(shape, SPECS[name]) for name, shape in shapes.items()}, at((N, D), P())
    sites = lora.find_sites(fn, params, x)
    config = lora.LoraConfig(rank=RANK, targets=tuple(sites))
    adapter = jax.eval_shape(lambda params: lora.init(jax.random.key(0), config, params, sites), params)
    adapter = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        adapter, lora.adapter_sharding(adapter, params),
    )  # fmt: skip
    adapted = lora.adapt(fn, strategy="factored")

    def total(fn: Any) -> Any:
        return lambda *args: jnp.sum(jnp.sin(fn(*args)).astype(jnp.float32))

    base = sums(jax.value_and_grad(total(fn), 1) if trains else fn, params, x)
    ours = sums(jax.value_and_grad(total(adapted), (1, 2)) if trains else adapted, params, adapter, x)
    assert ours[0] <= base[0]
    assert ours[1] <= 1.1 * base[1]
