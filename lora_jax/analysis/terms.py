"""Updates as singular triplets on the host, found from their factors."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax.adapter.updates import Replace, Update
from lora_jax.compose.fuse import has_factors, plain_factors, stacked
from lora_jax.compose.terms import Part, joined, significant
from lora_jax.errors import ParameterError
from lora_jax.methods import Dora, Gained, Rows, Shift
from lora_jax.svd import Triplets


class Directions(NamedTuple):
    """`Σ_r values[r] · left[r] ⊗ right[r]` on the host, values descending.

    Attributes:
      left: `[rank, fan_in]`, orthonormal: what an update reads.
      values: `[rank]`; those that are nothing but rounding are zero.
      right: `[rank, fan_out]`, orthonormal: what it writes.
    """

    left: np.ndarray
    values: np.ndarray
    right: np.ndarray

    @property
    def real(self) -> "Directions":
        """Those whose value is not zero."""
        rank = int(np.count_nonzero(self.values))
        return Directions(*(each[:rank] for each in self))


def why_without_factors(update: Update) -> str | None:
    """Why an update has no singular triplets; None if it has."""
    if has_factors(update):
        return None
    known = {Replace: "trained in full", Rows: "rows trained in full", Shift: "added to a bias"}
    return next((why for kind, why in known.items() if isinstance(update, kind)), "no low-rank factors")


def remark(update: Update) -> str:
    """What the factors of an update are not the whole of; empty if they are."""
    if isinstance(update, Dora):
        return "inside DoRA's norm"
    return "beside a gain" if isinstance(update, Gained) else ""


def part_of(path: str, update: Update) -> Part:
    """The factors of an update that has some, as stacks of matrices.

    Raises:
      ParameterError: their shapes are not those of one adapter for the site.
    """
    plain: Any = jax.eval_shape(plain_factors, update)
    if plain.a.shape != plain.site.a_shape(plain.rank):
        raise ParameterError(
            f"{path!r} has an A of shape {plain.a.shape} where its site has {plain.site.a_shape(plain.rank)}. "
            "Of stacked adapters take one: adapter.unstack()[0]"
        )
    return stacked(update)


def decomposed(path: str, update: Update) -> Iterator[tuple[tuple[int, ...], Directions]]:
    """Singular triplets of what an update adds, scale included, for each linear map of its stack with its place."""
    part = part_of(path, update)
    if part.a.shape[1] == 0:  # All terms of AdaLoRA may be pruned.
        nothing = Directions(np.zeros((0, update.site.fan_in)), np.zeros(0), np.zeros((0, update.site.fan_out)))
        yield from ((entry, nothing) for entry in np.ndindex(update.site.batch_shape))
        return
    found = jax.tree.map(np.asarray, _decomposed(part))
    for i, entry in enumerate(np.ndindex(update.site.batch_shape)):
        yield entry, Directions(*(each[i] for each in found))


@jax.jit
def _decomposed(parts: Part) -> Triplets:
    return jax.vmap(lambda part: significant(*joined([part])))(parts)
