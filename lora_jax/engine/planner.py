"""The planner: factored or merged, per product and from static shapes, and the merged form itself.

With `n` tokens and a weight of `d` inputs and `k` outputs, `x·(W + ab)` costs `2drk` operations and a pass over
`d × k` numbers where `x·W + (x·a)·b` costs `2nr(d + k)` and a pass over `n × k`. The merged form is exact only where
the sum is not rounded (float32), and knows no dropout.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.engine.context import Strategy
from lora_jax.engine.placement import spread
from lora_jax.engine.recompute import Recipe
from lora_jax.engine.weight import Labelled, Weight, flat_size


class Plan(NamedTuple):
    """Which products of a site run on the merged weight.

    Attributes:
      call: the product itself, where nothing is differentiated.
      forward: the product in a forward pass that is differentiated; `x·a` is needed there anyway, for B's gradient.
      backward: the gradient of the input, for which the merged weight is kept from the forward pass.
    """

    call: bool
    forward: bool
    backward: bool


def plan(weight: Weight, x: Labelled, out: Sequence[int], strategy: Strategy, dropout: bool) -> Plan:
    """Choose the form of a product: what takes fewer operations and bytes, unless the strategy says otherwise."""
    if not weight.terms or dropout or strategy == "factored":
        return Plan(False, False, False)
    if strategy == "merged":
        return Plan(True, True, True)
    if x.array.dtype != jnp.float32 or weight.base.dtype != jnp.float32 or spread(x.array, weight.base):
        return Plan(False, False, False)
    tokens, inner, outer = extents(weight, x, out)
    forward = tokens > inner
    # Kept, the merged weight should be no more than half the size of the input and of the result.
    return Plan(tokens * (inner + outer) > inner * outer, forward, forward and tokens >= 2 * max(inner, outer))


def extents(weight: Weight, x: Labelled, out: Sequence[int]) -> tuple[int, int, int]:
    """How many tokens, inputs and outputs a product has."""
    inner = flat_size(x, [axis for axis in x.axes if axis in weight.axes and axis not in out])
    tokens = flat_size(x, [axis for axis in x.axes if axis not in weight.axes])
    return tokens, inner, weight.base.size // max(inner, 1)


def merged(
    dot: Callable[[Any, Any], Any],
    x: Labelled,
    weight: Weight,
    thin: Callable[[Labelled, Any, Any], Any],
    planned: Plan,
    recipe: Recipe | None,
) -> Any:
    """`dot(x, W + Σ ab)` with the factors' own gradients: none of the weight's size is ever formed.

    It is a `custom_jvp`, so forward mode, reverse mode, `vmap` and higher derivatives all work.

    Args:
      dot: the program's product of activation and weight.
      x: the activation.
      weight: the weight, with its terms.
      thin: `thin(x, terms, like)`, the low-rank products, placed like the array `like`.
      planned: which products run on the merged weight.
      recipe: how to compute the activation again for the gradient of the factors; None to keep it.
    """
    leaves, again = recipe or Recipe([x.array], lambda leaves: leaves[0])

    def formed(x: Any, base: Any, terms: Any) -> Any:
        return dot(x, Weight(base, terms, weight.axes, weight.path).dense())

    def factored(x_in: Any, base: Any, terms: Any) -> Any:
        return added(y := dot(x_in, base), thin(Labelled(x_in, x.axes), terms, y))

    def by_factors(leaves: Sequence[Any], terms: Any, dterms: Any, like: Any) -> Any:
        read = Labelled(again(leaves), x.axes)
        return jax.jvp(lambda t: thin(read, t, like), (terms,), (dterms,))[1]

    @jax.custom_jvp
    def run(x: Any, leaves: Sequence[Any], base: Any, terms: Any) -> Any:
        return formed(x, base, terms)

    @run.defjvp
    def _(primals: Any, tangents: Any) -> tuple[Any, Any]:
        (x_in, leaves, base, terms), (dx, _, _, dterms) = primals, tangents
        base = lax.stop_gradient(base)
        y = run(x_in, leaves, base, terms) if planned.forward else factored(x_in, base, terms)
        by_x = (formed if planned.backward else factored)(dx, base, terms)
        # The leaves' tangents are not lost: the activation is a function of them, and its own are in dx.
        keep = jax.checkpoint(by_factors, policy=jax.checkpoint_policies.dots_saveable) if recipe else by_factors
        return y, added(by_x, keep(leaves, terms, dterms, y))

    return run(x.array, leaves, weight.base, weight.terms)


def added(y: Any, change: Any) -> Any:
    """Add in the wider dtype and round once to the dtype the program expects."""
    return (y.astype(change.dtype) + change).astype(y.dtype)
