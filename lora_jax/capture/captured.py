"""Captured: statistics by path, as `lora_jax.capture` returns them."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeAlias

import jax
from rich.table import Table

from lora_jax.adapter.adapter import leaves_by_name
from lora_jax.adapter.site import render
from lora_jax.capture.statistics import Components, Gradient, Inputs
from lora_jax.errors import nearest

What: TypeAlias = Literal["inputs", "components", "gradient"]
Statistic: TypeAlias = Inputs | Components | Gradient


@jax.tree_util.register_pytree_with_keys_class
class Captured(Mapping[str, Statistic]):
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

    def __rich__(self) -> Table:
        table = Table("path", self.what)
        for path, statistic in self._statistics.items():
            shapes = [f"{name} {list(getattr(leaf, 'shape', ()))}" for name, leaf in leaves_by_name(statistic)]
            table.add_row(path, "  ".join(shapes))
        return table

    def __repr__(self) -> str:
        return render(self)
