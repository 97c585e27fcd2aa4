"""What PEFT stores per output of a module: DoRA's magnitudes and biases on B, one vector each."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lora_jax.io import layouts
from lora_jax.io.rules import Target
from lora_jax.site import Site


class Share(NamedTuple):
    """A vector of one module, `[*out]` on the module's part of a parameter's outputs."""

    target: Target
    value: np.ndarray


def from_torch(site: Site, target: Target, vector: np.ndarray) -> Share:
    """A module's vector, of one number for each output (and axes of length one), for the site it belongs to."""
    row = vector.astype(np.float32).reshape(-1, 1)
    return Share(target, layouts.b_from_torch(site, target, row)[0])


def to_torch(site: Site, target: Target, columns: np.ndarray) -> np.ndarray:
    """The target's share of `[*out]` as PEFT stores a vector."""
    return layouts.b_to_torch(site, target, columns[None]).reshape(-1)


def fill(columns: np.ndarray, site: Site, shares: Sequence[Share]) -> None:
    """Put shares where they belong in an array `[*batch, *out]`."""
    for target, value in shares:
        where = [slice(None)] * len(site.out_axes)
        where[target.axis] = slice(*target.part)
        columns[(*target.index, *where)] = value
