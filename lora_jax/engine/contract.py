"""The thin products `(x·a)·b`, which every matmul-like use of a weight ends in, on tokens flattened to one axis.

Plain autodiff of these products yields the thin backward pass: with `z = g·bᵀ`, `dx = g·Wᵀ + z·a`,
`da = zᵀ·x`, `db = pᵀ·g`, and never `xᵀ·g`. Two facts shape the code: XLA runs weight gradients with two
contracted token axes about twice as slowly as flattened ones, and the gradient of A many times slower
when A is stored `(in, rank)`; so tokens are flattened and factors keep their rank axis first.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import count
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from lora_jax.dtypes import promoted
from lora_jax.engine import platforms
from lora_jax.engine.meshes import placed, spread
from lora_jax.engine.sizes import exceeds
from lora_jax.engine.weight import RANK, SLOT, Labelled, Term, flat_size, with_axis


class Contraction(NamedTuple):
    """The axes of a product of a weight and an activation, by their ids.

    Attributes:
      names: of the activation's axes; those that are its own have negative ids.
      contracted: those that are summed over.
      left: those of the weight that are left over.
      out: those of the result, in order.
    """

    names: list[Any]
    contracted: set[Any]
    left: list[Any]
    out: tuple[Any, ...]


def contraction(dimension_numbers: Any, side: int, axes: Sequence[Any], rank: int) -> Contraction:
    """The axes of a `dot_general`, of which operand `side` is a weight with these axes, and the other of this rank."""
    sums, batches = dimension_numbers
    ours, theirs = ((*sums[each], *batches[each]) for each in (side, 1 - side))
    free, paired = count(SLOT - 1, -1), dict(zip(theirs, ours, strict=True))
    names = [axes[paired[i]] if i in paired else next(free) for i in range(rank)]
    contracted, batch = {axes[i] for i in sums[side]}, [axes[i] for i in batches[side]]
    mine, its = ([axis for axis in each if axis not in contracted and axis not in batch] for each in (axes, names))
    return Contraction(names, contracted, mine, (*batch, *mine, *its) if side == 0 else (*batch, *its, *mine))


def hidden(
    read: Labelled, first: Labelled, second: Labelled, out: Sequence[int], precision: Any, like: Any
) -> Labelled:
    """The first product `x·a` of a term, rank-sized and in the activation's dtype; sums run in float32 or wider.

    On a TPU, a GPU or a mesh it is rounded by the product itself: policies that save products would keep a wider result
    beside the narrow one, and a sum over devices could not be shared with the base's. A CPU may leave it wide.

    Args:
      read: the activation, after dropout.
      first: the factor that meets it.
      second: the factor that comes after; what is neither in it nor in `out` is summed away.
      out: ids of the final result's axes.
      precision: as of `jax.lax.dot_general`.
      like: the base's own product; on a mesh results go where it is. None off a mesh.
    """
    read = replace(read, array=widened(read.array, first.array, second.array))
    owners = (read, first) if like is None else (Labelled(like, tuple(out)), read, first)
    dtype = read.array.dtype
    narrow = dtype if platforms.accelerated() or spread(read.array, first.array) else None
    inner = product(read, first.astype(dtype), {*out, *second.axes}, precision, owners, narrow)
    return inner.astype(dtype)


def widened(x: Any, *factors: Any) -> Any:
    """The activation as it meets factors: complex if one of them is."""
    return x.astype(promoted(x.dtype, jnp.complex64)) if any(map(jnp.iscomplexobj, factors)) else x


def mixed(inner: Labelled, second: Labelled, out: Sequence[int], precision: Any, like: Any) -> Any:
    """The second product of a term, `(x·a)·b`, with axes `out`."""
    owners = (Labelled(like, tuple(out)),)
    return product(inner, second.astype(inner.array.dtype), set(out), precision, owners).ordered(out).array


def ordered(term: Term, x_axes: Sequence[int], out: Sequence[int]) -> tuple[Labelled, Labelled]:
    """The two factors of a term, the one that contracts more of an activation with axes `x_axes` first."""
    weights = [flat_size(f, [i for i in f.axes if i in x_axes and i not in out]) for f in (term.a, term.b)]
    return (term.b, term.a) if exceeds(weights[1], weights[0]) else (term.a, term.b)


def product(
    x: Labelled, y: Labelled, keep: set[int], precision: Any, owners: Sequence[Labelled], dtype: Any = None
) -> Labelled:
    """Contract two labelled arrays over the ids they share and `keep` lacks; float32 accumulation at least.

    On an explicit mesh the result goes where its axes are in `owners`. Without a dtype it is float32 or wider.
    """
    keep = keep | {RANK} if (RANK in x.axes) != (RANK in y.axes) else keep - {RANK}
    alone = tuple(i for i, axis in enumerate(x.axes) if axis not in y.axes and axis not in keep)
    if alone:
        x = Labelled(x.array.sum(alone), tuple(axis for i, axis in enumerate(x.axes) if i not in alone))
    batch = [axis for axis in x.axes if axis in y.axes and axis in keep]
    inner = [axis for axis in y.axes if axis in x.axes and axis not in keep]
    left = [axis for axis in x.axes if axis not in batch and axis not in inner]
    right = [axis for axis in y.axes if axis not in batch and axis not in inner]
    axes = (*batch, *left, *right)
    shape = [(x if axis in x.axes else y).size(axis) for axis in axes]
    where = placed(axes, *owners)
    group = _separate if where is not None or spread(x.array, y.array) else flat
    (xa, xc, xb), (ya, yc, yb) = group(x, batch, inner, left), group(y, batch, inner, right)
    dtype = promoted(xa.dtype, ya.dtype, jnp.float32) if dtype is None else dtype
    array = lax.dot_general(
        xa, ya, ((xc, yc), (xb, yb)), precision=precision, preferred_element_type=dtype, out_sharding=where
    )
    return Labelled(array.reshape(shape) if group is flat else array, axes)


def flat(
    x: Labelled, batch: list[int], inner: list[int], free: list[int], inner_first: bool | None = None
) -> tuple[Any, list[int], list[int]]:
    """The array with its contracted axes merged into one and its free axes into another; moved only if it must be.

    Which of the two comes first is as it is in the array, unless said otherwise.
    """
    if inner_first is None:
        inner_first = bool(inner) and bool(free) and x.axes.index(inner[0]) < x.axes.index(free[0])
    groups = (inner, free) if inner_first else (free, inner)
    array = x.ordered([*batch, *groups[0], *groups[1]]).array
    sizes = [flat_size(x, group) for group in groups]
    array = array.reshape(*array.shape[: len(batch)], *sizes)
    return array, [len(batch) + (0 if inner_first else 1)], list(range(len(batch)))


def _separate(x: Labelled, batch: list[int], inner: list[int], free: list[int]) -> tuple[Any, list[int], list[int]]:
    """The array as it is: nothing is merged, so that no sharded axis has to move."""
    return x.array, [x.axes.index(axis) for axis in inner], [x.axes.index(axis) for axis in batch]


def split_factors(
    terms: Iterable[Term], into: Sequence[int], out: Sequence[int], stacked: Sequence[int] = ()
) -> list[tuple[Labelled, Labelled]] | None:
    """For each term the factor `[*stacked, rank, *into]` and the factor `[*stacked, rank, *out]`.

    None if a term divides the axes otherwise. Axes of length one may be in either.
    """
    pairs = []
    for term in terms:
        for pair in ((term.a, term.b), (term.b, term.a)):
            a, b = (
                _with_short(factor, pair, (*stacked, *axes)) for factor, axes in zip(pair, (into, out), strict=True)
            )
            if {*a.axes} == {*stacked, RANK, *into} and {*b.axes} == {*stacked, RANK, *out}:
                pairs.append((a.ordered((*stacked, RANK, *into)), b.ordered((*stacked, RANK, *out))))
                break
        else:
            return None
    return pairs


def _with_short(factor: Labelled, pair: Sequence[Labelled], axes: Sequence[int]) -> Labelled:
    """The factor with those of the axes that have length one in either factor, and no others of that length."""
    short = {axis for each in pair for axis in each.axes if each.size(axis) == 1 and axis not in (RANK, SLOT)}
    for axis in short - {*axes}:
        factor = factor.without(axis)
    for axis in short & {*axes}:
        factor = with_axis(factor, axis, 1)
    return factor
