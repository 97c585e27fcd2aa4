"""Types of the fields in `adapter_config.json`: nothing that a file says is used before it is known to be usable."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from lora_jax.errors import CheckpointError

_FLOAT32_MAX = 3.4e38


def check_types(where: str, config: Mapping[str, Any], *, masks: bool = False) -> None:
    """Refuse fields that are not what PEFT writes there; absent ones and null are fine.

    Args:
      where: the file, for error messages.
      config: what it says.
      masks: whether `rank_pattern` has lists of booleans and not ranks, as AdaLoRA has.

    Raises:
      CheckpointError: a field has another type, is out of range, or is no regex where one belongs.
    """
    for field, (needs, holds) in _FIELDS.items():
        value = config.get(field)
        if value is not None and not holds(value):
            raise CheckpointError(f"{where}: {field}={_shown(value)} must be {needs}")
    for field, (needs, holds) in (_PATTERNS | ({"rank_pattern": _MASK} if masks else {})).items():
        for key, value in (config.get(field) or {}).items():
            if not _is_regex(f"({key})"):
                raise CheckpointError(
                    f"{where}: {field}: {_shown(key)} is no regular expression, or one that may take for ever"
                )
            if not holds(value):
                raise CheckpointError(f"{where}: {field}[{_shown(key)}]={_shown(value)} must be {needs}")


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31


def _is_number(value: Any) -> bool:
    # An int may be larger than any float.
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and -_FLOAT32_MAX < value < _FLOAT32_MAX and math.isfinite(value)


def _is_regex(text: str) -> bool:
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError):
        return False
    return not _explodes(text)


_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{\d*,?\d*\}|.", re.DOTALL)


def _explodes(text: str) -> bool:
    """Whether a repetition repeats a group that repeats or branches: such a match may take exponential time.

    >>> _explodes("(a+)+$"), _explodes("(a|a)*"), _explodes(r"(.*\\.)?layers\\.[0-9]+\\.(q|k)_proj")
    (True, True, False)
    """
    groups, closed = [False], False
    for token in _TOKEN.findall(text):
        repeats = token in ("*", "+") or (token[0] == "{" and token[-1] == "}")
        if closed and repeats:
            return True
        closed = False
        if token == "(":
            groups.append(False)
        elif token == ")" and len(groups) > 1:
            closed = groups.pop()
            groups[-1] |= closed
        elif repeats or token == "|":
            groups[-1] = True
    return False


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _is_mask(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, bool) for each in value)


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, int) and not isinstance(each, bool) for each in value)


def _are_targets(value: Any) -> bool:
    return _are_names(value) or (isinstance(value, str) and _is_regex(value))


def _is_a(*types: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, types)


_RANK = "a positive integer", _is_rank
_MASK = "a list of true and false", _is_mask
_NUMBER = "a finite number", _is_number
_NAMES = "a list of names", _are_names
_TARGETS = "a list of names, or one regular expression that cannot take for ever", _are_targets
_BOOL = "true or false", _is_a(bool)

_PROBABILITY = "a probability below 1", lambda value: _is_number(value) and 0 <= value < 1

_PATTERNS = {"rank_pattern": _RANK, "alpha_pattern": _NUMBER}
_BIASES = ("none", "all", "lora_only", "vera_only")
_FIELDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "r": _RANK,
    "lora_alpha": _NUMBER,
    "init_r": _RANK,
    "lora_dropout": _PROBABILITY,
    "vera_dropout": _PROBABILITY,
    "projection_prng_key": ("an integer", _is_a(int)),
    "rank_pattern": ("an object", _is_a(dict)),
    "alpha_pattern": ("an object", _is_a(dict)),
    "target_modules": _TARGETS,
    "exclude_modules": _TARGETS,
    "target_parameters": _NAMES,
    "modules_to_save": _NAMES,
    "bias": ("one of none, all, lora_only, vera_only", lambda value: value in _BIASES),
    "use_rslora": _BOOL,
    "use_dora": _BOOL,
    "fan_in_fan_out": _BOOL,
    "lora_bias": _BOOL,
    "ensure_weight_tying": _BOOL,
    "alora_invocation_tokens": ("a list of token numbers", _are_tokens),
}
