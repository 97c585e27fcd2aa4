"""Adapters on disk: bit for bit, self-describing, and refused when damaged or when they belong elsewhere."""

import gc
import json
import os
import threading
import time
import tracemalloc
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import random_adapter
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from lora_jax.adapter.adapter import Adapter
from lora_jax.adapter.site import Site
from lora_jax.adapter.updates import LowRank, Replace, pytree
from lora_jax.config.config import LoraConfig
from lora_jax.errors import CheckpointError, ParameterError
from lora_jax.init import initialisers
from lora_jax.io.own import stored
from lora_jax.io.own.orbax import load, load_config, save
from lora_jax.merge import merge
from lora_jax.optim.frozen import combine, partition

DENSE = Site(path="params/mlp/kernel", shape=(16, 8), dtype="float32", kind="dense", in_axes=(0,), out_axes=(1,))
STACK = Site(path="params/layers/w", shape=(3, 8, 2, 4), dtype="bfloat16", kind="dense", in_axes=(1,), out_axes=(2, 3), batch_axes=(0,), uses=2)  # fmt: skip  # noqa: E501
BIAS = Site(path="params/head.0/b i/ü", shape=(8,), dtype="float32", kind="full")


def make() -> Adapter:
    factors = random_adapter([DENSE, STACK], dropout=0.1)
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), factors[STACK.path])
    odd = jnp.array([-0.0, 1e-42, 1e38, 1e-3, 1, 2, 3, 4])
    return Adapter({DENSE.path: factors[DENSE.path], STACK.path: low, BIAS.path: Replace(odd, BIAS)})


def base() -> dict[str, Any]:
    layers = {"w": jnp.zeros((3, 8, 2, 4), jnp.bfloat16)}
    return {"params": {"mlp": {"kernel": jnp.zeros((16, 8))}, "layers": layers, "head.0": {"b i": {"ü": jnp.ones(8)}}}}


