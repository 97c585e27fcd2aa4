"""The language model of one that sees images, against transformers and PEFT on the whole."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("peft")

import torch
from helpers import assert_close, random_adapter
from peft import PeftModel
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

import lora_jax as lora
from lora_jax import models

TEXT = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "sliding_window": 16,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(3, 90, (1, 60))


def theirs(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(TOKENS)).logits.numpy()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # Inside transformers.
@pytest.mark.parametrize("old", [True, False])
def test_gemma3_with_images(old: bool, tmp_path: Path):
    """`old` is how files of the Hub name tensors, the other how transformers 5 does in memory."""
    torch.manual_seed(0)
    config = Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4, image_token_index=96,
                          boi_token_index=95, eoi_token_index=94, initializer_range=0.2)  # fmt: skip
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "m", save_original_format=old)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    with pytest.warns(UserWarning, match="multi_modal_projector, vision_tower"):
        model = models.load(tmp_path / "m")
    with jax.default_matmul_precision("highest"):
        assert_close(np.asarray(model.apply(model.params, jnp.asarray(TOKENS))), theirs(whole))
        models.save(tmp_path / "n", model)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "n").eval()
        assert all(torch.equal(each, again.state_dict()[name]) for name, each in whole.state_dict().items())
        sites = lora.find_sites(model.apply, model.params, jnp.asarray(TOKENS))
        adapter = random_adapter([site for site in sites.values() if site.kind != "embedding" and not site.head])
        lora.peft.save(tmp_path / "adapter", adapter, sites=sites)
        ours = np.asarray(lora.adapt(model.apply)(model.params, adapter, jnp.asarray(TOKENS)))
    with pytest.warns(UserWarning, match=r"missing adapter keys.*vision_tower"):  # Its layers are called alike.
        peft = PeftModel.from_pretrained(whole, tmp_path / "adapter").eval()
    assert_close(theirs(peft), ours)
