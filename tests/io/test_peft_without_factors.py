"""TRAINABLE_TOKENS and LN_TUNING: rows and whole tensors are read, shown, merged on disk and converted, or refused."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import GOLDEN, assert_close, assert_same
from peft_models import from_torch, net
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from lora_jax.cli import main
from lora_jax.errors import CheckpointError
from lora_jax.io.inspect import inspect
from lora_jax.io.peft import PeftFiles, read_peft, write_peft
from lora_jax.methods import Rows

ROWS = ".token_adapter.trainable_tokens_delta"
NAMES = ("trainable_tokens", "ln_tuning")


def expected(name: str, prefix: str) -> dict[str, np.ndarray]:
    found = load_file(GOLDEN / name / "expected.safetensors")
    return {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}


def adapter(folder: Path, config: dict[str, Any], **arrays: np.ndarray) -> Path:
    folder.mkdir()
    save_file({f"base_model.model.{key}": value for key, value in arrays.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(("name", "kind"), [("trainable_tokens", Rows), ("ln_tuning", lora.Replace)])
def test_updates_are_rows_and_whole_tensors(name: str, kind: type) -> None:
    base = from_torch(expected(name, "base."))
    sites = lora.find_sites(net, base, jnp.asarray(expected(name, "x")[""]))
    found = lora.peft.load(GOLDEN / name, base, sites)
    assert {type(update) for update in found.values()} == {kind}
    assert_close(lora.merge(base, found), from_torch(expected(name, "merged.")))


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_is_merged_as_pefts(name: str, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    save_file(expected(name, "base."), tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}", encoding="utf-8")
    assert main(["merge", str(tmp_path / "base"), str(GOLDEN / name), str(tmp_path / "out")]) == 0
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), expected(name, "merged."))


@pytest.mark.parametrize("name", NAMES)
def test_inspect_shows_what_there_is(name: str) -> None:
    entries = inspect(GOLDEN / name).entries
    assert {entry.kind for entry in entries} == {"whole"}
    assert sum(entry.nbytes for entry in entries) == sum(
        each.nbytes for each in load_file(GOLDEN / name / "adapter_model.safetensors").values()
    )


@pytest.mark.parametrize("name", NAMES)
def test_convert_there_and_back(name: str, tmp_path: Path) -> None:
    base = from_torch(expected(name, "base."))
    sites = lora.find_sites(net, base, jnp.asarray(expected(name, "x")[""]))
    found = lora.peft.load(GOLDEN / name, base, sites)
    lora.save(tmp_path / "like", found, params=base)
    assert main(["convert", str(GOLDEN / name), str(tmp_path / "own"), "--like", str(tmp_path / "like")]) == 0
    assert_same(lora.load(tmp_path / "own"), found)


@pytest.mark.parametrize("name", NAMES)
def test_written_as_peft_wrote_it(name: str, tmp_path: Path) -> None:
    write_peft(tmp_path / "again", read_peft(GOLDEN / name))
    given, again = GOLDEN / name, tmp_path / "again"
    assert_same(load_file(again / "adapter_model.safetensors"), load_file(given / "adapter_model.safetensors"))
    configs = [json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")) for folder in (given, again)]
    theirs, ours = ({field: value for field, value in config.items() if value is not None} for config in configs)
    assert ours.pop("target_modules") == (["embed"] if name == "trainable_tokens" else ["layers.0.up", "layers.1.up"])
    assert ours == {field: theirs[field] for field in theirs.keys() - {"target_modules", "init_weights"}}


@pytest.mark.parametrize(
    ("config", "saved"),
    [
        ({"trainable_token_indices": {"a": [1], "b": [2]}}, {f"a{ROWS}": (1, 4), f"b{ROWS}": (1, 4)}),
        ({"trainable_token_indices": {"a": [1]}, "modules_to_save": ["b"]}, {f"a{ROWS}": (1, 4), "b.weight": (4,)}),
        ({"bias": "all"}, {"a.bias": (4,)}),
        ({"modules_to_save": ["a", "b"], "ensure_weight_tying": True}, {"a.weight": (9, 4), "b.weight": (9, 4)}),
        ({"modules_to_save": ["a"]}, {"a.weight": (4,), "lm_head.weight": (9, 4)}),
        ({"modules_to_save": ["a", "b"]}, {"a.weight": (4,)}),
        ({"modules_to_save": ["a"]}, {"a.temperature": ()}),
        ({"modules_to_save": ["a"], "fan_in_fan_out": True}, {"a.weight": (4, 4)}),
    ],
    ids=["rows of each table", "rows and a module", "biases", "ties", "a table of the base", "lack", "names", "layout"],
)
def test_what_neither_type_says_stays_lora(config: Any, saved: Any, tmp_path: Path) -> None:
    """And is told to be nothing that PEFT loads."""
    write_peft(tmp_path / "a", PeftFiles(config, {}, {name: ones(*shape) for name, shape in saved.items()}))
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"] == "LORA"
    found = lora.peft.portability(tmp_path / "a").rows[-1]
    assert (found.verdict, found.reasons[0][:33]) == ("refuses", "its LoRA needs a module with fact")


def test_norms_and_saved_modules(tmp_path: Path) -> None:
    config = {"peft_type": "LN_TUNING", "target_modules": ["norm"], "modules_to_save": ["head"]}
    keys = {"layers.0.norm.ln_tuning_layers.weight": ones(4), "layers.0.norm.ln_tuning_layers.bias": ones(4)}
    found = read_peft(adapter(tmp_path / "a", config, **keys, **{"head.weight": ones(3, 4)}))
    assert found.config["modules_to_save"] == ["head", "layers.0.norm"]
    assert list(found.saved) == ["head.weight", "layers.0.norm.bias", "layers.0.norm.weight"]
    write_peft(tmp_path / "again", found)
    again = json.loads((tmp_path / "again" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (again["target_modules"], again["modules_to_save"]) == (["layers.0.norm"], ["head"])
    assert_same(read_peft(tmp_path / "again").saved, found.saved)


TOKENS = {"peft_type": "TRAINABLE_TOKENS", "target_modules": ["embed"], "token_indices": [1, 9]}
NORMS = {"peft_type": "LN_TUNING", "target_modules": ["norm"]}
DELTA, NORM = "embed.trainable_tokens_delta", "norm.ln_tuning_layers.weight"


@pytest.mark.parametrize(
    ("config", "arrays", "reason"),
    [
        (TOKENS, {DELTA: ones(3, 4)}, "must name one row number for each"),
        ({**TOKENS, "token_indices": None}, {DELTA: ones(2, 4)}, "trainable_token_indices"),
        (TOKENS, {"other.trainable_tokens_delta": ones(2, 4)}, "does not hold embed"),
        (TOKENS, {DELTA: ones(2, 4), "q.lora_A.weight": ones(2, 4)}, "no key of an adapter of peft_type='TRAINABLE"),
        (NORMS, {DELTA: ones(2, 4)}, "does not hold norm"),
        (NORMS, {NORM: ones(4), "up.weight": ones(4, 4)}, "up.weight"),
        ({**NORMS, "target_modules": ["norm", "last"]}, {NORM: ones(4)}, "does not hold last"),
        ({**NORMS, "target_modules": "nor."}, {"head.weight": ones(4)}, "does not hold any trained tensor"),
    ],
)
def test_what_does_not_go_together_is_refused(config: Any, arrays: Any, reason: str, tmp_path: Path) -> None:
    params = {"embed": {"embedding": ones(11, 4)}, "norm": {"scale": ones(4)}}
    sites = lora.find_sites(lambda p, x: p["embed"]["embedding"][x] * p["norm"]["scale"][None], params, jnp.arange(2))
    with pytest.raises(CheckpointError, match=reason):
        lora.peft.load(adapter(tmp_path / "a", config, **arrays), params, sites)
