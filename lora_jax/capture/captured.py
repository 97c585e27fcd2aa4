"""What `lora_jax.capture` returns: by path the inputs of a site, their principal components, or its gradient."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from lora_jax.adapter.adapter import leaves_by_name
from lora_jax.adapter.registry import Data
from lora_jax.adapter.site import Site
from lora_jax.adapter.updates import pytree
from lora_jax.errors import ParameterError, nearest
from lora_jax.report.report import Printed
from lora_jax.report.tables import Table


@pytree()
@dataclass(frozen=True)
class Inputs:
    """The second moment of what a site reads.

    Attributes:
      second: `[*batch, fan_in, fan_in]` float32, the sum of `x xᵀ` over tokens.
      total: `[*batch, fan_in]` float32, the sum of `x`.
      count: `[*batch]` float32, the number of tokens; a use of the parameter in several places counts each.
    """

    second: Any
    total: Any
    count: Any


@pytree()
@dataclass(frozen=True)
class Components:
    """The principal components of what a site reads, the largest first.

    Attributes:
      vectors: `[*batch, components, fan_in]` float32, orthonormal; the entry of largest size of each is positive.
      energies: `[*batch, components]` float32, the sum over tokens of the squared centred inputs along each: squares of
        the singular values of the centred inputs.
      energy: `[*batch]` float32, the sum of all squared centred inputs.
      count: `[*batch]` float32, the number of tokens.
    """

    vectors: Any
    energies: Any
    energy: Any
    count: Any

    @property
    def explained(self) -> Any:
        """`[*batch, components]`: the share of the variance along each component."""
        return self.energies / jnp.maximum(self.energy, jnp.finfo(jnp.float32).tiny)[..., None]


@pytree()
@dataclass(frozen=True)
class Gradient:
    """The gradient of the loss by the parameter.

    Attributes:
      mean: float32, in the parameter's own layout; the mean over batches.
      count: number of batches.
    """

    mean: Any
    count: Any


What: TypeAlias = Literal["inputs", "components", "gradient"]
Statistic: TypeAlias = Inputs | Components | Gradient


@jax.tree_util.register_pytree_with_keys_class
class Captured(Printed, Mapping[str, Statistic]):
    """A read-only mapping from parameter path to what was captured there; a pytree, and printing it shows a table.

    Example:
      >>> import jax.numpy as jnp
      >>> captured = Captured("gradient", {"w": Gradient(jnp.ones((4, 3)), jnp.float32(2))})
      >>> captured["w"].mean.shape, captured.what
      ((4, 3), 'gradient')
    """

    def __init__(self, what: What, statistics: Mapping[str, Any]):
        self.what: What = what
        self._statistics = dict(sorted(statistics.items()))

    def __getitem__(self, path: str) -> Any:
        try:
            return self._statistics[path]
        except KeyError:
            raise KeyError(f"{path!r} was not captured; nearest: {nearest(path, self)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._statistics)

    def __len__(self) -> int:
        return len(self._statistics)

    def __contains__(self, path: object) -> bool:
        return path in self._statistics

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        """The statistics with their paths as keys, as JAX asks of a pytree."""
        children = [(jax.tree_util.DictKey(path), each) for path, each in self._statistics.items()]
        return children, (self.what, *self._statistics)

    @classmethod
    def tree_unflatten(cls, structure: Any, statistics: Any) -> "Captured":
        """Inverse of the flattening; the statistics may be anything JAX puts in their place."""
        what, *paths = structure
        captured = object.__new__(cls)
        captured.what = what
        captured._statistics = dict(zip(paths, statistics, strict=True))
        return captured

    def table(self) -> Table:
        """A row for every parameter."""
        rows = []
        for path, statistic in self._statistics.items():
            shapes = [f"{name} {list(getattr(leaf, 'shape', ()))}" for name, leaf in leaves_by_name(statistic)]
            rows.append((path, "  ".join(shapes)))
        return Table(("path", self.what), rows, words=(1,))


def statistic_for(captured: Mapping[str, Any] | None, what: Data, init: str, site: Site) -> Any:
    """The statistic of a site that an initialiser reads, checked against the site.

    Raises:
      ParameterError: nothing was captured, something else, elsewhere, or for another shape.
    """
    call = f'captured = lora_jax.capture(fn, params, batches, "{what}", config=config)'
    if not isinstance(captured, Captured) or captured.what != what:
        given = f"captured {captured.what}" if isinstance(captured, Captured) else f"captured={captured!r}"
        raise ParameterError(
            f"init={init!r} starts from captured {what}, not from {given}: {call}, then init(..., captured)"
        )
    if site.path not in captured:
        raise ParameterError(
            f"{what} of {site.path!r} were not captured (nearest: {nearest(site.path, captured)}): capture with this "
            f"config, {call}"
        )
    found = captured[site.path]
    value, lead, wanted = _form(found, what, site)
    if value.shape != (*lead, *wanted):
        raise ParameterError(
            f"{what} of {site.path!r} have shape {value.shape} where this model needs {(*lead, *wanted)}: they were "
            "captured with another one"
        )
    return found.mean if what == "gradient" else found


def _form(found: Any, what: Data, site: Site) -> tuple[jax.Array, tuple[int, ...], tuple[int, ...]]:
    """The array that shows what a statistic was captured for, and the shape it must have."""
    if what == "gradient":
        return found.mean, (), site.shape
    if what == "inputs":
        return found.second, site.batch_shape, (site.fan_in, site.fan_in)
    return found.vectors, site.batch_shape, (found.vectors.shape[-2], site.fan_in)
