"""Values out of JSON, which anyone may have written, as fields of dataclasses: each has the type of its field."""

from dataclasses import is_dataclass
from math import isfinite
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_PLAIN = (bool, int, str, NoneType)
_LARGEST = 1 << 63


def converted(value: Any, kind: Any) -> Any:
    """A value of JSON as a field of that type takes it; fields that a dataclass has got since take their defaults.

    Args:
      value: what `json.loads` returned.
      kind: a type, or a hint: a union, a `Literal`, a tuple of any length, a dataclass. Of any other the value is taken
        as it is.

    Raises:
      TypeError: the value is none of that type.
      OverflowError: it is an integer that no float can be.

    Example:
      >>> converted(["query", "value"], tuple[str, ...]), converted(3, float | None)
      (('query', 'value'), 3.0)
      >>> converted("3", int)
      Traceback (most recent call last):
        ...
      TypeError: '3' is no int
    """
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return _first(value, kind, args)
    if origin is tuple and isinstance(value, (list, tuple)) and args[1:] == (...,):
        return tuple(converted(each, args[0]) for each in value)
    if origin is tuple and isinstance(value, (list, tuple)) and len(args) == len(value):
        return tuple(map(converted, value, args))
    if is_dataclass(kind) and isinstance(value, dict):
        return kind(**converted_fields(value, kind))  # type: ignore[operator]
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value):
        return float(value)
    if not _holds(kind, origin, args, value):
        raise TypeError(f"{value!a:.80} is no {getattr(kind, '__name__', kind)}")
    return value


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


def _first(value: Any, kind: Any, options: tuple[Any, ...]) -> Any:
    """The value as the first of several types takes it."""
    if len(others := [each for each in options if each is not NoneType]) == 1 and value is not None:
        return converted(value, others[0])
    for each in options:
        try:
            return converted(value, each)
        except (TypeError, OverflowError):
            continue
    raise TypeError(f"{value!a:.80} is no {kind}")


def _holds(kind: Any, origin: Any, args: tuple[Any, ...], value: Any) -> bool:
    if kind is int:
        return type(value) is int and -_LARGEST <= value < _LARGEST
    if origin is Literal:
        return isinstance(value, str) and value in args
    if kind in _PLAIN:
        return isinstance(value, kind)
    return not (kind in (float, Path) or origin is tuple or (is_dataclass(kind) and not isinstance(value, kind)))  # type: ignore[arg-type]
