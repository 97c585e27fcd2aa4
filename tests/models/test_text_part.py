"""Language models in directories of models that see images, and encoders with heads for masked tokens."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_same, random_adapter
from safetensors.numpy import load_file
from test_classes import encoder
from tiny_models import tiny_config, tiny_directory, tiny_tensors

import lora_jax as lora
from lora_jax import CheckpointError, models
from lora_jax.models.text_part import text_config

TOKENS = jnp.arange(8)[None]
VISION = {
    "vision_tower.vision_model.post_layernorm.bias": np.arange(3, dtype=np.float32),
    "multi_modal_projector.mm_soft_emb_norm.weight": np.arange(4, dtype=np.float16),
}
FORMS = {"old": ("language_model.model.", "language_model."), "new": ("model.language_model.", "")}


def sees(path: Path, form: str = "old", **changes: Any) -> Path:
    """A tiny model that sees images, with the tensors of `tiny_directory(..., "gemma3_text")`."""
    body, head = FORMS[form]
    tensors = {
        name.replace("model.", body, 1) if name.startswith("model.") else head + name: each
        for name, each in tiny_tensors(tiny_config("gemma3_text")).items()
    }
    inner = tiny_config("gemma3_text")
    values = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": inner}
    vision = VISION if form == "old" else {f"model.{name}": each for name, each in VISION.items()}
    path.mkdir()
    tiny_directory(path, "gemma3_text", tensors | vision)
    (path / "config.json").write_text(json.dumps({**values, "vision_config": {"hidden_size": 3}, **changes}))
    return path


@pytest.mark.parametrize("form", FORMS)
def test_the_language_model_is_run_and_the_rest_is_saved_as_it_is(form: str, tmp_path: Path):
    with pytest.warns(UserWarning, match=r"multi_modal_projector, vision_tower is left out of what is computed"):
        model = models.load(sees(tmp_path / "m", form))
    alone = models.load(tiny_directory(tmp_path / "n", "gemma3_text"))
    assert_same(model.apply(model.params, TOKENS), alone.apply(alone.params, TOKENS))
    models.save(tmp_path / "back", model)
    stored = load_file(tmp_path / "back" / "model.safetensors")
    if form == "new":
        assert_same(stored, load_file(tmp_path / "m" / "model.safetensors"))
    assert_same(stored["model.vision_tower.vision_model.post_layernorm.bias"], np.arange(3, dtype=np.float32))
    with pytest.warns(UserWarning, match="saved as it is"):
        assert_same(models.load(tmp_path / "back").params, model.params)


@pytest.mark.parametrize("form", FORMS)
def test_adapters_have_the_names_that_transformers_has_in_the_whole(form: str, tmp_path: Path):
    with pytest.warns(UserWarning, match="saved as it is"):
        model = models.load(sees(tmp_path / "m", form))
    sites = lora.find_sites(model.apply, model.params, TOKENS)
    path = "model/language_model/layers/self_attn/q_proj/weight"
    adapter = random_adapter([sites[path]])
    lora.peft.save(tmp_path / "adapter", adapter, sites=sites)
    modules = lora.peft.read_peft(tmp_path / "adapter").modules
    assert next(iter(modules)) == "model.language_model.layers.0.self_attn.q_proj"
    lora.peft.merge_checkpoint(tmp_path / "m", tmp_path / "adapter", tmp_path / "merged")
    with pytest.warns(UserWarning, match="saved as it is"):
        assert_close(models.load(tmp_path / "merged").params, lora.merge(model.params, adapter))
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("m", "merged"))
    assert old.keys() == new.keys()


def test_what_files_of_the_hub_leave_out_is_what_transformers_takes(tmp_path: Path):
    found = text_config(
        tmp_path, {"model_type": "gemma3", "text_config": {"hidden_size": 2560}, "architectures": ["A"]}
    )
    assert (found["vocab_size"], found["hidden_size"], found["num_attention_heads"]) == (262_208, 2560, 8)
    assert (found["model_type"], found["architectures"]) == ("gemma3_text", ["A"])


@pytest.mark.parametrize("inner", [None, 7, {"model_type": "llama"}])
def test_another_language_model_inside_is_refused(inner: Any, tmp_path: Path):
    with pytest.raises(
        CheckpointError, match=r"text_config=.* must describe a language model of model_type 'gemma3_tex"
    ):
        models.load(sees(tmp_path / "m", text_config=inner))


def test_a_head_for_masked_tokens_is_named_and_saved_as_it_is(tmp_path: Path):
    path = encoder(tmp_path / "m", "roberta", architectures=["RobertaForMaskedLM"])
    stored = {f"roberta.{name}": each for name, each in load_file(path / "model.safetensors").items()}
    stored |= {"lm_head.bias": np.ones(61, np.float32), "lm_head.dense.weight": np.ones((16, 16), np.float32)}
    tiny_directory(
        path,
        "llama",
        stored,
        **{name: None for name in tiny_config("llama")} | json.loads((path / "config.json").read_text()),
    )
    with pytest.warns(UserWarning, match=r"lm_head is left out of what is computed here"):
        model = models.load(path)
    assert model.apply(model.params, TOKENS).shape == (1, 16)
    models.save(tmp_path / "n", model)
    assert_same(load_file(tmp_path / "n" / "model.safetensors")["lm_head.bias"], np.ones(61, np.float32))
    models.save(tmp_path / "o", models.with_classes(model, ("a", "b")))
    assert not [name for name in load_file(tmp_path / "o" / "model.safetensors") if name.startswith("lm_head")]
