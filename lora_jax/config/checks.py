"""Normalising and checking one field of a configuration at a time."""

import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeAlias

import jax.numpy as jnp

from lora_jax import regex
from lora_jax.errors import ConfigError
from lora_jax.paths import ALL_LINEAR, components

_LARGEST = float(jnp.finfo(jnp.float32).max)

Patterns: TypeAlias = Mapping[str, Any] | Collection[tuple[str, Any]]
Tokens: TypeAlias = Collection[int] | Mapping[str, Collection[int]] | Collection[tuple[str, Collection[int]]]


def pairs(patterns: Patterns) -> tuple[tuple[str, Any], ...]:
    """Patterns as pairs, in order, whether they came as a mapping or as pairs."""
    items: Any = patterns.items() if isinstance(patterns, Mapping) else patterns
    return tuple((key, value) for key, value in items)


def as_tuple(value: Any) -> tuple[Any, ...]:
    """A value that may stand alone, as a tuple; None is empty, and a set is sorted, so that order never varies."""
    if value is None:
        return ()
    if isinstance(value, str) or not isinstance(value, Iterable):
        return (value,)
    return tuple(sorted(value)) if isinstance(value, (set, frozenset)) else tuple(value)


def _number(field: str, value: Any, convert: Callable[[Any], Any], good: Callable[[Any], bool], needs: str) -> Any:
    try:
        number = convert(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or isinstance(value, (bool, str)) or not good(number):
        raise ConfigError(f"{field}={value!r} must be {needs}")
    return number


def positive_int(field: str, value: Any) -> int:
    """The value as a positive int."""
    return _number(field, value, operator.index, lambda number: 0 < number < 1 << 31, "a positive integer")


def seed(field: str, value: Any) -> int:
    """The value as a seed of random numbers."""
    return _number(field, value, operator.index, lambda number: 0 <= number < 1 << 32, "an integer from 0 to 2**32 - 1")


def sequence(field: str, value: Any) -> tuple[int, ...]:
    """The value as numbers of tokens, in order."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ConfigError(f"{field}={value!r} must be a sequence of token numbers")
    return tuple(_number(field, each, operator.index, lambda number: number >= 0, "token numbers") for each in value)


def positive(field: str, value: Any) -> float:
    """The value as a positive float that float32 has room for."""
    return _number(field, value, float, lambda number: 0 < number <= _LARGEST, "a positive number, finite in float32")


def ranks(field: str, value: Any) -> int | tuple[int, ...]:
    """A positive int; or one for each layer of a stack, of which some but not all may be 0."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        return positive_int(field, value)
    given = tuple(
        _number(field, each, operator.index, lambda number: number >= 0, "a rank, or one for each layer of a stack")
        for each in value
    )
    return given if any(given) else positive_int(field, value)


def alphas(field: str, value: Any) -> float | tuple[float, ...]:
    """A positive float, or one for each layer of a stack."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        return positive(field, value)
    return tuple(positive(field, each) for each in value) or positive(field, value)


def probability(field: str, value: Any) -> float:
    """The value as a probability below 1."""
    return _number(field, value, float, lambda number: 0 <= number < 1, "a probability, at least 0 and below 1")


def float_dtype(field: str, value: Any) -> str:
    """The name of a floating-point dtype, given in any form NumPy understands."""
    try:
        dtype = jnp.dtype("bool" if value is None else value)  # NumPy takes None for float64
    except TypeError:
        dtype = jnp.dtype("bool")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ConfigError(f"{field}={value!r} must be a floating-point dtype, such as 'float32' or 'bfloat16'")
    return dtype.name


def layers(value: Any) -> tuple[int, ...]:
    """Layer numbers, without repetition."""
    natural = "a layer number (0, 1, ...) or a collection of them"
    numbers = [_number("layers", item, operator.index, lambda number: number >= 0, natural) for item in as_tuple(value)]
    if not numbers:
        raise ConfigError("layers is empty: give layer numbers, or None for every layer")
    return tuple(dict.fromkeys(numbers))


def names(field: str, value: Any) -> tuple[str, ...]:
    """Names, without repetition, each of whole components."""
    given = as_tuple(value)
    for name in given:
        if not isinstance(name, str) or not all(components(name)):
            raise ConfigError(f"{field}: {name!r} is not a name; write components joined with '/' or '.': 'attn/query'")
    return tuple(dict.fromkeys(given))


def wanted(field: str, value: Any) -> str | tuple[str, ...]:
    """Names, one regex, or (for targets) `"all-linear"`."""
    if not isinstance(value, str):
        return names(field, value)
    if field == "targets" and value.lower() == ALL_LINEAR:
        return ALL_LINEAR
    return _regex(field, value) if value else ()


def _regex(field: str, value: Any) -> str:
    try:
        regex.check(value)
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{field}: {error}") from None
    return value


def patterns(field: str, value: Any, check: Callable[[str, Any], Any]) -> tuple[tuple[str, Any], ...]:
    """Pairs of a regex and a checked value, in the order given."""
    try:
        given = pairs(value or ())
    except (TypeError, ValueError):
        raise ConfigError(f"{field}={value!r} must map regexes to numbers, as in {{'query': 4}}") from None
    return tuple((_regex(field, key), check(f"{field}[{key!r}]", item)) for key, item in given)


def tokens(field: str, value: Any) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Row numbers by the name of their table; `""` stands for the only one."""
    if isinstance(value, Mapping) or any(not isinstance(each, int) for each in as_tuple(value)):
        given = pairs(value) if isinstance(value, (Mapping, list, tuple)) and _are_pairs(value) else None
    else:
        given = (("", as_tuple(value)),) if as_tuple(value) else ()
    if given is None:
        raise ConfigError(f"{field}={value!r} must be numbers of rows, or {{name: numbers}}")
    return tuple((name, _rows(field, name, rows)) for name, rows in given)


def _are_pairs(value: Any) -> bool:
    items = value.items() if isinstance(value, Mapping) else value
    return all(isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[0], str) for item in items)


def _rows(field: str, name: str, rows: Any) -> tuple[int, ...]:
    where = f"{field}[{name!r}]" if name else field
    numbers = tuple(
        _number(where, row, operator.index, lambda number: number >= 0, "a row number, at least 0")
        for row in as_tuple(rows)
    )
    if not numbers or len(set(numbers)) < len(numbers):
        raise ConfigError(f"{where}={rows!r} must be row numbers, at least one, and none of them twice")
    return numbers
