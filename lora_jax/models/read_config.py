"""Reading a `config.json` of a decoder, of transformers 4 or 5, into a `DecoderConfig`."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_jax.errors import CheckpointError
from lora_jax.models.config import DecoderConfig, Experts
from lora_jax.models.encoder_config import ENCODERS
from lora_jax.models.families import FAMILIES, Family
from lora_jax.models.fields import Fields, labels
from lora_jax.models.layers import ACTIVATIONS
from lora_jax.models.read_attention import attention
from lora_jax.models.tensors import GATE_UP
from lora_jax.models.text_part import WITH_IMAGES

_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")


def decoder_config(where: Path | str, values: Mapping[str, Any], tensors: Collection[str] = ()) -> DecoderConfig:
    """What the fields of a `config.json` describe.

    Args:
      where: the file, for errors.
      values: its content.
      tensors: names of the checkpoint's tensors, which tell whether experts are one tensor.

    Raises:
      CheckpointError: the family, an activation, a rope or a field that may change the logits is not known.

    Example:
      >>> sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
      >>> config = decoder_config("config.json", {"model_type": "llama", "vocab_size": 9, **sizes})
      >>> config.head_dim, config.tied
      (4, False)
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise unknown_family(where, kind)
    family = FAMILIES[kind]
    fields = Fields(where, values, spelled=family.spelled)
    fields.get("model_type")
    config = DecoderConfig(**_sizes(fields, kind), **_layout(fields, kind, family), **attention(fields, kind, family))
    fields.check_all_read()
    return _together(config) if any(name.endswith(f".experts.{GATE_UP}") for name in tensors) else config


def _together(config: DecoderConfig) -> DecoderConfig:
    """The same with all experts of a layer as one tensor, as transformers 5 holds them; then all families agree."""
    experts = config.experts
    if experts is None or experts.stored != "each":
        return config
    return replace(config, experts=replace(experts, stored="all"), modules=replace(config.modules, mlp="mlp"))


def unknown_family(where: Path | str, kind: Any) -> CheckpointError:
    """The error for a `model_type` that is in no table."""
    return CheckpointError(
        f"{where}: model_type={kind!r} is not known; there are {', '.join((*FAMILIES, *ENCODERS, *WITH_IMAGES))}. "
        "SmolLM and SmolLM2 are llama. A new family is one entry of a table: docs/add-a-family.md."
    )


def _sizes(fields: Fields, kind: str) -> dict[str, Any]:
    width, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    kv_heads = fields.size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", kv_heads, f"must divide num_attention_heads={heads}")
    given = fields.get("head_dim")
    if given is None and width % heads:
        raise fields.error("hidden_size", width, f"must be a multiple of num_attention_heads={heads}")
    return {
        "family": kind, "layers": fields.size("num_hidden_layers"), "width": width, "heads": heads,
        "kv_heads": kv_heads, "head_dim": fields.size("head_dim", width // heads), "vocab": fields.size("vocab_size"),
        "hidden": fields.size("intermediate_size", 4 * width if kind == "gpt2" else None),
    }  # fmt: skip


def _layout(fields: Fields, kind: str, family: Family) -> dict[str, Any]:
    """What its tensors are, and everything but attention."""
    biases = set(family.biases)
    if family.attention_bias and fields.switch("attention_bias", family.attention_bias_default):
        biases |= family.attention_bias
    if family.mlp_bias and fields.switch("mlp_bias"):
        biases.add("mlp")
    found: dict[str, Any] = {
        "modules": family.modules, "biases": frozenset(biases), "activation": _activation(fields, family),
        "eps": fields.number(family.eps, 1e-6 if family.eps.startswith("rms") else 1e-5),
        "tied": fields.switch("tie_word_embeddings", family.tied), "experts": _experts(fields, family),
        "labels": labels(fields), **family.fixed,
    }  # fmt: skip
    if kind.startswith("gemma"):
        found |= {"embed_scale": fields.size("hidden_size") ** 0.5}
        fields.expect("use_bidirectional_attention", False, "is not supported: these models are read as causal")
    if kind in ("gemma2", "gemma3_text"):
        caps = (50.0, 30.0) if kind == "gemma2" else (None, None)
        for name, field, default in zip(("attention_cap", "logit_cap"), _CAPS, caps, strict=True):
            found[name] = 0.0 if fields.nullable(field, default) is None else fields.number(field, default)
    if kind == "gpt2":
        found |= {"positions": fields.size("max_position_embeddings", 1024)}
        fields.expect("scale_attn_by_inverse_layer_idx", False, "is not supported")
        fields.expect("add_cross_attention", False, "is not supported")
    if kind == "gpt_neox" and fields.switch("use_parallel_residual", True):
        found |= {"residual": "parallel"}
    return found


def _activation(fields: Fields, family: Family) -> str:
    names = [name for name in ("hidden_activation", "hidden_act") if fields.get(name) is not None]
    name = fields.get(names[0]) if names else family.activation
    name = family.renamed.get(name, name) if isinstance(name, str) else name
    return fields.choice(names[0] if names else "hidden_act", name, ACTIVATIONS)


def _experts(fields: Fields, family: Family) -> Experts | None:
    if not family.experts:
        return None
    count = fields.first(("num_local_experts", "num_experts"))
    if not isinstance(count, int) or count < 1:
        raise fields.error("num_local_experts", count, "must be the number of experts")
    chosen = fields.size("num_experts_per_tok", fields.get("experts_per_token"))
    if chosen > count:
        raise fields.error("num_experts_per_tok", chosen, f"is more than the {count} experts")
    layers = (True,) * fields.size("num_hidden_layers")
    if family.experts == "normalised":
        return Experts(count, chosen, fields.size("intermediate_size"), layers)
    if family.experts == "gpt-oss":
        limit, sharpness = fields.number("swiglu_limit", 7.0), fields.number("swiglu_alpha", 1.702)
        return Experts(count, chosen, fields.size("intermediate_size"), layers, "chosen", "gpt-oss", limit, sharpness)
    weights = "normalised" if fields.switch("norm_topk_prob") else "all"
    return Experts(count, chosen, fields.size("moe_intermediate_size"), _sparse(fields, len(layers)), weights)


def _sparse(fields: Fields, count: int) -> tuple[bool, ...]:
    """For each layer whether it has experts; it must be one at least."""
    step, dense = fields.size("decoder_sparse_step", 1), fields.get("mlp_only_layers", [])
    if not isinstance(dense, list) or not all(type(each) is int and 0 <= each < count for each in dense):
        raise fields.error("mlp_only_layers", dense, f"must be numbers of the {count} layers")
    found = tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(count))
    if not any(found):
        raise fields.error("decoder_sparse_step", step, f"and mlp_only_layers={dense} leave no layer with experts")
    return found
