"""Factors of several PyTorch modules put together into those of one JAX parameter: fused outputs and stacked layers."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from lora_jax.io.columns import Share
from lora_jax.io.rules import Target
from lora_jax.site import Site


class Piece(NamedTuple):
    """Factors of one module: `a` of `[rank, *in]`, and the module's share of `b`; a leading axis if it has experts.

    Magnitudes (DoRA) and a bias on B, where there are any, are shares of the outputs.
    """

    target: Target
    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: Share | None = None
    bias: Share | None = None


class Joined(NamedTuple):
    """Factors of one weight of a parameter, or of one stack of experts."""

    a: np.ndarray
    b: np.ndarray
    scale: float


def join(site: Site, pieces: list[Piece]) -> Joined:
    """Factors whose product is that of every piece at its own outputs, exactly.

    Pieces with the same A share their ranks; ranks of the others add up, and B is zero where a piece has no outputs.
    """
    experts = 1 if pieces[0].target.parameter else 0
    # The largest, so that the others become factors below one, which cannot overflow.
    scale = max((piece.scale for piece in pieces), key=abs)
    groups: list[tuple[np.ndarray, np.ndarray]] = []
    for piece in pieces:
        a, b = _group(groups, piece, site, experts)
        factor = np.float32(piece.scale / scale if scale else 1.0)
        where = [slice(None)] * b.ndim
        where[1 + experts + piece.target.axis] = slice(*piece.target.part)
        b[tuple(where)] = piece.b * factor if factor != 1 else piece.b
    a, b = (np.concatenate(each, axis=experts) for each in zip(*groups, strict=True))
    return Joined(a, b, scale)


def _group(
    groups: list[tuple[np.ndarray, np.ndarray]], piece: Piece, site: Site, experts: int
) -> tuple[np.ndarray, np.ndarray]:
    for a, b in groups:
        if np.array_equal(a, piece.a):
            return a, b
    lead = piece.a.shape[: 1 + experts]
    groups.append((piece.a, np.zeros((*lead, *site.sizes(site.out_axes)), np.float32)))
    return groups[-1]


def stack(site: Site, joined: Mapping[tuple[int, ...], Joined]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Factors and scales of a whole parameter. Lower ranks are padded with zeros, absent weights are zero."""
    depth = len(next(iter(joined)))
    inner = len(site.batch_axes) - depth
    rank = max(each.a.shape[inner] for each in joined.values())
    a, b = np.zeros(site.a_shape(rank), np.float32), np.zeros(site.b_shape(rank), np.float32)
    scale = np.zeros(site.batch_shape, np.float32)
    for index, each in joined.items():
        own = (*index, *(slice(None),) * inner, slice(each.a.shape[inner]))
        a[own], b[own] = each.a, each.b
        scale[index] = each.scale
    return a, b, scale
