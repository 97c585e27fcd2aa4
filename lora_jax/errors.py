"""The exceptions lora_jax raises, each saying what was given, what was possible, and what to do next.

```
LoraError
├── ConfigError      (ValueError)   a LoraConfig that contradicts itself
├── MatchError       (ValueError)   a target, exclude or pattern that hits nothing
├── ParameterError   (ValueError)   an adapter that does not fit these parameters
├── MergeError       (ValueError)   a merge whose result could not be trusted
└── CheckpointError  (ValueError)   an adapter on disk that is broken or belongs elsewhere
```
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class LoraError(Exception):
    """Base class of every error this library raises on purpose."""


class ConfigError(LoraError, ValueError):
    """A `LoraConfig` field is out of range or contradicts another."""


class MatchError(LoraError, ValueError):
    """A target, exclude or pattern selects nothing, or selects what cannot be adapted."""


class ParameterError(LoraError, ValueError):
    """An adapter names a parameter that is missing or shaped differently."""


class MergeError(LoraError, ValueError):
    """Merging would give a result that cannot be trusted."""


class CheckpointError(LoraError, ValueError):
    """An adapter checkpoint is unreadable, incomplete, or belongs to another base."""


def listed(names: Sequence[str], separator: str = ", ", count: int = 5) -> str:
    """Render the first of several names for an error message, and how many more there are.

    >>> listed(["a", "b", "c"]), listed(["a", "b", "c"], count=2)
    ('a, b, c', 'a, b and 1 more')
    """
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return separator.join(names[:count]) + more


def nearest(name: str, candidates: Iterable[str], count: int = 3, separator: str = "/") -> str:
    """Render the candidates closest to `name` for an error message; `separator` stands between parts of a name.

    >>> nearest("quary", ["layers/query", "layers/value"], count=1)
    'layers/query'
    """
    known = sorted(set(candidates))
    parts = {path: path.split(separator) for path in known}
    hits = get_close_matches(name, known, n=count, cutoff=0.5)
    by_part = {part: path for path in reversed(known) for part in parts[path]}
    close_parts = get_close_matches(name.split(separator)[-1], list(by_part), n=count, cutoff=0.5)
    chosen = list(dict.fromkeys(hits + [by_part[part] for part in close_parts] + known))[:count]
    return ", ".join(chosen) if chosen else "(none)"
