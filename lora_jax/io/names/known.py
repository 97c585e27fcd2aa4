"""Known maps of names, for models of tunix, gemma, MaxText, Hugging Face's former Flax classes, and lora_jax's own."""

from collections.abc import Mapping
from typing import Any

from lora_jax.errors import MatchError
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

_MAXTEXT = {
    "self_attention/query/kernel": "self_attn.q_proj",
    "self_attention/key/kernel": "self_attn.k_proj",
    "self_attention/value/kernel": "self_attn.v_proj",
    "self_attention/out/kernel": "self_attn.o_proj",
    "mlp/wi_0/kernel": "mlp.gate_proj",
    "mlp/wi_1/kernel": "mlp.up_proj",
    "mlp/wo/kernel": "mlp.down_proj",
    "pre_self_attention_layer_norm/scale": "input_layernorm",
    "post_self_attention_layer_norm/scale": "post_attention_layernorm",
}


def _maxtext(special: Mapping[str, Mapping[str, Any]]) -> Names:
    """MaxText's decoder with scanned layers or without; `special` is what else rules for some paths say."""
    layers = [
        Rule(f"decoder/{stem}/{path}", f"{_LAYER}.{module}", **special.get(path, {}))
        for stem in ("layers", "layers_{i}")
        for path, module in _MAXTEXT.items()
    ]
    outside = [
        Rule("token_embedder/embedding", "model.embed_tokens"),
        Rule("decoder/decoder_norm/scale", "model.norm"),
        Rule("decoder/logits_dense/kernel", "lm_head"),
    ]
    return Names([*outside, *layers], tied=_HEAD)


KNOWN: Mapping[str, Names] = {
    # models/transformer.py is a Llama with tied embeddings: PyTorch's LlamaForCausalLM computes the same.
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
            ("layers/{i}/mlp/{name}/kernel", f"{_LAYER}.mlp.{{name}}"),
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
    # Qwen: the numbers are those of PyTorch.
    "maxtext": _maxtext({}),
    # Llama: neighbouring features rotate, and the query kernel holds the scale of the attention.
    "maxtext_llama": _maxtext(
        {
            "self_attention/query/kernel": {"rotary": -1, "query_scaled": True},
            "self_attention/key/kernel": {"rotary": -1},
        }
    ),
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
