"""Forms of a product whose rows meet factors of their own: three that compute the same, chosen by shapes.

* `rows`: the factors of each row's slot are gathered, and every row is multiplied by its own.
* `mask`: every row meets all slots at once, in two ordinary products; between them all but its own are set to zero.
* `blocks`: rows are brought into blocks of one slot each, and every block is multiplied by its factors. The number of
  blocks has a bound that depends on shapes only, so nothing is dropped and nothing recompiled.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import jax.numpy as jnp
from jax import lax

from lora_jax.dtypes import promoted
from lora_jax.engine import contract
from lora_jax.engine.meshes import spread
from lora_jax.engine.routing.isolation import finite, isolated
from lora_jax.engine.routing.slots import Routing, chosen, gate, kept
from lora_jax.engine.sizes import exceeds
from lora_jax.engine.weight import RANK, SLOT, Labelled, flat_size

Form = Literal["rows", "mask", "blocks"]


def planned(routing: Routing, rows: int, tokens: int, rank: int, blocks: bool) -> Form:
    """The form of a product, from static shapes.

    Args:
      routing: of the call.
      rows: how many choices there are.
      tokens: how many rows the product has.
      rank: of one slot.
      blocks: whether the product can run in blocks.
    """
    if routing.mixes:
        return "mask"
    if routing.strategy != "auto":
        return routing.strategy if blocks or routing.strategy != "blocks" else "rows"
    wide = routing.slots * rank
    if not exceeds(8 * rows, tokens) or not exceeds(rows, routing.slots):
        return "rows"
    if routing.slots <= 4 or (wide <= 1024 and (exceeds(256, tokens) or not blocks)):
        return "mask"
    return "blocks" if blocks and exceeds(tokens, 16) else "rows"


@dataclass(frozen=True, eq=False)
class Routed:
    """A product whose rows meet different factors.

    Attributes:
      routing: of the call.
      choice: what each row meets.
      out: ids of the result's axes.
      precision: as of `jax.lax.dot_general`.
      like: the base's own product; on a mesh results go where it is.
    """

    routing: Routing
    choice: Labelled
    out: Sequence[int]
    precision: Any
    like: Any

    def form(self, x: Labelled, first: Labelled, second: Labelled) -> Form:
        """How a term is applied to an activation."""
        free, into = [axis for axis in x.axes if axis not in first.axes], {*first.axes} - {SLOT, RANK}
        blocks = into <= {*x.axes} and not into & {*self.out} and not {*second.axes} & {*x.axes} and not spread(x.array)
        rows = prod(size for size, axis in zip(self.choice.array.shape, self.choice.axes, strict=True) if axis != SLOT)
        return planned(self.routing, rows, flat_size(x, free), first.size(RANK), blocks)

    def term(self, x: Labelled, first: Labelled, second: Labelled) -> Any:
        """What a term adds to the result: `(x·a)·b` with each row's own `a` and `b`."""
        form = self.form(x, first, second)
        if form == "blocks":
            return self.in_blocks(x, first, second)
        if form == "mask":
            return self.masked(
                contract.hidden(finite(x), first, second, self.out, self.precision, self.like), first, second
            )
        first, second = chosen(first, self.choice), chosen(second, self.choice)
        return self.mixed(contract.hidden(x, first, second, self.out, self.precision, self.like), second)

    def masked(self, inner: Labelled, first: Labelled, second: Labelled) -> Any:
        """The second product of a term, of what each row has chosen among its first products with all slots."""
        by = gate(self.choice, self.routing.slots, inner.array.dtype)
        axes = inner.axes if SLOT in inner.axes else (*inner.axes, SLOT)
        own = Labelled(kept(inner.over(axes), finite(by).over(axes), self.routing.mixes), axes)
        result = Labelled(self.mixed(own, second), tuple(self.out))
        return isolated(result, by, (first, second)).array

    def mixed(self, inner: Labelled, second: Labelled) -> Any:
        """The second product of a term."""
        return contract.mixed(inner, second, self.out, self.precision, self.like)

    def marked(self, term: Any) -> Any:
        """What a term adds, undefined in rows that a broken adapter is for."""
        return self.routing.spoiled(Labelled(term, tuple(self.out)), self.choice).array

    def in_blocks(self, x: Labelled, first: Labelled, second: Labelled) -> Any:
        """The term, computed in blocks of rows that have the same slot."""
        into = [axis for axis in first.axes if axis not in (SLOT, RANK)]
        left = [axis for axis in second.axes if axis not in (SLOT, RANK)]
        free = [axis for axis in x.axes if axis not in into]
        sizes = [x.size(axis) for axis in free]
        ids = jnp.broadcast_to(self.choice.over(free), sizes).reshape(-1)
        rows = x.ordered((*free, *into)).array.reshape(len(ids), -1)
        a = first.ordered((SLOT, RANK, *into)).array
        b = second.ordered((SLOT, RANK, *left)).array
        narrow, wide = (each.reshape(*each.shape[:2], -1) for each in (a, b))
        result = block_product(rows, ids, narrow, wide, self.precision)
        sizes += [second.size(axis) for axis in left]
        return Labelled(result.reshape(sizes), (*free, *left)).ordered(self.out).array


def block_product(x: Any, ids: Any, a: Any, b: Any, precision: Any = None) -> Any:
    """`[rows, out]` in float32 or wider: each row of `x` times `a` and `b` of its slot, in blocks of one slot each.

    Args:
      x: `[rows, in]`.
      ids: `[rows]` integers; rows with one past the end get zeros.
      a: `[slots, rank, in]`.
      b: `[slots, rank, out]`.
      precision: as of `jax.lax.dot_general`.
    """
    slots, rows, x = len(a), len(x), contract.widened(x, a, b)
    size = min(max(1 << (max(rows // slots, 1).bit_length() - 1), 8), 64)
    source, place, owner = _blocks(ids, slots + 1, size)
    block = x.at[source].get(mode="fill", fill_value=0).reshape(-1, size, x.shape[1])
    own = [each.astype(x.dtype).at[owner].get(mode="fill", fill_value=0) for each in (a, b)]
    accumulate = {"precision": precision, "preferred_element_type": promoted(x.dtype, jnp.float32)}
    inner = lax.dot_general(block, own[0], (((2,), (2,)), ((0,), (0,))), **accumulate).astype(x.dtype)
    found = lax.dot_general(inner, own[1], (((2,), (1,)), ((0,), (0,))), **accumulate)
    return found.reshape(-1, b.shape[2])[place]


def _blocks(ids: Any, slots: int, size: int) -> tuple[Any, Any, Any]:
    """The row behind each place in a block (past the end for none), the place of each row, the slot of each block."""
    rows = len(ids)
    counts = jnp.bincount(ids, length=slots)
    ends = jnp.cumsum(-(-counts // size) * size)
    starts = jnp.concatenate([jnp.zeros(1, ends.dtype), ends[:-1]])
    firsts = jnp.cumsum(counts) - counts
    order = jnp.argsort(ids, stable=True)
    ordered = ids[order]
    places = starts[ordered] + jnp.arange(rows) - firsts[ordered]
    total = -(-rows // size) + min(slots, rows)
    source = jnp.full(total * size, rows, order.dtype).at[places].set(order)
    place = jnp.zeros(rows, places.dtype).at[order].set(places)
    owner = jnp.searchsorted(ends, jnp.arange(total) * size, side="right")
    return source, place, jnp.minimum(owner, slots - 1)
