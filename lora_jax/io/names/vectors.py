"""What PEFT stores per output of a module: DoRA's magnitudes and biases on B, one vector each."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lora_jax.adapter.site import Site
from lora_jax.io.names import layouts
from lora_jax.io.names.targets import Part, Target


class Column(NamedTuple):
    """A vector `[*out]` of a parameter, of which a module has a part."""

    site: Site
    part: Part
    value: np.ndarray


class Share(NamedTuple):
    """A vector of one module, `[*out]` on the module's part of a parameter's outputs."""

    target: Target
    value: np.ndarray


def from_torch(site: Site, target: Target, vector: np.ndarray) -> Share:
    """The numbers for a parameter's outputs, of a module's vector (which may have axes of length one)."""
    own = target.part.span.picked(vector.astype(np.float32).reshape(-1))
    return Share(target, layouts.b_from_torch(site, target.part, own))


def to_torch(parts: Sequence[Column]) -> np.ndarray:
    """A module's vector, from the `[*out]` of its parameters; zero for those that are not given."""
    span = parts[0].part.span
    vector = np.zeros((span.groups, span.size), np.float32)
    for site, part, value in parts:
        vector[part.span.where] = part.span.spread(layouts.b_to_torch(site, part, value))
    return vector.reshape(-1)


def fill(columns: np.ndarray, site: Site, shares: Sequence[Share]) -> None:
    """Put shares where they belong in an array `[*batch, *out]`."""
    for target, value in shares:
        columns[(*target.index, *where(site, target.part))] = value


def where(site: Site, part: Part) -> tuple[slice, ...]:
    """Index of a part's outputs among the parameter's `[*out]`."""
    found = [slice(None)] * len(site.out_axes)
    found[part.axis] = slice(part.start, part.stop)
    return tuple(found)
