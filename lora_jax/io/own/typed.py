"""Values from JSON beside the annotations of the dataclass that is to hold them: a damaged file is noticed here."""

import types
from math import isfinite
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def mistyped(kind: type, values: dict[str, Any]) -> str | None:
    """The first field whose value is not what its annotation says, or None; what is no plain type is not looked at.

    Example:
      >>> from lora_jax.adapter.site import Site
      >>> mistyped(Site, {"path": "w", "shape": (3, 4), "kind": "dense"}), mistyped(Site, {"kind": {}})
      (None, 'kind')
    """
    hints = get_type_hints(kind)
    return next((name for name, value in values.items() if name in hints and not _holds(hints[name], value)), None)


def _holds(hint: Any, value: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_holds(each, value) for each in inner)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin is tuple and len(inner) == 2 and inner[1] is Ellipsis:
        return isinstance(value, (tuple, list)) and all(_holds(inner[0], each) for each in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63
    return isinstance(value, hint) if hint in (bool, str, type(None)) else True
