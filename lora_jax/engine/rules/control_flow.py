"""Control-flow rules: weights go into loops, branches, remat and shard_map without being formed."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lora_jax.adapter.sharding import shards
from lora_jax.engine import jaxprs
from lora_jax.engine.bases import View, array_of
from lora_jax.engine.context import Context
from lora_jax.engine.jaxprs import Program
from lora_jax.engine.lift import dense, interpret, opaque, rule
from lora_jax.engine.meshes import constrained
from lora_jax.engine.rules.linear import declared_product
from lora_jax.engine.weight import Labelled, Versions, Weight, beside


@rule("jit", "pjit", "closed_call", "core_call", merged=True)
def _inline(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """The compiled program is one anyway, and a weight may come out as symbolic as it went in."""
    declared = declared_product(ctx, eqn, operands)
    if declared is not None:
        return declared
    body = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    given, wanted = (eqn.params.get(name, ()) for name in ("in_shardings", "out_shardings"))
    needed = ctx.frame.needed(eqn) if ctx.frame else None
    results = interpret(ctx, jaxprs.program(body), _constrained(operands, given), needed)
    return _constrained(results, wanted)


def _constrained(values: Sequence[Any], shardings: Sequence[Any]) -> list[Any]:
    """Place values as an inner `jit` asks for; of a weight, its base, if that is an array."""

    def place(value: Any, sharding: Any) -> Any:
        if isinstance(value, Weight):
            return value if isinstance(value.base, View) else replace(value, base=constrained(value.base, sharding))
        return value if value is None else constrained(value, sharding)

    return [place(value, sharding) for value, sharding in zip_longest(values, shardings)]


@rule("checkpoint", "remat2", "remat")
def _checkpoint(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    body = jaxprs.program(eqn.params["jaxpr"])
    passed: dict[int, Weight] = {}

    def run(inner: Sequence[Any]) -> list[Any]:
        results = interpret(ctx, body, inner)
        passed.update(_handed_on(results, inner, operands))
        kept = [result for i, result in enumerate(results) if i not in passed]
        return [each if isinstance(each, Versions) else _formed(ctx, eqn, [each])[0] for each in kept]

    options = {name: eqn.params[name] for name in ("prevent_cse", "policy")}
    return _woven(jax.checkpoint(run, **options)(list(operands)), passed)


def _handed_on(results: Sequence[Any], inner: Sequence[Any], outer: Sequence[Any]) -> dict[int, Weight]:
    """Results of a region that are weights it was given (NNX hands on all state that way): what they are outside."""
    places = {id(weight): j for j, weight in enumerate(inner) if isinstance(weight, Weight)}
    return {i: outer[places[id(result)]] for i, result in enumerate(results) if id(result) in places}


def _formed(ctx: Context, eqn: Any, results: Sequence[Any], passed: Collection[int] = ()) -> list[Any]:
    """Results of a region, but for those handed on, as ordinary arrays."""
    reason = "returned by a region of the program"
    return [dense(ctx, eqn, result, reason) for i, result in enumerate(results) if i not in passed]


def _woven(values: Sequence[Any], passed: dict[int, Weight]) -> list[Any]:
    """The values in order, with the weights handed on at their positions."""
    rest = iter(values)
    return [passed[i] if i in passed else next(rest) for i in range(len(values) + len(passed))]


@rule("scan")
def _scan(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Constants stay symbolic, scanned weights are sliced with their factors, each step has its own key."""
    loop = jaxprs.loop(eqn)
    consts, scanned = operands[: loop.consts], operands[loop.consts + loop.carries :]
    init = _carries(ctx, eqn, operands[loop.consts : loop.consts + loop.carries])
    stacks = [_unstack(operand) for operand in scanned]
    steps = jnp.arange(eqn.params["length"]) if ctx.keys else None
    passed: dict[int, Weight] = {}

    def body(carry: Sequence[Any], inputs: Any) -> tuple[list[Any], list[Any]]:
        step, slices = inputs
        here = ctx if step is None else ctx.iteration(step)
        inner = [rebuild(part) for (_, rebuild), part in zip(stacks, slices, strict=True)]
        results = interpret(here, loop.body, [*consts, *carry, *inner])
        carry, outputs = results[: loop.carries], results[loop.carries :]
        passed.update(_handed_on(outputs, inner, scanned))
        return _formed(here, eqn, carry), _formed(here, eqn, outputs, passed)

    options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    carry, outputs = jax.lax.scan(body, init, (steps, [arrays for arrays, _ in stacks]), **options)
    return [*carry, *_woven(outputs, passed)]


