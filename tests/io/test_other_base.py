"""Another base of the same shapes, and one that holds the adapter already: named wherever a file or a name tells."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same, random_adapter
from safetensors.numpy import load_file, save_file
from tiny_models import tiny_directory

import lora_jax as lora
from lora_jax import models
from lora_jax.adapter.samples import sampled
from lora_jax.cli import main
from lora_jax.errors import CheckpointError
from lora_jax.generate.adapters import load_adapter, model_sites
from lora_jax.io.hf.extract import extract_checkpoint
from lora_jax.io.own import stored
from lora_jax.io.own.orbax import load_samples
from lora_jax.io.peft.base import checkpoint_values
from lora_jax.models.load import Model

PARAMS = {"up": {"kernel": jax.random.normal(jax.random.key(0), (4, 6))}, "norm": jnp.ones(6)}
OTHER = PARAMS | {"norm": jnp.full(6, 2.0)}
SITES = lora.find_sites(lambda p, x: x @ p["up"]["kernel"] * p["norm"][None], PARAMS, jnp.ones((2, 4)))
ADAPTER = random_adapter(SITES)
COMMIT, NEXT = "1" * 40, "2" * 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return models.load(tiny_directory(tmp_path_factory.mktemp("tiny") / "base", "llama", num_hidden_layers=1))


@pytest.fixture
def adapter(model: Model) -> lora.Adapter:
    return random_adapter([site for site in model_sites(model).values() if "q_proj" in site.path])


def refused_elsewhere(load: Any) -> None:
    load(PARAMS)
    with pytest.raises(CheckpointError, match="another base of the same shapes"):
        load(OTHER)


def test_samples_go_through_both_formats(tmp_path: Path) -> None:
    own, peft, back = (str(tmp_path / name) for name in ("own", "peft", "back"))
    lora.save(own, ADAPTER, params=PARAMS)
    assert main(["convert", own, peft]) == 0
    refused_elsewhere(lambda params: lora.peft.load(peft, params, SITES))
    assert main(["convert", peft, back, "--like", own]) == 0
    refused_elsewhere(lambda params: lora.load(back, params))
    assert load_samples(back) == load_samples(own)


def test_samples_stay_where_the_other_adapter_has_none(tmp_path: Path) -> None:
    peft, back, like = (str(tmp_path / name) for name in ("peft", "back", "like"))
    lora.save(like, ADAPTER)
    lora.peft.save(peft, ADAPTER, sites=SITES, params=PARAMS)
    assert main(["convert", peft, back, "--like", like]) == 0
    lora.load(back, OTHER)  # Only the adapted parameter is known to be the base's, and that is the same.
    with pytest.raises(CheckpointError, match="another base of the same shapes"):
        lora.load(back, PARAMS | {"up": {"kernel": PARAMS["up"]["kernel"] + 1}})
    again = str(tmp_path / "again")
    assert main(["convert", back, again]) == 0
    assert lora.peft.read_peft(again).base == {
        key: value for key, value in lora.peft.read_peft(peft).base.items() if key.startswith("up/kernel ")
    }


def test_a_base_on_disk_gives_samples_to_what_has_none(model: Model, adapter: lora.Adapter, tmp_path: Path) -> None:
    theirs, own, peft = (str(tmp_path / name) for name in ("theirs", "own", "peft"))
    lora.peft.save(theirs, adapter, sites=model_sites(model))
    assert main(["convert", theirs, own, "--base", str(model.directory)]) == 0
    assert_same(lora.load(own, model.params), adapter)
    other = jax.tree.map(lambda leaf: leaf * 1.5, model.params)
    with pytest.raises(CheckpointError, match="another base of the same shapes"):
        lora.load(own, other)
    assert main(["convert", own, peft, "--base", str(model.directory)]) == 0
    with pytest.raises(CheckpointError, match="another base of the same shapes"):
        lora.peft.load(peft, other, model_sites(model))


def test_convert_refuses_another_base(
    model: Model, adapter: lora.Adapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = str(tmp_path / "own")
    lora.save(own, adapter, params=jax.tree.map(lambda leaf: leaf * 1.5, model.params))
    assert main(["convert", own, str(tmp_path / "peft"), "--base", str(model.directory)]) == 2
    assert "another base of the same shapes" in capsys.readouterr().err


@pytest.mark.parametrize("own", [True, False])
def test_adapters_of_two_bases_do_not_become_one(own: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(tmp_path / name) for name in ("one", "same", "other")]
    for path, params in zip(paths, (PARAMS, PARAMS, OTHER), strict=True):
        lora.save(path, ADAPTER, params=params) if own else lora.peft.save(path, ADAPTER, sites=SITES, params=params)
    assert main(["compose", *paths[:2], "--out", str(tmp_path / "both")]) == 0
    refused_elsewhere(
        lambda params: lora.load(tmp_path / "both", params) if own else lora.peft.load(tmp_path / "both", params, SITES)
    )
    assert main(["compose", *paths, "--out", str(tmp_path / "all")]) == 2
    assert "other belongs to another base than" in capsys.readouterr().err.replace("/adapter_model.safetensors", "")


def test_a_merge_adds_no_adapters_of_two_bases(tmp_path: Path) -> None:
    for name, params in (("one", PARAMS), ("other", OTHER)):
        lora.peft.save(tmp_path / name, ADAPTER, sites=SITES, params=params)
    base = checkpoint(tmp_path / "base")
    with pytest.raises(CheckpointError, match="belongs to another base than"):
        lora.peft.merge_checkpoint(base, [tmp_path / "one", tmp_path / "other"], tmp_path / "merged")


def test_a_merge_looks_at_the_values_of_the_base(
    model: Model, adapter: lora.Adapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, merged, twice = (tmp_path / name for name in ("ours", "merged", "twice"))
    lora.peft.save(ours, adapter, sites=model_sites(model), params=model.params)
    lora.peft.merge_checkpoint(model.directory, ours, merged)
    shutil.copytree(merged, tmp_path / "unnoted")
    file = tmp_path / "unnoted" / "model.safetensors"
    save_file(load_file(file), file)
    assert main(["merge", str(tmp_path / "unnoted"), str(ours), str(twice)]) == 2
    assert "samples of the values differ at 1 of 1 weights: model.layers.0.self_attn.q_proj" in capsys.readouterr().err
    assert main(["merge", str(tmp_path / "unnoted"), str(ours), str(twice), "--again"]) == 0


STACK = lora.Site(path="layers/w", shape=(3, 2, 5, 4), dtype="float32", kind="dense", in_axes=(2,), out_axes=(1, 3), batch_axes=(0,))  # fmt: skip  # noqa: E501


def test_samples_of_kernels_are_those_of_weights_on_disk(tmp_path: Path) -> None:
    value = np.random.default_rng(0).normal(size=STACK.shape).astype(np.float32)
    weights = {f"layers.{i}.weight": value[i].transpose(0, 2, 1).reshape(8, 5) for i in range(3)}
    adapter, sites = random_adapter([STACK]), lora.Sites([STACK], ("layers/w",))
    names = lora.peft.Names([("layers/w", "layers.{i}")])
    params = {"layers": {"w": jnp.asarray(value)}}
    lora.peft.save(tmp_path / "ours", adapter, names, sites=sites, params=params)
    found = checkpoint_values(lora.peft.read_peft(tmp_path / "ours").base)
    assert {name: value for name, (_, value) in found.items()} == sampled(weights)
    (tmp_path / "base").mkdir()
    save_file(weights, tmp_path / "base" / "model.safetensors")
    lora.peft.merge_checkpoint(tmp_path / "base", tmp_path / "ours", tmp_path / "out")
    weights["layers.2.weight"] = weights["layers.2.weight"] + 1
    save_file(weights, tmp_path / "base" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"differ at 1 of 3 weights: layers\.2\.weight"):
        lora.peft.merge_checkpoint(tmp_path / "base", tmp_path / "ours", tmp_path / "other")


def test_an_extracted_adapter_belongs_to_the_base_and_not_to_what_it_is_of(tmp_path: Path) -> None:
    base, tuned = checkpoint(tmp_path / "base"), checkpoint(tmp_path / "tuned")
    save_file({"up.weight": np.arange(24, dtype=np.float32).reshape(6, 4)}, tuned / "model.safetensors")
    extract_checkpoint(base, tuned, tmp_path / "ours", rank=2)
    lora.peft.merge_checkpoint(base, tmp_path / "ours", tmp_path / "merged")
    with pytest.raises(CheckpointError, match=r"another base than .*tuned.* 1 of 1 weights: up\.weight"):
        lora.peft.merge_checkpoint(tuned, tmp_path / "ours", tmp_path / "twice")


def test_what_a_model_says_is_merged_into_it(model: Model, adapter: lora.Adapter, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    lora.peft.save(theirs, adapter, sites=model_sites(model))
    assert_same(load_adapter(theirs, model), adapter)
    lora.peft.merge_checkpoint(model.directory, theirs, tmp_path / "merged")
    with pytest.raises(CheckpointError, match=r"theirs/.* is merged into .*/merged already"):
        load_adapter(theirs, models.load(tmp_path / "merged"))


def checkpoint(path: Path) -> Path:
    path.mkdir(parents=True)
    save_file({"up.weight": np.ones((6, 4), np.float32)}, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    return path


NAMED = {
    "the same": ({"base_model_name_or_path": "Org/Base"}, None),
    "and commit": ({"base_model_name_or_path": "org/base", "revision": COMMIT}, None),
    "no name": ({"base_model_name_or_path": None}, None),
    "a directory": ({"base_model_name_or_path": "/models/other"}, None),
    "a branch": ({"base_model_name_or_path": "org/base", "revision": "main"}, None),
    "no text": ({"base_model_name_or_path": 7}, None),
    "another": ({"base_model_name_or_path": "org/other"}, r"names org/other as its base, and this is org/base\."),
    "its past": ({"base_model_name_or_path": "org/base", "revision": NEXT}, f"{NEXT} as its base.* commit {COMMIT}"),
}


@pytest.mark.parametrize("case", NAMED)
def test_names_of_bases(case: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    base = checkpoint(tmp_path / "models--org--base" / "snapshots" / COMMIT)
    lora.peft.save(tmp_path / "theirs", ADAPTER, sites=SITES)
    file = tmp_path / "theirs" / "adapter_config.json"
    fields, said = NAMED[case]
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    if said is None:
        lora.peft.merge_checkpoint(base, tmp_path / "theirs", tmp_path / "merged")
    else:
        with pytest.warns(UserWarning, match=said):
            lora.peft.merge_checkpoint(base, tmp_path / "theirs", tmp_path / "merged")
        lora.peft.merge_checkpoint(checkpoint(tmp_path / "plain"), tmp_path / "theirs", tmp_path / "unnamed")
    assert not recwarn.list


class Bucket:
    """A directory as if it were remote storage: no search below it, no sizes but `length`."""

    def __init__(self, path: Path):
        self.path = path

    def __str__(self) -> str:
        return f"gs://bucket{self.path}"

    @property
    def parent(self) -> "Bucket":
        return Bucket(self.path.parent)

    def glob(self, pattern: str) -> Iterator["Bucket"]:
        assert "**" not in pattern
        return map(Bucket, self.path.glob(pattern))

    def iterdir(self) -> Iterator["Bucket"]:
        return map(Bucket, self.path.iterdir())

    def is_dir(self) -> bool:
        return self.path.is_dir()

    def stat(self) -> Any:
        return SimpleNamespace(length=self.path.stat().st_size)


def test_remote_checkpoints_are_looked_at_before_arrays_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora.save(tmp_path / "lora", ADAPTER)
    asked: list[str] = []
    monkeypatch.setattr(stored, "_address", lambda folder: asked.append(folder) or f"file://{folder[11:]}")
    update: Any = ADAPTER["up/kernel"]
    shapes = {"a": update.a, "b": update.b, "scale": update.scale}
    expected = {"up/kernel": jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), shapes)}
    stored.check_stored("gs://bucket/lora", Bucket(tmp_path / "lora"), expected)
    assert asked and all(each.startswith("gs://bucket/") for each in asked)
    expected["up/kernel"]["a"] = jax.ShapeDtypeStruct((9, 9), jnp.float32)
    with pytest.raises(CheckpointError, match=r"'up/kernel.a' .*the manifest says \(9, 9\)"):
        stored.check_stored("gs://bucket/lora", Bucket(tmp_path / "lora"), expected)
    monkeypatch.setattr(stored, "_ZEROS", -(1 << 30))
    expected["up/kernel"]["a"] = jax.ShapeDtypeStruct(update.a.shape, jnp.float32)
    with pytest.raises(CheckpointError, match="made to fill the memory"):
        stored.check_stored("gs://bucket/lora", Bucket(tmp_path / "lora"), expected)
