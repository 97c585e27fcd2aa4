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

from collections.abc import Iterable
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


def nearest(name: str, candidates: Iterable[str], count: int = 3) -> str:
    """Render the candidates closest to `name` for an error message.

    >>> nearest("quary", ["layers/query", "layers/value"], count=1)
    'layers/query'
    """
    known = sorted(set(candidates))
    parts = {path: path.split("/") for path in known}
    hits = get_close_matches(name, known, n=count, cutoff=0.5)
    by_part = {part: path for path in reversed(known) for part in parts[path]}
    close_parts = get_close_matches(name.split("/")[-1], list(by_part), n=count, cutoff=0.5)
    chosen = list(dict.fromkeys(hits + [by_part[part] for part in close_parts] + known))[:count]
    return ", ".join(chosen) if chosen else "(none)"
