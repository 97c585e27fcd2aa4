"""What composing adapters costs: a decomposition of the factors, beside one of the whole update, and beside PEFT.

Run from the root of the repository: `python -m benchmarks.compose`. PEFT is compared with if torch and peft are
installed. Errors are norms of the difference to the product in float64, over the norm of that.
"""

import argparse
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lora
from benchmarks.harness import Tables, machine, ratio, rounds
from lora_jax import svd


def adapters(width: int, rank: int, count: int, layers: int) -> list[lora.Adapter]:
    """Random adapters of one stacked weight, of the size that training makes them."""
    site = lora.Site(
        path="w", shape=(layers, width, width), dtype="float32", kind="dense", in_axes=(1,), out_axes=(2,),
        batch_axes=(0,),
    )  # fmt: skip
    draw = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(draw.standard_normal(shape, np.float32) / width**0.5)  # noqa: E731
    return [
        lora.Adapter({
            "w": lora.LowRank(normal(*site.a_shape(rank)), normal(*site.b_shape(rank)), jnp.full(layers, 2.0), site)
        })
        for _ in range(count)
    ]  # fmt: skip


def full(given: list[lora.Adapter], rank: int) -> Callable[[], Any]:
    """The same from updates as matrices, one layer after the other, compiled."""
    stacks = [(update.a, update.b) for update in (adapter["w"] for adapter in given)]

    def one(layer: Any) -> Any:
        whole = sum(2.0 * jnp.dot(a.T, b, precision="highest") for a, b in layer)
        found = svd.exact(jnp.asarray(whole), rank)
        return found.left, found.values[:, None] * found.right

    compiled = jax.jit(lambda stacks: jax.lax.map(one, stacks))
    return lambda: compiled(stacks)


def peft_composition(given: list[lora.Adapter], rank: int) -> Callable[[], Any]:
    """PEFT's `add_weighted_adapter` on a model with as many linear layers."""
    import peft
    import torch

    layers, _, width = given[0]["w"].a.shape
    base = torch.nn.Sequential(*[torch.nn.Linear(width, width, bias=False) for _ in range(layers)])
    own = given[0]["w"].a.shape[1]
    config = peft.LoraConfig(r=own, lora_alpha=2 * own, target_modules=[str(i) for i in range(layers)])
    model = peft.get_peft_model(base, config, adapter_name="a0")
    for i in range(1, len(given)):
        model.add_adapter(f"a{i}", config)
    with torch.no_grad():
        for i, adapter in enumerate(given):
            for layer in range(layers):
                module = model.base_model.model[layer]
                module.lora_A[f"a{i}"].weight.copy_(torch.from_numpy(np.array(adapter["w"].a[layer])))
                module.lora_B[f"a{i}"].weight.copy_(torch.from_numpy(np.array(adapter["w"].b[layer]).T))
    names = [f"a{i}" for i in range(len(given))]

    def run() -> Any:
        if "made" in model.peft_config:
            model.delete_adapter("made")
        with torch.no_grad():
            model.base_model.add_weighted_adapter(
                names, [1.0] * len(names), "made", combination_type="svd", svd_rank=rank, svd_full_matrices=False
            )
        return model.base_model.model[0].get_delta_weight("made").detach().numpy()

    return run


def best(given: list[lora.Adapter], rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The sum at the first layer, and the nearest matrix of a rank, in float64."""
    parts = [adapter["w"] for adapter in given]
    whole = sum(2.0 * np.asarray(part.a[0], np.float64).T @ np.asarray(part.b[0], np.float64) for part in parts)
    left, values, right = np.linalg.svd(whole, full_matrices=False)
    return whole, (left[:, :rank] * values[:rank]) @ right[:rank]


def measure(width: int, rank: int, count: int, layers: int, turns: int, peft: bool) -> list[list[str]]:
    """Rows of the table for one width."""
    given = adapters(width, rank, count, layers)
    kept = rank * count
    runs: dict[str, Callable[[], Any]] = {
        "lora_jax": lambda: lora.compose(given, method="svd", rank=kept),
        "full SVD": full(given, kept),
    }
    if peft:
        runs["PEFT"] = peft_composition(given, kept)
    times = rounds(runs, turns, warm_up=1)
    exact, nearest = best(given, kept)
    made = {
        "lora_jax": runs["lora_jax"]()["w"].delta()[0],
        "full SVD": (lambda found: found[0][0].T @ found[1][0])(runs["full SVD"]()),
    }
    if peft:
        made["PEFT"] = runs["PEFT"]().T
    rows = []
    for name in runs:
        off = np.linalg.norm(np.asarray(made[name], np.float64) - nearest) / np.linalg.norm(exact)
        middle, low, high = ratio(times, name, "lora_jax")
        seconds = float(np.median(times[name])) / layers
        rows.append(
            [f"{name}, d {width}", f"{1e3 * seconds:.3f}", f"{middle:.1f} ({low:.1f} to {high:.1f})", f"{off:.1e}"]
        )
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--rank", type=int, default=16, help="of each adapter")
    parser.add_argument("--adapters", type=int, default=2)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    given = parser.parse_args()
    peft = find_spec("peft") is not None and find_spec("torch") is not None
    report = Tables(machine())
    rows = [
        row
        for width in given.widths
        for row in measure(width, given.rank, given.adapters, given.layers, given.rounds, peft)
    ]
    title = f"{given.adapters} adapters of rank {given.rank} to their sum, {given.layers} layers, {given.rounds} rounds"
    report.add(title, ["", "ms per layer", "/ lora_jax (quartiles)", "error"], rows)
    print(report.markdown()) if given.markdown else report.print()


if __name__ == "__main__":
    main()
