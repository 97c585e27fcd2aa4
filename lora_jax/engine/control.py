"""Control-flow rules: weights go into loops, branches, remat and shard_map without being formed."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lora_jax.engine import jaxprs
from lora_jax.engine.context import Context
from lora_jax.engine.jaxprs import Program
from lora_jax.engine.lift import dense, interpret, rule
from lora_jax.engine.placement import constrained
from lora_jax.engine.weight import Labelled, Weight, beside


@rule("jit", "pjit", "closed_call", "core_call")
def _inline(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """The compiled program is one anyway, and a weight may come out as symbolic as it went in."""
    body = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    given, wanted = (eqn.params.get(name, ()) for name in ("in_shardings", "out_shardings"))
    results = interpret(ctx, jaxprs.program(body), _constrained(operands, given))
    return _constrained(results, wanted)


def _constrained(values: Sequence[Any], shardings: Sequence[Any]) -> list[Any]:
    """Place values as an inner `jit` asks for; of a weight, its base."""
    return [
        replace(v, base=constrained(v.base, s)) if isinstance(v, Weight) else constrained(v, s)
        for v, s in zip_longest(values, shardings)
    ]


@rule("checkpoint", "remat2", "remat")
def _checkpoint(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    body = jaxprs.program(eqn.params["jaxpr"])

    def run(operands: Sequence[Any]) -> list[Any]:
        return _region(ctx, eqn, body, operands)

    return jax.checkpoint(run, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])(list(operands))


@rule("scan")
def _scan(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Constants stay symbolic, scanned weights are sliced with their factors, each step has its own key."""
    loop = jaxprs.loop(eqn)
    still = _invariant(loop.body, loop.consts, loop.carries)
    consts = list(operands[: loop.consts])
    carries = list(operands[loop.consts : loop.consts + loop.carries])
    fixed = {i: carries[i] for i in still if isinstance(carries[i], Weight)}
    init = _formed(ctx, eqn, carries, fixed)
    stacks = [_unstack(operand) for operand in operands[loop.consts + loop.carries :]]
    steps = jnp.arange(eqn.params["length"]) if ctx.key is not None else None

    def body(carry: Sequence[Any], inputs: Any) -> tuple[list[Any], list[Any]]:
        step, slices = inputs
        here = ctx if step is None else ctx.with_key(jax.random.fold_in(ctx.key, step))
        scanned = [rebuild(part) for (_, rebuild), part in zip(stacks, slices, strict=True)]
        results = _region(here, eqn, loop.body, [*consts, *_woven(carry, fixed), *scanned])
        return [r for i, r in enumerate(results[: loop.carries]) if i not in fixed], results[loop.carries :]

    options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    carry, outputs = jax.lax.scan(body, init, (steps, [arrays for arrays, _ in stacks]), **options)
    return [*_woven(carry, fixed), *outputs]


def _unstack(operand: Any) -> tuple[Any, Any]:
    return operand.unstack() if isinstance(operand, Weight) else (operand, lambda part: part)


def _invariant(body: Program, consts: int, carries: int) -> set[int]:
    """Positions of the carries that a loop's body hands on untouched."""
    pairs = zip(body.jaxpr.invars[consts : consts + carries], body.jaxpr.outvars[:carries], strict=True)
    return {i for i, (before, after) in enumerate(pairs) if before is after}


def _formed(ctx: Context, eqn: Any, carries: Sequence[Any], fixed: dict[int, Any]) -> list[Any]:
    """The carries of a loop but the fixed ones, as ordinary arrays."""
    reason = "carried through a loop that changes it"
    return [dense(ctx, eqn, carry, reason) for i, carry in enumerate(carries) if i not in fixed]


def _woven(values: Sequence[Any], fixed: dict[int, Any]) -> list[Any]:
    """The values in order, with the fixed ones put back at their positions."""
    rest = iter(values)
    return [fixed[i] if i in fixed else next(rest) for i in range(len(values) + len(fixed))]


def _region(ctx: Context, eqn: Any, body: Program, operands: Sequence[Any]) -> list[Any]:
    """Evaluate a body whose results must be ordinary arrays."""
    return [dense(ctx, eqn, result, "returned by a region of the program") for result in interpret(ctx, body, operands)]


@rule("while")
def _while(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    carries = len(eqn.outvars)
    test, body = (jaxprs.program(eqn.params[name]) for name in ("cond_jaxpr", "body_jaxpr"))
    split = len(test.jaxpr.invars) - carries
    for_test, for_body, init = operands[:split], operands[split:-carries], operands[-carries:]
    still = _invariant(body, len(for_body), carries)
    fixed = {i: init[i] for i in still if isinstance(init[i], Weight)}
    start = _formed(ctx, eqn, init, fixed)

    def go_on(state: tuple[Any, list[Any]]) -> Any:
        (result,) = _region(ctx.at(0), eqn, test, [*for_test, *_woven(state[1], fixed)])
        return result

    def step(state: tuple[Any, list[Any]]) -> tuple[Any, list[Any]]:
        turn, carry = state
        here = ctx.at(1) if ctx.key is None else ctx.at(1).with_key(jax.random.fold_in(ctx.key, turn))
        results = _region(here, eqn, body, [*for_body, *_woven(carry, fixed)])
        return turn + 1, [r for i, r in enumerate(results) if i not in fixed]

    _, results = jax.lax.while_loop(go_on, step, (jnp.int32(0), start))
    return _woven(results, fixed)


@rule("cond")
def _cond(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    index, *rest = operands

    def branch(position: int, body: Program) -> Any:
        return lambda values: _region(ctx.at(position), eqn, body, values)

    branches = [branch(i, jaxprs.program(body)) for i, body in enumerate(eqn.params["branches"])]
    return jax.lax.switch(index, branches, rest)


@rule("shard_map")
def _shard_map(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Each factor is split over the mesh the way the weight's axes are; the rank axis is not."""
    params = eqn.params
    operands = [beside(operand) if isinstance(operand, Weight) else operand for operand in operands]
    specs = [_specs(operand, spec) for operand, spec in zip(operands, params["in_specs"], strict=True)]
    leaves, tree = jax.tree.flatten(list(operands))
    body = jaxprs.program(params["jaxpr"])

    def run(*leaves: Any) -> list[Any]:
        return _region(ctx, eqn, body, jax.tree.unflatten(tree, leaves))

    return jax.shard_map(
        run, mesh=params["mesh"], in_specs=tuple(spec for each in specs for spec in each),
        out_specs=list(params["out_specs"]), check_vma=params["check_vma"],
        axis_names=params["newly_manual_axes"],
    )(*leaves)  # fmt: skip


def _specs(operand: Any, spec: PartitionSpec) -> list[PartitionSpec]:
    """Partition specs for the arrays of an operand, in the order of its leaves."""
    if not isinstance(operand, Weight):
        return [spec]
    entries = dict(zip(operand.axes, (*spec, *[None] * (len(operand.axes) - len(spec))), strict=True))

    def place(factor: Labelled) -> Labelled:
        return replace(factor, array=PartitionSpec(*(entries.get(axis) for axis in factor.axes)))

    placed = operand.map(spec, operand.axes, place)
    return jax.tree.leaves(placed, is_leaf=lambda node: isinstance(node, PartitionSpec))


@rule("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
def _custom(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    """The custom rule must see the value it was written for; discovery still looks for sites inside."""
    if ctx.look_inside:
        inner = replace(ctx, inside=eqn.primitive.name, key=None)
        jax.eval_shape(lambda: interpret(inner, jaxprs.sub_programs(eqn)[0], operands) and None)
    return None
