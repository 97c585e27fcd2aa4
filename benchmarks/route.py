"""Batches in which every example has its own adapter, beside the base and beside one adapter for all.

Run from the root of the repository: `python -m benchmarks.route`.
"""

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lora
from benchmarks.harness import CLOCKS, Tables, machine, ratio, rounds
from benchmarks.transformer import LINEARS, Shape, Transformer, initial

WORK = {
    "prefill, 16 × 32": (16, 32, (8, 32, 128)),
    "tokens of 512 requests": (512, 1, (8, 32, 128)),
    "decode, 64 × 1": (64, 1, (8, 32)),
}
"""Batch, length, and numbers of adapters in the bank, of which the batch uses as many as it can."""


def bank_of(sites: list[lora.Site], count: int, rank: int) -> lora.AdapterBank:
    """A bank with random adapters in all slots."""
    draw = np.random.default_rng(0)

    def normal(site: lora.Site, axes: tuple[int, ...]) -> Any:
        shape = (*site.batch_shape, count, rank, *site.sizes(axes))
        return jnp.asarray(draw.standard_normal(shape, np.float32) / 100)

    empty = lora.AdapterBank.empty(sites, count + 1, rank)
    held = {path: type(slots)(normal(slots.site, slots.site.in_axes), normal(slots.site, slots.site.out_axes), None,
                              slots.site) for path, slots in empty.items()}  # fmt: skip
    return lora.AdapterBank(held)


def measure(report: Tables, title: str, rank: int, layers: int, count: int, clock: str) -> dict[str, Any]:
    """Times of one kind of batch, and operations that routing adds."""
    batch, length, sizes = WORK[title]
    shape = Shape(layers=layers, batch=batch, length=length)
    model = Transformer(shape)
    params, tokens = initial(model, shape), jnp.asarray(np.random.default_rng(1).integers(2048, size=(batch, length)))
    found = lora.find_sites(model.apply, params, tokens)
    sites = [site for path, site in found.items() if any(f"/{name}/" in path for name in LINEARS)]
    one = lora.Adapter({path: update for path, update in bank_of(sites, 1, rank).get(1).items()})
    routed = jax.jit(lora.route(model.apply))
    programs: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "base": (jax.jit(model.apply), (params, tokens)),
        "one adapter": (jax.jit(lora.adapt(model.apply)), (params, one, tokens)),
    }
    forms = {}
    for size in sizes:
        bank = bank_of(sites, size, rank)
        ids = jnp.asarray(np.random.default_rng(2).integers(1, size + 1, batch))
        name = f"{size} adapters"
        programs[name] = (routed, (params, bank, ids, tokens))
        forms[name] = lora.route(model.apply).explain(params, bank, ids, tokens).uses[0].route
    compiled = {name: fn.lower(*args).compile() for name, (fn, args) in programs.items()}
    runs = {name: (lambda run=run, args=programs[name][1]: run(*args)) for name, run in compiled.items()}
    times, rows = rounds(runs, count, clock=clock), []
    for name, run in compiled.items():
        flops = run.cost_analysis()["flops"] / compiled["base"].cost_analysis()["flops"]
        against = [f"{ratio(times, name, other)[0]:.2f}" for other in ("base", "one adapter")]
        rows.append([name, forms.get(name, ""), f"{median(times[name]) * 1e3:.1f} ms", *against, f"{flops:.2f}"])
    columns = ["batch", "form", "time", "/ base", "/ one adapter", "operations / base"]
    report.add(f"{title}, rank {rank}, {count} rounds", columns, rows)
    return times


def registered(report: Tables, rank: int, layers: int, count: int, clock: str) -> dict[str, Any]:
    """The same batch, of 8 adapters, with a small and a large bank behind it."""
    shape = Shape(layers=layers, batch=16, length=32)
    model = Transformer(shape)
    params, tokens = initial(model, shape), jnp.zeros((16, 32), jnp.int32)
    found = lora.find_sites(model.apply, params, tokens)
    sites = [site for path, site in found.items() if any(f"/{name}/" in path for name in LINEARS)]
    routed, runs = jax.jit(lora.route(model.apply)), {}
    for size in (8, 1000):
        bank, ids = bank_of(sites, size, rank), jnp.asarray(np.random.default_rng(2).integers(1, 9, 16))
        runs[f"{size} registered"] = lambda bank=bank, ids=ids: routed(params, bank, ids, tokens)
    times = rounds(runs, count, clock=clock)
    middle, low, high = ratio(times, "1000 registered", "8 registered")
    report.add(
        "Adapters registered", ["time with 1000 / with 8 (quartiles)"], [[f"{middle:.3f} ({low:.3f} to {high:.3f})"]]
    )
    return times


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15, help="at least 11 for numbers that mean something")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--json", type=Path, help="write every time to this file")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    given = parser.parse_args()
    report = Tables(machine())
    record = {title: measure(report, title, given.rank, given.layers, given.rounds, given.clock) for title in WORK}
    record["registered"] = registered(report, given.rank, min(given.layers, 2), given.rounds, given.clock)
    if given.json:
        given.json.write_text(json.dumps(record, indent=1))
    print(report.markdown()) if given.markdown else report.print()


if __name__ == "__main__":
    main()
