"""The keys of `adapter_model.safetensors`: the module and the part of it that each one names, both ways."""

import re
from typing import Literal, NamedTuple

from lora_jax.errors import CheckpointError

PREFIX = "base_model.model."

Part = Literal["a", "b", "magnitude", "b_bias", "unused", "unknown"]

# What follows the module's name. A live model has the adapter's name in it: `lora_A.default.weight`.
_PARTS = re.compile(
    r"(?P<module>.+?)\.(?:"
    r"lora_A(?:\.(?!weight$)[^.]+)?\.(?P<a>weight)|"
    r"lora_B(?:\.(?!weight$|bias$)[^.]+)?\.(?:(?P<b>weight)|(?P<b_bias>bias))|"
    r"lora_embedding_(?:(?P<ea>A)|(?P<eb>B))(?:\.[^.]+)?|"
    r"lora_(?P<magnitude>magnitude_vector)(?:\.[^.]+)?(?:\.weight)?"
    r")"
)
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module)\.")
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.[^.]+\.(?P<rest>.+)")
_VARIANTS = {
    "lora_diag": "KaSA, which changes the base's weights",
    "lora_velora_embed": "VeLoRA, which stores projections of activations",
    "lora_E": "AdaLoRA, whose ranks are pruned in training",
}


class Key(NamedTuple):
    """What a key names: part of a module's factors, or (`part` None) a whole tensor of the base."""

    name: str
    part: Part | None = None
    embedding: bool = False


def parse(where: str, raw: str) -> Key:
    """Take a key apart.

    Raises:
      CheckpointError: it belongs to a variant that cannot be represented.

    Example:
      >>> parse("file", "base_model.model.layers.0.q.lora_A.weight")
      Key(name='layers.0.q', part='a', embedding=False)
      >>> parse("file", "base_model.model._orig_mod.head.weight")
      Key(name='head.weight', part=None, embedding=False)
    """
    key = _WRAPPERS.sub("", _WRAPPERS.sub("", raw).removeprefix(PREFIX))
    match = _PARTS.fullmatch(key)
    if match is None:
        return _whole(where, raw, key)
    module = match["module"]
    if re.search(r"\.base_layer\.(?!base_layer)", module):
        raise CheckpointError(
            f"{where}: {raw} is part of an adapted torch.nn.MultiheadAttention, where PEFT adds the update of out_proj "
            "twice, so no weight gives what it computes. Adapt the projections as separate modules."
        )
    named = {name: text for name, text in match.groupdict().items() if name != "module" and text}
    part = next(iter(named))
    if part in ("ea", "eb"):
        return Key(module, "a" if part == "ea" else "b", embedding=True)
    return Key(module, part)  # type: ignore[arg-type]


def _whole(where: str, raw: str, key: str) -> Key:
    for name, reason in _VARIANTS.items():
        if f".{name}" in key:
            raise CheckpointError(f"{where}: {raw} belongs to {reason}. Such an adapter cannot be represented here.")
    saved = _SAVED.fullmatch(key)
    if saved:
        return Key(f"{saved['module']}.{saved['rest']}")
    if ".original_module." in key:
        # The base's copy beside a module that is saved whole; PEFT writes its bias with bias="all" and never uses it.
        return Key(key, "unused")
    if ".lora_" in key or key.startswith("lora_"):
        return Key(key, "unknown")
    key = re.sub(r"\.trainable_tokens_delta\.[^.]+$", ".trainable_tokens_delta", key)
    return Key(re.sub(r"\.base_layer\.(weight|bias)$", r".\1", key))


def unparse(module: str, part: str, *, embedding: bool = False) -> str:
    """The key of a part of a module's factors, as PEFT writes it.

    >>> unparse("wte", "a", embedding=True), unparse("q", "b_bias")
    ('base_model.model.wte.lora_embedding_A', 'base_model.model.q.lora_B.bias')
    """
    if embedding and part in ("a", "b"):
        return f"{PREFIX}{module}.lora_embedding_{part.upper()}"
    suffix = {"a": "lora_A.weight", "b": "lora_B.weight", "b_bias": "lora_B.bias", "magnitude": "lora_magnitude_vector"}
    return f"{PREFIX}{module}.{suffix[part]}"
