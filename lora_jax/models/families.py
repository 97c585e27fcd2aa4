"""The table of families: an entry for each `model_type` that is read, with what sets it apart from Llama."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lora_jax.models.config import LLAMA, Modules

_QKV_OUT = frozenset({"qkv", "out"})


@dataclass(frozen=True, kw_only=True)
class Family:
    """How the `config.json` of a `model_type` is read.

    Attributes:
      modules: what its modules are called.
      spelled: what it calls fields that have another name elsewhere.
      theta: base of its ropes where the file has none; 0 for a model without ropes.
      eps: the field with what norms add to the variance.
      activation: the activation where the file has none.
      renamed: activations that mean another one.
      tied: whether table and head are one where the file does not say.
      biases: which kernels always have a bias.
      attention_bias: which kernels have one if the file's `attention_bias` is true, if that means anything.
      attention_bias_default: its value where the file has none.
      mlp_bias: whether the file's `mlp_bias` means something.
      windows: which layers have one: `all`, or those that `layer_types` names; `switched` where `use_sliding_window`
        must be true as well.
      window: the size of windows where the file has none.
      full_every: of how many layers the last has no window, where the file has no `layer_types`.
      rotary: the part of a head's features that is rotated by default, where it may be less than all.
      experts: how a mixture of experts weighs those it chooses; `gpt-oss` has a form of its own.
      fixed: further fields of `DecoderConfig`.
    """

    modules: Modules = LLAMA
    spelled: Mapping[str, str] = field(default_factory=dict)
    theta: float = 10_000.0
    eps: str = "rms_norm_eps"
    activation: str = "silu"
    renamed: Mapping[str, str] = field(default_factory=dict)
    tied: bool = False
    biases: frozenset[str] = frozenset()
    attention_bias: frozenset[str] = frozenset()
    attention_bias_default: bool = False
    mlp_bias: bool = False
    windows: Literal["", "all", "all switched", "layers", "layers switched"] = ""
    window: int | None = None
    full_every: int = 0
    rotary: float = 0.0
    experts: Literal["", "normalised", "choice", "gpt-oss"] = ""
    fixed: Mapping[str, Any] = field(default_factory=dict)


_AROUND = (
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
)  # fmt: skip
_GEMMA: dict[str, Any] = {
    "activation": "gelu_pytorch_tanh",
    "renamed": {"gelu": "gelu_pytorch_tanh"},
    "tied": True,
    "attention_bias": _QKV_OUT,
}
_AROUND_BOTH: dict[str, Any] = {"norm_offset": 1.0, "residual": "around"}

FAMILIES: dict[str, Family] = {
    "llama": Family(attention_bias=_QKV_OUT, mlp_bias=True),
    "mistral": Family(windows="all", window=4096),
    "qwen2": Family(biases=frozenset({"qkv"}), windows="layers switched", window=4096),
    "qwen3": Family(attention_bias=_QKV_OUT, windows="layers switched", window=4096, fixed={"qk_norm": True}),
    "qwen3_moe": Family(
        attention_bias=_QKV_OUT, windows="all switched", window=4096, experts="choice", fixed={"qk_norm": True},
    ),
    "mixtral": Family(
        modules=Modules(mlp="block_sparse_moe", up=("w1", "w3"), down="w2"),
        theta=1_000_000.0, windows="all", experts="normalised",
    ),
    "gemma": Family(**_GEMMA, fixed={"norm_offset": 1.0}),
    "gemma2": Family(
        **_GEMMA, modules=Modules(norms=_AROUND), windows="layers", window=4096, full_every=2, fixed=_AROUND_BOTH,
    ),
    "gemma3_text": Family(
        **_GEMMA, modules=Modules(norms=_AROUND), theta=1_000_000.0, windows="layers", window=4096, full_every=6,
        fixed=_AROUND_BOTH | {"qk_norm": True},
    ),
    "phi3": Family(modules=Modules(qkv=("qkv_proj",), up=("gate_up_proj",)), windows="all", rotary=1.0),
    "smollm3": Family(
        theta=2_000_000.0, tied=True, attention_bias=_QKV_OUT, mlp_bias=True, windows="layers switched",
    ),
    "gpt2": Family(
        modules=Modules(
            root="transformer", table="wte", positions="wpe", layers="h", last_norm="ln_f", attention="attn",
            qkv=("c_attn",), out="c_proj", up=("c_fc",), down="c_proj", norms=("ln_1", "ln_2"),
        ),
        spelled={
            "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions", "intermediate_size": "n_inner",
            "hidden_act": "activation_function",
        },
        theta=0.0, eps="layer_norm_epsilon", activation="gelu_new", tied=True,
        biases=frozenset({"qkv", "out", "mlp"}), fixed={"norm": "layer", "transposed": True, "gated": False},
    ),
    "gpt_neox": Family(
        modules=Modules(
            root="gpt_neox", table="embed_in", last_norm="final_layer_norm", head="embed_out", attention="attention",
            qkv=("query_key_value",), out="dense", up=("dense_h_to_4h",), down="dense_4h_to_h",
        ),
        eps="layer_norm_eps", activation="gelu", biases=frozenset({"mlp"}), attention_bias=_QKV_OUT,
        attention_bias_default=True, rotary=0.25, fixed={"norm": "layer", "interleaved": True, "gated": False},
    ),
    "gpt_oss": Family(
        modules=Modules(router="router"),
        theta=150_000.0, attention_bias=_QKV_OUT, attention_bias_default=True, windows="layers", window=128,
        full_every=2, experts="gpt-oss", fixed={"sinks": True},
    ),
}  # fmt: skip
"""How each `model_type` is read. SmolLM and SmolLM2 call themselves llama."""