def _unstack(operand: Any) -> tuple[Any, Any]:
    return operand.unstack() if isinstance(operand, (Weight, Versions)) else (operand, lambda part: part)


def _carries(ctx: Context, eqn: Any, carries: Sequence[Any]) -> list[Any]:
    """What a loop carries, as ordinary arrays. JAX itself makes constants of carries that no iteration changes."""
    return [dense(ctx, eqn, carry, "carried through a loop that changes it") for carry in carries]


@rule("while")
def _while(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    carries = len(eqn.outvars)
    test, body = (jaxprs.program(eqn.params[name]) for name in ("cond_jaxpr", "body_jaxpr"))
    split = len(test.jaxpr.invars) - carries
    for_test, for_body = operands[:split], operands[split:-carries]

    def go_on(carry: list[Any]) -> Any:
        (result,) = interpret(ctx.at(0), test, [*for_test, *carry])
        return result

    def iteration(state: tuple[Any, Any, list[Any]]) -> tuple[Any, Any, list[Any]]:
        number, going, carry = state
        here = ctx.at(1).iteration(number)
        new = _formed(here, eqn, interpret(here, body, [*for_body, *carry]))
        if going.ndim:
            new = [_where(going, *pair) for pair in zip(new, carry, strict=True)]
        return number + 1, go_on(new), new

    # The test is evaluated at the end of each iteration: only a loop's body may add to what is captured.
    init = _carries(ctx, eqn, operands[-carries:])
    return jax.lax.while_loop(lambda state: state[1].any(), iteration, (jnp.int32(0), go_on(init), init))[2]


def _where(going: Any, new: Any, old: Any) -> Any:
    """What a loop under `jax.vmap` carries: examples that are through keep what they have."""
    return jax.lax.select(jax.lax.broadcast_in_dim(going, new.shape, range(going.ndim)), new, old)


@rule("cond")
def _cond(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    index, *rest = operands

    def branch(position: int, body: Program) -> Any:
        here = ctx.at(position)
        return lambda values: _formed(here, eqn, interpret(here, body, values))

    branches = [branch(i, jaxprs.program(body)) for i, body in enumerate(eqn.params["branches"])]
    return jax.lax.switch(index, branches, rest)


@rule("shard_map")
def _shard_map(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Each factor is split over the mesh the way the weight's axes are; the rank axis is not."""
    params = eqn.params
    placed = [
        _spread(operand, spec, params["mesh"]) for operand, spec in zip(operands, params["in_specs"], strict=True)
    ]
    leaves, tree = jax.tree.flatten([operand for operand, _ in placed])
    body = jaxprs.program(params["jaxpr"])

    def run(*leaves: Any) -> list[Any]:
        return _formed(ctx, eqn, interpret(ctx, body, jax.tree.unflatten(tree, leaves)))

    return jax.shard_map(
        run, mesh=params["mesh"], in_specs=tuple(spec for _, specs in placed for spec in specs),
        out_specs=list(params["out_specs"]), check_vma=params["check_vma"],
        axis_names=params["newly_manual_axes"],
    )(*leaves)  # fmt: skip


def _spread(operand: Any, spec: PartitionSpec, mesh: Any) -> tuple[Any, list[PartitionSpec]]:
    """An operand as it goes in, and partition specs for its arrays, in the order of its leaves."""
    if not isinstance(operand, Weight):
        return operand, [spec]
    entries = (*spec, *[None] * (len(operand.axes) - len(spec)))
    base, specs = operand.base, spec
    if isinstance(base, View):
        base, specs = base.spread(entries, [shards(mesh, entry) for entry in entries]) or (array_of(base), spec)
    operand = beside(replace(operand, base=base))
    by_axis = dict(zip(operand.axes, entries, strict=True))

    def place(factor: Labelled) -> Labelled:
        return replace(factor, array=PartitionSpec(*(by_axis.get(axis) for axis in factor.axes)))

    placed = operand.map(specs, operand.axes, place)
    return operand, jax.tree.leaves(placed, is_leaf=lambda node: isinstance(node, PartitionSpec))


@rule("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
def _custom(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
    """The custom rule must see the value it was written for; discovery still looks for sites inside."""
    given = [operand for operand in operands if isinstance(operand, Weight)]
    if ctx.look_inside and not any(weight.adapted for weight in given):
        inner = replace(ctx, inside=eqn.primitive.name, keys=())
        jax.eval_shape(lambda: interpret(inner, jaxprs.sub_programs(eqn)[0], operands) and None)
    return opaque(ctx, eqn, operands)
