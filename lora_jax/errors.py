"""The exceptions lora_jax raises, each saying what was given, what was possible, and what to do next.

```
LoraError
├── ConfigError      (ValueError)   a LoraConfig that contradicts itself
├── MatchError       (ValueError)   a target, exclude or pattern that hits nothing
├── ParameterError   (ValueError)   an adapter that does not fit these parameters
├── MergeError       (ValueError)   a merge whose result could not be trusted
└── CheckpointError  (ValueError)   an adapter on disk that is broken or belongs elsewhere
    └── StorageError                a disk that is full or fails
```
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class LoraError(Exception):
    """Base class of every error this library raises on purpose.

    Example:
      >>> import lora_jax as lora
      >>> try:
      ...     lora.LoraConfig(rank=0)
      ... except lora.LoraError as error:
      ...     print(type(error).__name__)
      ConfigError
    """


class ConfigError(LoraError, ValueError):
    """A `LoraConfig` field is out of range or contradicts another.

    Example:
      >>> import lora_jax as lora
      >>> try:
      ...     lora.LoraConfig(rank=0)
      ... except lora.ConfigError as error:
      ...     print(error)
      rank=0 must be a positive integer
    """


class MatchError(LoraError, ValueError):
    """A target, exclude or pattern selects nothing, or selects what cannot be adapted.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
      >>> sites = lora.find_sites(lambda params, x: x @ params["w"], params, x)
      >>> try:
      ...     lora.init(jax.random.key(0), lora.LoraConfig(targets=("v",)), params, sites)
      ... except lora.MatchError as error:
      ...     print(str(error)[:46])
      targets: 'v' hits none of the 1 sites. Nearest
    """


class ParameterError(LoraError, ValueError):
    """An adapter names a parameter that is missing or shaped differently.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
      >>> sites = lora.find_sites(lambda params, x: x @ params["w"], params, x)
      >>> adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets="w"), params, sites)
      >>> try:
      ...     lora.merge({"w": jnp.ones((4, 7))}, adapter)
      ... except lora.ParameterError as error:
      ...     print(str(error)[:59])
      'w' has shape (4, 7), but the adapter was made for shape (4
    """


class MergeError(LoraError, ValueError):
    """Merging would give a result that cannot be trusted.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
      >>> sites = lora.find_sites(lambda params, x: x @ params["w"], params, x)
      >>> adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets="w"), params, sites)
      >>> try:
      ...     lora.merge(params, lora.scale(adapter, float("nan")))
      ... except lora.MergeError as error:
      ...     print(str(error)[:45])
      Merging makes 12 NaN or infinite entries in '
    """


class CheckpointError(LoraError, ValueError):
    """An adapter checkpoint is unreadable, incomplete, or belongs to another base.

    Example:
      >>> import lora_jax as lora
      >>> try:
      ...     lora.load("/nowhere")
      ... except lora.CheckpointError as error:
      ...     print(error)
      There is nothing at /nowhere. Check the path; lora_jax.save creates such a directory.
    """


class StorageError(CheckpointError):
    """The disk is full or fails: nothing is wrong with what was given, and what was there before is untouched.

    Example:
      >>> import lora_jax as lora
      >>> issubclass(lora.StorageError, lora.CheckpointError)
      True
    """


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
