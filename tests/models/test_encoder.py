"""Encoders: BERT's and RoBERTa's layers, classifiers and embeddings, padding, older spellings, and what is refused."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_same, random_adapter
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from lora_jax import models
from lora_jax.models.encoder_config import encoder_config, encoder_leaves

SIZES: dict[str, Any] = {
    "vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 40, "type_vocab_size": 2, "pad_token_id": 1,
}  # fmt: skip
ROWS = [("bert", ""), ("bert", "ForSequenceClassification"), ("roberta", ""), ("roberta", "ForSequenceClassification")]
TOKENS = jnp.asarray(np.random.default_rng(0).integers(2, 37, (2, 9)))


def directory(path: Path, family: str, task: str = "", **changes: Any) -> Path:
    values = {
        "model_type": family,
        "architectures": [f"X{task or 'Model'}"],
        "id2label": {"0": "a", "1": "b", "2": "c"},
    }
    values |= SIZES | changes
    draw = np.random.default_rng(0)
    leaves = encoder_leaves(
        encoder_config("config.json", values, ["pooler.dense.weight"] * (family == "bert")), unrolled=True
    )
    tensors = {
        leaf.template: draw.normal(size=leaf.shape).astype(np.float32) / leaf.shape[-1] ** 0.5 if len(leaf.shape) > 1
        else np.float32(leaf.template.endswith("Norm.weight")) + draw.normal(size=leaf.shape).astype(np.float32) / 8
        for leaf in leaves
    }  # fmt: skip
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(values))
    save_file(tensors, path / "model.safetensors")
    return path


@pytest.mark.parametrize(("family", "task"), ROWS)
def test_scanned_unrolled_and_rematerialised_layers_compute_the_same(family: str, task: str, tmp_path: Path):
    path = directory(tmp_path / "m", family, task)
    model = models.load(path)
    result = model.apply(model.params, TOKENS)
    assert (result.shape, result.dtype) == ((2, 3 if task else 16), jnp.float32)
    for other in (models.load(path, unrolled=True), models.load(path, remat=True)):
        assert_close(other.apply(other.params, TOKENS), result)


@pytest.mark.parametrize(("family", "task"), ROWS)
def test_padding_changes_nothing(family: str, task: str, tmp_path: Path):
    model = models.load(directory(tmp_path / "m", family, task))
    padded = jnp.concatenate([TOKENS, jnp.ones((2, 4), TOKENS.dtype)], 1)
    mask = jnp.broadcast_to(jnp.arange(13) < 9, padded.shape).astype(jnp.int32)
    result = model.apply(model.params, padded, mask=mask)
    assert_close(result, model.apply(model.params, TOKENS))
    assert np.abs(model.apply(model.params, padded) - result).max() > 1e-3


def test_types_and_the_head(tmp_path: Path):
    model = models.load(directory(tmp_path / "m", "bert"))
    types = jnp.broadcast_to(jnp.arange(9) > 4, TOKENS.shape).astype(jnp.int32)
    hidden = model.hidden(model.params, TOKENS, types=types)
    assert np.abs(hidden - model.hidden(model.params, TOKENS)).max() > 1e-3
    assert_close(model.apply(model.params, TOKENS, types=types), hidden.mean(1))
    mask = jnp.asarray([[1] * 3 + [0] * 6] * 2)
    assert_close(model.head(model.params, hidden, mask), hidden[:, :3].mean(1))


def test_older_spellings_and_heads_that_are_not_used(tmp_path: Path):
    new = directory(tmp_path / "new", "bert")
    tensors = load_file(new / "model.safetensors")
    old = {
        f"bert.{name}".replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): each
        for name, each in tensors.items()
    }
    old |= {"bert.embeddings.position_ids": np.arange(40)[None], "cls.predictions.bias": np.ones(37, np.float32)}
    directory(tmp_path / "old", "bert", "ForMaskedLM")
    save_file(old, tmp_path / "old" / "model.safetensors")
    with pytest.warns(UserWarning, match="cls is left out of what is computed here, and saved as it is"):
        found = models.load(tmp_path / "old")
    assert_same(found.params, models.load(new).params)


@pytest.mark.parametrize(("family", "task"), ROWS)
def test_what_is_saved_is_what_was_read(family: str, task: str, tmp_path: Path):
    path = directory(tmp_path / "m", family, task)
    models.save(tmp_path / "n", models.load(path))
    assert_same(load_file(tmp_path / "n" / "model.safetensors"), load_file(path / "model.safetensors"))


def test_adapters_have_the_names_of_pytorch(tmp_path: Path):
    model = models.load(directory(tmp_path / "m", "bert", "ForSequenceClassification"))
    sites = lora.find_sites(model.apply, model.params, TOKENS)
    adapter = random_adapter([site for site in sites.values() if "query" in site.path or "pooler" in site.path])
    lora.peft.save(tmp_path / "adapter", adapter, sites=sites)
    names = lora.peft.read_peft(tmp_path / "adapter").modules
    assert sorted(names) == [
        *(f"bert.encoder.layer.{layer}.attention.self.query" for layer in range(3)),
        "bert.pooler.dense",
    ]
    adapted = lora.adapt(model.apply)(model.params, adapter, TOKENS)
    assert_close(adapted, model.apply(lora.merge(model.params, adapter), TOKENS), factor=10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key' is not supported"),
        ({"is_decoder": True}, "is_decoder=True is not supported"),
        ({"hidden_act": "mish"}, "hidden_act='mish' is not known here; there are silu"),
        ({"embedding_size": 8}, "embedding_size=8 may change"),
        ({"num_attention_heads": 3}, "must be a multiple of num_attention_heads=3"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quantised with quant_method='hqq'"),
        ({"num_hidden_layers": 2}, r"does not describe: encoder\.layer\.2\."),
        (
            {"id2label": {}, "architectures": ["BertForTokenClassification"], "num_hidden_layers": 4},
            r"lacks 16 tensors .* encoder\.layer\.3",
        ),
    ],
)
def test_what_is_not_understood_is_refused(changes: dict[str, Any], message: str, tmp_path: Path):
    path = directory(tmp_path / "m", "bert")
    values = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(values))
    with pytest.raises(lora.CheckpointError, match=message):
        models.load(path)


def test_texts_that_are_not_embedded_by_their_mean_are_refused(tmp_path: Path):
    path = directory(tmp_path / "m", "bert")
    (path / "1_Pooling").mkdir()
    pooling = path / "1_Pooling" / "config.json"
    pooling.write_text(
        json.dumps({"word_embedding_dimension": 16, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    )
    with pytest.raises(lora.CheckpointError, match="by pooling_mode_cls_token; only their mean is read"):
        models.load(path)
    pooling.write_text(
        json.dumps({"word_embedding_dimension": 16, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True})
    )
    assert models.load(path).config.labels == 0
    pooling.write_text("[")
    with pytest.raises(lora.CheckpointError, match=r"1_Pooling/config\.json is not readable as JSON"):
        models.load(path)


@pytest.mark.parametrize(("family", "room"), [("bert", 40), ("roberta", 38)])
def test_texts_are_no_longer_than_the_positions(family: str, room: int, tmp_path: Path):
    model = models.load(directory(tmp_path / "m", family))
    assert jax.eval_shape(model.apply, model.params, jnp.zeros((1, room), int)).shape == (1, 16)
    with pytest.raises(lora.ParameterError, match=f"more than the {room} that"):
        model.apply(model.params, jnp.zeros((1, room + 1), int))
    with pytest.raises(lora.ParameterError, match="batch, time"):
        model.apply(model.params, jnp.zeros((1, 3)))
