"""Factors put together: of several modules into one parameter, of several parameters into one module, of layers."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lora_jax.site import Site


class Piece(NamedTuple):
    """Factors of some outputs of what is put together.

    Attributes:
      a: `[*experts, rank, ...]`.
      b: `[*experts, rank, ...]`, on the piece's outputs only.
      scale: of their product.
      where: index of the piece's outputs among all.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float
    where: tuple[slice, ...]


class Joined(NamedTuple):
    """Factors of all outputs: of a weight, or of a stack of experts."""

    a: np.ndarray
    b: np.ndarray
    scale: float


def join(pieces: Sequence[Piece], out: tuple[int, ...], *, stacked: bool = False) -> Joined:
    """Factors whose product is that of every piece at its own outputs, exactly.

    Pieces with the same A share their ranks; ranks of the others add up, and B is zero where a piece has no outputs.

    Args:
      pieces: in any order.
      out: sizes of the axes that all outputs are on.
      stacked: whether factors have a leading axis of experts.

    Example:
      >>> one, two = np.ones((2, 3)), np.zeros((1, 3))
      >>> q, k = Piece(one, np.ones((2, 4)), 0.5, (slice(0, 4),)), Piece(two, np.ones((1, 2)), 2.0, (slice(4, 6),))
      >>> a, b, scale = join([q, k], (6,))
      >>> a.shape, b[:, 0].tolist(), b[:, 4].tolist(), scale
      ((3, 3), [0.25, 0.25, 0.0], [0.0, 0.0, 1.0], 2.0)
    """
    experts = 1 if stacked else 0
    # The largest, so that the others become factors below one, which cannot overflow.
    scale = max((piece.scale for piece in pieces), key=abs)
    groups: list[tuple[np.ndarray, np.ndarray]] = []
    for piece in pieces:
        b = _group(groups, piece.a, out, experts)
        b[(..., *piece.where)] = piece.b if piece.scale == scale else piece.b * np.float32(piece.scale / scale)
    a, b = (np.concatenate(each, axis=experts) for each in zip(*groups, strict=True))
    return Joined(a, b, scale)


def _group(
    groups: list[tuple[np.ndarray, np.ndarray]], own: np.ndarray, out: tuple[int, ...], experts: int
) -> np.ndarray:
    """The B of the group that has this A."""
    for a, b in groups:
        if np.array_equal(a, own):
            return b
    groups.append((own, np.zeros((*own.shape[: 1 + experts], *out), np.float32)))
    return groups[-1][1]


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
