"""Convolutions in groups: PEFT's A reads every input channel there, and a change of the weight only a group's own.

PEFT keeps a convolution A without groups, and a B of one element per window with the groups of the layer. So a change
of the weight has PEFT's form if each `rank / groups` rows of A have one group's channels, and zeros elsewhere.
"""

import numpy as np

from lora_jax.io.names.join import Piece, join
from lora_jax.io.peft.delta import crossing


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
    joined = join(pieces, (groups, out.shape[2]))
    b = joined.b.reshape(len(joined.b), -1).T
    return joined.a, b.reshape(*b.shape, *(1,) * len(window))
