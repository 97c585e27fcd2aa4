"""Axes of values that hold examples or tokens, as products of labelled and other parts.

A label is the number of an axis of the ids that say which adapter each example, or each token, meets. An array of
shape `[batch · tokens, features]` has `((0, batch), (None, tokens))` along its first axis where only examples are
labelled. Parts of length one say nothing and are left out. A label means a position: what is there belongs to the
example of that number, whatever else has been added to it.
"""

from collections.abc import Iterable, Sequence
from functools import cmp_to_key
from math import prod
from typing import TypeAlias

from lora_jax.engine.sizes import divides, exceeds, several

Part: TypeAlias = tuple[int | None, int]
Axis: TypeAlias = tuple[Part, ...]
Axes: TypeAlias = tuple[Axis, ...]

LOST = -1
"""Label of a part in which an operation has mixed, or may have mixed, what was labelled."""


def plain(size: int) -> Axis:
    """An axis along which nothing labelled runs."""
    return ((None, size),) if several(size) else ()


def length(axis: Axis) -> int:
    """Number of positions along an axis."""
    return prod(size for _, size in axis)


def labels(axes: Iterable[Axis]) -> list[int]:
    """Every label, as often as it is met."""
    return [label for axis in axes for label, _ in axis if label is not None and label != LOST]


def marks(values: Iterable[Axes]) -> set[int]:
    """What runs along the axes of several values, `LOST` included."""
    return {label for axes in values for axis in axes for label, _ in axis if label is not None}


def marked(axes: Iterable[Axis]) -> bool:
    """Whether anything labelled runs along the axes, or once did."""
    return any(label is not None for axis in axes for label, _ in axis)


def lost(axis: Axis) -> Axis:
    """The axis with every label lost; what never had one is as it was."""
    return joined([((None if label is None else LOST, size),) for label, size in axis])


def all_lost(axes: Iterable[Axis]) -> Axes:
    """Axes of which everything that has no label may be what an operation has mixed."""
    return tuple(joined([((LOST if label is None else label, size),) for label, size in axis]) for axis in axes)


def joined(axes: Iterable[Axis]) -> Axis:
    """Several axes in one; parts without a label side by side become one part."""
    parts: list[Part] = []
    for label, size in (part for axis in axes for part in axis):
        if parts and label in (None, LOST) and parts[-1][0] == label:
            parts[-1] = (label, parts[-1][1] * size)
        else:
            parts.append((label, size))
    return tuple(parts)


def both(one: Axis, other: Axis, either: bool = False) -> Axis:
    """What runs along an axis of a result that two operands share, position by position.

    What has never been labelled is as the other says. Where they contradict each other, nothing is known. A part that
    was lost is as the other says where both are combined at every position, as in a residual stream around something
    that was sorted and put back; it stays lost where the result is `either` of them.
    """
    if one == other or not marked([other]):
        return one
    if not marked([one]):
        return other
    cuts = sorted({*_ends(one), *_ends(other)}, key=cmp_to_key(lambda a, b: exceeds(a, b) - exceeds(b, a)))
    left, right = cut(one, cuts), cut(other, cuts)
    if left is None or right is None:
        return ((LOST, length(one)),)
    parts = [(_one_of(a, b, either), size) for (a, size), (b, _) in zip(left, right, strict=True)]
    return joined([(part,) for part in parts])


def _one_of(one: int | None, other: int | None, either: bool) -> int | None:
    if one is None or one == other:
        return other
    if other is None:
        return one
    if LOST in (one, other) and not either:
        return other if one == LOST else one
    return LOST


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
        while rest and not exceeds(rest[0], end):
            stop = rest.pop(0)
            if (
                not divides(here, stop)
                or not divides(stop, end)
                or (label not in (None, LOST) and (here, stop) != (at, end))
            ):
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
        while several(need):
            label, have = parts.pop(0)
            if divides(have, need):
                taken.append((label, have))
                need //= have
            elif divides(need, have):
                kept = label if label is None else LOST
                taken.append((kept, need))
                parts.insert(0, (kept, have // need))
                need = 1
            else:
                mixed = plain if not marked(axes) else lambda size: ((LOST, size),) if several(size) else ()
                return tuple(mixed(each) for each in sizes)
        new.append(joined([tuple(taken)]))
    return tuple(new)
