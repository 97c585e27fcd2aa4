"""Low-rank factors of several parts as those of one: of fused modules, split parameters, stacked layers and groups.

Their ranks are concatenated, as by `combination_type="cat"` of PEFT's `add_weighted_adapter`, but parts with the same A
share it.

Convolutions in groups: PEFT keeps an A without groups, which reads every input channel, and a B of one element per
window with the groups of the layer. So a change of the weight has PEFT's form if each `rank / groups` rows of A have
one group's channels, and zeros elsewhere.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lora_jax.adapter.site import Site
from lora_jax.io.peft.module import crossing


class Piece(NamedTuple):
    """Factors of some of the outputs.

    Attributes:
      a: `[*experts, rank, ...]`.
      b: `[*experts, rank, ...]`, on the piece's outputs only.
      scale: of their product.
      where: index of the piece's outputs among all.
      values: `[rank]`, what each term is multiplied by; None for one. Either all pieces have them or none has.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float
    where: tuple[slice, ...]
    values: np.ndarray | None = None


class Concatenated(NamedTuple):
    """Factors of all outputs: of a weight, or of a stack of experts."""

    a: np.ndarray
    b: np.ndarray
    scale: float
    values: np.ndarray | None = None


def concatenate(pieces: Sequence[Piece], out: tuple[int, ...], *, stacked: bool = False) -> Concatenated:
    """Factors whose product is that of every piece at its own outputs, exactly.

    Pieces with the same A and values share their ranks; ranks of the others add up, and B is zero where a piece has no
    outputs.

    Args:
      pieces: in any order.
      out: sizes of the axes that all outputs are on.
      stacked: whether factors have a leading axis of experts.

    Example:
      >>> one, two = np.ones((2, 3)), np.zeros((1, 3))
      >>> q, k = Piece(one, np.ones((2, 4)), 0.5, (slice(0, 4),)), Piece(two, np.ones((1, 2)), 2.0, (slice(4, 6),))
      >>> a, b, scale, _ = concatenate([q, k], (6,))
      >>> a.shape, b[:, 0].tolist(), b[:, 4].tolist(), scale
      ((3, 3), [0.25, 0.25, 0.0], [0.0, 0.0, 1.0], 2.0)
    """
    experts = 1 if stacked else 0
    # The largest, so that the others become factors below one, which cannot overflow.
    scale = max((piece.scale for piece in pieces), key=abs)
    groups: list[_Group] = []
    for piece in pieces:
        b = _group(groups, piece, out, experts).b
        b[(..., *piece.where)] = piece.b if piece.scale == scale else piece.b * np.float32(piece.scale / scale)
    a, b = (np.concatenate([getattr(group, name) for group in groups], axis=experts) for name in "ab")
    values = [group.values for group in groups if group.values is not None]
    return Concatenated(a, b, scale, np.concatenate(values) if values else None)


class _Group(NamedTuple):
    """Terms of pieces that share them, on all outputs."""

    a: np.ndarray
    b: np.ndarray
    values: np.ndarray | None


def _group(groups: list[_Group], piece: Piece, out: tuple[int, ...], experts: int) -> _Group:
    """The group that has this A and these values."""
    for group in groups:
        same = piece.values is None or group.values is None or np.array_equal(group.values, piece.values)
        if same and np.array_equal(group.a, piece.a):
            return group
    groups.append(_Group(piece.a, np.zeros((*piece.a.shape[: 1 + experts], *out), np.float32), piece.values))
    return groups[-1]


class Stacked(NamedTuple):
    """Factors, scales and values of a whole parameter; values None if no weight of it has any."""

    a: np.ndarray
    b: np.ndarray
    scale: np.ndarray
    values: np.ndarray | None


def stack(site: Site, joined: Mapping[tuple[int, ...], Concatenated]) -> Stacked:
    """Put the weights of a parameter together. Lower ranks are padded with zeros, absent weights are zero."""
    depth = len(next(iter(joined)))
    inner = len(site.batch_axes) - depth
    rank = max(each.a.shape[inner] for each in joined.values())
    a, b = np.zeros(site.a_shape(rank), np.float32), np.zeros(site.b_shape(rank), np.float32)
    scale, values = np.zeros(site.batch_shape, np.float32), np.zeros((*site.batch_shape, rank), np.float32)
    for index, each in joined.items():
        own = (*index, *(slice(None),) * inner, slice(each.a.shape[inner]))
        a[own], b[own] = each.a, each.b
        values[own] = 1 if each.values is None else each.values
        scale[index] = each.scale
    plain = all(each.values is None for each in joined.values())
    return Stacked(a, b, scale, None if plain else values)


def grouped(a: np.ndarray, b: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """PEFT's A for the factors that every group has alike: a copy of `a` per group, `groups` times the rank.

    Args:
      a: `[rank, channels of a group, *window]`.
      b: PEFT's B, `(out, rank, 1, ...)`, which stays as it is.
      groups: how many there are.

    Example:
      >>> grouped(np.ones((1, 1, 3)), np.ones((4, 1, 1)), 2)[0][:, :, 0].tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """
    rank, channels, *window = a.shape
    wide = np.zeros((groups, rank, groups, channels, *window), a.dtype)
    wide[np.arange(groups), :, np.arange(groups)] = a
    return wide.reshape(groups * rank, groups * channels, *window), b


def ungrouped(where: str, a: np.ndarray, b: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Inverse of `grouped`; groups that have an A of their own add up their ranks.

    Raises:
      CheckpointError: A reads channels of other groups.
    """
    rank, window = b.shape[1], a.shape[2:]
    wide = a.reshape(groups, rank, groups, -1, *window)
    own = np.arange(groups)
    others = wide.copy()
    others[own, :, own] = 0
    if others.any():
        raise crossing(where)
    out = b.reshape(groups, -1, rank).swapaxes(1, 2)
    pieces = [Piece(wide[g, :, g], out[g][:, None], 1.0, (slice(g, g + 1), slice(None))) for g in own]
    joined = concatenate(pieces, (groups, out.shape[2]))
    b = joined.b.reshape(len(joined.b), -1).T
    return joined.a, b.reshape(*b.shape, *(1,) * len(window))
