"""What the methods cost and what they learn: one training step and one evaluation beside LoRA's, and held-out loss.

Run from the root of the repository: `python -m benchmarks.methods`.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

import jax

import lora_jax as lora
from benchmarks.harness import CLOCKS, Tables, machine, ratio, rounds
from benchmarks.learning import STARTS, learn, plot
from benchmarks.steps import OPTIMIZER, Step, descend
from benchmarks.transformer import LINEARS, Shape, Transformer, initial, next_token_loss, token_batch

METHODS = ("lora", "dora", "lora-fa", "lora-xs", "adalora", "vera")


def started(shape: Shape, rank: int, method: str) -> tuple[Any, Any, lora.Adapter]:
    """A model, its parameters, and an adapter on all linear layers of its blocks."""
    model, tokens = Transformer(shape), token_batch(shape)
    params = initial(model, shape)
    config = lora.LoraConfig(rank=rank, targets=LINEARS, method=method)
    sites = lora.find_sites(model.apply, params, tokens)
    return model, params, lora.init(jax.random.key(2), config, params, sites)


def step(shape: Shape, rank: int, method: str) -> Step:
    """One training step."""
    model, params, adapter = started(shape, rank, method)
    adapted = lora.adapt(model.apply)

    def loss(adapter: Any, params: Any, tokens: Any) -> Any:
        return next_token_loss(adapted(params, adapter, tokens), tokens)

    return descend(method, loss, adapter, params, token_batch(shape), lora.optimizer(OPTIMIZER, adapter))


def evaluation(shape: Shape, rank: int, method: str, cached: bool = False) -> tuple[Any, Callable[[], Any]]:
    """One forward pass, compiled, and a function that runs it; DoRA also with its gains computed before."""
    model, params, adapter = started(shape, rank, method)
    adapter = lora.methods.precompute(params, adapter) if cached else adapter
    tokens = token_batch(shape)
    compiled = jax.jit(lora.adapt(model.apply)).lower(params, adapter, tokens).compile()
    return compiled, lambda: compiled(params, adapter, tokens)


def measure(report: Tables, shape: Shape, rank: int, count: int, clock: str) -> dict[str, Any]:
    """Time, operations and memory of every method, beside LoRA's."""
    steps = {method: step(shape, rank, method).compile() for method in METHODS}
    forward = {method: evaluation(shape, rank, method) for method in METHODS}
    forward["dora, gains computed once"] = evaluation(shape, rank, "dora", cached=True)
    record = {}
    for title, built in (("training step", steps), ("evaluation", forward)):
        times = rounds({name: run for name, (_, run) in built.items()}, count, clock=clock)
        rows = []
        for name, (compiled, _) in built.items():
            middle, low, high = ratio(times, name, "lora")
            flops = compiled.cost_analysis()["flops"] / built["lora"][0].cost_analysis()["flops"]
            memory = [each.memory_analysis().temp_size_in_bytes for each in (compiled, built["lora"][0])]
            rows.append([
                name, f"{median(times[name]):.2f} s", f"{middle:.3f} ({low:.3f} to {high:.3f})", f"{flops:.3f}",
                f"{memory[0] / memory[1]:.3f}",
            ])  # fmt: skip
        columns = [title, "time", "/ lora (quartiles)", "operations / lora", "temporary memory / lora"]
        report.add(f"Rank {rank}: {shape}, {count} rounds, {clock} clock", columns, rows)
        record[title] = times
    return record


def compare(report: Tables, steps: int, seeds: int, picture: Path | None) -> dict[str, Any]:
    """Train every method and start on the built-in task, with about as many trained numbers, and tabulate."""
    results = {name: [learn(name, steps, seed) for seed in range(seeds)] for name in STARTS}
    rows = []
    for name, runs in results.items():
        losses = [run.losses[-1] for run in runs]
        rows.append([
            name, f"{runs[0].rank}", f"{runs[0].trainable:,}", f"{runs[0].nbytes:,}", f"{runs[0].losses[0]:.3f}",
            f"{mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})",
            f"{median(run.seconds for run in runs) * 1e3:.0f} ms",
        ])  # fmt: skip
    columns = ["method", "rank", "trained numbers", "bytes", "loss before", "held-out loss (of seeds)", "step"]
    report.add(f"Held-out loss after {steps} steps, {seeds} seeds", columns, rows)
    if picture is not None:
        plot(results, picture)
    return {name: [run._asdict() for run in runs] for name, runs in results.items()}


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument(
        "--rounds", type=int, default=15, help="at least 11 for numbers that mean something; 0 for none"
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--steps", type=int, default=300, help="of training; 0 leaves the comparison out")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot", type=Path, help="write a picture of held-out losses to this file")
    parser.add_argument("--json", type=Path, help="write every time and loss to this file")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    given = parser.parse_args()
    report, record = Tables(machine()), {}
    if given.rounds:
        record["cost"] = measure(report, Shape(layers=given.layers), given.rank, given.rounds, given.clock)
    if given.steps:
        record["learning"] = compare(report, given.steps, given.seeds, given.plot)
    if given.json:
        given.json.write_text(json.dumps(record, indent=1))
    print(report.markdown()) if given.markdown else report.print()


if __name__ == "__main__":
    main()
