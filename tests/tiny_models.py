"""Tiny random model directories of every family, written with NumPy, for tests without PyTorch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from lora_jax.models.read_config import decoder_config
from lora_jax.models.tensors import decoder_leaves

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 700.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 700.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 700.0, "factor": 4.0, "original_max_position_embeddings": 32}
NESTED = {"full_attention": LLAMA3, "sliding_attention": ROPE}
OF_FAMILY: Mapping[str, dict[str, Any]] = {
    "llama": {"rope_parameters": LLAMA3},
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2, "rope_parameters": ROPE},
    "qwen3": {"rope_parameters": YARN, "tie_word_embeddings": True},
    "qwen3_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 5},
    "gemma": {},
    "gemma2": {"sliding_window": 5, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {"sliding_window": 5, "sliding_window_pattern": 3, "rope_parameters": NESTED},
    "phi3": {"sliding_window": 5, "partial_rotary_factor": 0.5},
    "smollm3": {"no_rope_layer_interval": 2},
    "gpt2": {},
    "gpt_neox": {"num_key_value_heads": 4, "rotary_pct": 0.5},
    "gpt_oss": {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 5, "rope_parameters": YARN},
}
"""Fields of a config of each family, beside `SIZES`."""
GPT2 = {"vocab_size": 61, "n_embd": 24, "n_layer": 4, "n_head": 4, "n_positions": 64}


def tiny_config(family: str, **changes: Any) -> dict[str, Any]:
    """A `config.json`; a change to None removes the field."""
    sizes = GPT2 if family == "gpt2" else SIZES
    values = {"model_type": family, **sizes, **OF_FAMILY[family], **changes}
    return {name: value for name, value in values.items() if value is not None}


def tiny_tensors(values: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors of a config, by name: kernels keep the size of what they multiply."""
    draw, found = np.random.default_rng(seed), {}
    for leaf in decoder_leaves(decoder_config("config.json", values), unrolled=True):
        normal = draw.normal(size=leaf.shape).astype(np.float32)
        vector = len(leaf.shape) < 2 or leaf.template.endswith("bias")
        centre = np.float32(leaf.template.endswith("norm.weight") and not values["model_type"].startswith("gemma"))
        found[leaf.template] = centre + normal / 8 if vector else normal / np.float32(leaf.shape[-1] ** 0.5)
    return found


def tiny_directory(path: Path, family: str, tensors: Mapping[str, np.ndarray] | None = None, **changes: Any) -> Path:
    """A model directory with the tensors given, or random ones."""
    values = tiny_config(family, **changes)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(values))
    save_file(dict(tiny_tensors(values) if tensors is None else tensors), path / "model.safetensors")
    return path
