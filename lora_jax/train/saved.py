"""Options out of a JSON file, which anyone may have written: each has the type that its field says."""

from dataclasses import is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def converted(value: Any, kind: Any) -> Any:
    """A value of JSON as a field of that type takes it; fields that a dataclass has got since take their defaults.

    Args:
      value: what `json.loads` returned.
      kind: a type, or a hint: a union, a `Literal`, a tuple of any length, a dataclass.

    Raises:
      TypeError: the value is none of that type.

    Example:
      >>> converted(["query", "value"], tuple[str, ...])
      ('query', 'value')
      >>> converted("3", int)
      Traceback (most recent call last):
        ...
      TypeError: '3' is no int
    """
    origin, args = get_origin(kind), get_args(kind)
    if is_dataclass(kind) and isinstance(value, dict):
        return kind(**converted_fields(value, kind))  # type: ignore[operator]
    if origin in (UnionType, Union):
        return None if value is None else converted(value, args[0])
    if origin is tuple and isinstance(value, list):
        return tuple(converted(each, args[0]) for each in value)
    if (kind is Path and isinstance(value, str)) or (kind is float and type(value) in (int, float)):
        return kind(value)
    if type(value) is kind or (origin is Literal and value in args):
        return value
    raise TypeError(f"{value!r:.80} is no {getattr(kind, '__name__', kind)}")


def converted_fields(values: dict[str, Any], kind: Any) -> dict[str, Any]:
    """Fields of a dataclass, by name.

    Raises:
      TypeError: there is no such field, or its value is none of its type.
    """
    hints, fields = get_type_hints(kind), {}
    for name, value in values.items():
        if name not in hints:
            raise TypeError(f"there is no option {name}")
        try:
            fields[name] = converted(value, hints[name])
        except (TypeError, OverflowError) as error:
            raise TypeError(f"{name}: {error}") from None
    return fields
