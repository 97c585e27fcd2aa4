"""What a TPU v5e would move and hold for a LoRA step, of what the frozen model's own step does; no TPU is needed.

XLA's compiler for TPUs runs ahead of time on any machine with libtpu (`pip install --group bench-tpu`), and its counts
are the same on every machine. The floor is the same model with no adapter: its forward pass, or that and the gradient
of its input. Run from the root of the repository: `python -m benchmarks.compiled`.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

import lora_jax as lora
from benchmarks.ahead import Cost, cost, missing
from benchmarks.harness import Tables

RANK, TOKENS, WIDTH, HIDDEN = 16, 8192, 2048, 8192
SLACK = 1.01
"""By how much a count may exceed what was last measured: another release of libtpu schedules a little differently."""


@dataclass(frozen=True)
class Program:
    """A function of parameters and an activation, as it is measured.

    Attributes:
      fn: the function.
      params: shapes of its parameters.
      x: shape of its activation.
      trains: whether it is a training step that is compiled: the gradients of the activation and of what trains.
      goal: bytes and temporaries to reach, as multiples of the floor's.
      last: bytes and temporaries last measured, which `--check` holds.
    """

    fn: Callable[..., Any]
    params: Any
    x: jax.ShapeDtypeStruct
    trains: bool
    goal: tuple[float, float | None]
    last: tuple[float, float]

    def measure(self) -> dict[str, Cost]:
        """Costs of the floor, with an adapter, and where it trains of full fine-tuning."""
        adapter, adapted = self.adapter(), lora.adapt(self.fn)
        if not self.trains:
            return {"floor": cost(self.fn, self.params, self.x), "lora": cost(adapted, self.params, adapter, self.x)}
        g = jax.eval_shape(self.fn, self.params, self.x)
        return {
            "floor": cost(pulled_back(self.fn, 1), g, self.params, self.x),
            "lora": cost(pulled_back(adapted, 1, 2), g, self.params, adapter, self.x),
            "full": cost(pulled_back(self.fn, 0, 1), g, self.params, self.x),
        }

    def adapter(self) -> Any:
        """Shapes of an adapter of all parameters that are sites."""
        sites = lora.find_sites(self.fn, self.params, self.x)
        config = lora.LoraConfig(rank=RANK, targets=tuple(sites))
        return jax.eval_shape(lambda params: lora.init(jax.random.key(0), config, params, sites), self.params)


def pulled_back(fn: Callable[..., Any], *trains: int) -> Callable[..., Any]:
    """The result of a function, and the gradients of some arguments for a given gradient of the result."""

    def step(g: Any, *args: Any) -> Any:
        def of(*some: Any) -> Any:
            given = dict(zip(trains, some, strict=True))
            return fn(*(given.get(i, arg) for i, arg in enumerate(args)))

        y, back = jax.vjp(of, *(args[i] for i in trains))
        return y, back(g)

    return step


def mlp(params: Any, x: jax.Array) -> jax.Array:
    """A gated feed-forward layer."""
    return (jax.nn.silu(x @ params["gate"]) * (x @ params["up"])) @ params["down"]


def projections(params: Any, x: jax.Array) -> list[jax.Array]:
    """Three products of one activation."""
    return [x @ params[name] for name in "qkv"]


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """RMSNorm in float32."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-6)).astype(x.dtype) * scale


Products: TypeAlias = Callable[[jax.Array, str], jax.Array]
"""What a block multiplies with: an activation and the name of a kernel."""


def block(x: jax.Array, norms: Any, product: Products) -> jax.Array:
    """A block of a Llama: causal attention with heads of 128, grouped if keys are fewer, then a gated layer."""
    y = norm(x, norms["norm_1"])
    q, k, v = (each.reshape(*x.shape[:-1], -1, 128) for each in [product(y, name) for name in "qkv"])
    y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x = x + product(y.reshape(x.shape), "o")
    y = norm(x, norms["norm_2"])
    return x + product(jax.nn.silu(product(y, "gate")) * product(y, "up"), "down")


def layer(x: jax.Array, params: Any) -> tuple[jax.Array, None]:
    """A block with plain kernels."""
    return block(x, params, lambda y, name: y @ params[name]), None


def layers(remat: Callable[..., Any], params: Any, x: jax.Array) -> jax.Array:
    """Stacked blocks, scanned."""
    return jax.lax.scan(remat(layer), x, params)[0]


