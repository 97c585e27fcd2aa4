"""Adapters through `flax.serialization` and through programs of `jax.export`."""

import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from flax.training.train_state import TrainState

import lora_jax as lora
from lora_jax.adapter.updates import LowRank, pytree

PARAMS, X = {"w": jnp.ones((6, 5)), "v": jnp.ones((3, 5, 4))}, jnp.ones((3, 6))


def fn(params: Any, x: jax.Array) -> jax.Array:
    return jax.lax.map(lambda v: (x @ params["w"]) @ v, params["v"])


def start(seed: int = 0, **fields: Any) -> lora.Adapter:
    config = lora.LoraConfig(**{"rank": 2, "targets": ("w", "v"), **fields})
    return lora.init(jax.random.key(seed), config, PARAMS, lora.find_sites(fn, PARAMS, X))


def assert_bits(actual: Any, desired: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        assert (one.dtype, one.shape, np.asarray(one).tobytes()) == (
            other.dtype,
            other.shape,
            np.asarray(other).tobytes(),
        )


FORMS = [{}, {"init": "pissa"}, {"method": "dora"}, {"param_dtype": "bfloat16"}, {"train": ("w",), "targets": ("v",)}]


@pytest.mark.parametrize("fields", FORMS, ids=str)
def test_bytes_of_flax(fields: dict[str, Any]) -> None:
    adapter, other = start(1, **fields), start(2, **fields)
    again = serialization.from_bytes(other, serialization.to_bytes(adapter))
    assert isinstance(again, lora.Adapter)
    assert_bits(again, adapter)
    lora.summary(again)


def test_train_state_of_flax() -> None:
    adapter = start()
    tree = {"params": PARAMS, "lora": adapter}
    make = lambda: TrainState.create(apply_fn=None, params=tree, tx=lora.optimizer(optax.adam(1e-2), tree))  # noqa: E731
    state = make().apply_gradients(grads=jax.tree.map(jnp.ones_like, tree))
    again = serialization.from_bytes(make(), serialization.to_bytes(state))
    assert_bits((again.params, again.opt_state), (state.params, state.opt_state))


def test_bytes_of_another_adapter_are_refused() -> None:
    with pytest.raises(lora.CheckpointError, match=r"adapted parameters, v are not"):
        serialization.from_bytes(start(targets=("w",)), serialization.to_bytes(start()))
    with pytest.raises(lora.CheckpointError, match=r"arrays at 'v'.*a_start, b_start only there"):
        serialization.from_bytes(start(init="pissa"), serialization.to_bytes(start()))


def test_flax_is_not_imported_for_it() -> None:
    code = (
        "import sys, lora_jax as lora; lora.Adapter({}); print('flax' in sys.modules); import flax.serialization as s;"
    )
    code += "a = lora.Adapter({}); print(type(s.from_bytes(a, s.to_bytes(a))).__name__)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["False", "Adapter"]


@pytree("site", "dropout", "mine")
@dataclass(frozen=True)
class Mine(LowRank):
    """An update of a user, with a static field of its own."""

    mine: tuple[Any, ...] = ()


def forms() -> dict[str, tuple[Any, Any]]:
    adapter, run = start(), lambda tree, x: lora.adapt(fn)(PARAMS, tree, x)
    plain = adapter["w"]
    own = Mine(plain.a, plain.b, plain.scale, plain.site, mine=(1, ("x", None), 0.5))
    ids = jnp.ones(3, jnp.int32)
    product = lambda params, x: x @ params["w"]  # noqa: E731
    banked = lambda tree, x: lora.route(product)(PARAMS, tree, ids, x)  # noqa: E731
    methods = {name: (start(method=name), run) for name in lora.methods.names() if name != "alora"}
    return methods | {
        "pissa": (start(init="pissa"), run),
        "own": (lora.Adapter({"w": own}), run),
        "full": (start(targets=("v",), train=("w",)), run),
        "bank": (lora.AdapterBank.of([start(targets=("w",))]), banked),
    }


@pytest.mark.parametrize("name", [*lora.methods.names(), "pissa", "own", "full", "bank"])
def test_exported_program_with_an_adapter_as_argument(name: str) -> None:
    if name not in forms():
        pytest.skip("acts on routed calls only")
    tree, run = forms()[name]
    exported = jax.export.deserialize(jax.export.export(jax.jit(run))(tree, X).serialize())
    assert exported.in_tree == jax.tree.structure(((tree, X), {}))
    np.testing.assert_array_equal(exported.call(tree, X), jax.jit(run)(tree, X))


@pytest.mark.parametrize("kind", [lora.Adapter, lora.AdapterBank, LowRank, lora.Replace, Mine])
def test_export_knows_the_class(kind: type) -> None:
    nothing: Any = {"serialize_auxdata": lambda data: b"", "deserialize_auxdata": lambda data: None}
    with pytest.raises(ValueError, match=r"already|registration|[Dd]uplicate"):
        jax.export.register_pytree_node_serialization(kind, serialized_name=f"test {kind.__name__}", **nothing)
