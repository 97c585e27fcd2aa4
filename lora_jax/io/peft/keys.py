"""The keys of `adapter_model.safetensors`: the module and the part of it that each one names, both ways."""

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

from lora_jax.errors import CheckpointError
from lora_jax.io.formats.recognise import PEFT_FILE

WEIGHTS = PEFT_FILE
PREFIX = "base_model.model."

Part = Literal["a", "b", "magnitude", "b_bias", "values", "outputs", "unused", "unknown"]

Form = Literal["lora", "embedding", "adalora", "vera"]
"""How the keys of a module are spelled."""

# What follows the module's name. A live model has the adapter's name in it: `lora_A.default.weight`.
_PARTS = re.compile(
    r"(?P<module>.+?)\.(?:"
    r"lora_A(?:\.(?!weight$)[^.]+)?\.(?P<a>weight)|"
    r"lora_B(?:\.(?!weight$|bias$)[^.]+)?\.(?:(?P<b>weight)|(?P<b_bias>bias))|"
    r"lora_embedding_(?:(?P<ea>A)|(?P<eb>B))(?:\.[^.]+)?|"
    r"lora_(?P<magnitude>magnitude_vector)(?:\.[^.]+)?(?:\.weight)?|"
    r"lora_(?:(?P<sa>A)|(?P<sb>B)|(?P<values>E))(?:\.(?!weight$|bias$)[^.]+)?|"
    r"vera_lambda_(?:(?P<outputs>b)|(?P<vd>d))(?:\.[^.]+)?"
    r")"
)
_SPELLED: Mapping[str, tuple[Part, Form]] = {
    "a": ("a", "lora"), "b": ("b", "lora"), "b_bias": ("b_bias", "lora"), "magnitude": ("magnitude", "lora"),
    "ea": ("a", "embedding"), "eb": ("b", "embedding"),
    "sa": ("a", "adalora"), "sb": ("b", "adalora"), "values": ("values", "adalora"),
    "outputs": ("outputs", "vera"), "vd": ("values", "vera"),
}  # fmt: skip
_SHARED = re.compile(r"(?:base_model\.)?vera_(?:(?P<a>A)|(?P<b>B))(?:\.[^.]+)?")
_SUFFIXES: Mapping[Form, Mapping[str, str]] = {
    "lora": {"a": "lora_A.weight", "b": "lora_B.weight", "b_bias": "lora_B.bias"},
    "embedding": {"a": "lora_embedding_A", "b": "lora_embedding_B"},
    "adalora": {"a": "lora_A", "b": "lora_B", "values": "lora_E"},
    "vera": {"values": "vera_lambda_d", "outputs": "vera_lambda_b"},
}
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module)\.")
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.[^.]+\.(?P<rest>.+)")
_VARIANTS = {
    "lora_diag": "KaSA, which changes the base's weights",
    "lora_velora_embed": "VeLoRA, which stores projections of activations",
}


class Key(NamedTuple):
    """What a key names: part of a module's factors (of all, if `name` is empty), or (`part` None) a whole tensor."""

    name: str
    part: Part | None = None
    form: Form = "lora"


def parse(where: str, raw: str) -> Key:
    """Take a key apart.

    Raises:
      CheckpointError: it belongs to a variant that cannot be represented.

    Example:
      >>> parse("file", "base_model.model.layers.0.q.lora_A.weight")
      Key(name='layers.0.q', part='a', form='lora')
      >>> parse("file", "base_model.model._orig_mod.head.weight")
      Key(name='head.weight', part=None, form='lora')
      >>> parse("file", "base_model.vera_A")
      Key(name='', part='a', form='vera')
    """
    shared = _SHARED.fullmatch(raw)
    if shared is not None:
        return Key("", "a" if shared["a"] else "b", "vera")
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
    return Key(module, *_SPELLED[next(iter(named))])


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
    if re.search(r"(^|\.)(lora|vera)_", key):
        return Key(key, "unknown")
    key = re.sub(r"\.trainable_tokens_delta\.[^.]+$", ".trainable_tokens_delta", key)
    return Key(re.sub(r"\.base_layer\.(weight|bias)$", r".\1", key))


def unparse(module: str, part: str, form: Form = "lora") -> str:
    """The key of a part of a module's factors, as PEFT writes it.

    >>> unparse("wte", "a", "embedding"), unparse("q", "b_bias"), unparse("q", "a", "vera")
    ('base_model.model.wte.lora_embedding_A', 'base_model.model.q.lora_B.bias', 'base_model.vera_A')
    """
    if form == "vera" and part in ("a", "b"):
        return f"base_model.vera_{part.upper()}"
    return f"{PREFIX}{module}.{_SUFFIXES[form].get(part, 'lora_magnitude_vector')}"
