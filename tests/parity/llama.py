"""A tiny random Llama and a Phi-3 of transformers, and the same weights for this project's own transformer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from linen_transformer import Transformer, TransformerConfig
from torch_side import numbers
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

import lora_jax as lora
from lora_jax.io.peft import KNOWN, Names

SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "initializer_range": 0.3,
    "attn_implementation": "eager",
}  # fmt: skip
CONFIG = TransformerConfig(layers=2, width=16, heads=2, kv_heads=1, hidden=24, scan=False)
TOKENS = np.random.default_rng(0).integers(256, size=(3, 7))


def llama() -> LlamaForCausalLM:
    """The same model at every call; weights large enough for the logits to depend on every one of them."""
    torch.manual_seed(3)
    return LlamaForCausalLM(LlamaConfig(**SIZES, head_dim=8)).eval()


def phi3() -> Phi3ForCausalLM:
    """A Llama whose query, key and value are one module, and so are its gate and up."""
    torch.manual_seed(4)
    return Phi3ForCausalLM(Phi3Config(**SIZES, pad_token_id=0)).eval()


def unfused(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state of a Phi-3 under Llama's names."""
    found = dict(state)
    for name in state:
        if name.endswith("qkv_proj.weight"):
            parts = zip("qkv", np.split(found.pop(name), [16, 24]), strict=True)
            found |= {name.replace("qkv", part): value for part, value in parts}
        if name.endswith("gate_up_proj.weight"):
            parts = zip(("gate", "up"), np.split(found.pop(name), 2), strict=True)
            found |= {name.replace("gate_up", part): value for part, value in parts}
    return found


def _fused(layers: str) -> list[tuple[tuple[str, ...], str]]:
    attention = tuple(f"{layers}/attn/{name}/kernel" for name in ("query", "key", "value"))
    mlp = tuple(f"{layers}/mlp/{name}/kernel" for name in ("gate", "up"))
    layer = "model.layers.{i}"
    return [(attention, f"{layer}.self_attn.qkv_proj"), (mlp, f"{layer}.mlp.gate_up_proj")]


PHI3 = Names([*_fused("layers_{i}"), *_fused("layers"), *KNOWN["lora_jax"].rules], tied=KNOWN["lora_jax"].tied)


class Twin:
    """This project's transformer with the weights of `llama` or `phi3`, scanned or unrolled."""

    def __init__(self, scan: bool = False, model: Callable[[], Any] = llama):
        self.variables = params_of(model(), scan)
        self.fn = Transformer(TransformerConfig(**{**vars(CONFIG), "scan": scan})).apply
        self.sites = lora.find_sites(self.fn, self.variables, jnp.asarray(TOKENS))

    def run(self, adapter: lora.Adapter) -> np.ndarray:
        """Logits with the adapter."""
        with jax.default_matmul_precision("highest"):
            return np.asarray(lora.adapt(self.fn)(self.variables, adapter, jnp.asarray(TOKENS)))


def params_of(model: Any, scan: bool) -> Any:
    """The weights of a model of transformers, for this project's."""
    state = unfused(numbers(model.state_dict()))
    layers = [_layer(state, f"model.layers.{index}.") for index in range(CONFIG.layers)]
    stacked: Any = {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}
    params = stacked if scan else {f"layers_{index}": layer for index, layer in enumerate(layers)}
    params |= {
        "embed": {"embedding": jnp.asarray(state["model.embed_tokens.weight"])},
        "norm": {"scale": jnp.asarray(state["model.norm.weight"])},
    }
    return {"params": params}


def _layer(state: dict[str, np.ndarray], prefix: str) -> Any:
    def kernel(name: str, *shape: int) -> dict[str, jax.Array]:
        weight = state[f"{prefix}{name}.weight"].T
        return {"kernel": jnp.asarray(weight.reshape(shape or weight.shape))}

    def norm(name: str) -> dict[str, jax.Array]:
        return {"scale": jnp.asarray(state[f"{prefix}{name}.weight"])}

    return {
        "attn_norm": norm("input_layernorm"), "mlp_norm": norm("post_attention_layernorm"),
        "attn": {
            "query": kernel("self_attn.q_proj", 16, 2, 8), "key": kernel("self_attn.k_proj", 16, 1, 8),
            "value": kernel("self_attn.v_proj", 16, 1, 8), "out": kernel("self_attn.o_proj", 2, 8, 16),
        },
        "mlp": {name: kernel(f"mlp.{name}_proj") for name in ("gate", "up", "down")},
    }  # fmt: skip
