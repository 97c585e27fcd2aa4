"""The methods of composition by name: what each does to factors and to whole tensors, and what it needs to know."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from lora_jax.adapter.factors import Array
from lora_jax.adapter.registry import Table
from lora_jax.compose import elementwise, selected, sums
from lora_jax.compose.elementwise import PLAIN, Rule, merged
from lora_jax.compose.terms import Fused, Options, Part, product

Fuse: TypeAlias = Callable[[Sequence[Part], Options, Array | None], Fused]
Tensors: TypeAlias = Callable[[Sequence[Array], Array, Options, Array | None], Array]


@dataclass(frozen=True)
class Method:
    """One way to make one adapter out of several.

    Attributes:
      fuse: what it does to the factors of one linear map.
      rule: what it does to vectors and other whole tensors.
      rank: whether it takes a rank.
      shared: whether it takes two adapters, with weights that are shares of one.
      dense: whether it forms matrices of the weight's size; stacks are then gone through one by one.
    """

    fuse: Fuse
    rule: Rule = PLAIN
    rank: bool = True
    shared: bool = False
    dense: bool = False

    @property
    def adds(self) -> bool:
        """Whether whole tensors are added up by weight."""
        return self.rule == PLAIN and not self.shared

    @property
    def random(self) -> bool:
        """Whether it draws random numbers."""
        return self.rule.thin == "random"

    def tensors(self, given: Sequence[Array], weights: Array, options: Options, key: Array | None) -> Array:
        """One vector out of several changes of it."""
        if self.shared and len(given) == 2:
            one, other = given
            weights = sums.along_circle(product(one, one), product(one, other), product(other, other), weights)
        return merged(given, weights, self.rule, options, key)


METHODS: Table[Method] = Table("method", "A method of composition", __name__)
METHODS.entries.update({
    "cat": Method(sums.cat, rank=False),
    "svd": Method(sums.truncated),
    "linear": Method(sums.truncated),
    "slerp": Method(sums.slerp, shared=True),
    "knots": Method(sums.knots, elementwise.TIES),
    "peft_linear": Method(elementwise.on_factors(PLAIN)),
    "rank_one": Method(selected.rank_one),
    "block": Method(selected.block),
})  # fmt: skip
for _name, _rule in {
    "ties": elementwise.TIES,
    "dare_linear": elementwise.DARE_LINEAR,
    "dare_ties": elementwise.DARE_TIES,
    "magnitude_prune": elementwise.MAGNITUDE_PRUNE,
}.items():
    METHODS.entries[_name] = Method(elementwise.on_factors(_rule), _rule)
    METHODS.entries[f"{_name}_svd"] = Method(elementwise.on_deltas(_rule), _rule, dense=True)
