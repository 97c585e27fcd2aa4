"""How much a LoRA training step costs beyond what no step can do without, and beside other ways to write it.

Run from the root of the repository: `python -m benchmarks.train_step`. qwix is compared with if it is installed.
"""

import argparse
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import jax

import lora_jax as lora
from benchmarks.harness import CLOCKS, Tables, compilations, machine, ratio, rounds
from benchmarks.peers import FlatDense, by_hand, nnx_step, qwix_step
from benchmarks.steps import Step, adapted_model, floor, full, least_flops, lora_step
from benchmarks.transformer import Shape, Transformer, token_batch

FULL = "full fine-tuning"
DEEP = Shape(layers=24, width=64, hidden=256, vocabulary=256, heads=4, batch=2, length=32)
"""Many small layers: what tracing and compiling costs per layer."""


def steps(shape: Shape, rank: int) -> list[Step]:
    """Everything that is timed at one rank, the floor first."""
    others = [qwix_step(shape, rank)] if find_spec("qwix") else []
    return [
        floor(shape),
        full(shape, name=FULL),
        full(shape, FlatDense, f"{FULL}, tokens flattened"),
        *(lora_step(shape, rank, strategy) for strategy in ("auto", "factored", "merged")),
        by_hand(shape, rank),
        nnx_step(shape, rank),
        *others,
    ]


def measure_steps(report: Tables, shape: Shape, rank: int, count: int, clock: str) -> dict[str, Any]:
    """Time, operations and memory of every step at one rank."""
    built = {step.name: step.compile() for step in steps(shape, rank)}
    times = rounds({name: run for name, (_, run) in built.items()}, count, clock=clock)
    flops = {name: compiled.cost_analysis()["flops"] for name, (compiled, _) in built.items()}
    memory = {name: compiled.memory_analysis().temp_size_in_bytes for name, (compiled, _) in built.items()}
    base = next(iter(built))
    least = {name: flops[base] if name == base else least_flops(shape, rank, flops[base]) for name in built}
    rows = []
    for name in built:
        low, high = ratio(times, name, base)[1:]
        rows.append([
            name,
            f"{median(times[name]):.2f} s",
            f"{ratio(times, name, base)[0]:.2f} ({low:.2f} to {high:.2f})",
            f"{ratio(times, name, FULL)[0]:.2f}",
            f"{flops[name] / least[name]:.3f}",
            f"{memory[name] / memory[base]:.2f}",
        ])  # fmt: skip
    columns = [
        "training step",
        "time",
        "/ floor (quartiles)",
        "/ full",
        "operations / least",
        "temporary memory / floor",
    ]
    report.add(f"Rank {rank}: {shape}, {count} rounds, {clock} clock", columns, rows)
    return {"rank": rank, "seconds": times, "flops": flops, "temporary_bytes": memory}


def build(fn: Callable[..., Any], args: tuple[Any, ...]) -> Callable[[], Any]:
    """A function that traces and compiles `fn` anew."""

    def run() -> None:
        jax.clear_caches()
        jax.jit(lambda *args: fn(*args)).lower(*args).compile()

    return run


def measure_compilation(report: Tables, shape: Shape, rank: int, count: int, clock: str) -> dict[str, Any]:
    """Time to trace and compile with an adapter and without: the forward pass, and a training step."""
    rows, record = [], {}
    for scan in (False, True):
        model, tokens = Transformer(shape, scan=scan), token_batch(shape)
        params, adapter = adapted_model(model, shape, rank)
        plain, ours = full(shape, scan=scan), lora_step(shape, rank, scan=scan)
        pairs = {
            "forward": (
                build(model.apply, (params, tokens)),
                build(lora.adapt(model.apply), (params, adapter, tokens)),
            ),
            "training step": (build(plain.fn, plain.args), build(ours.fn, ours.args)),
        }
        for name, (without, adapted) in pairs.items():
            times = rounds({"plain": without, "adapted": adapted}, count, warm_up=1, clock=clock)
            label = f"{name}, {shape.layers} layers {'scanned' if scan else 'unrolled'}"
            seconds = [f"{median(times[key]):.2f} s" for key in ("plain", "adapted")]
            rows.append([label, *seconds, f"{ratio(times, 'adapted', 'plain')[0]:.2f}"])
            record[label] = times
    report.add("Trace and compile", ["program", "plain", "adapted", "ratio"], rows)
    return record


def measure_swaps(report: Tables, shape: Shape, rank: int) -> int:
    """Programs compiled for another adapter, and for another scale, after the first call."""
    model, tokens = Transformer(shape), token_batch(shape)
    params, adapter = adapted_model(model, shape, rank)
    _, other = adapted_model(model, shape, rank, seed=3)
    louder = lora.scale(adapter, 3.0)
    adapted = jax.jit(lora.adapt(model.apply))
    jax.block_until_ready(adapted(params, adapter, tokens))
    with compilations() as seen:
        jax.block_until_ready([adapted(params, each, tokens) for each in (other, louder)])
    report.add("Compilations after the first call", ["swapped adapter and changed scale"], [[str(len(seen))]])
    return len(seen)


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--rounds", type=int, default=15, help="at least 11 for numbers that mean something")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--compile-rounds", type=int, default=5, help="0 leaves compilation out")
    parser.add_argument("--json", type=Path, help="write every time and count to this file")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    given = parser.parse_args()
    shape, report = Shape(layers=given.layers), Tables(machine())
    record: dict[str, Any] = {"machine": machine(), "clock": given.clock}
    record["steps"] = [measure_steps(report, shape, rank, given.rounds, given.clock) for rank in given.ranks]
    if given.compile_rounds:
        record["compile"] = measure_compilation(report, DEEP, given.ranks[0], given.compile_rounds, given.clock)
    record["compilations_after_swap"] = measure_swaps(report, DEEP, given.ranks[0])
    if given.json:
        given.json.write_text(json.dumps(record, indent=1))
    print(report.markdown()) if given.markdown else report.print()


if __name__ == "__main__":
    main()
