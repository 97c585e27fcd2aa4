"""What a `config.json` says about attention: its scale, the windows of its layers, and their ropes."""

from typing import Any

from lora_jax.models.families import Family
from lora_jax.models.fields import Fields
from lora_jax.models.ropes import Rope, read_rope

_FULL, _SLIDING = "full_attention", "sliding_attention"
# What gpt-oss has where a file says nothing.
_GPT_OSS_ROPE = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip


def attention(fields: Fields, kind: str, family: Family) -> dict[str, Any]:
    """Fields of `DecoderConfig` that are about attention.

    Raises:
      CheckpointError: a field is wrong, or describes what is not supported.
    """
    count = fields.size("num_hidden_layers")
    rotated = _rotated(fields, kind, count)
    types = _types(fields, family, rotated)
    ropes, rope_of = _ropes(fields, kind, family, types, rotated)
    return {"scale": _scale(fields, kind), "windows": _windows(fields, family, types), "ropes": ropes,
            "rope_of": rope_of}  # fmt: skip


def _head_dim(fields: Fields) -> int:
    return fields.size("head_dim", fields.size("hidden_size") // fields.size("num_attention_heads"))


def _scale(fields: Fields, kind: str) -> float:
    if kind in ("gemma2", "gemma3_text"):
        return fields.number("query_pre_attn_scalar", 256) ** -0.5
    if kind == "gpt2" and not fields.switch("scale_attn_weights", True):
        return 1.0
    return _head_dim(fields) ** -0.5


def _rotated(fields: Fields, kind: str, count: int) -> list[bool]:
    """For each layer, whether it rotates queries and keys."""
    if kind != "smollm3":
        return [True] * count
    every = fields.size("no_rope_layer_interval", 4)
    given = fields.get("no_rope_layers", [(layer + 1) % every != 0 for layer in range(count)])
    if not isinstance(given, list) or len(given) < count or not all(each in (0, 1) for each in given):
        raise fields.error("no_rope_layers", given, f"must have a 0 or 1 for each of {count} layers")
    return [bool(each) for each in given[:count]]


def _types(fields: Fields, family: Family, rotated: list[bool]) -> list[str]:
    """For each layer `full_attention` or `sliding_attention`; where all have a window, that is not told here."""
    count, given = len(rotated), fields.get("layer_types")
    last, every = fields.get("max_window_layers", 28), family.full_every
    if isinstance(last, bool) or not isinstance(last, int):
        raise fields.error("max_window_layers", last, "must be a number of layers")
    for name in ("_sliding_window_pattern", "sliding_window_pattern"):
        every = every if fields.get(name) is None else fields.size(name)
    if given is None:
        if family.windows == "layers":
            return [_SLIDING if (layer + 1) % every else _FULL for layer in range(count)]
        if family.windows != "layers switched" or not fields.switch("use_sliding_window"):
            return [_FULL] * count
        # SmolLM3 has windows where it does not rotate, Qwen above a layer.
        sliding = [not each for each in rotated] if not all(rotated) else [layer >= last for layer in range(count)]
        return [_SLIDING if each else _FULL for each in sliding]
    if not isinstance(given, list) or len(given) != count or not {*given} <= {_FULL, _SLIDING}:
        raise fields.error("layer_types", given, f"must have {_FULL!r} or {_SLIDING!r} for each of {count} layers")
    if not family.windows.startswith("layers") and _SLIDING in given and not _all_slide(fields, family):
        raise fields.error("layer_types", given, "has windows, which this family does not tell apart by layer")
    return given


def _all_slide(fields: Fields, family: Family) -> bool:
    return family.windows == "all" and {*fields.get("layer_types")} == {_SLIDING}


def _windows(fields: Fields, family: Family, types: list[str]) -> tuple[int, ...]:
    """For each layer the size of its window, or 0."""
    size = fields.nullable("sliding_window", family.window)
    if "switched" in family.windows and not fields.switch("use_sliding_window"):
        size = None
    elif not family.windows and size is not None:
        raise fields.error("sliding_window", size, "is not supported: this family has no windows")
    if size is not None:
        size = fields.size("sliding_window", family.window)
    if family.windows.startswith("all"):
        return (size or 0,) * len(types)
    if _SLIDING in types and size is None and family.windows == "layers":
        raise fields.error("sliding_window", size, f"must be a size, as layer_types has {_SLIDING!r}")
    return tuple(size or 0 if each == _SLIDING else 0 for each in types)


def _ropes(
    fields: Fields, kind: str, family: Family, types: list[str], rotated: list[bool]
) -> tuple[tuple[Rope, ...], tuple[int, ...]]:
    """The different ropes, and for each layer which it has."""
    if not family.theta:
        return (), (-1,) * len(types)
    by_type = _by_type(fields, kind, family, {*types})
    ropes = tuple(dict.fromkeys(by_type[each] for each in types))
    order = [ropes.index(by_type[each]) if on else -1 for each, on in zip(types, rotated, strict=True)]
    return ropes, tuple(order)


def _by_type(fields: Fields, kind: str, family: Family, types: set[str]) -> dict[str, Rope]:
    """The rope of each type of layers; in one form of the file they are nested by type, in others there is one."""
    outside = fields.first(("rope_theta", "rotary_emb_base"), family.theta)
    parts = fields.first(("partial_rotary_factor", "rotary_pct"), family.rotary or 1.0)
    longest, original = fields.size("max_position_embeddings", 2048), None
    if fields.get("original_max_position_embeddings") is not None:
        original = fields.size("original_max_position_embeddings")
    local = fields.number("rope_local_base_freq", 10_000.0) if kind == "gemma3_text" else 0.0
    fields.expect("rope_interleaved", False, "is not supported")
    name = "rope_scaling" if fields.get("rope_scaling") is not None else "rope_parameters"
    fields.get("rope_parameters")
    given = fields.nested(name) if fields.get(name) else None
    if given is None:
        given = Fields(fields.where, _GPT_OSS_ROPE if kind == "gpt_oss" else {})

    def rope(inside: Fields, theta: float) -> Rope:
        part = inside.number("partial_rotary_factor", parts)
        dim = int(_head_dim(fields) * part)
        if part != 1.0 and not family.rotary:
            raise inside.error("partial_rotary_factor", part, "is not supported in this family")
        if dim % 2 or not 0 < dim <= _head_dim(fields):
            raise inside.error("partial_rotary_factor", part, f"rotates {dim} features, which must be even")
        return read_rope(inside, theta, dim, longest, original)

    if given.get(_FULL) is None and given.get(_SLIDING) is None:
        # Gemma 3 scales only the ropes of layers without windows.
        windowed = {_SLIDING: rope(Fields(fields.where, {}), local)} if local else {}
        return dict.fromkeys(types, rope(given, outside)) | windowed
    found = {each: rope(given.nested(each), local if local and each == _SLIDING else outside) for each in types}
    given.check_all_read()
    return found
