"""Terms: what every linear rule does with the low-rank terms of a weight before it multiplies by them."""

from collections.abc import Iterable, Sequence
from typing import Any

from lora_jax.engine import contract
from lora_jax.engine.context import Context
from lora_jax.engine.weight import RANK, Labelled, Term, Weight


def masks(ctx: Context, weight: Weight, x: Labelled) -> list[Any]:
    """For each term the elements of the activation that its own dropout keeps; None for all."""
    return [
        contract.survivors(x, term.dropout, ctx.dropout_key(weight.path, term.slot))
        if ctx.drops(term.dropout, term.slot)
        else None
        for term in weight.terms
    ]


def inputs(ctx: Context, weight: Weight, x: Labelled) -> list[Labelled]:
    """What each term reads: the activation, with that term's own dropout where there is a key."""
    pairs = zip(weight.terms, masks(ctx, weight, x), strict=True)
    return [contract.dropped(x, term.dropout, mask) for term, mask in pairs]


def split_factors(
    terms: Iterable[Term], into: Sequence[int], out: Sequence[int], stacked: Sequence[int] = ()
) -> list[tuple[Labelled, Labelled]] | None:
    """For each term the factor `[*stacked, rank, *into]` and the factor `[*stacked, rank, *out]`.

    None if a term divides the axes otherwise.
    """
    pairs = []
    for term in terms:
        for a, b in ((term.a, term.b), (term.b, term.a)):
            if {*a.axes} == {*stacked, RANK, *into} and {*b.axes} == {*stacked, RANK, *out}:
                pairs.append((a.ordered((*stacked, RANK, *into)), b.ordered((*stacked, RANK, *out))))
                break
        else:
            return None
    return pairs
