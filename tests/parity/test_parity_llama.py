"""A Llama of transformers under PEFT, and this project's transformer with the same weights and the same adapter."""

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("transformers")

import numpy as np
from helpers import assert_close, random_adapter
from llama import TOKENS, Twin, llama
from safetensors.numpy import load_file
from torch_side import adapted, opened, run

import lora_jax as lora

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
X = torch.from_numpy(TOKENS)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_the_bases_agree(scan: bool) -> None:
    assert_close(Twin(scan).run(lora.Adapter({})), run(llama(), X))


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {r"layers\.1.*": 5},
            "alpha_pattern": {"q_proj": 3},
        },
        {"target_modules": [*PROJECTIONS, "embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ],
    ids=["all linear", "patterns", "tied factors", "tied table"],
)
def test_written_by_peft(options: dict[str, Any], scan: bool, tmp_path: Path) -> None:
    twin, model = Twin(scan), adapted(llama(), r=2, lora_alpha=3, **options)
    model.save_pretrained(tmp_path)
    adapter = lora.peft.load(tmp_path, twin.variables, twin.sites, "lora_jax")
    expected = run(model, X)
    assert_close(twin.run(adapter), expected)
    assert np.abs(expected - run(llama(), X)).max() > 0.1


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("tied", ["no table", "tied factors", "tied table"])
def test_read_by_peft(tied: str, scan: bool, tmp_path: Path) -> None:
    twin = Twin(scan)
    adapter = random_adapter(twin.sites)
    table = "params/embed/embedding"
    if tied != "tied factors":
        adapter = adapter.without(table)
    if tied == "tied table":
        value = twin.variables["params"]["embed"]["embedding"] * 1.5 + 0.1
        adapter = lora.Adapter({**adapter, table: lora.Replace(value, twin.sites[table])})
    lora.peft.save(tmp_path / "a", adapter, "lora_jax", sites=twin.sites, task_type="CAUSAL_LM")
    assert_close(run(opened(llama(), tmp_path / "a"), X), twin.run(adapter))
    written = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert sum(array.size for array in written.values()) < 20_000


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
)
def test_one_use_of_a_tied_table_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    twin, model = Twin(), adapted(llama(), r=2, **options)
    model.save_pretrained(tmp_path)
    with pytest.raises(lora.CheckpointError, match="ensure_weight_tying=True"):
        lora.peft.load(tmp_path, twin.variables, twin.sites, "lora_jax")


@pytest.mark.parametrize("policy", [True, False])
def test_tables_of_the_base_in_pefts_files(policy: bool, tmp_path: Path) -> None:
    twin, model = Twin(), adapted(llama(), r=2, target_modules=["q_proj"])
    model.save_pretrained(tmp_path, save_embedding_layers=policy)
    assert ("base_model.model.model.embed_tokens.weight" in load_file(tmp_path / "adapter_model.safetensors")) is policy
    adapter = lora.peft.load(tmp_path, twin.variables, twin.sites, "lora_jax")
    assert all(isinstance(update, lora.LowRank) for update in adapter.values())
    assert_close(twin.run(adapter), run(model, X))
