"""Known maps of names: tunix, gemma, MaxText, KerasHub, Hugging Face's former Flax classes, and lora_jax's own."""

from collections.abc import Mapping

from lora_jax.errors import MatchError
from lora_jax.io.names.maxtext import MAXTEXT
from lora_jax.io.names.names import Names
from lora_jax.io.names.rules import Rule

_LAYER = "model.layers.{i}"
_OWN = {
    "attn/query/kernel": "self_attn.q_proj",
    "attn/key/kernel": "self_attn.k_proj",
    "attn/value/kernel": "self_attn.v_proj",
    "attn/out/kernel": "self_attn.o_proj",
    "mlp/gate/kernel": "mlp.gate_proj",
    "mlp/up/kernel": "mlp.up_proj",
    "mlp/down/kernel": "mlp.down_proj",
    "attn_norm/scale": "input_layernorm",
    "mlp_norm/scale": "post_attention_layernorm",
}

# Layers of tunix and of the gemma package share their attention; einsum kernels hold key and value, or all three.
_EINSUM_ATTENTION = {
    "attn/q_einsum/w": f"{_LAYER}.self_attn.q_proj",
    "attn/kv_einsum/w": (f"{_LAYER}.self_attn.k_proj", f"{_LAYER}.self_attn.v_proj"),
    "attn/qkv_einsum/w": tuple(f"{_LAYER}.self_attn.{part}_proj" for part in "qkv"),
    "attn/attn_vec_einsum/w": f"{_LAYER}.self_attn.o_proj",
}
_HEAD = {"model.embed_tokens": "lm_head"}
_KERAS_HUB = {
    "self_attention/query/kernel": "self_attn.q_proj",
    "self_attention/key/kernel": "self_attn.k_proj",
    "self_attention/value/kernel": "self_attn.v_proj",
    "self_attention/attention_output/kernel": "self_attn.o_proj",
    "feedforward_gate_dense/kernel": "mlp.gate_proj",
    "feedforward_intermediate_dense/kernel": "mlp.up_proj",
    "feedforward_output_dense/kernel": "mlp.down_proj",
    "self_attention_layernorm/scale": "input_layernorm",
    "feedforward_layernorm/scale": "post_attention_layernorm",
}

KNOWN: Mapping[str, Names] = {
    # A Llama in Flax linen with tied embeddings: PyTorch's LlamaForCausalLM computes the same.
    "lora_jax": Names(
        [
            ("embed/embedding", "model.embed_tokens"),
            ("norm/scale", "model.norm"),
            *((f"layers_{{i}}/{path}", f"{_LAYER}.{module}") for path, module in _OWN.items()),
            *((f"layers/{path}", f"{_LAYER}.{module}") for path, module in _OWN.items()),
        ],
        tied=_HEAD,
    ),
    # Flax classes of transformers < 5 keep PyTorch's names.
    "hf_flax": Names(literal=True),
    "hf_flax_bert": Names(
        tied={
            "bert.embeddings.word_embeddings": "cls.predictions.decoder",
            "roberta.embeddings.word_embeddings": "lm_head.decoder",
        },
        literal=True,
    ),
    "hf_flax_gemma": Names(tied=_HEAD, literal=True),
    "hf_flax_gpt2": Names(fan_in_fan_out=True, tied={"transformer.wte": "lm_head"}, literal=True),
    "tunix": Names(
        [
            ("embedder/input_embedding", "model.embed_tokens"),
            ("lm_head/w", "lm_head"),
            ("final_norm/w", "model.norm"),
            ("layers/{i}/{name}_layernorm/w", f"{_LAYER}.{{name}}_layernorm"),
            ("layers/{i}/attn/{name}_norm/w", f"{_LAYER}.self_attn.{{name}}_norm"),
            ("layers/{i}/attn/{name}_proj/w", f"{_LAYER}.self_attn.{{name}}_proj"),
            *(Rule(f"layers/{{i}}/{path}", modules) for path, modules in _EINSUM_ATTENTION.items()),
            ("layers/{i}/mlp/router/kernel", f"{_LAYER}.mlp.gate"),  # experts of Qwen3
            ("layers/{i}/mlp/{name}/kernel", f"{_LAYER}.mlp.{{name}}"),
            ("layers/{i}/mlp/{name}_proj", f"{_LAYER}.mlp.experts.{{j}}.{{name}}_proj"),
            ("layers/{i}/moe/router_logits", f"{_LAYER}.router.proj"),  # experts of Gemma 4
            ("layers/{i}/moe/gating_einsum", f"{_LAYER}.experts.gate_up_proj"),
            ("layers/{i}/moe/linear", f"{_LAYER}.experts.down_proj"),
        ],
        tied=_HEAD,
    ),
    "gemma": Names(
        [
            ("embedder/input_embedding", "model.embed_tokens"),
            *(Rule(f"layer_{{i}}/{path}", modules) for path, modules in _EINSUM_ATTENTION.items()),
            ("layer_{i}/mlp/gating_einsum", (f"{_LAYER}.mlp.gate_proj", f"{_LAYER}.mlp.up_proj")),
            ("layer_{i}/mlp/linear", f"{_LAYER}.mlp.down_proj"),
        ],
        tied=_HEAD,
    ),
    # Llama 3 and Qwen, whose variables by `path` are the tensors of PyTorch, transposed and with heads apart.
    "keras_hub_llama": Names(
        [
            ("token_embedding/embeddings", "model.embed_tokens"),
            ("token_embedding/reverse_embeddings", "lm_head"),
            ("sequence_output_layernorm/scale", "model.norm"),
            *((f"transformer_layer_{{i}}/{path}", f"{_LAYER}.{module}") for path, module in _KERAS_HUB.items()),
        ],
        tied=_HEAD,
    ),
    **MAXTEXT,
}
"""Maps by name, for `names=` of `lora_jax.peft.load` and `save`."""


def find_names(names: Names | str | None) -> Names:
    """A map, given as one, by its name in `KNOWN`, or as None for the identity.

    Raises:
      MatchError: there is no map of that name.

    Example:
      >>> find_names("gemma").module("params/embedder/input_embedding")
      'model.embed_tokens'
    """
    if isinstance(names, str):
        if names not in KNOWN:
            raise MatchError(
                f"names={names!r} is not a known map; there are {', '.join(sorted(KNOWN))}, or pass a Names"
            )
        return KNOWN[names]
    return Names() if names is None else names
