"""The table of initialisers that `LoraConfig(init=...)` chooses from."""

from collections.abc import Callable
from typing import TypeAlias

import jax

from lora_jax.errors import ConfigError
from lora_jax.site import Site

Initialiser: TypeAlias = Callable[[jax.Array, Site, int, str], tuple[jax.Array, jax.Array]]
"""`(key, site, rank, dtype) -> (a, b)` for one linear map: `a` is `[rank, fan_in]` and `b` is `[rank, fan_out]`."""

_INITIALISERS: dict[str, Initialiser] = {}


def register(name: str) -> Callable[[Initialiser], Initialiser]:
    """Decorator that makes an initialiser available as `LoraConfig(init=name)`.

    The function draws the factors of *one* linear map, with its input axes in one and its output axes in one;
    they are reshaped afterwards. For a stacked parameter (scanned layers, experts)
    `lora_jax.init` loops it over the stack, with a key for each entry. It is traced, with the site's `path` left blank:
    sites of one shape share a compilation. A `ConfigError` it raises is shown with the path.

    Args:
      name: the name users write.

    Raises:
      ConfigError: the name is taken.

    Example:
      >>> import jax.numpy as jnp
      >>> @register("example-ones")
      ... def ones(key, site, rank, dtype):
      ...     return jnp.ones((rank, site.fan_in), dtype), jnp.zeros((rank, site.fan_out), dtype)
      >>> "example-ones" in initialisers()
      True
    """
    if name in _INITIALISERS:
        raise ConfigError(f"An initialiser named {name!r} exists already; taken names: {', '.join(initialisers())}")

    def add(initialiser: Initialiser) -> Initialiser:
        _INITIALISERS[name] = initialiser
        return initialiser

    return add


def initialisers() -> tuple[str, ...]:
    """Names that `LoraConfig(init=...)` accepts.

    Example:
      >>> import lora_jax as lora
      >>> {"default", "gaussian", "orthogonal"} <= set(lora.initialisers())
      True
    """
    return tuple(sorted(_INITIALISERS))


def find(name: str) -> Initialiser:
    """The initialiser of a name.

    Raises:
      ConfigError: there is none; the message lists those there are.
    """
    if not isinstance(name, str) or name not in _INITIALISERS:
        raise ConfigError(f"init={name!r} is not an initialiser; choose one of: {', '.join(initialisers())}")
    return _INITIALISERS[name]