def assert_bits(actual: Any, desired: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(tmp_path / "adapter", make())
    return tmp_path / "adapter"


def test_round_trip(saved: Path) -> None:
    loaded = load(saved)
    assert_bits(loaded, make())
    assert loaded[STACK.path].site == STACK
    assert loaded[DENSE.path].dropout == 0.1
    assert all(isinstance(leaf, jax.Array) and not leaf.committed for leaf in jax.tree.leaves(loaded))


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn", "int8"])
def test_round_trip_of_other_dtypes(tmp_path: Path, dtype: str) -> None:
    adapter = jax.tree.map(lambda leaf: (leaf * 8).astype(dtype), random_adapter([DENSE]))
    save(tmp_path / "adapter", adapter)
    assert_bits(dict(load(tmp_path / "adapter")), dict(adapter))


def test_loaded_adapter_does_not_recompile(saved: Path) -> None:
    total = jax.jit(lambda adapter: sum(leaf.astype(jnp.float32).sum() for leaf in jax.tree.leaves(adapter)))
    total(make())
    total(load(saved))
    assert total._cache_size() == 1


def test_only_the_adapter_is_written(tmp_path: Path) -> None:
    big = {"w": jnp.ones((512, 512))}
    site = Site(path="w", shape=(512, 512), dtype="float32", kind="dense", in_axes=(0,), out_axes=(1,))
    save(tmp_path / "adapter", random_adapter([site], rank=64), params=big)
    size = sum(file.stat().st_size for file in (tmp_path / "adapter").rglob("*") if file.is_file())
    assert size < 1.1 * (2 * 64 * 512 * 4)


def test_arrays_are_readable_by_plain_orbax(saved: Path) -> None:
    shapes = jax.tree.map(lambda leaf: leaf.shape, ocp.metadata(saved).metadata)
    assert shapes[DENSE.path] == {"a": (2, 16), "b": (2, 8), "scale": ()}


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded(tmp_path: Path, axis_type: AxisType) -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))

    def place(adapter: Adapter) -> Any:
        """The last axis over the mesh where it divides."""
        specs = [PartitionSpec(*(None,) * (leaf.ndim - 1), "x") for leaf in jax.tree.leaves(adapter)]
        fits = [leaf.ndim and leaf.shape[-1] % 8 == 0 for leaf in jax.tree.leaves(adapter)]
        placed = [NamedSharding(mesh, spec if fit else PartitionSpec()) for spec, fit in zip(specs, fits, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(adapter), placed)

    adapter = jax.device_put(make(), place(make()))
    save(tmp_path / "adapter", adapter)
    assert_bits(load(tmp_path / "adapter"), make())
    again = load(tmp_path / "adapter", sharding=place)
    assert_bits(again, make())
    assert [leaf.sharding for leaf in jax.tree.leaves(again)] == [leaf.sharding for leaf in jax.tree.leaves(adapter)]
    replicated = load(tmp_path / "adapter", sharding=NamedSharding(mesh, PartitionSpec()))
    assert_bits(replicated, make())
    assert all(len(leaf.devices()) == 8 for leaf in jax.tree.leaves(replicated))
    one = SingleDeviceSharding(jax.devices()[3])
    by_path = load(tmp_path / "adapter", sharding=lambda adapter: Adapter(dict.fromkeys(adapter, one)))
    assert all(leaf.devices() == {jax.devices()[3]} for leaf in jax.tree.leaves(by_path))


@pytest.mark.parametrize("path", ["relative/adapter", "~/adapter"])
def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    save(path, make())
    assert_bits(load(path), make())
    assert (tmp_path / path.replace("~", "home") / "_CHECKPOINT_METADATA").exists()


def test_config(tmp_path: Path) -> None:
    assert "default" in initialisers()
    config = LoraConfig(rank=4, targets=("mlp", "layers"), rank_pattern={"mlp": 2}, rslora=True, param_dtype="bfloat16")
    save(tmp_path / "with", make(), config=config)
    save(tmp_path / "without", make())
    assert load_config(tmp_path / "with") == config
    assert load_config(tmp_path / "without") is None


@pytree("site", "dropout", "order")
@dataclass(frozen=True)
class Variant(LowRank):
    """A kind of update that the library does not know."""

    magnitude: jax.Array | None = None
    order: tuple[int, ...] = (0, 1)


@pytest.mark.parametrize("magnitude", [None, jnp.ones(8)])
def test_new_kinds_of_update_need_no_support(tmp_path: Path, magnitude: jax.Array | None) -> None:
    plain = make()[DENSE.path]
    update = Variant(plain.a, plain.b, plain.scale, DENSE, magnitude=magnitude, order=(1, 0))
    adapter = Adapter({DENSE.path: update})
    save(tmp_path / "adapter", adapter)
    assert_bits(load(tmp_path / "adapter"), adapter)


# The base it belongs to


def test_right_base_is_accepted(tmp_path: Path) -> None:
    save(tmp_path / "adapter", make(), params=base())
    assert_bits(load(tmp_path / "adapter", base()), make())
    assert_bits(load(tmp_path / "adapter", jax.eval_shape(base)), make())


def test_nnx_and_dict_bases_are_alike(tmp_path: Path) -> None:
    model = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
    site = Site(path="kernel", shape=(16, 8), dtype="float32", kind="dense", in_axes=(0,), out_axes=(1,))
    save(tmp_path / "adapter", random_adapter([site]), params=nnx.state(model))
    load(tmp_path / "adapter", {"kernel": model.kernel[...], "bias": np.zeros(8, np.float32)})


def test_wrong_base_is_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path / "adapter", make(), params=base() | {"step": jnp.zeros(())})
    wrong = base()
    wrong["params"]["mlp"]["kernel"] = jnp.zeros((16, 9))
    wrong["params"]["extra"] = jnp.zeros(2)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "adapter", wrong)
    message = str(caught.value)
    for part in (
        str(tmp_path / "adapter"),
        "3 of 5 parameters differ",
        "params/mlp/kernel is float32[16,9], not float32[16,8]",
        "params/extra (float32[2]) is new",
        "step (float32[]) is missing",
        "leave params out",
    ):
        assert part in message


