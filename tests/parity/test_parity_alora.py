"""Activated LoRA: real PEFT computes the same on both ways."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("transformers")

import jax
import jax.numpy as jnp
import numpy as np
from helpers import assert_close
from llama import TOKENS, Twin, llama
from peft import PeftModel
from torch_side import adapted

import lora_jax as lora

SEQUENCE = [17, 4]
PROMPTS = TOKENS.copy()
PROMPTS[0, 2:4], PROMPTS[0, 4:6], PROMPTS[1, 0:2] = SEQUENCE, SEQUENCE, SEQUENCE
"""Invoked twice, at once, and never."""


def test_both_ways(tmp_path: Path) -> None:
    model = adapted(
        llama(),
        task_type="CAUSAL_LM",
        alora_invocation_tokens=SEQUENCE,
        r=3,
        target_modules=["q_proj", "v_proj", "up_proj"],
    )
    model.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(PROMPTS)).logits.numpy()
    twin = Twin()
    adapter = lora.peft.load(tmp_path / "theirs", twin.variables, twin.sites, "lora_jax")
    ids = lora.methods.invoked(PROMPTS, adapter)
    assert ids.sum(1).tolist() == [3, 7, 0]
    with jax.default_matmul_precision("highest"):
        found = lora.route(twin.fn, token_axes=1)(twin.variables, [adapter], ids, jnp.asarray(PROMPTS))
    assert_close(np.asarray(found), expected)
    lora.peft.save(tmp_path / "ours", adapter, "lora_jax", sites=twin.sites, task_type="CAUSAL_LM")
    again = PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()
    with torch.no_grad():
        assert_close(again(input_ids=torch.from_numpy(PROMPTS)).logits.numpy(), expected)
