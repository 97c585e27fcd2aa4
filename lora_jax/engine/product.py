"""The adapted product: `x·(W + Σ a·b)` in the planned form, with the factors' own gradients.

Plain autodiff of `x·W + (x·a)·b` already gives the thin backward pass, but keeps the whole input for the gradient
of `a`, and cannot run forward on the merged weight without forming a gradient of its size. Written as a
`custom_jvp`, forward mode, reverse mode, `vmap` and higher derivatives all work. Its tangent is

    dx·W + (dx·a + x·da)·b + (x·a)·db

so that the backward pass reads the output's gradient once per factor: `z = g·bᵀ` serves both the input and `a`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from lora_jax.engine import contract
from lora_jax.engine.planner import Plan
from lora_jax.engine.recompute import Recipe
from lora_jax.engine.weight import Labelled, Weight


def adapted_product(
    dot: Callable[[Any, Any], Any],
    x: Labelled,
    weight: Weight,
    out: Sequence[int],
    precision: Any,
    planned: Plan,
    recipe: Recipe | None,
    masks: Sequence[Any],
) -> Any:
    """`dot(x, W + Σ ab)` without any gradient of the weight's size.

    Args:
      dot: the program's product of activation and weight.
      x: the activation.
      weight: the weight, with its terms.
      out: ids of the result's axes.
      precision: as of `jax.lax.dot_general`.
      planned: which products run on the merged weight.
      recipe: how to compute the activation again for the gradient of `a`; None to keep it.
      masks: for every term what its dropout keeps of the activation; None for everything.
    """
    leaves, again = recipe or Recipe([x.array], lambda leaves: leaves[0])

    def hidden(x_in: Any, terms: Any, masks: Any, like: Any) -> list[Labelled]:
        pairs = zip(terms, masks, strict=True)
        reads = [contract.dropped(Labelled(x_in, x.axes), term.dropout, mask) for term, mask in pairs]
        return contract.hidden(reads, terms, out, precision, like)

    def mixed(inner: Any, terms: Any, like: Any) -> Any:
        return contract.mixed(inner, x.axes, terms, out, precision, like)

    def formed(x: Any, base: Any, terms: Any) -> Any:
        return dot(x, Weight(base, terms, weight.axes, weight.path).dense())

    @jax.custom_jvp
    def run(x: Any, leaves: Sequence[Any], base: Any, terms: Any, masks: Any) -> Any:
        if planned.call:
            return formed(x, base, terms)
        y = dot(x, base)
        return added(y, mixed(hidden(x, terms, masks, y), terms, y))

    @run.defjvp
    def _(primals: Any, tangents: Any) -> tuple[Any, Any]:
        (x, leaves, base, terms, masks), (dx, _, _, dterms, _) = primals, tangents
        y = formed(x, base, terms) if planned.forward else dot(x, base)
        inner = hidden(x, terms, masks, y)
        if not planned.forward:
            # Without the barrier XLA repeats this sum in the backward pass, and keeps both its parts until then.
            y = lax.optimization_barrier(added(y, mixed(inner, terms, y)))
        # The leaves' tangents are not lost: the activation is a function of them, and its own are in dx.
        read = lambda leaves, dterms: hidden(again(leaves), dterms, masks, y)  # noqa: E731
        by_a = (jax.checkpoint(read) if recipe else read)(leaves, dterms)
        change = jax.tree.map(lax.add, hidden(dx, terms, masks, y), by_a)
        return y, added(dot(dx, base), mixed(change, terms, y) + mixed(inner, dterms, y))

    return run(x.array, leaves, weight.base, weight.terms, masks)


def added(y: Any, change: Any) -> Any:
    """Add in the wider dtype and round once to the dtype the program expects."""
    return (y.astype(change.dtype) + change).astype(y.dtype)
