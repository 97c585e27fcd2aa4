"""Axes: what runs along each axis of a value, as products of labelled and other parts.

A label is the number of an axis of the ids that say which adapter each example, or each token, meets. An array of
shape `[batch · tokens, features]` has `((0, batch), (None, tokens))` along its first axis where only examples are
labelled. Parts of length one say nothing and are left out.
"""

from collections.abc import Iterable, Sequence
from math import prod
from typing import TypeAlias

Part: TypeAlias = tuple[int | None, int]
Axis: TypeAlias = tuple[Part, ...]
Axes: TypeAlias = tuple[Axis, ...]


def plain(size: int) -> Axis:
    """An axis along which nothing labelled runs."""
    return ((None, size),) if size > 1 else ()


def length(axis: Axis) -> int:
    """Number of positions along an axis."""
    return prod(size for _, size in axis)


def labels(axes: Iterable[Axis]) -> list[int]:
    """Every label, as often as it is met."""
    return [label for axis in axes for label, _ in axis if label is not None]


def joined(axes: Iterable[Axis]) -> Axis:
    """Several axes in one; unlabelled parts side by side become one part."""
    parts: list[Part] = []
    for label, size in (part for axis in axes for part in axis):
        if parts and label is None and parts[-1][0] is None:
            parts[-1] = (None, parts[-1][1] * size)
        else:
            parts.append((label, size))
    return tuple(parts)


def both(one: Axis, other: Axis) -> Axis:
    """What runs along an axis of a result that two operands share, position by position.

    What one of them does not label is as the other says; where they contradict each other, nothing is known.
    """
    if one == other or not labels([other]):
        return one
    if not labels([one]):
        return other
    cuts = sorted({*_ends(one), *_ends(other)})
    left, right = cut(one, cuts), cut(other, cuts)
    if left is None or right is None:
        return plain(length(one))
    found = [a if b is None or a == b else b if a is None else -1 for (a, _), (b, _) in zip(left, right, strict=True)]
    return plain(length(one)) if -1 in found else joined([((a, n),) for a, (_, n) in zip(found, left, strict=True)])


def _ends(axis: Axis) -> list[int]:
    """Products of the lengths of all parts up to each."""
    return [prod(size for _, size in axis[: i + 1]) for i in range(len(axis))]


def cut(axis: Axis, ends: Sequence[int]) -> Axis | None:
    """The axis in parts that end at the given products of lengths; None if a labelled part would be cut.

    >>> cut(((0, 2), (None, 12)), [2, 6, 24])
    ((0, 2), (None, 3), (None, 4))
    """
    parts, at, rest = [], 1, list(ends)
    for label, size in axis:
        end, here = at * size, at
        while rest and rest[0] <= end:
            stop = rest.pop(0)
            if stop % here or end % stop or (label is not None and (here, stop) != (at, end)):
                return None
            parts += [(label, stop // here)]
            here = stop
        if here != end:
            return None
        at = end
    return tuple(parts)


def reshaped(axes: Axes, sizes: Sequence[int]) -> Axes:
    """The axes of an array of another shape; a labelled part that the new shape cuts is known no more."""
    parts = [part for axis in axes for part in axis]
    new: list[Axis] = []
    for size in sizes:
        taken: list[Part] = []
        need = size
        while need > 1:
            label, have = parts.pop(0)
            if need % have == 0:
                taken.append((label, have))
                need //= have
            elif have % need == 0:
                taken.append((None, need))
                parts.insert(0, (None, have // need))
                need = 1
            else:
                return tuple(plain(each) for each in sizes)
        new.append(joined([tuple(taken)]))
    return tuple(new)
