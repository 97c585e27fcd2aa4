"""Looking into Pallas kernels: a kernel gets the formed weight, but what it multiplies by is a site."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.engine import jaxprs
from lora_jax.engine.context import Context
from lora_jax.engine.jaxprs import Program
from lora_jax.engine.lift import RULES, opaque, rule
from lora_jax.engine.weight import Weight


@rule("pallas_call")
def _pallas_call(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """The kernel's references to a weight stand for its blocks: axes keep their ids, squeezed ones go."""
    if ctx.look_inside and not any(operand.adapted for operand in operands if isinstance(operand, Weight)):
        _look_inside(ctx, eqn, operands)
    return opaque(ctx, eqn, operands)


def _look_inside(ctx: Context, eqn: Any, operands: Sequence[Any]) -> None:
    grid, kernel = eqn.params["grid_mapping"], jaxprs.program(eqn.params["jaxpr"])
    inputs = len(grid.block_mappings) - len(eqn.outvars)
    blocks = [_block(w, m.block_shape) for w, m in zip(operands[-inputs:], grid.block_mappings[:inputs], strict=True)]
    refs = [None] * grid.num_index_operands + blocks
    jax.eval_shape(lambda: _walk(replace(ctx, inside="pallas_call", keys=()), kernel, refs))


def _block(operand: Any, shape: Sequence[Any]) -> Weight | None:
    if not isinstance(operand, Weight):
        return None
    kept = [size is not None and type(size).__name__ != "Squeezed" for size in shape]
    return _part(operand, [n for n, keep in zip(operand.base.shape, kept, strict=True) if keep], kept)


def _part(weight: Weight, shape: Sequence[int], kept: Sequence[bool]) -> Weight:
    """A stand-in for some part of a weight, without some of its axes."""
    axes = tuple(axis for axis, keep in zip(weight.axes, kept, strict=True) if keep)
    return replace(weight, base=jnp.zeros(shape, weight.base.dtype), terms=(), axes=axes, gain=None)


def _walk(ctx: Context, program: Program, operands: Sequence[Weight | None]) -> None:
    """Follow weights through a kernel. Nothing is computed: all other values are zeros of the right shape."""
    env = {v: w for v, w in zip(program.jaxpr.invars, operands, strict=False) if w is not None}
    for position, eqn in enumerate(program.jaxpr.eqns):
        here, name = ctx.at(position), eqn.primitive.name
        known = [None if jaxprs.is_literal(atom) else env.get(atom) for atom in eqn.invars]
        if not any(known):
            continue
        if name == "get" and known[0] is not None:
            env[eqn.outvars[0]] = _read(eqn, known[0])
        elif inner := jaxprs.sub_programs(eqn):
            for sub in inner:
                _walk(here, sub, known[len(known) - len(sub.jaxpr.invars) :])
        elif name in RULES:
            given = [
                w if w is not None else jnp.zeros(v.aval.shape, v.aval.dtype)
                for w, v in zip(known, eqn.invars, strict=True)
            ]
            results = RULES[name](here, eqn, given) or []
            env.update({v: r for v, r in zip(eqn.outvars, results, strict=False) if isinstance(r, Weight)})


def _read(eqn: Any, ref: Weight) -> Weight:
    """What is read from a reference; an integer among the indices drops its axis."""
    kept = [True] * len(ref.axes)
    for indexer in jax.tree.unflatten(eqn.params["tree"], eqn.invars[1:]):
        kept = [type(index).__name__ == "Slice" for index in indexer.indices]
    return _part(ref, eqn.outvars[0].aval.shape, kept)
