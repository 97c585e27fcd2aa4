"""Tables merged on disk: tied to the head or not, as the base has them, resized in training."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_same
from merging import factors, read_all, state, write_adapter, write_base

import lora_jax as lora
from lora_jax.io.peft import Module, merge_checkpoint

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
