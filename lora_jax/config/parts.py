"""Parts of fused kernels, as a configuration names them: by kernel, names and where their columns are."""

import operator
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeAlias

from lora_jax.config.checks import names, pairs
from lora_jax.errors import ConfigError, MatchError, nearest
from lora_jax.paths import name_hits

Columns: TypeAlias = tuple[int, ...]
Given: TypeAlias = Mapping[str, Any] | Collection[tuple[str, Any]]
Parts: TypeAlias = tuple[tuple[str, tuple[tuple[str, Columns], ...]], ...]


def checked(value: Given) -> Parts:
    """By name of the kernel, the names of parts and their columns, `(start, stop)` or `(start, stop, axis)`.

    Raises:
      ConfigError: it is something else.
    """
    try:
        given = [(kernel, list(pairs(parts))) for kernel, parts in pairs(value or ())]
    except (TypeError, ValueError):
        raise _error(value) from None
    for kernel, parts in given:
        names("parts", (kernel,))
        names(f"parts[{kernel!r}]", [name for name, _ in parts])
        if not parts or len({name for name, _ in parts}) < len(parts):
            raise _error(value)
    return tuple(
        (kernel, tuple((name, _columns(kernel, name, each)) for name, each in parts)) for kernel, parts in given
    )


def _columns(kernel: str, name: str, value: Any) -> Columns:
    numbers = _indexes(value)
    if len(numbers) not in (2, 3) or not 0 <= numbers[0] < numbers[1]:
        raise _error(f"{{{kernel!r}: {{{name!r}: {value!r}}}}}")
    return numbers


def _indexes(value: Any) -> Columns:
    try:
        return tuple(operator.index(each) for each in value)
    except TypeError:
        return ()


def _error(value: Any) -> ConfigError:
    return ConfigError(
        f"parts={value} must say where the columns of each part of a kernel are, start and stop (and the axis, if it "
        'is not the first output axis): {"c_attn": {"q": (0, 768), "v": (1536, 2304)}}'
    )


def of_path(parts: Any, path: str) -> tuple[tuple[str, Columns], ...]:
    """The parts of a parameter; none if it is not taken apart."""
    return next((found for kernel, found in parts if name_hits(kernel, path)), ())


def path_of(path: str, name: str) -> str:
    """What a part would be called if it were a module of its own.

    Example:
      >>> path_of("h_0/attn/c_attn/kernel", "q")
      'h_0/attn/c_attn/q/kernel'
    """
    module, _, leaf = path.rpartition("/")
    return "/".join(filter(None, (module, name, leaf)))


def expanded(parts: Any, paths: Iterable[str]) -> list[str]:
    """The paths of parameters, and for those that are taken apart those of their parts.

    Raises:
      MatchError: a kernel is none of the parameters.
    """
    paths = list(paths)
    for kernel, _ in parts:
        if not any(name_hits(kernel, path) for path in paths):
            raise MatchError(
                f"parts: {kernel!r} hits none of the adapted parameters; nearest: {nearest(kernel, paths)}"
            )
    return [each for path in paths for each in ([path_of(path, name) for name, _ in of_path(parts, path)] or [path])]
