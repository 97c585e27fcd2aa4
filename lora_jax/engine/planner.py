"""The planner: `x·W + (x·a)·b` or `x·(W + ab)`, for each product from static shapes.

With `n` tokens and a weight of `d` inputs and `k` outputs, `x·(W + ab)` costs `2drk` operations and a pass over
`d × k` numbers where `x·W + (x·a)·b` costs `2nr(d + k)` and a pass over `n × k`. The merged form is exact only where
the sum is not rounded (float32), and knows no dropout.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp

from lora_jax.engine.context import Strategy
from lora_jax.engine.meshes import spread
from lora_jax.engine.sizes import exceeds
from lora_jax.engine.weight import Labelled, Weight, flat_size


class Plan(NamedTuple):
    """Which products of a site run on the merged weight.

    Attributes:
      call: the product itself, where nothing is differentiated.
      forward: the product in a forward pass that is differentiated; `x·a` is needed there anyway, for B's gradient.
        The gradient of the input is never merged: the sum would have to be kept from the forward pass.
    """

    call: bool
    forward: bool


def plan(weight: Weight, x: Labelled, out: Sequence[int], strategy: Strategy, dropout: bool) -> Plan:
    """Choose the form of a product: what takes fewer operations and bytes, unless the strategy says otherwise."""
    if not weight.terms or dropout or strategy == "factored":
        return Plan(False, False)
    if strategy == "merged":
        return Plan(True, True)
    if x.array.dtype != jnp.float32 or weight.base.dtype != jnp.float32 or spread(x.array, weight.base):
        return Plan(False, False)
    tokens, inner, outer = extents(weight, x, out)
    return Plan(call=exceeds(tokens * (inner + outer), inner * outer), forward=exceeds(tokens, inner))


def extents(weight: Weight, x: Labelled, out: Sequence[int]) -> tuple[int, int, int]:
    """How many tokens, inputs and outputs a product has."""
    inner = flat_size(x, [axis for axis in x.axes if axis in weight.axes and axis not in out])
    tokens = flat_size(x, [axis for axis in x.axes if axis not in weight.axes])
    return tokens, inner, weight.base.size // max(inner, 1)
