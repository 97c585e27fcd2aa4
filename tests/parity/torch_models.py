"""Random models of transformers, one of each family and kind of rope, with weights that show what is left out."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 5000.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 5000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 5e4, "factor": 8.0, "original_max_position_embeddings": 256}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 5e3,
    "short_factor": [1.0, 1.5, 2.0, 3.0],
    "long_factor": [1.0, 4.0, 9.0, 20.0],
}
NESTED = {"full_attention": {**LINEAR, "rope_theta": 5e5}, "sliding_attention": ROPE}
EXPERTS = {"num_local_experts": 6, "num_experts_per_tok": 2}

MODELS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True}),
    "llama linear": ("llama", {"rope_parameters": LINEAR, "tie_word_embeddings": True}),
    "llama dynamic": ("llama", {"rope_parameters": DYNAMIC}),
    "llama yarn": ("llama", {"rope_parameters": {**YARN, "mscale": 1.3, "mscale_all_dim": 0.4}}),
    "mistral": ("mistral", {"rope_parameters": ROPE, "sliding_window": 64, "head_dim": 12}),
    "qwen2": ("qwen2", {"rope_parameters": ROPE, "use_sliding_window": True, "sliding_window": 50, "max_window_layers": 2}),
    "qwen3": ("qwen3", {"rope_parameters": {**YARN, "truncate": False, "beta_fast": 16.0}, "head_dim": 16}),
    "qwen3_moe": ("qwen3_moe", {"rope_parameters": ROPE, "head_dim": 16, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}),
    "qwen3_moe all": ("qwen3_moe", {"rope_parameters": ROPE, "head_dim": 16, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "use_sliding_window": True, "sliding_window": 64}),
    "qwen3_moe mixed": ("qwen3_moe", {"rope_parameters": ROPE, "head_dim": 16, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [2]}),
    "mixtral": ("mixtral", {"rope_parameters": ROPE, "sliding_window": 64, **EXPERTS}),
    "gemma": ("gemma", {"rope_parameters": ROPE, "head_dim": 16, "hidden_act": "gelu"}),
    "gemma2": ("gemma2", {"rope_parameters": ROPE, "head_dim": 16, "sliding_window": 64, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0}),
    "gemma3_text": ("gemma3_text", {"rope_parameters": NESTED, "head_dim": 16, "sliding_window": 64, "query_pre_attn_scalar": 20, "sliding_window_pattern": 3}),
    "phi3": ("phi3", {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}, "sliding_window": 64}),
    "phi3 longrope": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 512}),
    "phi3 shortrope": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 1500}),
    "smollm3": ("smollm3", {"rope_parameters": ROPE, "attention_bias": True}),
    "smollm3 windows": ("smollm3", {"rope_parameters": ROPE, "use_sliding_window": True, "sliding_window": 64}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 1200}),
    "gpt_neox": ("gpt_neox", {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}, "num_key_value_heads": None}),
    "gpt_neox serial": ("gpt_neox", {"rope_parameters": ROPE, "num_key_value_heads": None, "use_parallel_residual": False, "attention_bias": False, "hidden_act": "gelu_new"}),
    "gpt_oss": ("gpt_oss", {"rope_parameters": {**YARN, "truncate": False}, "head_dim": 8, "sliding_window": 64, **EXPERTS}),
    "arcee": ("arcee", {"rope_parameters": YARN, "attention_bias": True, "mlp_bias": True}),  # of docs/add-a-family.md
}  # fmt: skip


def random_model(name: str, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A model whose scores are far enough apart that windows, caps and scales show, and no further."""
    kind, options = MODELS[name]
    sizes = {key: value for key, value in SIZES.items() if kind != "gpt2" or key == "vocab_size" or key.endswith("id")}
    given = {key: value for key, value in {**sizes, **options, **changes}.items() if value is not None}
    config = AutoConfig.for_model(kind, **deepcopy(given))  # It fills in the dicts that it is given.
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            kernel = parameter.ndim > 1
            parameter.copy_(noise / parameter.shape[-1] ** 0.5 if kernel else parameter + noise / 10)
    return model


def saved(path: Path, name: str, *, fused: bool = False, **changes: Any) -> torch.nn.Module:
    """The same, in a directory; experts as older versions stored them, or `fused` as they are in memory."""
    model: Any = random_model(name, **changes)
    model.save_pretrained(path, save_original_format=not fused)
    return model
