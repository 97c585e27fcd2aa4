"""The settings of a composition, checked before anything is computed."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from lora_jax.adapter.factors import Array, is_traced
from lora_jax.compose.methods import METHODS, Method
from lora_jax.compose.terms import Options
from lora_jax.errors import ConfigError


def checked(
    name: str, rank: int | None, density: float | None, majority_sign: str | None, key: Array | None
) -> Options:
    """The settings of a composition.

    Raises:
      ConfigError: one is out of range, missing, or means nothing to the method.
    """
    method = METHODS.find(name)
    if rank is not None and not method.rank:
        raise ConfigError(f'method={name!r} keeps every term, so rank={rank} means nothing; for fewer: method="svd"')
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ConfigError(f"rank={rank!r} must be a positive integer")
    thins = method.rule.thin != "none"
    if thins and density is None:
        raise ConfigError(f"method={name!r} keeps a share of the entries: pass density=, such as 0.5")
    if density is not None and not thins:
        raise ConfigError(f"method={name!r} keeps all entries, so density={density} means nothing: leave it out")
    if density is not None and not 0 < density <= 1:
        raise ConfigError(f"density={density} must be above 0 and at most 1")
    if majority_sign is not None and not method.rule.elect:
        raise ConfigError(f"method={name!r} elects no signs, so majority_sign={majority_sign!r} means nothing")
    if majority_sign not in (None, "total", "frequency"):
        raise ConfigError(f'majority_sign={majority_sign!r} must be "total" or "frequency"')
    if method.random and key is None:
        raise ConfigError(f"method={name!r} drops random entries: pass key=jax.random.key(0), or any other key")
    return Options(rank, 1.0 if density is None else float(density), majority_sign or "total")


def weighed(count: int, weights: Any, method: Method) -> list[tuple[Array, float | None]]:
    """A weight for every adapter, as an array and as the number that it is, if that is known.

    Raises:
      ConfigError: they are not one for each, or not what the method needs.
    """
    if not count:
        raise ConfigError("There is nothing to compose: pass at least one adapter")
    default = 1 / count if method.shared else 1.0
    given = [default] * count if weights is None else list(weights)
    if len(given) != count:
        raise ConfigError(f"{len(given)} weights were given for {count} adapters: pass one for each")
    known = [None if is_traced(weight) else float(weight) for weight in given]
    numbers = [number for number in known if number is not None]
    if not all(map(math.isfinite, numbers)):
        raise ConfigError(f"weights={numbers} must be finite")
    if method.shared:
        _check_two(count, numbers)
    return [(jnp.asarray(weight, jnp.float32), number) for weight, number in zip(given, known, strict=True)]


def _check_two(count: int, numbers: Sequence[float]) -> None:
    if count != 2:
        raise ConfigError(f'method="slerp" goes from one adapter to another, and {count} were given: pass two')
    if len(numbers) == count and (min(numbers) < 0 or abs(sum(numbers) - 1) > 1e-6):
        raise ConfigError(f'weights={numbers} of method="slerp" must be shares of one, such as [0.25, 0.75]')