def test_adapted_parameters_are_checked_even_without_a_fingerprint(saved: Path) -> None:
    load(saved, base() | {"more": jnp.zeros(3)})
    wrong = base()
    wrong["params"]["layers"]["w"] = jnp.zeros((3, 8, 2, 4), jnp.float32)
    with pytest.raises(CheckpointError, match=r"params/layers/w is float32\[3,8,2,4\], not bfloat16\[3,8,2,4\]"):
        load(saved, wrong)


def test_other_values_are_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path / "adapter", make(), params=base())
    other = base()
    other["params"]["layers"]["w"] = other["params"]["layers"]["w"] + 0.01
    with pytest.raises(CheckpointError, match=r"differ at 1 of 2 parameters: params/layers/w\. .* base=\"any\""):
        load(tmp_path / "adapter", other)
    assert_bits(load(tmp_path / "adapter", other, base="any"), make())
    with pytest.raises(CheckpointError, match='must be "same"'):
        load(tmp_path / "adapter", other, base="all")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_that_holds_the_adapter_already(tmp_path: Path, dtype: str) -> None:
    site = Site(path="w", shape=(16, 8), dtype=dtype, kind="dense", in_axes=(0,), out_axes=(1,))
    adapter = random_adapter([site])
    params = {"w": jax.random.normal(jax.random.key(5), (16, 8), dtype), "bias": jnp.ones(3)}
    save(tmp_path / "adapter", adapter, params=params)
    merged = merge(params, adapter)
    with pytest.raises(CheckpointError, match="is merged into these parameters already"):
        load(tmp_path / "adapter", merged)
    with pytest.raises(CheckpointError, match="another base of the same shapes"):
        load(tmp_path / "adapter", merged | {"bias": jnp.zeros(3)})


def test_a_base_whose_values_were_not_known(tmp_path: Path) -> None:
    save(tmp_path / "adapter", make(), params=jax.eval_shape(base))
    assert_bits(load(tmp_path / "adapter", base()), make())


def test_a_checkpoint_from_before_shapes_and_values_were_recorded(tmp_path: Path) -> None:
    save(tmp_path / "adapter", make(), params=base())

    def forget(metadata: Any) -> None:
        del metadata["lora_jax"]["arrays"], metadata["lora_jax"]["base"]["values"]

    edit(tmp_path / "adapter", forget)
    assert_bits(load(tmp_path / "adapter", base()), make())


def test_files_that_hold_other_arrays_than_the_manifest_says(saved: Path) -> None:
    notes = saved / "_CHECKPOINT_METADATA"
    notes.write_text(notes.read_text().replace('"float32[2,', '"float32[99999999999,'))
    with pytest.raises(
        CheckpointError, match=r"kernel.a' .2 such. the files hold .2, 16., and the manifest says .9999"
    ):
        load(saved)


