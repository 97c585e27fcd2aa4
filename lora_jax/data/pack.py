"""`pack`: which examples share a row, by first-fit-decreasing over windows of examples in a random order."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

_WINDOW = 1024
_FULL = 0.98  # a row that is less full takes part in the next window again, with
_AGAIN = 256  # so many examples in all, so that the time stays proportional to their number


def pack(lengths: ArrayLike, length: int, seed: int | None = 0) -> list[list[int]]:
    """Group examples into rows that none of them overfills.

    Args:
      lengths: of the examples, each at most `length`.
      length: of the rows.
      seed: of the order in which examples are taken, a window at a time; None for the order they have.

    Returns:
      For each row the numbers of its examples: each example once.

    Example:
      >>> pack([3, 6, 5, 4, 2], 10, seed=None)
      [[1, 3], [2, 0, 4]]
    """
    sizes = np.asarray(lengths, np.int64)
    order = np.arange(len(sizes)) if seed is None else np.random.default_rng((seed, len(sizes))).permutation(len(sizes))
    done: list[list[int]] = []
    waiting: list[int] = []
    for start in range(0, len(order), _WINDOW):
        taken = np.concatenate([np.asarray(waiting, np.int64), order[start : start + _WINDOW]])
        rows = _first_fit(taken[np.argsort(-sizes[taken], kind="stable")].tolist(), sizes, length)
        last = start + _WINDOW >= len(order)
        again = set() if last else _emptiest([int(sizes[row].sum()) for row in rows], rows, length)
        done += [row for i, row in enumerate(rows) if i not in again]
        waiting = [each for i in sorted(again) for each in rows[i]]
    return done


def _emptiest(filled: Sequence[int], rows: Sequence[Sequence[int]], length: int) -> set[int]:
    """Rows that are far from full, the emptiest first, as long as they hold few examples together."""
    chosen, held = set(), 0
    for row in sorted(range(len(rows)), key=filled.__getitem__):
        held += len(rows[row])
        if filled[row] >= _FULL * length or held > _AGAIN:
            break
        chosen.add(row)
    return chosen


def _first_fit(decreasing: Sequence[int], sizes: np.ndarray, length: int) -> list[list[int]]:
    """Each into the first row that has room for it."""
    rows: list[list[int]] = []
    rooms: list[int] = []
    for each, size in zip(decreasing, sizes[np.asarray(decreasing, np.int64)].tolist(), strict=True):
        for row, room in enumerate(rooms):
            if room >= size:
                rows[row].append(each)
                rooms[row] = room - size
                break
        else:
            rows.append([each])
            rooms.append(length - size)
    return rows


def shuffled(rows: list[list[int]], seed: int | None, epoch: int) -> list[list[int]]:
    """Rows in an order that is the epoch's own, and depends on the arguments alone.

    Args:
      rows: of `pack`.
      seed: of the order; None for the same order in every epoch.
      epoch: number of passes before.

    Example:
      >>> shuffled([[0], [1], [2]], 0, epoch=3) == shuffled([[0], [1], [2]], 0, epoch=3)
      True
    """
    if seed is None:
        return rows
    return [rows[i] for i in np.random.default_rng((seed, epoch, len(rows))).permutation(len(rows))]


def fill(rows: Sequence[Sequence[int]], lengths: ArrayLike, length: int) -> float:
    """Share of the places in rows that hold tokens.

    >>> fill([[0, 1], [2]], [4, 4, 8], 8)
    1.0
    """
    sizes = np.asarray(lengths)
    return float(sum(int(sizes[list(row)].sum()) for row in rows) / (length * len(rows)))
