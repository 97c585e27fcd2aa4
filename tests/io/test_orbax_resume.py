"""Exact resume, with the adapter as an ordinary tree in Orbax."""

from pathlib import Path
from typing import Any

import jax
import optax
import orbax.checkpoint as ocp_v0
from helpers import random_adapter
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp
from test_orbax import DENSE, assert_bits

from lora_jax.adapter.adapter import Adapter
from lora_jax.optim.frozen import optimizer

# Exact resume, with the adapter as an ordinary tree in Orbax


def start() -> tuple[Any, Any]:
    adapter = random_adapter([DENSE])
    return adapter, optimizer(optax.adamw(0.01), adapter).init(adapter)


@jax.jit
def step(adapter: Any, state: Any, number: Any) -> tuple[Any, Any]:
    x = jax.random.normal(jax.random.fold_in(jax.random.key(1), number), (4, 16))
    grads = jax.grad(lambda adapter: ((x @ adapter[DENSE.path].delta()) ** 2).mean())(adapter)
    updates, state = optimizer(optax.adamw(0.01), adapter).update(grads, state, adapter)
    return optax.apply_updates(adapter, updates), state


def run(adapter: Any, state: Any, numbers: range) -> dict[str, Any]:
    for number in numbers:
        adapter, state = step(adapter, state, number)
    return {"adapter": adapter, "opt_state": state}


def abstract() -> dict[str, Any]:
    adapter, state = start()
    here = SingleDeviceSharding(jax.devices()[0])
    tree = {"adapter": adapter, "opt_state": state}
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), tree)


def test_resume_through_checkpointer(tmp_path: Path) -> None:
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(5, run(*start(), range(5)))
        restored = checkpointer.load(5, abstract())
    assert isinstance(restored["adapter"], Adapter)
    assert_bits(run(**_named(restored), numbers=range(5, 10)), run(*start(), range(10)))


def test_resume_through_checkpoint_manager(tmp_path: Path) -> None:
    with ocp_v0.CheckpointManager(tmp_path) as manager:
        manager.save(5, args=ocp_v0.args.StandardSave(run(*start(), range(5))))
        manager.wait_until_finished()
        restored = manager.restore(5, args=ocp_v0.args.StandardRestore(abstract()))
    assert isinstance(restored["adapter"], Adapter)
    assert_bits(run(**_named(restored), numbers=range(5, 10)), run(*start(), range(10)))


def _named(tree: dict[str, Any]) -> dict[str, Any]:
    return {"adapter": tree["adapter"], "state": tree["opt_state"]}
