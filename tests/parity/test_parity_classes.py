"""Classes against transformers and PEFT: heads that are stored, new ones that are trained, and merged directories."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("peft")

import torch
from helpers import assert_close
from peft import PeftModel
from torch_models import saved
from transformers import AutoModel, AutoModelForSequenceClassification, BertConfig

import lora_jax as lora
from lora_jax import models
from lora_jax.models.classes import class_logits

NAMES = ("no", "perhaps", "yes")
LENGTHS = np.array([20, 13, 1])
SEGMENTS = (np.arange(20) < LENGTHS[:, None]).astype(np.int32)
TOKENS = np.where(SEGMENTS == 1, np.random.default_rng(0).integers(3, 97, SEGMENTS.shape), 2)
FAMILIES = [
    "llama",
    "gpt2",
    *(pytest.param(each, marks=pytest.mark.full) for each in ("gpt_neox", "gemma2", "mixtral")),
]


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


def theirs(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(TOKENS), attention_mask=torch.from_numpy(SEGMENTS)).logits.numpy()


def ours(model: models.Model, adapter: Any = None) -> np.ndarray:
    def run(params: Any, tokens: jax.Array, segments: jax.Array) -> jax.Array:
        return class_logits(model, params, tokens, segments)

    inputs = jnp.asarray(TOKENS), jnp.asarray(SEGMENTS)
    if adapter is None:
        return np.asarray(run(model.params, *inputs))
    return np.asarray(lora.adapt(run)(model.params, adapter, *inputs))


def base(path: Path, family: str) -> Path:
    """A random model without a head for classes."""
    if family != "bert":
        saved(path, family)
        return path
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    AutoModel.from_config(BertConfig(vocab_size=97, pad_token_id=2, initializer_range=0.3, **sizes)).save_pretrained(
        path
    )
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_stored_head(family: str, tmp_path: Path):
    base(tmp_path / "m", family)
    with_head = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m", num_labels=3).eval()
    with_head.save_pretrained(tmp_path / "n")
    assert_close(ours(models.load(tmp_path / "n")), theirs(with_head))


@pytest.mark.parametrize("family", [*FAMILIES, "bert"])
def test_a_new_head_that_is_trained_is_for_peft_and_for_transformers(family: str, tmp_path: Path):
    path = base(tmp_path / "m", family)
    model = models.with_classes(models.load(path), NAMES)
    sites = lora.find_sites(model.apply, model.params, jnp.asarray(TOKENS))
    head = "classifier" if family == "bert" else "score"
    config = lora.LoraConfig(rank=2, train=(head,))
    fresh = lora.init(jax.random.key(0), config, model.params, sites)
    trained, fixed = lora.partition(fresh)
    moved = jax.tree.map(lambda leaf: leaf + 0.05 * jax.random.normal(jax.random.key(1), leaf.shape), trained)
    adapter = lora.combine(moved, fixed)
    lora.peft.save(tmp_path / "adapter", adapter, sites=sites, params=model.params, task_type="SEQ_CLS")
    there = AutoModelForSequenceClassification.from_pretrained(path, num_labels=3)
    assert_close(ours(model, adapter), theirs(PeftModel.from_pretrained(there, tmp_path / "adapter").eval()))
    models.save(tmp_path / "merged", model, lora.merge(model.params, adapter))
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.id2label == dict(enumerate(NAMES))
    assert_close(theirs(merged), ours(model, adapter))
