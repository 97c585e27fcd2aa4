"""Maps of names for MaxText's models: three for its decoders as they are, and `maxtext_names` for a configuration."""

from collections.abc import Iterable, Mapping
from typing import Any

from lora_jax.errors import MatchError
from lora_jax.io.names.names import Names
from lora_jax.io.names.rules import Rule

_NORMS = {
    "pre_self_attention_layer_norm/scale": "input_layernorm",
    "post_self_attention_layer_norm/scale": "post_attention_layernorm",
}
_ATTENTION = {
    "self_attention/query/kernel": "self_attn.q_proj",
    "self_attention/key/kernel": "self_attn.k_proj",
    "self_attention/value/kernel": "self_attn.v_proj",
    "self_attention/out/kernel": "self_attn.o_proj",
    "self_attention/query_norm/scale": "self_attn.q_norm",
    "self_attention/key_norm/scale": "self_attn.k_norm",
}
_LATENT_ATTENTION = {
    "self_attention/query/kernel": "self_attn.q_proj",
    "self_attention/wq_a/kernel": "self_attn.q_a_proj",
    "self_attention/q_norm/scale": "self_attn.q_a_layernorm",
    "self_attention/wq_b/kernel": "self_attn.q_b_proj",
    "self_attention/wkv_a/kernel": "self_attn.kv_a_proj_with_mqa",
    "self_attention/kv_norm/scale": "self_attn.kv_a_layernorm",
    "self_attention/wkv_b/kernel": "self_attn.kv_b_proj",
    "self_attention/out/kernel": "self_attn.o_proj",
}
_MLP = {"wi_0/kernel": "gate_proj", "wi_1/kernel": "up_proj", "wo/kernel": "down_proj"}
_EXPERTS = {"wi_0": "gate_proj", "wi_1": "up_proj", "wo": "down_proj"}
_MIXTRAL_EXPERTS = {"wi_0": "w1", "wi_1": "w3", "wo": "w2"}
_HEAD = {"model.embed_tokens": "lm_head"}


def maxtext_names(config: Any) -> Names:
    """The map of a MaxText model, by its configuration.

    MaxText keeps the scale of its attention in the query kernel, unless queries are normalised or its decoder scales
    them itself, and rotates neighbouring features where others rotate halves for Llama 3.1 only. What the tree of
    parameters cannot tell is in the configuration: `model_name`, `rope_type`, `decoder_block`, `use_qk_norm`, and for
    DeepSeek `first_num_dense_layers`.

    Args:
      config: MaxText's configuration, or a mapping with these fields of it. Fields it lacks have MaxText's defaults.

    Returns:
      One of `KNOWN["maxtext"]`, `"maxtext_llama"` and `"maxtext_llama3.1"`, or DeepSeek's.

    Raises:
      MatchError: the decoder is none of those that have a map.

    Example:
      >>> maxtext_names({"decoder_block": "mistral"}) == MAXTEXT["maxtext_llama"]
      True
      >>> names = maxtext_names({"decoder_block": "deepseek", "first_num_dense_layers": 3})
      >>> names.module("decoder/moe_layers_0/self_attention/wq_a/kernel")
      'model.layers.3.self_attn.q_a_proj'
    """
    get = (lambda name, default: config.get(name, default)) if isinstance(config, Mapping) else _attribute(config)
    decoder = str(getattr(get("decoder_block", "llama2"), "value", get("decoder_block", "llama2")))
    if decoder == "deepseek":
        return _deepseek(int(get("first_num_dense_layers", 0)))
    if decoder not in _SCALED | _UNSCALED:
        raise MatchError(
            f"There is no map for MaxText's decoder_block={decoder!r}; there are "
            f"{', '.join(sorted(_SCALED | _UNSCALED | {'deepseek'}))}. Write a Names for it, or pass one of "
            f"{', '.join(MAXTEXT)} if its parameters are the same"
        )
    if decoder in _UNSCALED or get("use_qk_norm", False):
        return MAXTEXT["maxtext"]
    llama31 = any(str(get(name, "")).lower().startswith("llama3.1") for name in ("model_name", "rope_type"))
    return MAXTEXT["maxtext_llama3.1" if llama31 else "maxtext_llama"]


