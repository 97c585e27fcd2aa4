"""What a merge on disk refuses or leaves out, with nothing left behind."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import GOLDEN, assert_close
from hypothesis import given
from hypothesis import strategies as st
from merging import factors, read_all, state, write_adapter, write_base
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from lora_jax.io.hf import merge as merge_module
from lora_jax.io.peft import Module, PeftFiles, merge_checkpoint, write_peft


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


def test_out_inside_the_base_is_refused_through_links(small: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(small[0])
    with pytest.raises(lora.CheckpointError, match="is inside the base"):
        merge_checkpoint(*small, tmp_path / "link" / "out")


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
