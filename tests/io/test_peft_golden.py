"""What real PEFT wrote is read, run, merged and written again as PEFT has it; no PyTorch needed."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import GOLDEN, assert_close, assert_same
from peft_models import CASES, SCANNED, Params, from_torch, net, scanned_net, stacked
from safetensors.numpy import load_file

import lora_jax as lora
from lora_jax.io.peft import Names

NAMES = sorted(folder.name for folder in GOLDEN.iterdir() if (folder / "expected.safetensors").exists())
SCANNABLE = (
    "linear", "embedding", "patterns", "rslora", "dora", "lora_bias", "tokens", "adalora", "adalora_pruned", "vera",
)  # fmt: skip
WITHOUT_FACTORS = ("trainable_tokens", "ln_tuning")


class Golden:
    """One case: the base, the input, and what PEFT made of it."""

    def __init__(self, name: str):
        self.folder, self.case = GOLDEN / name, CASES[name]
        expected = load_file(self.folder / "expected.safetensors")
        self.x, self.y = jnp.asarray(expected["x"]), expected["y"]
        self.base = self.params(expected, "base.")
        self.merged = self.params(expected, "merged.")
        self.sites = lora.find_sites(self.case.fn, self.base, self.x)

    def params(self, expected: dict[str, np.ndarray], prefix: str) -> Params:
        state = {key.removeprefix(prefix): value for key, value in expected.items() if key.startswith(prefix)}
        return from_torch(state, transposed=self.case.transposed)

    def load(self, folder: Path | None = None) -> lora.Adapter:
        return lora.peft.load(folder or self.folder, self.base, self.sites, self.case.names)


def test_every_golden_case_runs() -> None:
    assert sorted(CASES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_output_and_merged_weights_are_pefts(name: str) -> None:
    golden = Golden(name)
    adapter = golden.load()
    with jax.default_matmul_precision("highest"):
        y = lora.adapt(golden.case.fn)(golden.base, adapter, golden.x)
    assert_close(np.asarray(y), golden.y)
    assert_close(lora.merge(golden.base, adapter), golden.merged)
    assert np.abs(golden.y - np.asarray(golden.case.fn(golden.base, golden.x))).max() > 0.1


@pytest.mark.parametrize("name", WITHOUT_FACTORS)
def test_files_without_factors_are_written_as_lora_has_the_same(name: str, tmp_path: Path) -> None:
    golden = Golden(name)
    lora.peft.save(tmp_path / "again", golden.load(), golden.case.names, sites=golden.sites)
    assert lora.peft.read_peft(tmp_path / "again").config["peft_type"] == "LORA"
    assert_same(golden.load(tmp_path / "again"), golden.load())


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WITHOUT_FACTORS])
def test_written_again_as_peft_wrote_it(name: str, tmp_path: Path) -> None:
    golden = Golden(name)
    lora.peft.save(tmp_path / "again", golden.load(), golden.case.names, sites=golden.sites)
    theirs, ours = (load_file(folder / "adapter_model.safetensors") for folder in (golden.folder, tmp_path / "again"))
    assert_same(ours, theirs)
    before, after = lora.peft.read_peft(golden.folder), lora.peft.read_peft(tmp_path / "again")
    for module, found in before.modules.items():
        if found.kind != "parameter":
            assert np.float32(after.scale(module)) == np.float32(before.scale(module))
    assert_same(golden.load(tmp_path / "again"), golden.load())
    written = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    original = json.loads((golden.folder / "adapter_config.json").read_text())
    for field in ("bias", "modules_to_save", "fan_in_fan_out", "peft_type", "inference_mode"):
        assert written[field] == original[field]


@pytest.mark.parametrize("names", [SCANNED, None], ids=["map", "no map"])
@pytest.mark.parametrize("name", SCANNABLE)
def test_scanned_layers_take_the_same_files(name: str, names: Names | None, tmp_path: Path) -> None:
    golden = Golden(name)
    params = stacked(golden.base)
    sites = lora.find_sites(scanned_net, params, golden.x)
    adapter = lora.peft.load(golden.folder, params, sites, names)
    with jax.default_matmul_precision("highest"):
        assert_close(np.asarray(lora.adapt(scanned_net)(params, adapter, golden.x)), golden.y)
    assert_close(lora.merge(params, adapter), stacked(golden.merged))
    lora.peft.save(tmp_path / "again", adapter, names, sites=sites)
    theirs, ours = (load_file(folder / "adapter_model.safetensors") for folder in (golden.folder, tmp_path / "again"))
    assert_same(ours, theirs)


def test_layers_that_a_file_leaves_out_stay_as_they_are(tmp_path: Path) -> None:
    golden = Golden("linear")
    files = lora.peft.read_peft(golden.folder)
    modules = {name: module for name, module in files.modules.items() if name.startswith("layers.1")}
    config: dict[str, Any] = {**files.config, "layers_to_transform": [1]}
    lora.peft.write_peft(tmp_path / "one", lora.peft.PeftFiles(config, modules))
    params = stacked(golden.base)
    sites = lora.find_sites(scanned_net, params, golden.x)
    adapter = lora.peft.load(tmp_path / "one", params, sites, SCANNED)
    plain = lora.peft.load(tmp_path / "one", golden.base, golden.sites)
    assert_close(lora.merge(params, adapter), stacked(lora.merge(golden.base, plain)))
    lora.peft.save(tmp_path / "again", adapter, SCANNED, sites=sites)
    assert lora.peft.read_peft(tmp_path / "again").modules.keys() == modules.keys()
    assert net is golden.case.fn
