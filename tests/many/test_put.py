"""What `AdapterBank.put` sends and writes: an adapter's own bytes, in place, whatever its rank."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same, random_adapter
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lora_jax as lora
from lora_jax.many import bank as banks

PARAMS = {"wide": jnp.ones((3, 64, 32)), "tall": jnp.ones((32, 64)), "left": jnp.ones((64, 64))}


def fn(params: Any, x: Any) -> Any:
    x, _ = jax.lax.scan(lambda x, w: (x @ w @ w.T, None), x, params["wide"])
    return x @ params["left"] @ params["tall"].T


SITES = lora.find_sites(fn, PARAMS, jnp.ones((2, 64)))
DTYPES = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])


def given(rank: int, seed: int = 0) -> lora.Adapter:
    return jax.tree.map(lambda leaf: leaf + 0.1, random_adapter(SITES, rank=rank, seed=seed))


def write(bank: lora.AdapterBank, adapter: lora.Adapter, patch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """The arguments of the program that writes."""
    seen: list[tuple[Any, ...]] = []
    with patch.context() as patched:
        patched.setattr(banks, "_write", lambda *args: seen.append(args))
        bank.put(2, adapter)
    return seen[0]


@DTYPES
def test_what_is_sent_is_what_the_adapter_holds(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, adapter = lora.AdapterBank.empty(SITES, 5, 16, gains=True, dtype=dtype), given(3).without("left")
    args = write(bank, adapter, monkeypatch)
    sent = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(args) if not isinstance(leaf, jax.Array))
    factors: list[Any] = list(adapter.values())
    own = sum((each.a.size + each.b.size) * bank["wide"].a.dtype.itemsize for each in factors)
    assert own <= sent <= own + 64 * len(adapter)  # where parts begin, and whether they are finite
    assert sent < bank.nbytes / 4 / 5


@DTYPES
def test_a_write_neither_copies_the_bank_nor_holds_a_slot(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = lora.AdapterBank.empty(SITES, 5, 16, dtype=dtype)
    args = write(bank, given(3), monkeypatch)
    compiled: Any = banks._write.lower(*args).compile()
    memory, slot = compiled.memory_analysis(), bank.nbytes / 4
    assert memory.alias_size_in_bytes == bank.nbytes
    assert memory.temp_size_in_bytes < slot / 8
    if dtype == jnp.float32 or jax.__version_info__ >= (0, 12):  # Before, XLA's CPU compiler goes through float32.
        assert compiled.cost_analysis()["bytes accessed"] < 2.1 * slot


@pytest.mark.parametrize("room", [1, 5, 8])
def test_rows_come_in_order_and_zeros_behind_them(room: int) -> None:
    bank = lora.AdapterBank.empty(SITES, 4, room).put(1, given(room, 1)).put(3, given(room, 2))
    before = jax.tree.map(np.asarray, bank)
    for rank in (*range(room, 0, -1), room):
        adapter = given(rank)
        bank = bank.put(2, adapter)
        for path, held in bank.items():
            lead = len(held.site.batch_axes)
            slots = [np.moveaxis(np.asarray(each), (lead, lead + 1), (0, 1)) for each in (held.a, held.b)]
            plain = adapter[path].low_rank()
            assert plain is not None
            for found, each in zip(slots, plain.pairs()[0], strict=True):
                np.testing.assert_allclose(found[1, :rank], np.moveaxis(np.asarray(each), lead, 0), rtol=1e-6)
                assert not found[1, rank:].any()
    assert_same(jax.tree.leaves(bank.evict(2)), jax.tree.leaves(before))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("inside", [False, True])
def test_a_bank_stays_where_it_is_on_a_mesh(kind: AxisType, inside: bool) -> None:
    mesh = jax.make_mesh((2, 2), ("slots", "out"), axis_types=(kind,) * 2)
    spec = {4: PartitionSpec(None, "slots", None, "out"), 3: PartitionSpec("slots", None, "out"), 1: PartitionSpec()}
    empty = partial(lora.AdapterBank.empty, SITES, 5, 8)
    bank = jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, spec[leaf.ndim])), empty())
    before = [leaf.sharding for leaf in jax.tree.leaves(bank)]
    put = jax.jit(lora.AdapterBank.put) if inside else lora.AdapterBank.put
    bank = put(bank, 2, given(3))
    after = jax.tree.leaves(bank)
    assert all(leaf.sharding.is_equivalent_to(old, leaf.ndim) for leaf, old in zip(after, before, strict=True))
    assert_same(after, jax.tree.leaves(empty().put(2, given(3))))
