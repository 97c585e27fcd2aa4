"""redistribute: EVA's choice of a rank for every layer, by how much of its inputs' variance each component explains."""

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np

from lora_jax.capture.captured import Captured, Components
from lora_jax.config.checks import as_tuple
from lora_jax.config.config import LoraConfig
from lora_jax.errors import ConfigError


def redistribute(config: LoraConfig, captured: Captured, *, rho: float = 2.0, adjust_scale: bool = True) -> LoraConfig:
    """Give ranks to the layers whose inputs have most structure, with the sum of all ranks as it is.

    The components of all layers are ordered by the share of the variance that each explains in its own layer, and as
    many of them are kept as there were ranks, at most `round(rank * rho)` in one layer. The layers of a scanned stack
    and experts are counted apart: their ranks differ, in factors padded with zeros to the largest.

    Args:
      config: the config that the components were captured with.
      captured: `lora_jax.capture(..., "components")`.
      rho: the most that a rank may grow by, at least 1.
      adjust_scale: multiply alpha by `new / old`, as PEFT's `adjust_scaling_factors` does, so that the scale stays
        (but for `rslora`); else alpha stays.

    Returns:
      The config with the new `rank_pattern` and `alpha_pattern`, a tuple per stack; a parameter that is left with no
      rank in any layer is added to `exclude`.

    Raises:
      ConfigError: something else was captured, with fewer components than `rho` asks for, or `rho` is below 1.

    Example:
      >>> import jax.numpy as jnp
      >>> def site(*energies):
      ...     return Components(jnp.eye(4), jnp.array(energies), jnp.float32(1), jnp.float32(9))
      >>> captured = Captured("components", {"up/w": site(0.9, 0.05, 0.03, 0.0), "down/w": site(0.4, 0.3, 0.2, 0.1)})
      >>> redistribute(LoraConfig(rank=2, targets=("up", "down")), captured).rank_pattern
      (('down/w', 3), ('up/w', 1))

    References:
      Paischer et al., EVA, arXiv 2410.07170. Ties go to the first path; PEFT leaves them to a sort that is not stable.
    """
    if captured.what != "components" or rho < 1:
        raise ConfigError(f"redistribute needs captured components and rho >= 1, not {captured.what!r} and rho={rho}")
    old = {path: _spread(path, config, each) for path, each in captured.items()}
    new = _chosen({path: _limited(path, captured[path], ranks, rho) for path, ranks in old.items()}, _total(old))
    left = [path for path in captured if any(new[path])]
    alphas = {path: _alphas(config, path, old[path], new[path], adjust_scale) for path in left}
    return replace(
        config,
        rank_pattern=tuple((re.escape(path), _short(new[path])) for path in left),
        alpha_pattern=tuple((re.escape(path), _short(alphas[path])) for path in left),
        exclude=_without(config.exclude, [path for path in captured if path not in left]),
    )


def _spread(path: str, config: LoraConfig, components: Any) -> tuple[int, ...]:
    """The rank of every layer of a site."""
    ranks, layers = as_tuple(config.ranks_for(path)), components.energy.size
    return ranks * layers if len(ranks) == 1 else ranks


def _total(ranks: dict[str, tuple[int, ...]]) -> int:
    return sum(map(sum, ranks.values()))


def _limited(path: str, components: Components, ranks: tuple[int, ...], rho: float) -> list[Any]:
    """For each layer of a site the shares explained by as many components as it may keep."""
    shares = np.asarray(components.explained)
    size, shares = components.vectors.shape[-1], shares.reshape(-1, shares.shape[-1])
    most = [min(round(rank * rho), size) for rank in ranks]
    if max(most) > shares.shape[-1]:
        raise ConfigError(
            f"{path}: {max(most)} components may be kept and {shares.shape[-1]} were captured; capture with the same "
            "config and rho"
        )
    return [share[:count] for share, count in zip(shares, most, strict=True)]


def _chosen(shares: dict[str, list[Any]], budget: int) -> dict[str, tuple[int, ...]]:
    """How many components each layer keeps of the `budget` largest of all; of equals, the first."""
    names = [(path, i) for path, each in shares.items() for i, layer in enumerate(each) for _ in layer]
    values = np.concatenate([layer for each in shares.values() for layer in each])
    counts = Counter(names[i] for i in np.argsort(-values, kind="stable")[:budget])
    return {path: tuple(counts[path, i] for i in range(len(each))) for path, each in shares.items()}


def _alphas(
    config: LoraConfig, path: str, old: tuple[int, ...], new: tuple[int, ...], adjust: bool
) -> tuple[float, ...]:
    given = as_tuple(config.alpha_for(path))
    given = given * len(old) if len(given) == 1 else given
    rows = zip(given, old, new, strict=True)
    return tuple(alpha * max(after, 1) / max(before, 1) if adjust else alpha for alpha, before, after in rows)


def _short(values: tuple[Any, ...]) -> Any:
    """One value where all are equal."""
    return values[0] if len(set(values)) == 1 else values


def _without(exclude: Any, paths: list[str]) -> Any:
    """The names or the regex to leave out, with more paths."""
    if isinstance(exclude, str):
        return "|".join([f"(?:{exclude})", *map(re.escape, paths)]) if paths else exclude
    return (*exclude, *paths)