_SCALED = {"llama2", "mistral", "mixtral"}
_UNSCALED = {"qwen2", "qwen3", "qwen3_moe"}


def _attribute(config: Any) -> Any:
    return lambda name, default: getattr(config, name, default)


def _decoder(*, neighbours: bool, scaled: bool) -> Names:
    """Layers of queries, keys and values, scanned or not, with a feed-forward network or experts."""
    special: Mapping[str, Mapping[str, Any]] = {
        "self_attention/query/kernel": {"rotary": -neighbours, "query_scaled": scaled},
        "self_attention/key/kernel": {"rotary": -neighbours},
    }
    modules = {
        **_ATTENTION,
        **_NORMS,
        **{f"mlp/{path}": f"mlp.{module}" for path, module in _MLP.items()},
        "moe_block/gate/kernel": "mlp.gate",  # Qwen3-MoE
        "MoeBlock_0/gate/kernel": "block_sparse_moe.gate",  # Mixtral
    }
    layers = [
        Rule(f"decoder/{stem}/{path}", f"model.layers.{{i}}.{module}", **special.get(path, {}))
        for stem in ("layers", "layers_{i}")
        for path, module in modules.items()
    ]
    experts = [
        *_experts("layers", "moe_block", "mlp.experts", _EXPERTS),
        *_experts("layers", "MoeBlock_0", "block_sparse_moe.experts", _MIXTRAL_EXPERTS),
    ]
    return Names([*_outside(), *layers, *experts], tied=_HEAD)


def _deepseek(dense: int) -> Names:
    """DeepSeek 2 and 3, and Kimi K2: layers without experts first, which MaxText counts apart from those with."""
    every = {**_LATENT_ATTENTION, **_NORMS}
    shared = "DeepSeekMoeBlock_0/shared_experts"
    kinds = {
        "dense_layers": every | {f"mlp/{path}": f"mlp.{module}" for path, module in _MLP.items()},
        "moe_layers": every
        | {f"{shared}/{path}": f"mlp.shared_experts.{module}" for path, module in _MLP.items()}
        | {"DeepSeekMoeBlock_0/MoeBlock_0/gate/kernel": "mlp.gate"},
    }
    layers = [
        Rule(f"decoder/{stem}/{path}", f"model.layers.{{i+{dense * (kind == 'moe_layers')}}}.{module}")
        for kind, modules in kinds.items()
        for stem in (kind, f"{kind}_{{i}}")
        for path, module in modules.items()
    ]
    experts = _experts("moe_layers", "DeepSeekMoeBlock_0/MoeBlock_0", "mlp.experts", _EXPERTS, first=dense)
    return Names([*_outside(), *layers, *experts])


def _experts(layers: str, block: str, module: str, names: Mapping[str, str], first: int = 0) -> Iterable[Rule]:
    """Experts of layers that are scanned, `[experts, layers, in, out]`, and of layers that are not."""
    for path, name in names.items():
        yield Rule(f"decoder/{layers}/{block}/{path}", f"model.layers.{{j+{first}}}.{module}.{{i}}.{name}")
        yield Rule(f"decoder/{layers}_{{i}}/{block}/{path}", f"model.layers.{{i+{first}}}.{module}.{{j}}.{name}")


def _outside() -> list[Rule]:
    return [
        Rule("token_embedder/embedding", "model.embed_tokens"),
        Rule("decoder/decoder_norm/scale", "model.norm"),
        Rule("decoder/logits_dense/kernel", "lm_head"),
    ]


MAXTEXT: Mapping[str, Names] = {
    # Queries are normalised, or scaled by the decoder itself: Qwen 2, 2.5 and 3.
    "maxtext": _decoder(neighbours=False, scaled=False),
    # Neither: the query kernel holds the scale. Llama 2 and 3, Mistral, Mixtral.
    "maxtext_llama": _decoder(neighbours=False, scaled=True),
    # The same, with neighbouring features rotated: `rope_type` or `model_name` begins with llama3.1.
    "maxtext_llama3.1": _decoder(neighbours=True, scaled=True),
}
"""Maps of MaxText's decoders by name, without DeepSeek's, which depends on how many layers have no experts."""
