"""What capturing costs beside a forward pass of the same model.

Run from the root of the repository: `python -m benchmarks.capture`.
"""

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp

import lora_jax as lora
from benchmarks.harness import CLOCKS, Tables, machine, ratio, rounds
from benchmarks.transformer import LINEARS, Shape, Transformer, initial, next_token_loss, token_batch
from lora_jax.capture.collect import gradient_step, observing_step, split, zeros
from lora_jax.config.selection import select

CONFIG = lora.LoraConfig(targets=LINEARS)
"""All linear layers of the model."""
Run = tuple[Any, Callable[[], Any]]


def forward(model: Transformer, params: Any, tokens: Any) -> Run:
    """The pass that is the measure."""
    compiled = jax.jit(model.apply).lower(params, tokens).compile()
    return compiled, partial(compiled, params, tokens)


def observed(model: Transformer, params: Any, tokens: Any, what: str, rank: int) -> Run:
    """One batch added to what is collected of the inputs of all linear layers."""
    sites = select(CONFIG, lora.find_sites(model.apply, params, tokens)).sites
    state = zeros(what, sites, {site.path: 2 * rank for site in sites}, 0)
    given = split((params, (tokens,)))
    compiled = observing_step(model.apply, sites, None).lower(state, *given).compile()
    return compiled, _in_place(compiled, state, given[0])


def differentiated(model: Transformer, params: Any, tokens: Any) -> Run:
    """One batch added to the gradient by all linear layers."""

    def loss(params: Any, tokens: Any) -> Any:
        return next_token_loss(model.apply(params, tokens), tokens)

    sites = select(CONFIG, lora.find_sites(model.apply, params, tokens)).sites
    given = split((params, (tokens,)))
    state = {site.path: jnp.zeros(site.shape) for site in sites}
    compiled = gradient_step(loss, list(state)).lower(state, *given).compile()
    return compiled, _in_place(compiled, state, given[0])


def _in_place(compiled: Any, state: Any, arrays: list[Any]) -> Callable[[], Any]:
    held = [state]

    def run() -> Any:
        held[0] = compiled(held[0], arrays)
        return held[0]

    return run


def measure(report: Tables, shape: Shape, scan: bool, rank: int, count: int, clock: str) -> None:
    """Time, operations and memory of every pass."""
    model, tokens = Transformer(shape, scan=scan), token_batch(shape)
    params = initial(model, shape)
    built = {
        "forward": forward(model, params, tokens),
        "components (EVA)": observed(model, params, tokens, "components", rank),
        "inputs (CorDA)": observed(model, params, tokens, "inputs", rank),
        "gradient (LoRA-GA)": differentiated(model, params, tokens),
    }
    times = rounds({name: run for name, (_, run) in built.items()}, count, clock=clock)
    flops = {name: compiled.cost_analysis()["flops"] for name, (compiled, _) in built.items()}
    memory = {name: compiled.memory_analysis() for name, (compiled, _) in built.items()}
    rows = []
    for name in built:
        middle, low, high = ratio(times, name, "forward")
        rows.append([
            name,
            f"{median(times[name]):.3f} s",
            f"{middle:.2f} ({low:.2f} to {high:.2f})",
            f"{flops[name] / flops['forward']:.2f}",
            f"{memory[name].temp_size_in_bytes / 2**20:.0f} MiB",
            f"{memory[name].alias_size_in_bytes / 2**20:.0f} MiB",
        ])  # fmt: skip
    columns = ["one batch", "time", "/ forward (quartiles)", "operations", "temporary", "statistics"]
    report.add(
        f"Rank {rank}, {'scanned' if scan else 'unrolled'}: {shape}, {count} rounds, {clock} clock", columns, rows
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args()
    report = Tables(machine())
    for scan in (False, True):
        measure(report, Shape(), scan, options.rank, options.rounds, options.clock)
    report.print()


if __name__ == "__main__":
    main()