def test_a_small_folder_that_claims_much_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros take no room on disk: 70 kB were 4.3 GB in memory."""
    wide = Site(path="w", shape=(1 << 20, 3), dtype="float32", kind="dense", in_axes=(0,), out_axes=(1,))
    save(tmp_path / "a", Adapter({"w": LowRank(jnp.zeros((2, 1 << 20)), jnp.zeros((2, 3)), jnp.float32(2), wide)}))
    assert load(tmp_path / "a")["w"].rank == 2
    monkeypatch.setattr(stored, "_ZEROS", 1 << 20)
    with pytest.raises(CheckpointError, match="says that its arrays have 8,388,636 bytes, and its files have"):
        load(tmp_path / "a")


def test_pipes_are_not_opened(saved: Path) -> None:
    os.mkfifo(saved / "state" / "d" / "pipe")
    with pytest.raises(CheckpointError, match="pipe is a named pipe, where only regular files belong"):
        load(saved)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_what_is_not_finite_is_neither_written_nor_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    adapter = random_adapter([DENSE])
    bad = Adapter({DENSE.path: replace(adapter[DENSE.path], b=adapter[DENSE.path].b.at[1, 2].set(value))})
    with pytest.raises(CheckpointError, match=r"params/mlp/kernel \(b\) of the adapter holds NaN or infinity"):
        save(tmp_path / "adapter", bad)
    assert not (tmp_path / "adapter").exists()
    with monkeypatch.context() as patch:
        patch.setattr("lora_jax.io.own.orbax._not_finite", lambda arrays: [])
        save(tmp_path / "adapter", bad)
    refused(tmp_path / "adapter", r"holds NaN or infinity at params/mlp/kernel \(b\)")


def test_loading_keeps_nothing(saved: Path) -> None:
    """Orbax keeps what it reads of metadata: 200 kB for every call."""

    def kept() -> int:
        gc.collect()
        found = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, "*orbax*")])
        return sum(each.size for each in found.statistics("filename"))

    load(saved)
    tracemalloc.start()
    load(saved)
    before = kept()
    for _ in range(5):
        load(saved)
    assert (kept() - before) / 5 < 20_000
    tracemalloc.stop()


def test_long_lists_of_differences_are_cut(tmp_path: Path) -> None:
    save(tmp_path / "adapter", make(), params=base())
    with pytest.raises(CheckpointError, match="9 more"):
        load(tmp_path / "adapter", base() | {f"x{number:02d}": jnp.zeros(1) for number in range(14)})


def test_saving_for_a_base_it_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="these parameters do not have"):
        save(tmp_path / "adapter", make(), params=base()["params"])
    assert not (tmp_path / "adapter").exists()


# What is there already


def test_existing_path_is_refused_unless_overwritten(saved: Path) -> None:
    train, fixed = partition(make())
    other = combine(jax.tree.map(lambda leaf: leaf * 2, train), fixed)
    with pytest.raises(CheckpointError, match=r"exists already.*overwrite=True"):
        save(saved, other)
    assert_bits(load(saved), make())
    save(saved, other, overwrite=True)
    assert_bits(load(saved), other)


def test_what_is_no_adapter_is_never_deleted(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("important")
    for path in (tmp_path / "mine", tmp_path / "mine" / "thesis.tex"):
        with pytest.raises(CheckpointError, match="no adapter that could be replaced"):
            save(path, make(), overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "important"


def test_empty_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the adapter is empty"):
        save(tmp_path / "adapter", Adapter({}))


# Damage


def refused(path: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        load(path)
    assert str(path) in str(caught.value)


def edit(path: Path, change: Any) -> None:
    """Change what `save` wrote as metadata."""
    file = path / "_CHECKPOINT_METADATA"
    content = json.loads(file.read_text())
    change(content["custom_metadata"])
    file.write_text(json.dumps(content))


def test_nothing_there(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "There is nothing at")


def test_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("hello")
    refused(tmp_path / "empty", "cannot be read as an adapter")
    refused(tmp_path / "file", "is a text file")


def test_checkpoint_of_something_else(tmp_path: Path) -> None:
    ocp.save(tmp_path / "other", {"w": jnp.ones(3)})
    refused(tmp_path / "other", "without the metadata of an adapter")


@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_garbled_metadata(saved: Path, keep: float) -> None:
    file = saved / "_CHECKPOINT_METADATA"
    file.write_text(file.read_text()[: int(keep * file.stat().st_size)])
    refused(saved, "cannot be read as an adapter")


def test_unfinished_checkpoint(saved: Path) -> None:
    (saved / "_CHECKPOINT_METADATA").unlink()
    refused(saved, "cannot be read as an adapter")


def test_other_format(saved: Path) -> None:
    edit(saved, lambda notes: notes["lora_jax"].update(format=99, version="9.9"))
    refused(saved, "has format 99, written by lora_jax 9.9.*Install the version")


@pytest.mark.parametrize(
    "change",
    [
        lambda notes: notes.update(lora_jax="text"),
        lambda notes: notes["lora_jax"].pop("updates"),
    ],
)
def test_missing_metadata(saved: Path, change: Any) -> None:
    edit(saved, change)
    refused(saved, "without the metadata of an adapter")


@pytest.mark.parametrize(
    "change",
    [
        lambda updates: updates[DENSE.path].update(type="Unknown"),
        lambda updates: updates[DENSE.path].pop("site"),
        lambda updates: updates[DENSE.path].update(new=3),
        lambda updates: updates[DENSE.path].update(site=[1]),
        lambda updates: updates.update(more=updates[DENSE.path]),
    ],
)
def test_metadata_that_does_not_fit_the_arrays(saved: Path, change: Any) -> None:
    edit(saved, lambda notes: change(notes["lora_jax"]["updates"]))
    refused(saved, "cannot be read as an adapter")


@pytest.mark.parametrize("delete", [False, True], ids=["truncated", "deleted"])
@pytest.mark.parametrize("pattern", ["state/d/*", "state/manifest.ocdbt", "state/_METADATA"])
def test_damaged_arrays(tmp_path: Path, pattern: str, delete: bool) -> None:
    # One array only: Orbax abandons parallel reads when one fails, and what they raise later is nobody's to catch.
    saved = tmp_path / "adapter"
    save(saved, make().without(DENSE.path, STACK.path))
    for file in list(saved.glob(pattern)):
        content = file.read_bytes()
        file.unlink()
        if not delete:
            file.write_bytes(content[: len(content) // 2])
    refused(saved, "cannot be read as an adapter")


def test_values_that_jax_would_truncate(tmp_path: Path) -> None:
    made = make()[DENSE.path]
    wide = LowRank(np.asarray(made.a, np.float64), made.b, made.scale, DENSE)
    save(tmp_path / "adapter", Adapter({DENSE.path: wide}))
    refused(tmp_path / "adapter", "holds float64 arrays.*jax_enable_x64")


def test_damaged_config(tmp_path: Path) -> None:
    save(tmp_path / "adapter", make(), config=LoraConfig(rank=4, targets=("mlp",)))
    edit(tmp_path / "adapter", lambda notes: notes["lora_jax"]["config"].update(unknown=1))
    with pytest.raises(CheckpointError, match="unknown"):
        load_config(tmp_path / "adapter")


def test_two_kinds_of_update_with_one_name_are_told_apart(tmp_path: Path) -> None:
    """A class is found again by its name, so one whose name another has taken cannot be saved."""
    update = make()[DENSE.path]
    mine, other = (type("Twice", (LowRank,), {"__module__": module}) for module in ("mine", "elsewhere"))
    pytree("site", "dropout")(mine)
    adapter = Adapter({DENSE.path: mine(update.a, update.b, update.scale, update.site)})
    with pytest.raises(CheckpointError, match=r"mine\.Twice, and elsewhere has another kind of update named Twice"):
        save(tmp_path / "adapter", adapter)
    assert other.__name__ == "Twice"


def test_threads_take_turns_with_orbax(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, wrong, inside, most = make(), list[Exception](), [], 0

    def watched(call: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal most
            inside.append(call)
            most = max(most, len(inside))
            time.sleep(0.02)
            try:
                return call(*args, **kwargs)
            finally:
                inside.remove(call)

        return run

    def work(name: str) -> None:
        try:
            for _ in range(2):
                save(tmp_path / name, adapter, overwrite=True)
                assert_bits(load(tmp_path / name), adapter)
        except Exception as error:
            wrong.append(error)

    for name in ("save", "load"):
        monkeypatch.setattr(ocp, name, watched(getattr(ocp, name)))
    threads = [threading.Thread(target=work, args=(name,)) for name in ("one", "one", "other")]
    for each in threads:
        each.start()
    for each in threads:
        each.join(120)
    assert (wrong, most) == ([], 1)
