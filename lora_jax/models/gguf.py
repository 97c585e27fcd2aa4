"""GGUF files of llama.cpp as Hugging Face checkpoints: config, and float weights by name in `(out, in)` layout."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.errors import CheckpointError, listed
from lora_jax.regular import unreadable

_INSTALL = 'Reading GGUF files needs the package gguf: pip install "lora_jax[gguf]"'

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_ROPE_FACTORS = "rope_freqs.weight"

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""What `general.architecture` may say; mistral and SmolLM are `llama` there."""

_LLAMA_3 = {
    "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
"""What all Llama 3.1 to 3.3 have in common; the file has the factors of the frequencies that come of it."""


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file, dequantised when it is read.

    Attributes:
      name: in a Hugging Face checkpoint.
      shape: `(out, in)` of a kernel.
      dtype: of `read`, by its name in safetensors files.
    """

    name: str
    shape: tuple[int, ...]
    _stored: Any
    _heads: int
    dtype: str = "F32"

    def read(self) -> np.ndarray:
        """Its values, float32.

        Raises:
          CheckpointError: gguf cannot dequantise its type.
        """
        from gguf.quants import dequantize

        kind = self._stored.tensor_type
        try:
            values = dequantize(self._stored.data, kind).astype(np.float32, copy=False)
        except RuntimeError as error:  # What Python raises for what is not implemented.
            raise CheckpointError(f"{self._stored.name} is {kind.name}, which the package gguf cannot read") from error
        if not self._heads:
            return values
        pairs = values.reshape(self._heads, -1, 2, *values.shape[1:])
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


@dataclass(frozen=True)
class Gguf:
    """An open GGUF file.

    Attributes:
      path: the file.
      metadata: its keys and values; lists as lists.
      config: what the model's `config.json` would say.
      name: the repository of the Hugging Face Hub that it says it was converted from, or empty.
      tensors: by their names in a Hugging Face checkpoint.
    """

    path: Path
    metadata: Mapping[str, Any]
    config: Mapping[str, Any]
    name: str
    tensors: Mapping[str, GgufTensor]


def read_gguf(path: str | PathLike[str]) -> Gguf:
    """Open a GGUF file, and say as a `config.json` what is inside.

    Nothing but the metadata is read yet. Weights of every type that the package gguf dequantises become float32.

    Args:
      path: the file.

    Raises:
      CheckpointError: it is no GGUF file, or of an architecture, or with a setting or tensor, that is not known here.
      ImportError: the package gguf is not installed.

    Example:
      >>> model = read_gguf("SmolLM2-135M-Instruct.Q4_1.gguf")  # doctest: +SKIP
      >>> model.config["model_type"], model.tensors["model.norm.weight"].read().shape  # doctest: +SKIP
      ('llama', (576,))
    """
    path = Path(path)
    reader = _reader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    stored = {tensor.name: tensor for tensor in reader.tensors}
    if metadata.get("split.count", 0) > 1:
        raise CheckpointError(
            f"{path} is one of {metadata['split.count']} parts: join them with llama-gguf-split --merge"
        )
    try:
        config = _config(metadata, stored)
        tensors = [_tensor(config, each) for name, each in stored.items() if name != _ROPE_FACTORS]
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return Gguf(path, metadata, config, _converted_from(metadata), {tensor.name: tensor for tensor in tensors})


def _converted_from(metadata: Mapping[str, Any]) -> str:
    """The repository of the weights before they were converted; not that of the file, nor of what they were tuned from.

    >>> _converted_from({"general.source.url": "https://huggingface.co/org/model"})
    'org/model'
    """
    for name in ("source.huggingface.repository", "source.repo_url", "source.url"):
        found = re.fullmatch(
            r"(?:https://huggingface\.co/)?([\w.-]+/[\w.-]+)/?", str(metadata.get(f"general.{name}", ""))
        )
        if found:
            return found[1]
    return ""


def _reader(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError(_INSTALL) from error
    if what := unreadable(path):
        raise CheckpointError(f"{path} is {what}, not a GGUF file")
    try:
        return GGUFReader(path)
    # It checks nothing but the first bytes, so what is cut off or damaged ends in errors of NumPy and Python.
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError, TypeError) as error:
        raise CheckpointError(f"{path} is no whole GGUF file ({error}); fetch it again") from error


def _tensor(config: Mapping[str, Any], stored: Any) -> GgufTensor:
    heads = 0
    if config["model_type"] == "llama":
        # There the two features that are rotated together are neighbours; Hugging Face has all first ones first.
        counts = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
        heads = config.get(counts.get(stored.name.split(".")[-2], ""), 0)
    return GgufTensor(_hf_name(stored.name), tuple(map(int, stored.shape[::-1])), stored, heads)


def _hf_name(name: str) -> str:
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if block and block[2] in _BLOCK:
        return f"model.layers.{block[1]}.{_BLOCK[block[2]]}.{block[3]}"
    top, _, kind = name.rpartition(".")
    if top in _TOP and kind == "weight":
        return f"{_TOP[top]}.weight"
    raise CheckpointError(
        f"no place is known for the tensor {name!r}; known are {listed(sorted({*_TOP, *_BLOCK}), count=20)}"
    )


def _config(metadata: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` of the metadata; a key of the architecture that it does not read is an error."""
    family = metadata.get("general.architecture")
    if family not in ARCHITECTURES:
        raise CheckpointError(f"architecture {family!r} is not known; there are {', '.join(ARCHITECTURES)}")
    left = {name.removeprefix(f"{family}."): value for name, value in metadata.items() if name.startswith(f"{family}.")}
    config = {"model_type": family, "architectures": [f"{family.title()}ForCausalLM"], **_sizes(left, stored)}
    config |= {"hidden_act": "silu", "tie_word_embeddings": "output.weight" not in stored, "torch_dtype": "float32"}
    if family == "llama":
        config |= {"attention_bias": "blk.0.attn_q.bias" in stored, "mlp_bias": False}
    if scaling := _rope_scaling(left, config, stored):
        config["rope_scaling"] = scaling
    config |= _special(metadata)
    if unknown := [name for name, value in left.items() if value]:
        raise CheckpointError(
            f"the setting {family}.{unknown[0]} = {left[unknown[0]]!r} is not known, and may change numbers"
        )
    return config


def _special(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Ids of the special tokens; a turn of a conversation may end with another token than a text."""
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "padding")}
    ends = list(dict.fromkeys(each for each in (ids["eos"], ids["eot"]) if each is not None))
    named = {
        "bos_token_id": ids["bos"],
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": ids["padding"],
    }
    return {name: value for name, value in named.items() if value is not None}


def _sizes(left: dict[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes, taken out of what is left to be read."""

    def take(name: str, *default: Any) -> Any:
        if name not in left and not default:
            raise CheckpointError(f"the setting {name} is missing")
        return left.pop(name, *default)

    if "token_embd.weight" not in stored:
        raise CheckpointError("the tensor token_embd.weight is missing")
    width, heads = take("embedding_length"), take("attention.head_count")
    rotated = take("rope.dimension_count", None)
    head_dim = take("attention.key_length", rotated or width // heads)
    if {rotated or head_dim, take("attention.value_length", head_dim)} != {head_dim}:
        raise CheckpointError(f"heads of {head_dim}, of which {rotated} are rotated or values differ, are not known")
    take("vocab_size", None)  # Files have more or fewer rows than that.
    return {
        "vocab_size": int(stored["token_embd.weight"].shape[1]), "hidden_size": width,
        "intermediate_size": take("feed_forward_length"), "num_hidden_layers": take("block_count"),
        "num_attention_heads": heads, "num_key_value_heads": take("attention.head_count_kv", heads),
        "head_dim": head_dim, "rms_norm_eps": _short(take("attention.layer_norm_rms_epsilon")),
        "rope_theta": _short(take("rope.freq_base", 10_000.0)), "max_position_embeddings": take("context_length"),
    }  # fmt: skip


def _rope_scaling(left: dict[str, Any], config: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any] | None:
    """`rope_scaling` of the settings, or of the factors that llama.cpp keeps for Llama 3.1 and later."""
    kind, factor = left.pop("rope.scaling.type", "none"), _short(left.pop("rope.scaling.factor", 1.0))
    factor = _short(left.pop("rope.scale_linear", factor))  # How old files call it.
    original = left.pop("rope.scaling.original_context_length", config["max_position_embeddings"])
    left.pop("rope.scaling.finetuned", None)
    if _ROPE_FACTORS in stored:
        return _llama3(stored[_ROPE_FACTORS].data.view(np.float32), config)
    if kind == "yarn":
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    if kind not in ("none", "linear"):
        raise CheckpointError(f"rope.scaling.type {kind!r} is not known; there are none, linear, yarn")
    return {"rope_type": "linear", "factor": factor} if factor != 1.0 else None


def _llama3(factors: np.ndarray, config: Mapping[str, Any]) -> dict[str, Any]:
    """The scaling of which the factors come; they must be those that Llama 3 has for its lowest frequency."""
    scaling = _LLAMA_3 | {"factor": round(float(factors.max()), 3)}
    half = config["head_dim"] // 2
    waves = 2 * math.pi * config["rope_theta"] ** (np.arange(half) / half)
    turns = scaling["original_max_position_embeddings"] / waves
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise CheckpointError(f"the factors in {_ROPE_FACTORS} are not those of Llama 3")
    return scaling


def _short(value: float) -> float:
    """A float32 as it was typed: 1e-05 and not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
