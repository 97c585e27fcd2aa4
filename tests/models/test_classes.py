"""Heads for classes: `score` of decoders and `classifier` of encoders, read, saved, and new on models without."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_same
from safetensors.numpy import load_file
from tiny_models import tiny_config, tiny_directory, tiny_tensors

from lora_jax import CheckpointError, ConfigError, generate, models
from lora_jax.models.classes import class_logits, class_names

NAMES = ("no", "perhaps", "yes")
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 9)))
SEGMENTS = jnp.asarray(np.arange(9)[None] < np.array([[9], [4]])).astype(jnp.int32)
CLASSES = {"architectures": ["LlamaForSequenceClassification"], "id2label": dict(enumerate(NAMES))}


def with_score(path: Path, family: str = "llama", **changes: Any) -> Path:
    """A tiny decoder with a head for classes in the place of the one for tokens."""
    return tiny_directory(path, family, tiny_tensors(tiny_config(family, **CLASSES, **changes)), **CLASSES, **changes)


@pytest.mark.parametrize("tied", [False, True])
def test_a_score_is_of_the_last_token_of_each_text(tied: bool, tmp_path: Path):
    model = models.load(with_score(tmp_path / "m", tie_word_embeddings=tied))
    assert (model.config.labels, class_names(model), model.continues) == (3, NAMES, False)
    hidden = model.hidden(model.params, TOKENS, segments=SEGMENTS)
    want = jnp.stack([hidden[0, 8], hidden[1, 3]]) @ model.params["score"]["weight"].T
    found = model.apply(model.params, TOKENS, segments=SEGMENTS)
    assert_close(found, want)
    assert_close(model.apply(model.params, TOKENS)[1], hidden_last(model)[1])
    assert_close(model.apply(model.params, TOKENS[1:, :4]), want[1:])


def hidden_last(model: models.Model) -> jax.Array:
    return model.hidden(model.params, TOKENS)[:, -1] @ model.params["score"]["weight"].T


def test_it_is_saved_as_it_was(tmp_path: Path):
    path = with_score(tmp_path / "m", "gpt2")
    models.save(tmp_path / "n", models.load(path))
    stored = load_file(tmp_path / "n" / "model.safetensors")
    assert_same(stored, load_file(path / "model.safetensors"))
    assert stored["score.weight"].shape == (3, 24)


@pytest.mark.parametrize("unrolled", [False, True])
def test_a_new_head_of_a_decoder_stands_for_the_other_one(unrolled: bool, tmp_path: Path):
    base = models.load(tiny_directory(tmp_path / "m", "llama", architectures=["LlamaForCausalLM"]), unrolled=unrolled)
    model = models.with_classes(base, NAMES, seed=1)
    assert sorted(model.params) == ["model", "score"] and sorted(base.params) == ["lm_head", "model"]
    assert class_logits(model, model.params, TOKENS, SEGMENTS).shape == (2, 3)
    models.save(tmp_path / "n", model)
    saved = json.loads((tmp_path / "n" / "config.json").read_text())
    assert saved["architectures"] == ["LlamaForSequenceClassification"]
    assert saved["id2label"] == {"0": "no", "1": "perhaps", "2": "yes"}
    again = models.load(tmp_path / "n", unrolled=unrolled)
    assert_same(again.params, model.params)
    assert models.with_classes(again, NAMES) is again


def encoder(path: Path, kind: str, **changes: Any) -> Path:
    """A tiny encoder with the tensors that its config describes."""
    from lora_jax.models.encoder_config import encoder_config, encoder_leaves

    values = {
        "model_type": kind, "vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 24, "max_position_embeddings": 64, **changes,
    }  # fmt: skip
    draw = np.random.default_rng(0)
    leaves = encoder_leaves(encoder_config("config.json", values, ()), unrolled=True)
    tensors = {leaf.template: draw.normal(size=leaf.shape).astype(np.float32) / 4 for leaf in leaves}
    return tiny_directory(path, "llama", tensors, **{name: None for name in tiny_config("llama")} | values)


@pytest.mark.parametrize(("kind", "new"), [("bert", {"pooler", "classifier"}), ("roberta", {"classifier"})])
def test_a_new_head_of_an_encoder(kind: str, new: set[str], tmp_path: Path):
    base = models.load(encoder(tmp_path / "m", kind, architectures=[f"{kind.title()}Model"]))
    model = models.with_classes(base, NAMES)
    assert {*model.params} | {*model.params[kind]} == {kind, "embeddings", "encoder"} | new
    assert_same(model.params[kind]["encoder"], base.params["encoder"])
    logits = class_logits(model, model.params, TOKENS, SEGMENTS)
    assert logits.shape == (2, 3)
    models.save(tmp_path / "n", model)
    again = models.load(tmp_path / "n")
    assert_same(again.params, model.params)
    assert_same(class_logits(again, again.params, TOKENS, SEGMENTS), logits)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_new_head_of_a_model_in_few_bits_is_of_floats(family: str, tmp_path: Path):
    sizes = {"n_embd": 64} if family == "gpt2" else {"hidden_size": 64, "intermediate_size": 128}
    base = models.load(tiny_directory(tmp_path / "m", family, **sizes), quantise="nf4")
    model = models.with_classes(base, NAMES)
    assert model.params["score"]["weight"].dtype == jnp.float32
    assert jnp.isfinite(class_logits(model, model.params, TOKENS, SEGMENTS)).all()


def test_a_new_head_lies_where_the_model_does(tmp_path: Path):
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), devices=jax.devices()[:4])
    path = tiny_directory(tmp_path / "m", "llama")
    spread = models.with_classes(models.load(path, mesh=mesh), NAMES)
    alone = models.with_classes(models.load(path), NAMES)
    assert spread.params["score"]["weight"].sharding.device_set == {*jax.devices()[:4]}
    assert_same(spread.params["score"], alone.params["score"])
    assert_close(*(class_logits(each, each.params, TOKENS, SEGMENTS) for each in (spread, alone)))


def test_what_is_wrong_is_named(tmp_path: Path):
    model = models.load(with_score(tmp_path / "m"))
    with pytest.raises(ConfigError, match=r"has a head for 3 classes, and the data have 2: .*num_labels=2"):
        models.with_classes(model, ("a", "b"))
    with pytest.raises(ConfigError, match="is a decoder for 3 classes, which continues no texts"):
        generate.Generator(model)
    with pytest.raises(CheckpointError, match=r"id2label=\['a'\] must have a name for each class"):
        models.load(tiny_directory(tmp_path / "n", "llama", **{**CLASSES, "id2label": ["a"]}))
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors .*: score\.weight"):
        models.load(tiny_directory(tmp_path / "o", "llama", tiny_tensors(tiny_config("llama")), **CLASSES))
    unnamed = {**CLASSES, "id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}}
    assert class_names(models.load(tiny_directory(tmp_path / "p", "llama", **unnamed))) == ()
