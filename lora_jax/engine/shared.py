"""Products that a program repeats, as the layers of a deep model do, are traced, differentiated and lowered once.

An adapted product is a function of arrays and of what is static in it: the operation, the roles of axes, the plan.
Where two products have the same statics they are one compiled function, called twice. XLA inlines such calls.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax

from lora_jax.adapter.factors import is_traced
from lora_jax.engine.bases import View
from lora_jax.engine.planner import Plan
from lora_jax.engine.product import adapted_product
from lora_jax.engine.recompute import Recomputation
from lora_jax.engine.weight import Labelled, Weight, flat_ids


@dataclass(frozen=True)
class Product:
    """What is static in an adapted product.

    Attributes:
      dot: the program's product of activation and weight.
      out: ids of the result's axes.
      precision: as of `jax.lax.dot_general`.
      planned: the forms of the products.
      again: computes the activation from the leaves; None to keep it.
      opaque: whether `dot` is a function of the user.
    """

    dot: Callable[[Any, Any], Any]
    out: tuple[int, ...]
    precision: Any
    planned: Plan
    again: Callable[[Sequence[Any]], Any] | None
    opaque: bool

    def __call__(self, x: Labelled, weight: Weight, leaves: Sequence[Any], masks: Sequence[Any], read: Any) -> Any:
        """The product of an activation and a weight; see `adapted_product`."""
        recomputed = None if self.again is None else Recomputation(list(leaves), self.again)
        with jax.named_scope("lora"):
            return adapted_product(
                self.dot, x, weight, self.out, self.precision, self.planned, recomputed, masks, self.opaque, read
            )


def shared_product(
    product: Product, x: Labelled, weight: Weight, leaves: Sequence[Any], masks: Sequence[Any], read: Any
) -> Any:
    """The product, in one function with all that are equal to it; outside of a traced program, by itself.

    So is one of a user's own kernel: what its function closes over would be kept as long as the compiled function.
    """
    if is_traced(x.array) and not product.opaque and not isinstance(weight.base, View) and _hashable(product):
        product, x, weight = _canonical(product, x, weight)
        return _compiled(product)(x, weight, list(leaves), list(masks), read)
    return product(x, weight, leaves, masks, read)


@lru_cache(maxsize=1024)
def _compiled(product: Product) -> Callable[..., Any]:
    def lora_product(*operands: Any) -> Any:
        return product(*operands)

    return jax.jit(lora_product)


def _hashable(product: Product) -> bool:
    try:
        hash(product)
    except TypeError:
        return False
    return True


def _canonical(product: Product, x: Labelled, weight: Weight) -> tuple[Product, Labelled, Weight]:
    """The same with ids of axes that count from zero, and without what concerns one use only."""
    names = {axis: number for number, axis in enumerate(flat_ids(weight.axes))}
    rename = lambda axes: tuple(names.get(axis, axis) for axis in axes)  # noqa: E731
    terms = tuple(replace(term, path="") for term in weight.terms)
    bare = replace(weight, terms=terms, paths=(), numbering=None, keys=None, formed="")
    return replace(product, out=rename(product.out)), replace(x, axes=rename(x.axes)), bare.renamed(names)
