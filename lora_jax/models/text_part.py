"""The language model in a directory of a model that sees images too: its config and its tensors, and what is beside."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from lora_jax.errors import CheckpointError

WITH_IMAGES = {"gemma3": "gemma3_text"}
"""By `model_type`: that of its language model."""
ROOT = "model.language_model"
"""What transformers 5 calls it in the whole."""

# What transformers' configs have where files say nothing, as those of the Hub do.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "gemma3": {
        "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131_072,
    },
}  # fmt: skip
_OF_THE_WHOLE = ("architectures", "id2label", "problem_type", "tie_word_embeddings")
_HEAD = re.compile(r"(?:language_model\.)?((?:lm_head|score)\..*)")
_BODY = re.compile(r"(?:language_model\.model|model\.language_model)\.(.*)")

_Stored = TypeVar("_Stored")


def text_config(where: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """What the `config.json` of the language model alone would say.

    Args:
      where: the file, for errors.
      values: its content, of a model that sees images.

    Raises:
      CheckpointError: there is no such part, or another one.
    """
    kind, inner = values["model_type"], values.get("text_config")
    if not isinstance(inner, Mapping) or inner.get("model_type", WITH_IMAGES[kind]) != WITH_IMAGES[kind]:
        raise CheckpointError(
            f"{where}: text_config={inner!r} must describe a language model of model_type {WITH_IMAGES[kind]!r}"
        )
    whole = {name: values[name] for name in _OF_THE_WHOLE if name in values}
    return {**_DEFAULTS[kind], **inner, **whole, "model_type": WITH_IMAGES[kind]}


def split_tensors(tensors: Mapping[str, _Stored]) -> tuple[dict[str, _Stored], dict[str, _Stored]]:
    """The language model's tensors and the others, by the names that transformers 5 has for them.

    >>> split_tensors({"language_model.model.norm.weight": 1, "vision_tower.post_layernorm.bias": 2})
    ({'model.language_model.norm.weight': 1}, {'model.vision_tower.post_layernorm.bias': 2})
    """
    found, beside = dict[str, Any](), dict[str, Any]()
    for name, each in tensors.items():
        if match := _BODY.fullmatch(name):
            found[f"{ROOT}.{match[1]}"] = each
        elif match := _HEAD.fullmatch(name):
            found[match[1]] = each
        else:
            beside[f"model.{name.removeprefix('model.')}"] = each
    return found, beside
