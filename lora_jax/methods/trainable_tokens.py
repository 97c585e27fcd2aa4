"""PEFT's `trainable_token_indices`: some rows of an embedding trained in full, those of new tokens for instance."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lora_jax.adapter.factors import Array, widened
from lora_jax.adapter.site import Site
from lora_jax.adapter.updates import Change, Update, pytree, unscalable


@pytree("site", "rows")
@dataclass(frozen=True)
class Rows(Update):
    """Trained rows of a look-up table: the model sees the table with those rows replaced.

    PEFT's `trainable_token_indices`. PEFT copies the whole table in every forward pass. Here the change is a product of
    two factors, one-hot columns and the differences of the rows, so that look-ups read a few numbers more and an
    output head that is tied to the table scores the new rows, without a copy. A row comes out as trained up to the
    rounding of float32.

    Attributes:
      value: `[len(rows), *out]`, trained.
      site: the table, of kind `embedding`; static.
      rows: positions along the table's indexed axis; static.

    Example:
      >>> site = Site(path="w", shape=(9, 2), dtype="float32", kind="embedding", in_axes=(0,), out_axes=(1,))
      >>> Rows(jnp.ones((2, 2)), site, (1, 7)).applied(jnp.zeros((9, 2)))[:, 0].astype(int).tolist()
      [0, 1, 0, 0, 0, 0, 0, 1, 0]
    """

    value: Array
    site: Site
    rows: tuple[int, ...]
    reads_base: ClassVar[bool] = True

    def trains(self) -> "Rows":
        """True on the value."""
        return replace(self, value=True)

    def axes(self) -> "Rows":
        """The table's axes along the value."""
        return replace(self, value=(None, *self.site.out_axes))

    def change(self, weight: Array) -> Change:
        """The table plus one-hot columns times the differences of the rows."""
        size = weight.shape[self.site.in_axes[0]]
        chosen = jax.nn.one_hot(jnp.asarray(self.rows), size, dtype=jnp.float32)
        return Change(weight, ((chosen, widened(self.value) - widened(rows_of(self.site, weight, self.rows))),))

    def scaled(self, factor: Any) -> "Rows":
        """Refused: a replaced row has no size relative to the base."""
        raise unscalable(self.site.path, "has rows trained in full", factor)


def rows_of(site: Site, table: Array, rows: tuple[int, ...]) -> Array:
    """`[len(rows), *out]`: some rows of a table."""
    (axis,) = site.in_axes
    return jnp.moveaxis(jnp.take(table, jnp.asarray(rows), axis), axis, 0)