def shapes(width: int, hidden: int, *stacked: int) -> Any:
    """Shapes of a block's kernels."""
    pairs = dict.fromkeys("qkvo", (width, width)) | dict.fromkeys(("gate", "up"), (width, hidden))
    return {name: bf16(*stacked, *pair) for name, pair in (pairs | {"down": (hidden, width)}).items()}


def bf16(*shape: int) -> jax.ShapeDtypeStruct:
    """The shape of a bfloat16 array."""
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def checkpointed(policy: Any) -> Callable[..., Any]:
    """Rematerialisation under a policy."""
    return lambda fn: jax.checkpoint(fn, policy=policy)


POLICIES: Mapping[str, tuple[Callable[..., Any], tuple[float, float]]] = {
    "no remat": (lambda fn: fn, (1.73, 1.13)),
    "remat, nothing kept": (jax.checkpoint, (2.32, 1.70)),
    "remat, dots_saveable": (checkpointed(jax.checkpoint_policies.dots_saveable), (1.73, 1.15)),
    "remat, no batch dims": (checkpointed(jax.checkpoint_policies.dots_with_no_batch_dims_saveable), (2.00, 1.41)),
}


def programs() -> dict[str, Program]:
    """What is measured, by name."""
    x, kernels = bf16(TOKENS, WIDTH), shapes(WIDTH, HIDDEN)
    gated, heads = ({name: kernels[name] for name in names} for names in (("gate", "up", "down"), "qkv"))
    stack = shapes(1024, 4096, 4) | dict.fromkeys(("norm_1", "norm_2"), bf16(4, 1024))
    scanned = {
        f"4 layers, {name}": Program(partial(layers, remat), stack, bf16(4, 1024, 1024), True, (1.25, 1.05), last)
        for name, (remat, last) in POLICIES.items()
    }
    return {
        "MLP, forward": Program(mlp, gated, x, False, (1.20, 1.02), (1.12, 1.00)),
        "MLP, training step": Program(mlp, gated, x, True, (1.55, None), (1.55, 1.71)),
        "q/k/v, forward": Program(projections, heads, x, False, (1.20, 1.02), (1.32, 0.00)),
        "q/k/v, training step": Program(projections, heads, x, True, (1.36, 1.00), (1.68, 1.47)),
        **scanned,
    }


def row(name: str, program: Program, costs: Mapping[str, Cost]) -> list[str]:
    """A line of the table."""
    ours = costs["lora"].over(costs["floor"])
    full = costs["full"].over(costs["floor"]) if "full" in costs else None
    shown = lambda *each: ", ".join("-" if number is None else f"{number:.2f}" for number in each)  # noqa: E731
    return [
        name, shown(ours.nbytes), shown(ours.temporary), shown(ours.flops),
        shown(full.nbytes, full.temporary, full.flops) if full else "", shown(*program.goal),
    ]  # fmt: skip


def exceeded(name: str, program: Program, costs: Mapping[str, Cost]) -> list[str]:
    """What is above what was last measured."""
    ours = costs["lora"].over(costs["floor"])
    pairs = zip(("bytes", "temporaries"), (ours.nbytes, ours.temporary), program.last, strict=True)
    return [f"{name}: {what} {now:.3f}, were {last:.3f}" for what, now, last in pairs if now > SLACK * last]


def main() -> None:
    """Compile, print, and check what was asked for."""
    known = programs()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="WORD", default=[""], help=f"of: {'; '.join(known)}")
    parser.add_argument("--check", action="store_true", help="fail if a count is above what was last measured")
    parser.add_argument("--json", type=Path, help="write every count to this file")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    given = parser.parse_args()
    if why := missing():
        print(f"SKIPPED: {', '.join(known)}: {why}")
        return
    chosen = {name: program for name, program in known.items() if any(word in name for word in given.only)}
    costs = {name: program.measure() for name, program in chosen.items()}
    report = Tables({"jax": jax.__version__, "chip": "TPU v5e, compiled ahead of time", "rank": str(RANK)})
    columns = ["", "bytes / floor", "temporaries / floor", "operations / floor", "full fine-tuning", "goal"]
    report.add("Compiled programs", columns, [row(name, chosen[name], each) for name, each in costs.items()])
    if given.json:
        counts = {name: {of: each._asdict() for of, each in those.items()} for name, those in costs.items()}
        given.json.write_text(json.dumps(counts, indent=1))
    print(report.markdown()) if given.markdown else report.print()
    above = [line for name, each in costs.items() for line in exceeded(name, chosen[name], each)]
    if given.check and above:
        raise SystemExit("\n".join(above))


if __name__ == "__main__":
    main()
