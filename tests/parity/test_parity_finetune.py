"""`lora-jax finetune` against PEFT: the same adapter file, batches and AdamW give the same losses; files load there."""

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("transformers")

import jax
import numpy as np
from helpers import assert_close
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lora_jax as lora
from lora_jax import models
from lora_jax.cli import main
from lora_jax.data import Batches, Options, encode, read
from lora_jax.train.builtin import write_tokenizer
from lora_jax.train.metrics import read_metrics

STEPS, RATE, BATCH, LENGTH = 50, 1e-2, 2, 48
TOKENS = np.random.default_rng(0).integers(256, size=(3, 40))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random llama, an adapter of PEFT's for it, and data."""
    path = tmp_path_factory.mktemp("parity")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, initializer_range=0.2, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )  # fmt: skip
    base = LlamaForCausalLM(config)
    base.save_pretrained(path / "model")
    write_tokenizer(path / "model")
    settings = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(base, settings).save_pretrained(path / "start")
    lines = [{"prompt": f"{i} times {j} is ", "completion": f"{i * j}"} for i in range(10) for j in range(10)]
    (path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    """What `lora-jax finetune` made of it."""
    args = f"finetune --model {place}/model --data {place}/data.jsonl --out {place}/run --from {place}/start --merge"
    how = f"--steps {STEPS} --batch {BATCH} --length {LENGTH} --lr {RATE} --schedule constant --warmup 0 --accumulate 2"
    with jax.default_matmul_precision("highest"):
        assert main([*args.split(), *how.split(), "--weight-decay", "0.1", "--eval-batches", "2"]) == 0
    return place / "run"


def their_losses(place: Path, batches: Batches) -> list[float]:
    """PEFT's and torch's, with a mask that keeps packed examples apart."""
    base = AutoModelForCausalLM.from_pretrained(place / "model", attn_implementation="eager")
    model = PeftModel.from_pretrained(base, place / "start", is_trainable=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.1), []
    for step in range(STEPS):
        loss = their_loss(model, batches[step])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def their_loss(model: Any, batch: Any) -> Any:
    segments = torch.from_numpy(batch.segments)
    same = segments[:, :, None] == segments[:, None, :]
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    mask = torch.where(same & causal, 0.0, torch.finfo(torch.float32).min)[:, None]
    tokens = torch.from_numpy(batch.tokens).long()
    positions = torch.from_numpy(batch.positions).long()
    logits = model(tokens, attention_mask=mask, position_ids=positions).logits[:, :-1]
    wanted = torch.from_numpy(batch.trained)[:, 1:]
    return torch.nn.functional.cross_entropy(logits[wanted], tokens[:, 1:][wanted])


def test_losses_are_those_of_torch_and_peft(place: Path, run: Path) -> None:
    data = read(place / "data.jsonl")
    loaded = models.load(place / "model")
    examples = encode(data.train, loaded.tokenizer, Options(length=LENGTH))
    theirs = their_losses(place, Batches(examples, batch=2 * BATCH, length=LENGTH, seed=0))
    ours = [record["loss"] for record in read_metrics(run / "metrics.jsonl")]
    assert ours[0] > 2 * ours[-1], "it learns"
    assert np.abs(np.subtract(ours, theirs)).max() < 1e-3


def test_peft_loads_the_adapter_and_transformers_the_merged_model(place: Path, run: Path) -> None:
    loaded = models.load(place / "model")
    tokens = TOKENS.astype(np.int32)
    sites = lora.find_sites(loaded.apply, loaded.params, tokens)
    adapter = lora.peft.load(run / "adapter", loaded.params, sites)
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(lora.adapt(loaded.apply)(loaded.params, adapter, tokens))
    base = AutoModelForCausalLM.from_pretrained(place / "model").eval()
    merged = AutoModelForCausalLM.from_pretrained(run / "merged").eval()
    for model in (PeftModel.from_pretrained(base, run / "adapter").eval(), merged):
        with torch.no_grad():
            assert_close(model(torch.from_numpy(TOKENS)).logits.numpy(), ours)
