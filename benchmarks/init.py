"""How long starts from the weight take: PiSSA by a full and by a randomised decomposition, OLoRA by a thin one.

Run from the root of the repository: `python -m benchmarks.init`.
"""

import argparse
from collections.abc import Callable
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lora
from benchmarks.harness import Tables, machine, ratio, rounds

STARTS = ("pissa", "pissa_niter_1", "pissa_niter_2", "pissa_niter_4", "olora")


def weight(size: int) -> jax.Array:
    """A square matrix whose singular values fall with a power of their number, as those of trained weights do."""
    draw = np.random.default_rng(0)
    left, right = (np.linalg.qr(draw.normal(size=(size, size)))[0] for _ in range(2))
    return jnp.asarray((left * np.arange(1.0, size + 1) ** -0.5) @ right, jnp.float32)


def start(name: str, params: Any, rank: int) -> Callable[[], lora.Adapter]:
    """A function that starts an adapter."""
    x = jax.ShapeDtypeStruct((1, params["w"].shape[0]), jnp.float32)
    sites = lora.find_sites(lambda params, x: x @ params["w"], params, x)
    config = lora.LoraConfig(rank=rank, alpha=rank, targets="w", init=name)
    return lambda: lora.init(jax.random.key(0), config, params, sites)


def energy(update: Any, matrix: jax.Array) -> float:
    """Share of the weight's squared norm that the start takes over."""
    rest = matrix - update.scale * jnp.einsum("ri,ro->io", update.a, update.b)
    return float(1 - jnp.square(rest).sum() / jnp.square(matrix).sum())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    given = parser.parse_args()
    params = {"w": weight(given.size)}
    runs = {name: start(name, params, given.rank) for name in STARTS}
    times = rounds(runs, given.rounds, warm_up=1)
    held = {name: energy(run()["w"], params["w"]) for name, run in runs.items()}
    rows = [
        [name, f"{median(times[name]):.2f} s", f"{1 / ratio(times, name, 'pissa')[0]:.1f}", f"{held[name]:.4f}",
         f"{held[name] / held['pissa']:.4f}"]
        for name in STARTS
    ]  # fmt: skip
    report = Tables(machine())
    columns = ["init", "time", "times faster than pissa", "energy", "/ pissa"]
    report.add(f"Start at rank {given.rank} of a {given.size} × {given.size} weight", columns, rows)
    print(report.markdown()) if given.markdown else report.print()


if __name__ == "__main__":
    main()
