"""What it costs to train several adapters in one step, beside one adapter on as many tokens and beside as many steps.

Run from the root of the repository: `python -m benchmarks.lanes`.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lora
from benchmarks.harness import CLOCKS, Tables, compilations, machine, ratio, rounds
from benchmarks.steps import Step, adapted_model, lora_step
from benchmarks.transformer import Shape, Transformer, next_token_loss, token_batch

ONE = "one adapter, all tokens"


def lanes_step(shape: Shape, rank: int, count: int, strategy: Any = "auto") -> Step:
    """One step of `count` adapters with learning rates of their own, each on its share of the batch."""
    model, lane = Transformer(shape), replace(shape, batch=shape.batch // count)
    params, first = adapted_model(model, lane, rank)
    others = [adapted_model(model, lane, rank, seed)[1] for seed in range(3, 2 + count)]
    stacked = lora.Adapter.stack([first, *others])
    adapted = lora.adapt(model.apply, strategy=strategy)
    tx = lora.optim.lanes(optax.adamw, learning_rate=jnp.geomspace(1e-5, 1e-3, count))

    def loss(adapter: Any, params: Any, tokens: Any) -> Any:
        return next_token_loss(adapted(params, adapter, tokens), tokens)

    def step(stacked: Any, state: Any, params: Any, tokens: Any, active: Any) -> tuple[Any, Any, Any]:
        values, gradients = jax.vmap(jax.value_and_grad(loss), in_axes=(0, None, 0))(stacked, params, tokens)
        updates, state = tx.update(gradients, state, stacked, active=active)
        return optax.apply_updates(stacked, updates), state, values

    tokens = token_batch(shape).reshape(count, lane.batch, lane.length)
    name = f"{count} adapters in one step" if strategy == "auto" else f"the same, {strategy}"
    return Step(name, step, (stacked, jax.jit(tx.init)(stacked), params, tokens, jnp.ones(count, bool)))


def times_over(run: Callable[[], Any], count: int) -> Callable[[], Any]:
    """A function that runs another several times."""
    return lambda: [run() for _ in range(count)][-1]  # all but the last results were given away


def compiled_for(step: Step) -> int:
    """Number of programs compiled when the lanes of a step are stopped one by one."""
    jitted = jax.jit(step.fn)
    *args, active = step.args
    jax.block_until_ready(jitted(*args, active))
    with compilations() as seen:
        for i in range(len(active)):
            jax.block_until_ready(jitted(*args, np.arange(len(active)) > i))
    return len(seen)


def measure(report: Tables, shape: Shape, rank: int, count: int, turns: int, clock: str) -> dict[str, Any]:
    """Time, operations and memory of one step of all lanes, beside one adapter and beside a step for each."""
    steps = [lora_step(shape, rank), *(lanes_step(shape, rank, count, each) for each in ("auto", "factored"))]
    built = {step.name: step.compile() for step in steps}
    alone, run = lora_step(replace(shape, batch=shape.batch // count), rank).compile()
    built = {ONE: built.pop(steps[0].name), **built, f"{count} steps of one adapter": (alone, times_over(run, count))}
    times = rounds({name: run for name, (_, run) in built.items()}, turns, clock=clock)
    flops = {name: each.cost_analysis()["flops"] for name, (each, _) in built.items()}
    flops[list(built)[-1]] *= count
    memory = {name: each.memory_analysis().temp_size_in_bytes for name, (each, _) in built.items()}
    rows = []
    for name in built:
        middle, low, high = ratio(times, name, ONE)
        rows.append([
            name, f"{median(times[name]):.2f} s", f"{middle:.3f} ({low:.3f} to {high:.3f})",
            f"{flops[name] / flops[ONE]:.3f}", f"{memory[name] / memory[ONE]:.3f}",
        ])  # fmt: skip
    columns = ["", "time", "/ one (quartiles)", "operations / one", "temporary memory / one"]
    report.add(f"Rank {rank}: {shape}, {turns} rounds, {clock} clock", columns, rows)
    return {"seconds": times, "flops": flops, "temporary_bytes": memory}


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15, help="at least 11 for numbers that mean something")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1, help="sequences of each adapter")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--json", type=Path, help="write every number to this file")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    given = parser.parse_args()
    shape = Shape(
        layers=given.layers, width=given.width, hidden=4 * given.width, batch=given.adapters * given.batch,
        length=given.length,
    )  # fmt: skip
    report = Tables(machine())
    record = measure(report, shape, given.rank, given.adapters, given.rounds, given.clock)
    small = replace(shape, layers=1, width=64, hidden=128, vocabulary=64, length=16)
    count = compiled_for(lanes_step(small, given.rank, given.adapters))
    report.add("Compilations", ["", "programs"], [["stopping the lanes one by one", f"{count}"]])
    if given.json:
        given.json.write_text(json.dumps({**record, "compilations": count}, indent=1))
    print(report.markdown()) if given.markdown else report.print()


if __name__ == "__main__":
    main()
