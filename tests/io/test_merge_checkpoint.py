"""Adapters merged into checkpoints on disk: the weights PEFT makes, and everything that is refused."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import GOLDEN, assert_close, assert_same
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from lora_jax.io.hf import changes
from lora_jax.io.hf import merge as merge_module
from lora_jax.io.peft import Module, PeftFiles, merge_checkpoint, write_peft

CASES = sorted(str(file.parent.relative_to(GOLDEN)) for file in GOLDEN.rglob("expected.safetensors"))


def write_base(path: Path, state: Mapping[str, Any], shards: int = 1, config: Mapping[str, Any] | None = None) -> Path:
    """A checkpoint directory with other files beside it."""
    path.mkdir()
    state = {name: np.array(value, order="C") for name, value in state.items()}
    (path / "config.json").write_text(json.dumps(config or {"model_type": "test"}))
    (path / "tokenizer.json").write_text("{}")
    (path / "pytorch_model.bin").write_bytes(b"the same weights")
    if shards == 1:
        save_file(state, path / "model.safetensors", {"format": "pt"})
        return path
    files = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(sorted(state))}
    for file in set(files.values()):
        save_file({name: state[name] for name in state if files[name] == file}, path / file, {"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"x": 1}, "weight_map": files}))
    return path


def read_all(path: Path) -> dict[str, np.ndarray]:
    return {name: value for file in path.glob("*.safetensors") for name, value in load_file(file).items()}


def write_adapter(path: Path, modules: Mapping[str, Module], saved: Mapping[str, Any] = {}, **config: Any) -> Path:
    rank = next((module.a.shape[0] for module in modules.values()), 2)
    given = {"r": rank, "lora_alpha": 2 * rank, "target_modules": sorted(modules), **config}
    write_peft(path, PeftFiles(given, modules, saved))
    return path


def factors(out: int, into: int, rank: int = 2, seed: int = 0, kind: Any = "linear") -> Module:
    draw = np.random.default_rng(seed)
    a, b = draw.normal(size=(rank, into)), draw.normal(size=(out, rank))
    return Module(kind, a.astype(np.float32), b.astype(np.float32))


def state(*shapes: tuple[str, tuple[int, ...]], dtype: Any = np.float32) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(7)
    return {name: draw.normal(size=shape).astype(dtype) for name, shape in shapes}


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, Path]:
    """A base of two layers and a norm, and an adapter on one of them."""
    base = write_base(tmp_path / "base", state(("q.weight", (6, 4)), ("k.weight", (5, 4)), ("norm.weight", (4,))))
    return base, write_adapter(tmp_path / "lora", {"q": factors(6, 4)})


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


TIED = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
TABLE, HEAD = factors(4, 9, kind="embedding"), factors(9, 4, seed=3)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("modules", [{"embed_tokens": TABLE}, {"lm_head": HEAD}, {"embed_tokens": TABLE, "lm_head": HEAD}])  # fmt: skip  # noqa: E501
def test_one_use_of_a_tied_table_needs_untying(stored: bool, modules: dict[str, Module], tmp_path: Path) -> None:
    before = state(("embed_tokens.weight", (9, 4)), ("norm.weight", (4,)))
    if stored:
        before["lm_head.weight"] = before["embed_tokens.weight"]
    base = write_base(tmp_path / "base", before, 2, TIED)
    adapter = write_adapter(tmp_path / "lora", modules)
    with pytest.raises(lora.CheckpointError, match="--untie"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    merge_checkpoint(base, adapter, tmp_path / "out", untie=True)
    after, files, table = read_all(tmp_path / "out"), lora.peft.read_peft(adapter), before["embed_tokens.weight"]
    for name in ("embed_tokens", "lm_head"):
        delta = files.delta(name, (9, 4)) if name in modules else 0
        assert_close(after[f"{name}.weight"], table + delta)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {**TIED, "tie_word_embeddings": False}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(after)


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_trained_rows_of_a_tied_table(name: str, tmp_path: Path) -> None:
    """PEFT gives the rows of the table to the head too; rows of the head alone need a table of their own."""
    before = state(("embed_tokens.weight", (9, 4)))
    base = write_base(tmp_path / "base", before, config=TIED)
    rows = state(("rows", (2, 4)))["rows"]
    saved = {f"{name}.token_adapter.trainable_tokens_delta": rows}
    adapter = write_adapter(tmp_path / "lora", {}, saved, trainable_token_indices={name: [7, 2]})
    expected = before["embed_tokens.weight"].copy()
    expected[[7, 2]] = rows
    if name == "embed_tokens":
        merge_checkpoint(base, adapter, tmp_path / "out")
        assert_same(read_all(tmp_path / "out"), {"embed_tokens.weight": expected})
        return
    with pytest.raises(lora.CheckpointError, match="--untie"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    merge_checkpoint(base, adapter, tmp_path / "out", untie=True)
    assert_same(read_all(tmp_path / "out"), before | {"lm_head.weight": expected})


def test_a_tied_table_whose_uses_agree_stays_one(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", state(("embed_tokens.weight", (9, 4))), config=TIED)
    adapter = write_adapter(
        tmp_path / "lora", {"embed_tokens": TABLE, "lm_head": Module("linear", TABLE.b.T, TABLE.a.T)}
    )
    merge_checkpoint(base, adapter, tmp_path / "out")
    after, before = read_all(tmp_path / "out"), read_all(base)
    assert list(after) == ["embed_tokens.weight"]
    delta = lora.peft.read_peft(adapter).delta("embed_tokens", (9, 4))
    assert_close(after["embed_tokens.weight"], before["embed_tokens.weight"] + delta)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == TIED


def corrupt(base: Path, adapter: Path) -> None:
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def as_shard(base: Path) -> None:
    (base / "model.safetensors").rename(base / "model-1.safetensors")


def lose_a_shard(base: Path, adapter: Path) -> None:
    as_shard(base)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"q.weight": "gone.safetensors"}}))


def escape(base: Path, adapter: Path) -> None:
    as_shard(base)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"q.weight": "../m.safetensors"}}))


def disagree(base: Path, adapter: Path) -> None:
    as_shard(base)
    names = dict.fromkeys(("q.weight", "k.weight"), "model-1.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def quantise(base: Path, adapter: Path) -> None:
    (base / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))


def integers(base: Path, adapter: Path) -> None:
    save_file({"q.weight": np.ones((6, 4), np.int8)}, base / "model.safetensors")


def pickle(base: Path, adapter: Path) -> None:
    (base / "model.safetensors").unlink()


def smaller(base: Path, adapter: Path) -> None:
    save_file({"q.weight": np.ones((6, 3), np.float32)}, base / "model.safetensors")


def another(base: Path, adapter: Path) -> None:
    save_file({"query.weight": np.ones((6, 4), np.float32)}, base / "model.safetensors")


def no_bias(base: Path, adapter: Path) -> None:
    module = factors(6, 4)
    os.remove(adapter / "adapter_model.safetensors")
    biased = Module("linear", module.a, module.b, b_bias=np.ones(6, np.float32))
    files = PeftFiles({"r": 2, "lora_bias": True, "target_modules": ["q"]}, {"q": biased})
    write_peft(adapter, files, overwrite=True)


def existing(base: Path, adapter: Path) -> None:
    (base.parent / "out").mkdir()


def infinite(base: Path, adapter: Path) -> None:
    save_file({"q.weight": np.full((6, 4), np.inf, np.float32)}, base / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (corrupt, "model.safetensors cannot be read"),
        (lose_a_shard, "gone.safetensors is named in"),
        (escape, "not in its own directory"),
        (disagree, "disagree about 1 tensors, such as 'norm.weight'"),
        (quantise, "is quantised .*'gptq'.*unquantised checkpoint"),
        (integers, "q.weight is I8"),
        (pickle, "pytorch_model.bin is a pickle"),
        (smaller, r"q.weight: factors of shapes \(2, 4\) and \(6, 2\) .* do not fit a weight of shape \(6, 3\)"),
        (another, "has no q.weight.*Nearest: query.weight"),
        (no_bias, "no q.bias to add it to"),
        (existing, "exists already"),
        (infinite, "NaN or infinite entries in 'q.weight'"),
    ],
)
def test_refusals_leave_nothing_behind(damage: Any, message: str, small: tuple[Path, Path]) -> None:
    base, adapter = small
    damage(base, adapter)
    before = sorted(base.parent.rglob("*"))
    with pytest.raises((lora.CheckpointError, lora.MergeError), match=message):
        merge_checkpoint(base, adapter, base.parent / "out")
    assert sorted(base.parent.rglob("*")) == before


@given(
    file=st.sampled_from(["model-1.safetensors", "model.safetensors.index.json", "config.json"]),
    edits=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.integers(0, 40),
)
def test_damaged_bases_never_crash_or_leave_anything(
    file: str, edits: list[tuple[int, int]], cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    base = write_base(folder / "base", state(("q.weight", (6, 4)), ("k.weight", (5, 4))))
    as_shard(base)
    names = dict.fromkeys(("q.weight", "k.weight"), "model-1.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    adapter = write_adapter(folder / "lora", {"q": factors(6, 4)})
    content = bytearray((base / file).read_bytes())
    for place, value in edits:
        content[place % len(content)] = value
    (base / file).write_bytes(content[: len(content) - cut])
    try:
        merge_checkpoint(base, adapter, folder / "out")
    except lora.LoraError:
        assert {path.name for path in folder.iterdir()} == {"base", "lora"}
    else:
        assert set(read_all(folder / "out")) == set(read_all(base))


def test_links_that_lead_out_of_a_base_are_not_copied(small: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = small
    (tmp_path / "secret").write_text("key")
    (base / "NOTICE").symlink_to(tmp_path / "secret")
    (base / "LICENSE").write_text("free")
    (base / "COPYING").symlink_to("LICENSE")
    (base / "device").symlink_to("/dev/zero")
    os.mkfifo(base / "pipe")
    said = r"(?s)left out of the copy: .*NOTICE. is a link that leads out, to .*pipe. is a named pipe"
    with pytest.warns(UserWarning, match=said):
        merge_checkpoint(base, adapter, tmp_path / "merged")
    made = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"LICENSE", "COPYING"} <= made and not {"NOTICE", "device", "pipe"} & made


def test_a_cache_of_the_hub_is_made_of_links(small: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = small
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (base / "tokenizer.json").write_text("{}")
    for number, file in enumerate(sorted(base.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    merge_checkpoint(snapshot, adapter, tmp_path / "merged")
    assert (tmp_path / "merged" / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("weights", [[1.0], [1.0, float("nan")], [1.0, 1.0, 1.0]])
def test_weights_must_be_one_number_each(small: tuple[Path, Path], weights: list[float], tmp_path: Path) -> None:
    with pytest.raises(lora.MergeError, match="one finite number for each adapter"):
        merge_checkpoint(small[0], [small[1]] * 2, tmp_path / "out", weights=weights)


@pytest.mark.parametrize("case", ["dora", "saved"])
def test_what_replaces_cannot_be_weighted_or_combined(case: str, tmp_path: Path) -> None:
    expected = load_file(GOLDEN / case / "expected.safetensors")
    base = write_base(
        tmp_path / "base", {k.removeprefix("base."): v for k, v in expected.items() if k.startswith("base.")}
    )
    with pytest.raises(lora.CheckpointError, match="weight must be 1"):
        merge_checkpoint(base, GOLDEN / case, tmp_path / "out", weights=[0.5])
    with pytest.raises(lora.CheckpointError, match="two adapters"):
        merge_checkpoint(base, [GOLDEN / case, GOLDEN / case], tmp_path / "out")


def test_an_interrupted_merge_leaves_nothing(small: tuple[Path, Path], tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_checkpoint(*small, tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_an_adapter_that_fits_two_places_is_refused(tmp_path: Path) -> None:
    names = [f"{tower}.layers.0.q.weight" for tower in ("text", "vision")]
    base = write_base(tmp_path / "base", state(*((name, (6, 4)) for name in names)))
    adapter = write_adapter(tmp_path / "lora", {"layers.0.q": factors(6, 4)})
    with pytest.raises(lora.CheckpointError, match=r"in several places: .*(text|vision)\.layers\.0\.q\.weight as well"):
        merge_checkpoint(base, adapter, tmp_path / "out")


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


SEQ = "ForConditionalGeneration"
UNTIEABLE = {
    "masked": ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "embeddings.word_embeddings", "embedding"),
    "other name": ({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}, "backbone.embeddings", "embedding"),
    "no name at all": ({"architectures": ["XForCausalLM"], "vocab_size": 9}, "lookup", "embedding"),
    "encoder-decoder": ({"architectures": [f"Bart{SEQ}"], "is_encoder_decoder": True}, "lm_head", "linear"),
    "whisper": (
        {"architectures": [f"Whisper{SEQ}"], "model_type": "whisper", "is_encoder_decoder": True}, "proj_out", "linear",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNTIEABLE)
def test_tied_tables_are_recognised_under_other_names(case: str, tmp_path: Path) -> None:
    config, module, kind = UNTIEABLE[case]
    table = module if kind == "embedding" else "model.decoder.embed_tokens"
    base = write_base(
        tmp_path / "base", state((f"{table}.weight", (9, 4))), config=config | {"tie_word_embeddings": True}
    )
    change = factors(4, 9, kind="embedding") if kind == "embedding" else factors(9, 4)
    adapter = write_adapter(tmp_path / "lora", {module: change})
    with pytest.raises(lora.CheckpointError, match="One table cannot hold both"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    if case != "other name":
        with pytest.raises(lora.CheckpointError, match="two tables cannot be written"):
            merge_checkpoint(base, adapter, tmp_path / "out", untie=True)


def test_a_classifier_has_no_head_to_be_tied_to(tmp_path: Path) -> None:
    config = {"architectures": ["LlamaForSequenceClassification"], "tie_word_embeddings": True}
    base = write_base(tmp_path / "base", state(("model.embed_tokens.weight", (9, 4))), config=config)
    adapter = write_adapter(tmp_path / "lora", {"model.embed_tokens": TABLE})
    assert merge_checkpoint(base, adapter, tmp_path / "out").changed == ("model.embed_tokens.weight",)


def test_a_shared_table_is_not_where_encoder_and_decoder_look(tmp_path: Path) -> None:
    config = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "is_encoder_decoder": True}
    base = write_base(tmp_path / "base", state(("shared.weight", (9, 4))), config=config)
    adapter = write_adapter(tmp_path / "lora", {"shared": TABLE})
    with pytest.raises(lora.CheckpointError, match="modules of their own"):
        merge_checkpoint(base, adapter, tmp_path / "out", untie=True)


def test_an_untied_head_keeps_the_rows_that_the_table_got(tmp_path: Path) -> None:
    before = state(("embed_tokens.weight", (9, 4)))
    base = write_base(tmp_path / "base", before, config=TIED)
    rows = {"embed_tokens.token_adapter.trainable_tokens_delta": state(("rows", (1, 4)))["rows"]}
    adapter = write_adapter(tmp_path / "lora", {"lm_head": HEAD}, rows, trainable_token_indices={"embed_tokens": [5]})
    merge_checkpoint(base, adapter, tmp_path / "out", untie=True)
    table = before["embed_tokens.weight"].copy()
    table[5] = next(iter(rows.values()))
    delta = lora.peft.read_peft(adapter).delta("lm_head", (9, 4))
    assert_close(read_all(tmp_path / "out"), {"embed_tokens.weight": table, "lm_head.weight": table + delta})


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


def test_an_adapter_without_its_config_has_no_scale(small: tuple[Path, Path], tmp_path: Path) -> None:
    (small[1] / "adapter_config.json").unlink()
    with pytest.raises(lora.CheckpointError, match="nothing tells what the updates of q are multiplied by"):
        merge_checkpoint(*small, tmp_path / "out")
    merge_checkpoint(*small, tmp_path / "out", alpha=3)
    q, files = read_all(small[0])["q.weight"], lora.peft.read_peft(small[1], alpha=3)
    assert_close(read_all(tmp_path / "out")["q.weight"], q + files.delta("q", (6, 4)))


def test_two_models_in_one_directory_are_refused(small: tuple[Path, Path], tmp_path: Path) -> None:
    (small[0] / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(lora.CheckpointError, match="has both"):
        merge_checkpoint(*small, tmp_path / "out")


def test_an_adapter_beside_the_base_is_not_copied(small: tuple[Path, Path], tmp_path: Path) -> None:
    (small[0] / "adapter_config.json").write_text("{}")
    (small[0] / "onnx").mkdir()
    (small[0] / "onnx" / "config.json").write_text("{}")
    merged = merge_checkpoint(*small, tmp_path / "out")
    assert Path("adapter_config.json") in merged.left_out
    assert (tmp_path / "out" / "onnx" / "config.json").exists()


def test_out_inside_the_base_is_refused_through_links(small: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(small[0])
    with pytest.raises(lora.CheckpointError, match="is inside the base"):
        merge_checkpoint(*small, tmp_path / "link" / "out")


# Tables that the file has as they are, and vocabularies that training resized.

TABLES = ("model.embed_tokens.weight", (9, 4)), ("lm_head.weight", (9, 4)), ("q.weight", (4, 4))
UNTIED = {"vocab_size": 9, "tie_word_embeddings": False}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("adapted", [True, False])
def test_a_table_that_is_the_bases_changes_nothing(adapted: bool, dtype: str, tmp_path: Path) -> None:
    base = state(*TABLES, dtype=np.dtype(jnp.bfloat16) if dtype == "bfloat16" else np.float32)
    modules = {"model.embed_tokens": factors(4, 9, kind="embedding")} if adapted else {"q": factors(4, 4)}
    tables = {"model.embed_tokens.weight": base["model.embed_tokens.weight"].astype(np.float32)}
    write_base(tmp_path / "base", base, config=UNTIED)
    plain = write_adapter(tmp_path / "plain", modules)
    with_table = write_adapter(tmp_path / "table", modules, tables)
    for name, adapter in (("a", plain), ("b", with_table)):
        merge_checkpoint(tmp_path / "base", [adapter, adapter], tmp_path / name, weights=[0.5, 2])
    assert_same(read_all(tmp_path / "b"), read_all(tmp_path / "a"))


def test_a_table_of_another_base_takes_no_weight(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", state(*TABLES), config=UNTIED)
    tables = {"model.embed_tokens.weight": np.ones((9, 4), np.float32)}
    adapter = write_adapter(tmp_path / "lora", {"q": factors(4, 4)}, tables)
    merge_checkpoint(base, adapter, tmp_path / "a")
    assert_same(read_all(tmp_path / "a")["model.embed_tokens.weight"], tables["model.embed_tokens.weight"])
    with pytest.raises(lora.CheckpointError, match="differs from the base's"):
        merge_checkpoint(base, adapter, tmp_path / "b", weights=[2])


@pytest.mark.parametrize("rows", [11, 8])
@pytest.mark.parametrize("kind", ["saved", "beside factors", "tied", "nested config"])
def test_a_vocabulary_that_training_resized(kind: str, rows: int, tmp_path: Path) -> None:
    config: dict[str, Any] = UNTIED | ({"tie_word_embeddings": True} if kind == "tied" else {})
    config = {"text_config": config} if kind == "nested config" else config
    before = state(*TABLES)
    if kind == "tied":
        del before["lm_head.weight"]
        config["architectures"] = ["XForCausalLM"]
    base = write_base(tmp_path / "base", before, 2, config)
    tables = state(*((name, (rows, 4)) for name, _ in TABLES[:2]))
    if kind == "tied":
        tables["lm_head.weight"] = tables["model.embed_tokens.weight"]
    modules = {"q": factors(4, 4)}
    if kind == "beside factors":
        modules |= {"model.embed_tokens": factors(4, rows, kind="embedding"), "lm_head": factors(rows, 4)}
    saved = {} if kind == "beside factors" else {"modules_to_save": ["embed_tokens", "lm_head"]}
    adapter = write_adapter(tmp_path / "lora", modules, tables, **saved)
    merged = merge_checkpoint(base, adapter, tmp_path / "out")
    written, files = read_all(tmp_path / "out"), lora.peft.read_peft(adapter)
    for name in before.keys() - {"q.weight"}:
        module = name.removesuffix(".weight")
        delta = files.delta(module, (rows, 4)) if kind == "beside factors" else np.float32(0)
        assert_close(written[name], tables[name] + delta)
    assert merged.nbytes == sum(value.nbytes for value in written.values())
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found == json.loads(json.dumps(config).replace('"vocab_size": 9', f'"vocab_size": {rows}'))


def test_a_vocabulary_has_one_size(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", state(*TABLES, ("lm_head.bias", (9,))), config=UNTIED)
    tables = state(("model.embed_tokens.weight", (11, 4)), ("lm_head.weight", (12, 4)))
    cases = {
        "while lm_head.bias and lm_head.weight would keep 9": {
            "model.embed_tokens.weight": tables["model.embed_tokens.weight"]
        },
        "lm_head.weight: 12 rows, model.embed_tokens.weight: 11 rows": tables,
        "while lm_head.bias would keep 9": dict.fromkeys(tables, tables["lm_head.weight"]),
    }
    for place, (message, saved) in enumerate(cases.items()):
        adapter = write_adapter(
            tmp_path / f"{place}", {"q": factors(4, 4)}, saved, modules_to_save=["embed_tokens", "head"]
        )
        with pytest.raises(lora.CheckpointError, match=message):
            merge_checkpoint(base, adapter, tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "cut", "said"),
    [
        ("model.safetensors", False, "cannot be read: No such file"),
        ("tokenizer.json", False, "cannot be read: No such file"),
        ("model.safetensors", True, "ends in the middle of"),
    ],
)  # fmt: skip
def test_a_base_that_changes_meanwhile_is_named(
    file: str, cut: bool, said: str, small: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = small

    def disturbed(*given: Any) -> Any:
        if cut:
            os.truncate(base / file, (base / file).stat().st_size - 200)
        else:
            os.remove(base / file)
        return items(*given)

    items = merge_module._items
    monkeypatch.setattr(merge_module, "_items", disturbed)
    with pytest.raises(lora.CheckpointError, match=rf"base/{file} {said}"):
        merge_checkpoint(base, adapter, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "lora"]
