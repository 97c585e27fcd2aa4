"""`EncoderConfig`: what a BERT or RoBERTa computes, read from its `config.json`; and the tensors that it has."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lora_jax.models.fields import Fields, labels
from lora_jax.models.layers import ACTIVATIONS
from lora_jax.models.tensors import Leaf, Shape, stacked

ENCODERS: Mapping[str, str] = {
    "bert": "bert", "roberta": "roberta", "xlm-roberta": "roberta", "camembert": "roberta",
}  # fmt: skip
"""Every `model_type` that is read, and what it calls itself in the names of a classifier's tensors."""


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """An encoder; hashable, so that it can be a static argument.

    Attributes:
      family: `model_type` of the `config.json`.
      root: what holds everything but the classifier; empty for a model without one.
      layers: number of layers.
      width: features of the residual stream.
      heads: number of heads.
      hidden: inner width of the MLP.
      vocab: number of tokens.
      positions: number of learned positions.
      types: number of types of tokens.
      eps: what norms add to the variance.
      activation: name of the MLP's activation.
      padding: the token that takes no position, where positions are counted by token; None for BERT.
      labels: number of classes; 0 for a model without a classifier.
      pooler: whether there is a layer on the first token.
      norm: as in `DecoderConfig`.
      norm_offset: likewise.
    """

    family: str
    root: str
    layers: int
    width: int
    heads: int
    hidden: int
    vocab: int
    positions: int
    types: int
    eps: float
    activation: str
    padding: int | None
    labels: int
    pooler: bool
    norm: Literal["layer"] = "layer"
    norm_offset: float = 0.0


def encoder_config(where: Path | str, values: Mapping[str, Any], tensors: Collection[str]) -> EncoderConfig:
    """What the fields of a `config.json` describe.

    Args:
      where: the file, for errors.
      values: its content.
      tensors: names of the checkpoint's tensors, which tell whether it has a pooler.

    Raises:
      CheckpointError: an activation or a field that may change the results is not known.
    """
    fields = Fields(where, values)
    family = fields.get("model_type")
    fields.expect("position_embedding_type", "absolute", "is not supported; there is 'absolute'")
    fields.expect("is_decoder", False, "is not supported: these models are read as encoders")
    activation = fields.choice("hidden_act", fields.get("hidden_act", "gelu"), ACTIVATIONS)
    width, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    if width % heads:
        raise fields.error("hidden_size", width, f"must be a multiple of num_attention_heads={heads}")
    classes = labels(fields)
    fields.get("tie_word_embeddings")  # That of a head that is not read.
    padding = fields.get("pad_token_id", 1)
    if isinstance(padding, bool) or not isinstance(padding, int):
        raise fields.error("pad_token_id", padding, "must be a token")
    config = EncoderConfig(
        family=family, root=ENCODERS[family] if classes else "", width=width, heads=heads, activation=activation,
        layers=fields.size("num_hidden_layers"), hidden=fields.size("intermediate_size"),
        vocab=fields.size("vocab_size"), positions=fields.size("max_position_embeddings", 512),
        types=fields.size("type_vocab_size", 2), eps=fields.number("layer_norm_eps", 1e-12),
        padding=None if family == "bert" else padding, labels=classes,
        pooler=any("pooler.dense.weight" in name for name in tensors),
    )  # fmt: skip
    fields.check_all_read()
    return config


def encoder_leaves(config: EncoderConfig, *, unrolled: bool = False) -> list[Leaf]:
    """Every parameter of an encoder; layers stacked unless `unrolled`."""
    root = f"{config.root}." if config.root else ""
    found = [Leaf(tuple(name.split(".")), name, (), shape) for name, shape in _outside(config, root).items()]
    for name, shape in _layer(config).items():
        found += stacked(f"{root}encoder.layer.{{}}.{name}", (config.layers,), shape, unrolled)
    return found


def _linear(name: str, out: int, into: int) -> dict[str, Shape]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def _norm(config: EncoderConfig, name: str) -> dict[str, Shape]:
    return {f"{name}.weight": (config.width,), f"{name}.bias": (config.width,)}


def _outside(config: EncoderConfig, root: str) -> dict[str, Shape]:
    width = config.width
    rows = {"word": config.vocab, "position": config.positions, "token_type": config.types}
    found: dict[str, Shape] = {f"{root}embeddings.{name}_embeddings.weight": (n, width) for name, n in rows.items()}
    found |= _norm(config, f"{root}embeddings.LayerNorm")
    if config.pooler:
        found |= _linear(f"{root}pooler.dense", width, width)
    if config.labels and config.root == "bert":
        found |= _linear("classifier", config.labels, width)
    elif config.labels:
        found |= _linear("classifier.dense", width, width) | _linear("classifier.out_proj", config.labels, width)
    return found


def _layer(config: EncoderConfig) -> dict[str, Shape]:
    width, found = config.width, {}
    for name in ("query", "key", "value"):
        found |= _linear(f"attention.self.{name}", width, width)
    found |= _linear("attention.output.dense", width, width) | _norm(config, "attention.output.LayerNorm")
    found |= _linear("intermediate.dense", config.hidden, width)
    return found | _linear("output.dense", width, config.hidden) | _norm(config, "output.LayerNorm")
