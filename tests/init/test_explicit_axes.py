"""Starts, statistics and reports of parameters on a mesh with explicit axes: what they are on one device."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers import assert_close
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lora_jax as lora
from lora_jax.adapter.sharding import adapter_sharding

KEY = jax.random.key(0)
SPECS = {"w": PartitionSpec("data", "model"), "stack": PartitionSpec(None, "data", "model")}


def fn(params: Any, x: jax.Array) -> jax.Array:
    mixed = jax.lax.scan(lambda total, w: (total + jnp.tanh(x @ w).sum(), None), jnp.zeros(()), params["stack"])[0]
    return jnp.tanh(x @ params["w"]) + mixed


def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)


def setting() -> tuple[Any, Any, jax.Array, Any]:
    """Parameters on one device and on the mesh, tokens, and sites."""
    keys = jax.random.split(KEY, 3)
    params = {"w": jax.random.normal(keys[0], (16, 8)), "stack": jax.random.normal(keys[1], (3, 16, 8))}
    spread = {name: jax.device_put(leaf, NamedSharding(mesh(), SPECS[name])) for name, leaf in params.items()}
    x = jax.random.normal(keys[2], (8, 16))
    return params, spread, x, lora.find_sites(fn, params, x)


def sizes(adapter: lora.Adapter) -> Any:
    """What does not depend on the signs of singular vectors."""
    return {path: [abs(jax.device_get(part)) for part in (update.a, update.b)] for path, update in adapter.items()}


def trained(adapter: lora.Adapter) -> lora.Adapter:
    train, fixed = lora.partition(adapter)
    return lora.combine(jax.tree.map(lambda leaf: leaf + 0.1, train), fixed)


STARTS = ["pissa", "pissa_niter_4", "milora", "olora", "corda-ipm", "lora-ga", "eva"]
READS = {"corda-ipm": "inputs", "lora-ga": "gradient", "eva": "components"}


@pytest.mark.parametrize("start", [*STARTS, "lora-xs"])
def test_starts(start: str) -> None:
    params, spread, x, sites = setting()
    fields = {"method": start} if start == "lora-xs" else {"init": start}
    config = lora.LoraConfig(rank=2, targets=("w", "stack"), **fields)
    loss = (lambda params, x: jnp.sum(fn(params, x) ** 2)) if start == "lora-ga" else fn
    given = [lora.capture(loss, params, [(x,)], READS[start], config=config)] if start in READS else []
    one = lora.init(KEY, config, params, sites, *given)
    assert_close(sizes(lora.init(KEY, config, spread, sites, *given)), sizes(one), factor=10)
    jitted = jax.jit(lambda params: lora.init(KEY, config, params, sites, *given))
    assert_close(sizes(jitted(spread)), sizes(one), factor=10)


def test_loftq() -> None:
    params, spread, _, sites = setting()
    adapter = lora.init(KEY, lora.LoraConfig(rank=2, targets=("w", "stack")), params, sites)
    found, want = (lora.loftq(adapter, tree, "int4") for tree in (spread, params))
    assert_close(sizes(found[0]), sizes(want[0]), factor=10)


def test_merge_report_and_merge() -> None:
    params, spread, _, sites = setting()
    adapter = trained(lora.init(KEY, lora.LoraConfig(rank=2, targets=("w", "stack")), params, sites))
    placed = jax.device_put(adapter, adapter_sharding(adapter, spread))
    for given in (adapter, placed):
        rows = lora.merge_report(spread, given).rows, lora.merge_report(params, adapter).rows
        for one, other in zip(*rows, strict=True):
            assert (one.relative, one.survival) == pytest.approx((other.relative, other.survival), rel=1e-5)
        merged = lora.merge(spread, given)
        assert_close(jax.device_get(merged), jax.device_get(lora.merge(params, adapter)))
        assert {name: leaf.sharding.spec for name, leaf in merged.items()} == SPECS


@pytest.mark.parametrize("router", ["arrow", "components"])
def test_routers(router: str) -> None:
    params, spread, _, sites = setting()
    first = trained(lora.init(KEY, lora.LoraConfig(rank=2, targets=("w", "stack")), params, sites))
    adapters = [first, lora.scale(first, 2.0)]
    placed = [jax.device_put(each, adapter_sharding(each, spread)) for each in adapters]
    found, want = (jax.tree.map(jnp.abs, getattr(lora.routers, router)(each)) for each in (placed, adapters))
    assert_close(jax.device_get(jax.tree.leaves(found)), jax.device_get(jax.tree.leaves(want)), factor=10)


@pytest.mark.parametrize("what", ["inputs", "components", "gradient"])
def test_capture_outside_of_set_mesh(what: Any) -> None:
    params, _, x, _ = setting()
    program = lambda params, x: jnp.sum(jnp.tanh(x @ params["w"]) ** 2)  # noqa: E731
    rows = jax.device_put(x, NamedSharding(mesh(), PartitionSpec("data")))
    columns = {"w": jax.device_put(params["w"], NamedSharding(mesh(), PartitionSpec(None, "model")))}
    config = lora.LoraConfig(rank=2, targets="w")
    found = lora.capture(program, columns, [(rows,), (rows,)], what, config=config)
    want = lora.capture(program, {"w": params["w"]}, [(x,), (x,)], what, config=config)
    assert_close(jax.device_get(jax.tree.leaves(found)), jax.device_get(jax.tree.leaves(want)), factor=10)
    if what == "gradient":
        assert found["w"].mean.sharding == columns["w"].sharding
