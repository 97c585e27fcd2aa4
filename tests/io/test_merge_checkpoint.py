"""Adapters merged into checkpoints on disk: the weights PEFT makes."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import GOLDEN, assert_close, assert_same
from merging import factors, read_all, state, write_adapter, write_base
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from lora_jax.io.hf import changes
from lora_jax.io.hf import merge as merge_module
from lora_jax.io.hf.tensors import Item, write_file
from lora_jax.io.peft import Module, merge_checkpoint

CASES = sorted(str(file.parent.relative_to(GOLDEN)) for file in GOLDEN.rglob("expected.safetensors"))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_weights_are_pefts(name: str, shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "_BLOCK", 8)  # a row or two at a time
    expected = load_file(GOLDEN / name / "expected.safetensors")
    before, after = (
        {key.removeprefix(prefix): value for key, value in expected.items() if key.startswith(prefix)}
        for prefix in ("base.", "merged.")
    )
    config = {"model_type": "gpt_oss"} if "transposed" in name else {}
    write_base(tmp_path / "base", before, shards, config)
    merged = merge_checkpoint(tmp_path / "base", GOLDEN / name, tmp_path / "out")
    written = read_all(tmp_path / "out")
    assert_close(written, after)
    same = {key for key in before if key not in merged.changed}
    assert_same({key: written[key] for key in same}, {key: before[key] for key in same})
    assert merged.changed and all((written[key] != before[key]).any() for key in merged.changed)


@pytest.mark.parametrize("shards", [1, 2])
def test_an_adapter_is_not_merged_twice(small: tuple[Path, Path], shards: int, tmp_path: Path) -> None:
    base = write_base(tmp_path / "sharded", read_all(small[0]), shards)
    other = write_adapter(tmp_path / "other", {"q": factors(6, 4, seed=5)})
    merge_checkpoint(base, small[1], tmp_path / "one")
    merge_checkpoint(tmp_path / "one", other, tmp_path / "two")
    for adapter in (small[1], other):
        with pytest.raises(lora.CheckpointError, match=r"is merged into .*two already: .* again=True"):
            merge_checkpoint(tmp_path / "two", [adapter], tmp_path / "three")
    assert not (tmp_path / "three").exists()
    merge_checkpoint(tmp_path / "two", other, tmp_path / "three", again=True)


def test_a_merged_file_has_the_format_that_transformers_asks_for(small: tuple[Path, Path], tmp_path: Path) -> None:
    base = write_base(tmp_path / "plain", read_all(small[0]))
    save_file(read_all(base), base / "model.safetensors")
    merge_checkpoint(base, small[1], tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        assert file.metadata()["format"] == "pt"


@pytest.mark.parametrize("shards", [1, 2])
def test_what_stands_in_the_directory(small: tuple[Path, Path], shards: int, tmp_path: Path) -> None:
    base = write_base(tmp_path / "sharded", read_all(small[0]), shards)
    told: list[tuple[int, int]] = []
    merged = merge_checkpoint(base, small[1], tmp_path / "out", progress=lambda done, total: told.append((done, total)))
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {file.name for file in base.iterdir()} - {"pytorch_model.bin"}
    assert merged.left_out == (Path("pytorch_model.bin"),)
    for file in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(file, "np") as now, safe_open(base / file.name, "np") as before:
            noted = {**before.metadata(), "lora_jax.merged": now.metadata()["lora_jax.merged"]}
            assert (now.metadata(), list(now.keys())) == (noted, list(before.keys()))
    if shards > 1:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["metadata"] == {"x": 1, "total_size": merged.nbytes}
        assert index["weight_map"] == json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    assert told[-1] == (merged.nbytes, merged.nbytes)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_bases_are_rounded_once(dtype: str, tmp_path: Path) -> None:
    before = state(("q.weight", (64, 48)), dtype=jnp.dtype(dtype))
    write_base(tmp_path / "base", before)
    module = factors(64, 48)
    write_adapter(tmp_path / "lora", {"q": module})
    merge_checkpoint(tmp_path / "base", tmp_path / "lora", tmp_path / "out")
    exact = before["q.weight"].astype(np.float32) + (module.b * np.float32(2)) @ module.a
    assert_same(read_all(tmp_path / "out")["q.weight"], exact.astype(jnp.dtype(dtype)))


def test_stochastic_rounding_keeps_small_updates_on_average(tmp_path: Path) -> None:
    before = np.ones((256, 64), jnp.bfloat16)
    write_base(tmp_path / "base", {"q.weight": before})
    # A tenth of a bfloat16 step at 1: rounding to nearest loses all of it.
    module = Module("linear", np.ones((1, 64), np.float32), np.full((256, 1), 2**-7 / 20, np.float32))
    write_adapter(tmp_path / "lora", {"q": module})
    results = {}
    for name, options in {"nearest": {}, "one": {"seed": 1}, "again": {"seed": 1}, "other": {"seed": 2}}.items():
        rounding: Any = "nearest" if name == "nearest" else "stochastic"
        merge_checkpoint(tmp_path / "base", tmp_path / "lora", tmp_path / name, rounding=rounding, **options)
        results[name] = read_all(tmp_path / name)["q.weight"].astype(np.float64) - 1
    assert not results["nearest"].any()
    assert abs(results["one"].mean() / (2**-7 / 10) - 1) < 0.1
    assert_same(results["one"], results["again"])
    assert (results["one"] != results["other"]).any()


def test_several_adapters_add_up_with_weights(small: tuple[Path, Path], tmp_path: Path) -> None:
    base, first = small
    second = write_adapter(tmp_path / "second", {"q": factors(6, 4, 3, seed=1), "k": factors(5, 4, 3, seed=2)})
    merge_checkpoint(base, [first, second], tmp_path / "out", weights=[0.5, -2])
    before, after = read_all(base), read_all(tmp_path / "out")
    one, two = lora.peft.read_peft(first), lora.peft.read_peft(second)
    q = before["q.weight"] + 0.5 * one.delta("q", (6, 4)) - 2 * two.delta("q", (6, 4))
    assert_close(after["q.weight"], q)
    assert_close(after["k.weight"], before["k.weight"] - 2 * two.delta("k", (5, 4)))


@pytest.mark.parametrize(("inside", "outside"), [("q", "model.q"), ("model.q", "q")])
def test_the_outermost_module_may_be_missing_on_either_side(inside: str, outside: str, tmp_path: Path) -> None:
    write_base(tmp_path / "base", state((f"{inside}.weight", (6, 4)), (f"{inside}.bias", (6,))))
    write_adapter(tmp_path / "lora", {outside: factors(6, 4)})
    assert merge_checkpoint(tmp_path / "base", tmp_path / "lora", tmp_path / "out").changed == (f"{inside}.weight",)


def test_a_new_head_is_added(small: tuple[Path, Path], tmp_path: Path) -> None:
    saved = state(("score.weight", (2, 4)))
    adapter = write_adapter(tmp_path / "classifier", {"q": factors(6, 4)}, saved, modules_to_save=["score"])
    merged = merge_checkpoint(small[0], adapter, tmp_path / "out")
    assert merged.added == ("score.weight",)
    assert_same(read_all(tmp_path / "out")["score.weight"], saved["score.weight"])


def test_whole_modules_bring_their_counters(small: tuple[Path, Path], tmp_path: Path) -> None:
    """Batch normalisation counts its steps in an integer."""
    before = read_all(small[0]) | {"bn.num_batches_tracked": np.int64(3), "bn.running_mean": np.zeros(4, np.float32)}
    base = write_base(tmp_path / "with_bn", before)
    saved = {"bn.num_batches_tracked": np.array(41), "bn.running_mean": np.ones(4, np.float32)}
    adapter = write_adapter(tmp_path / "bn", {"q": factors(6, 4)}, saved, modules_to_save=["bn"])
    merge_checkpoint(base, adapter, tmp_path / "out")
    after = read_all(tmp_path / "out")
    assert_same({name: after[name] for name in saved}, saved)
    new = merge_checkpoint(small[0], adapter, tmp_path / "new")
    assert set(new.added) == set(saved)
    assert_same({name: read_all(tmp_path / "new")[name] for name in saved}, saved)


@pytest.mark.parametrize(("model", "flag"), [("gpt2", False), ("test", True)])
def test_square_conv1d_weights_lie_transposed(model: str, flag: bool, tmp_path: Path) -> None:
    """PEFT keeps one fan_in_fan_out for all layers, and the last one decides: with a head it says False."""
    before = state(("h.c_proj.weight", (4, 4)), ("h.c_fc.weight", (4, 8)), ("lm_head.weight", (4, 4)))
    base = write_base(tmp_path / "base", before, config={"model_type": model, "tie_word_embeddings": False})
    modules = {"h.c_proj": factors(4, 4, seed=1), "h.c_fc": factors(8, 4, seed=2)}
    modules |= {"lm_head": factors(4, 4, seed=3)} if model == "gpt2" else {}
    adapter = write_adapter(tmp_path / "lora", modules, fan_in_fan_out=flag)
    merge_checkpoint(base, adapter, tmp_path / "out")
    after = read_all(tmp_path / "out")
    for name, module in modules.items():
        delta = 2 * module.b @ module.a
        added = delta if name == "lm_head" else delta.T
        assert_close(after[f"{name}.weight"], before[f"{name}.weight"] + added)


def test_a_square_weight_whose_layout_cannot_be_told_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", state(("a.weight", (4, 4)), ("b.weight", (4, 8))))
    adapter = write_adapter(tmp_path / "lora", {"a": factors(4, 4), "b": factors(8, 4)}, fan_in_fan_out=False)
    with pytest.raises(lora.CheckpointError, match=r"a\.weight is square, and its layout cannot be told"):
        merge_checkpoint(base, adapter, tmp_path / "out")


@pytest.mark.parametrize(("model", "transposed"), [("gpt_oss", True), ("llama4", False)])
def test_square_experts_lie_as_peft_takes_them(model: str, transposed: bool, tmp_path: Path) -> None:
    before = state(("experts.down_proj", (3, 4, 4)))
    base = write_base(tmp_path / "base", before, config={"model_type": model})
    draw = np.random.default_rng(0)
    module = Module("parameter", *(draw.normal(size=size).astype(np.float32) for size in ((6, 4), (4, 6))))
    config = {"target_modules": [], "target_parameters": ["experts.down_proj"], "r": 2, "lora_alpha": 2}
    adapter = write_adapter(tmp_path / "lora", {"experts": module}, **config)
    merge_checkpoint(base, adapter, tmp_path / "out")
    delta = lora.peft.read_peft(adapter).delta(
        "experts", (3, 4, 4), parameter="experts.down_proj", transposed=transposed
    )
    assert_close(read_all(tmp_path / "out")["experts.down_proj"], before["experts.down_proj"] + delta)


def test_a_matrix_adapted_as_a_parameter_goes_by_its_own_name_in_patterns(tmp_path: Path) -> None:
    before = state(("router.weight", (4, 4)))
    base = write_base(tmp_path / "base", before, config={"model_type": "gpt_oss"})
    module = factors(4, 4, kind="parameter")
    config = {"target_modules": [], "target_parameters": ["router.weight"], "alpha_pattern": {"router.weight": 3}}
    adapter = write_adapter(tmp_path / "lora", {"router": module}, **config)
    merge_checkpoint(base, adapter, tmp_path / "out")
    expected = before["router.weight"] + 1.5 * module.b @ module.a
    assert_close(read_all(tmp_path / "out")["router.weight"], expected)


def test_an_adapter_beside_the_base_is_not_copied(small: tuple[Path, Path], tmp_path: Path) -> None:
    (small[0] / "adapter_config.json").write_text("{}")
    (small[0] / "onnx").mkdir()
    (small[0] / "onnx" / "config.json").write_text("{}")
    merged = merge_checkpoint(*small, tmp_path / "out")
    assert Path("adapter_config.json") in merged.left_out
    assert (tmp_path / "out" / "onnx" / "config.json").exists()


def test_files_do_not_depend_on_how_many_threads_write_them(
    small: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for threads in (1, 3):
        told: list[int] = []
        monkeypatch.setattr(merge_module, "_THREADS", threads)
        found = merge_checkpoint(*small, tmp_path / str(threads), progress=lambda done, total: told.append(done))  # noqa: B023
        assert told == sorted(told) and told[-1] == found.nbytes
    one, three = (next((tmp_path / str(threads)).glob("*.safetensors")).read_bytes() for threads in (1, 3))
    assert one == three


def test_one_tensor_that_fails_stops_the_others(tmp_path: Path) -> None:
    served = threading.Event()

    def endless() -> Iterator[bytes]:
        while True:
            served.set()
            yield b"."

    def broken() -> Iterator[bytes]:
        served.wait()
        raise lora.MergeError("broken")
        yield b""

    items = [Item(name, "U8", (1,), 1, pieces()) for name, pieces in (("a", endless), ("b", broken))]
    with pytest.raises(lora.MergeError, match="broken"):
        write_file(tmp_path / "file", {}, items, lambda count: None, threads=2)


@pytest.mark.parametrize("columns", [1, 3, 700])
@pytest.mark.parametrize("rank", [1, 5, 300])
@pytest.mark.parametrize("rows", [1, 3, 4, 41])
def test_products_of_one_thread(rows: int, rank: int, columns: int) -> None:
    draw = np.random.default_rng(rows)
    left, right = (draw.normal(size=shape).astype(np.float32) for shape in ((rows, rank), (rank, columns)))
    assert_close(changes._product(left, right), left @ right)
