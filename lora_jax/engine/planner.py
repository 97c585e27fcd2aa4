"""The planner: `x·W + (x·a)·b`, `[x, x·a]·[W; b]` or `x·(W + ab)`, for each product from static shapes.

With `n` tokens and a weight of `d` inputs and `k` outputs, `x·(W + ab)` costs `2drk` operations and a pass over
`d × k` numbers where `x·W + (x·a)·b` costs `2nr(d + k)` and a pass over `n × k`. The merged form is exact only where
the sum is not rounded (float32), and knows no dropout. On TPUs and GPUs bytes decide: there the thin product is added
in another pass over the result, read and written, and the joined form makes copies of both operands instead. In a
training step the copy of the activation costs nothing that could be measured (it is read for the thin products anyway),
so there the weight's alone is compared. A CPU adds while the result is in its cache.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import jax.numpy as jnp

from lora_jax.engine import platforms
from lora_jax.engine.bases import View
from lora_jax.engine.context import Strategy
from lora_jax.engine.joined import Joint
from lora_jax.engine.meshes import spread
from lora_jax.engine.sizes import exceeds
from lora_jax.engine.weight import Labelled, Weight, flat_size

Form: TypeAlias = Literal["factored", "joined", "merged"]


class Plan(NamedTuple):
    """Which form the products of a site have.

    Attributes:
      call: the product itself, where nothing is differentiated.
      forward: the product in a forward pass that is differentiated; `x·a` is needed there anyway, for B's gradient.
      backward: the gradient of the input; it is never merged: the sum would have to be kept from the forward pass.
    """

    call: Form = "factored"
    forward: Form = "factored"
    backward: Form = "factored"


def plan(weight: Weight, x: Labelled, out: Sequence[int], strategy: Strategy, dropout: bool) -> Plan:
    """Choose the form of a product: what takes fewer operations and bytes, unless the strategy says otherwise."""
    if not weight.terms or strategy == "factored":
        return Plan()
    if strategy == "merged":
        return Plan() if dropout else Plan("merged", "merged")
    tokens, inner, outer = extents(weight, x, out)
    joins = (strategy == "joined" or platforms.accelerated()) and joinable(weight, x, out)
    if strategy == "joined":
        return Plan(_joined(joins), _joined(joins), _joined(joins and not dropout))
    planned = Plan(
        _joined(joins and exceeds(2 * tokens * outer, (tokens + outer) * inner)),
        _joined(joins and exceeds(2 * tokens, inner)),
        _joined(joins and not dropout and exceeds(2 * tokens, outer)),
    )
    narrow = x.array.dtype != jnp.float32 or weight.base.dtype != jnp.float32
    if dropout or narrow or spread(x.array, weight.base):
        return planned
    call, forward = exceeds(tokens * (inner + outer), inner * outer), exceeds(tokens, inner)
    return planned._replace(
        call="merged" if call else planned.call, forward="merged" if forward else planned.forward
    )  # fmt: skip


def _joined(joins: bool) -> Form:
    return "joined" if joins else "factored"


def joinable(weight: Weight, x: Labelled, out: Sequence[int]) -> bool:
    """Whether factors can be appended to the operands of a product.

    Not where an operand may be spread over devices: an axis that has something appended is no longer divided as it
    was. Nor where several terms of one adapter cancel at the start, which they do exactly only by themselves.
    """
    base, terms = weight.base, weight.terms
    if isinstance(base, View) or weight.gain is not None or base.dtype != x.array.dtype or spread(x.array, base):
        return False
    real = all(jnp.issubdtype(each.dtype, jnp.floating) for t in terms for each in (base, t.a.array, t.b.array))
    alone = len({term.adapter for term in terms}) == len(terms)
    return real and alone and Joint.of(x.axes, weight.axes, out).fits(weight, x)


def extents(weight: Weight, x: Labelled, out: Sequence[int]) -> tuple[int, int, int]:
    """How many tokens, inputs and outputs a product has."""
    inner = flat_size(x, [axis for axis in x.axes if axis in weight.axes and axis not in out])
    tokens = flat_size(x, [axis for axis in x.axes if axis not in weight.axes])
    return tokens, inner, weight.base.size // max(inner, 1)
