"""How PEFT matches names of modules: `target_modules`, `modules_to_save`, `rank_pattern`; and names that match best."""

import re
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from lora_jax import regex

_LITERAL = re.compile(r"([^\\^$*+?{}\[\]|()\n]|\\[^\w\n])*")
"""Letters as they are, dots, and escaped marks: no pattern of this kind can take long."""


def targets(wanted: str | Collection[str] | None, module: str) -> bool:
    """Whether PEFT's `target_modules` hits a module: one regex for the whole name, or names that end it.

    Args:
      wanted: the field as it is in `adapter_config.json`.
      module: name of the module in the base model, as in `model.layers.0.self_attn.q_proj`.

    Example:
      >>> targets(["q_proj"], "layers.0.q_proj"), targets(["q_proj"], "layers.0.seq_proj"), targets(".*0.*", "x.0.y")
      (True, False, True)
    """
    if isinstance(wanted, str):
        return regex.fullmatch(wanted, module)
    return any(module == name or module.endswith(f".{name}") for name in wanted or ())


def saves(wanted: Collection[str] | None, name: str) -> bool:
    """Whether PEFT's `modules_to_save` covers a tensor: a module around it has a name that *ends* with an entry.

    There is no boundary before the entry, so `head` covers `subhead.weight` too. That is how PEFT wraps modules.

    Example:
      >>> saves(["head"], "model.head.weight"), saves(["head"], "subhead.weight"), saves(["head"], "head_2.weight")
      (True, True, False)
    """
    parts = name.split(".")
    around = (".".join(parts[:end]) for end in range(1, len(parts)))
    return any(module.endswith(entry) for module in around for entry in wanted or ())


def in_pattern(patterns: Mapping[str, Any] | None, module: str) -> Any:
    """The value of the first key of `rank_pattern` or `alpha_pattern` that matches a module, or None.

    The order of the keys decides, not how specific they are.

    Example:
      >>> in_pattern({"q_proj": 4, "layers.0.q_proj": 2}, "layers.0.q_proj"), in_pattern({"q": 4}, "seq")
      (4, None)
    """
    return next((value for key, value in (patterns or {}).items() if _matches(key, module)), None)


def _matches(key: str, module: str) -> bool:
    plain = _plain(key)
    if plain is None or "\n" in module:
        return regex.fullmatch(rf"(.*\.)?({key})", module)
    start = len(module) - plain.length
    if start < 0 or (start and (plain.whole or module[start - 1] != ".")):
        return False
    return module.endswith(plain.text) if isinstance(plain.text, str) else bool(plain.text.fullmatch(module, start))


def is_plain(key: str) -> bool:
    """Whether a pattern key is letters and dots only, which costs next to nothing to match; most are.

    >>> is_plain("layers.0.q_proj"), is_plain(exact_key("layers.0.q")), is_plain("layers.*.q")
    (True, True, False)
    """
    return _plain(key) is not None


class _Plain(NamedTuple):
    """What a key of a fixed length says: whether it is the whole name, and how that ends."""

    whole: bool
    length: int
    text: str | re.Pattern[str]


@lru_cache(1 << 14)
def _plain(key: str) -> _Plain | None:
    """The key without repetitions, choices and the like; None if it has some."""
    body = key.removeprefix("^")
    if not _LITERAL.fullmatch(body):
        return None
    text, length = re.sub(r"\\(.)", r"\1", body), len(re.findall(r"\\?.", body))
    dots = re.search(r"(?<!\\)(\\\\)*\.", body)
    return _Plain(body != key, length, re.compile(body) if dots else text)


def exact_key(module: str) -> str:
    """A pattern key that matches one module and nothing else.

    PEFT puts `(.*\\.)?` in front of a key; `^`, which holds only where the whole name begins, undoes that.

    Example:
      >>> patterns = {exact_key("q.0"): 4}
      >>> in_pattern(patterns, "q.0"), in_pattern(patterns, "x.q.0"), in_pattern(patterns, "q10")
      (4, None, None)
    """
    return f"^{re.escape(module)}"


def shortest(chosen: Iterable[str], others: Iterable[str]) -> list[str]:
    """The fewest and shortest endings that hit the chosen modules and none of the others under PEFT's matcher.

    Args:
      chosen: names of the adapted modules.
      others: names of every module that must not be hit.

    Returns:
      Endings, sorted. Where no ending tells a chosen module from another, its full name is used.

    Example:
      >>> shortest(["layers.0.q", "layers.1.q", "up"], ["layers.0.k", "x.up"])
      ['q', 'up']
      >>> shortest(["layers.0.q"], ["layers.1.q"])
      ['0.q']
    """
    chosen, avoided = sorted(set(chosen)), {end for other in others for end in _endings(other)}
    return sorted({next((end for end in _endings(name) if end not in avoided), name) for name in chosen})


def _endings(name: str) -> list[str]:
    """`c`, `b.c`, `a.b.c` for `a.b.c`."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in reversed(range(len(parts)))]
