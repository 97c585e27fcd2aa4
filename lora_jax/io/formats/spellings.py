"""Keys of tools that store PEFT's factors under other names: kohya, ComfyUI, diffusers, loralib."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from lora_jax.errors import CheckpointError

TABLES = frozenset(
    ("embed_tokens", "wte", "tok_embeddings", "word_embeddings", "token_embedding", "embed_in", "shared")
)
"""What models call the modules that hold a look-up table."""

_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
"""What diffusers once called the projections of a text encoder."""

_SPELLINGS = tuple(
    re.compile(pattern)
    for pattern in (
        # kohya's sd-scripts and ComfyUI, dotted or flattened.
        r"(?P<module>.+)\.lora_(?P<part>down|up)\.weight",
        # diffusers: LoRACompatibleLinear, then text encoders, then processors of attention.
        r"(?P<module>.+)\.lora\.(?P<part>down|up)\.weight",
        r"(?P<module>.+)\.lora_linear_layer\.(?P<part>down|up)\.weight",
        r"(?P<module>.+)\.processor\.(?P<processor>\w+)_lora\.(?P<part>down|up)\.weight",
        r"(?P<module>.+)\.(?P<text>to_q|to_k|to_v|to_out)_lora\.(?P<part>down|up)\.weight",
    )
)
_LORALIB = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])")
_PARTS = {"down": "A", "up": "B", "A": "A", "B": "B"}
_ALPHA = ".alpha"
_FACTOR = ".lora_"


class Spelled(NamedTuple):
    """Tensors under PEFT's keys, and the alphas of modules that the file has as tensors."""

    arrays: dict[str, np.ndarray]
    alphas: dict[str, np.ndarray]


def respelled(where: str, arrays: Mapping[str, np.ndarray]) -> Spelled:
    """Bring the keys of other tools to PEFT's; what is neither factor nor alpha stays as it is.

    Args:
      where: the file, for error messages.
      arrays: tensors by key.

    Raises:
      CheckpointError: two keys mean one tensor, or an alpha is no number.

    Example:
      >>> found = respelled("x", {"q.lora_down.weight": np.ones((2, 4)), "q.alpha": np.float32(3)})
      >>> list(found.arrays), {name: float(alpha) for name, alpha in found.alphas.items()}
      (['q.lora_A.weight'], {'q': 3.0})
    """
    adalora = any(key.endswith(".lora_E") or ".lora_E." in key for key in arrays)
    found: dict[str, np.ndarray] = {}
    for raw, array in arrays.items():
        key = _key(raw, adalora)
        if key in found or (key != raw and key in arrays):
            raise CheckpointError(f"{where}: {raw} and another key mean the same tensor, {key}: keep one of them")
        found[key] = array
    alphas = {}
    modules = {_plain(key.partition(_FACTOR)[0]) for key in found if _FACTOR in key}
    for key in [key for key in found if key.endswith(_ALPHA)]:
        module = key.removesuffix(_ALPHA)
        # A module that is saved whole may have a parameter of that name.
        if _plain(module) in modules:
            alphas[module] = _number(where, key, found.pop(key))
    return Spelled(found, alphas)


def _key(raw: str, adalora: bool) -> str:
    match = next(filter(None, (pattern.fullmatch(raw) for pattern in _SPELLINGS)), None)
    if match is None:
        # AdaLoRA's keys look the same, with a third beside them.
        match = None if adalora else _LORALIB.fullmatch(raw)
        if match is not None and match["module"].rpartition(".")[2] in TABLES:
            return f"{match['module']}.lora_embedding_{match['part']}"
    if match is None:
        return raw
    return f"{_module(match.groupdict())}.lora_{_PARTS[match['part']]}.weight"


def _module(named: Mapping[str, str | None]) -> str:
    module, processor, text = named["module"], named.get("processor"), named.get("text")
    if processor:
        # diffusers keeps the output of attention in a list, before dropout.
        return f"{module}.{'to_out.0' if processor == 'to_out' else processor}"
    return f"{module}.{_TEXT[text]}" if text else str(module)


def _plain(module: str) -> str:
    return module.removeprefix("base_model.model.")


def _number(where: str, key: str, array: np.ndarray) -> np.ndarray:
    if array.size != 1 or array.dtype.kind == "b" or not (array.astype(np.float32) != 0).all():
        raise CheckpointError(f"{where}: {key} of shape {array.shape} must be a module's alpha: one number, and not 0")
    return array.reshape(())
