"""What a base in few bits takes beside a plain one: bytes, memory and time of products, training steps, compilation.

Run from the root of the repository: `python -m benchmarks.quantised`. Where libtpu is installed (`pip install --group
bench-tpu`) the training step is also compiled for a TPU v5e, with a bfloat16 base. `--check` fails where a count of
bytes, memory or operations exceeds what was last measured.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import lora_jax as lora
from benchmarks.ahead import cost, missing
from benchmarks.harness import CLOCKS, Tables, machine, ratio, rounds

BASES: dict[str, dict[str, Any]] = {
    "nf4": {}, "nf4 nested": {"nested": True}, "int4": {}, "int8": {}, "int8, blocks of 128": {"block": 128}, "fp8": {},
}  # fmt: skip
"""Names of quantised bases; the first word is the format."""
TIMED = ("nf4", "int4", "int8", "fp8")
TOKENS = (16, 256, 1024)
PRODUCT_GOALS = (1.25, 1.05, 1.05)
NUMBER_GOALS = {"nf4": 0.5625, "nf4 nested": 0.53, "int8, blocks of 128": 1.032}
MEMORY_GOAL, TIME_GOAL, COMPILE_GOAL = 0.55, 1.15, 1.3
LAST_MEMORY = {"nf4": 0.58, "int4": 0.58, "int8": 0.51, "fp8": 0.84}
"""Arguments and temporaries of a step last measured on CPU, of those of a float32 base."""
LAST_TPU = {"nf4": (1.44, 0.55), "int4": (1.44, 0.55), "int8": (1.74, 1.05), "fp8": (1.74, 1.05)}
"""Bytes, and arguments with temporaries, last measured for a TPU v5e, of those of a bfloat16 base."""
OPERATIONS = 1.04


class Stack(NamedTuple):
    """Layers that a scan runs over under `jax.checkpoint`."""

    layers: int = 8
    width: int = 512
    hidden: int = 2048
    tokens: int = 512
    dtype: Any = jnp.float32

    def params(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the base."""
        sizes = {"up": (self.width, self.hidden), "down": (self.hidden, self.width)}
        return {name: jax.ShapeDtypeStruct((self.layers, *each), self.dtype) for name, each in sizes.items()}

    def step(self) -> tuple[Callable[..., Any], Any, Any]:
        """A training step `step(params, adapter, x)`, and shapes of the adapter and of `x`."""
        x = jax.ShapeDtypeStruct((self.tokens, self.width), self.dtype)
        sites = lora.find_sites(apply, self.params(), x)
        config = lora.LoraConfig(rank=8, targets=tuple(sites))
        start = lambda params: lora.init(jax.random.key(0), config, params, sites)  # noqa: E731
        adapted = lora.adapt(apply)
        loss = lambda adapter, params, x: jnp.square(adapted(params, adapter, x).astype(jnp.float32)).mean()  # noqa: E731
        step = lambda params, adapter, x: jax.value_and_grad(loss)(adapter, params, x)  # noqa: E731
        return step, jax.eval_shape(start, self.params()), x


def apply(params: Any, x: jax.Array) -> jax.Array:
    """The layers of a stack."""

    def layer(x: jax.Array, each: Any) -> tuple[jax.Array, None]:
        return x + jnp.tanh(x @ each["up"]) @ each["down"], None

    return jax.lax.scan(jax.checkpoint(layer), x, params)[0]


def small(params: Any, name: str) -> Any:
    """A base in few bits, as shapes or as arrays."""
    make = partial(lora.quantise, format=name.split(",")[0].split()[0], **BASES[name])
    return make(params)


def filled(tree: Any) -> Any:
    """Arrays of these shapes with normal numbers."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return treedef.unflatten([
        jax.random.normal(key, leaf.shape, leaf.dtype) / 32 for key, leaf in zip(keys, leaves, strict=True)
    ])  # fmt: skip


def measure_sizes(report: Tables) -> dict[str, float]:
    """Bytes of a number."""
    kernel = {"w": jax.ShapeDtypeStruct((24, 2048, 2048), jnp.bfloat16)}
    found = {name: small(kernel, name)["w"].nbytes / kernel["w"].size for name in BASES}
    rows = [[name, f"{each:.4f}", str(NUMBER_GOALS.get(name, ""))] for name, each in found.items()]
    report.add("Bytes of a number", ["base", "bytes", "goal"], rows)
    return found


def measure_products(report: Tables, count: int, clock: str) -> dict[str, Any]:
    """Time of `x @ w`, of that with a float32 kernel of the same run."""
    kernel = filled({"w": jax.ShapeDtypeStruct((2048, 2048), jnp.float32)})
    bases = {"float32": kernel} | {name: small(kernel, name) for name in TIMED}
    rows, record = [], {}
    for n, goal in zip(TOKENS, PRODUCT_GOALS, strict=True):
        x = jnp.ones((n, 2048))
        product = jax.jit(lambda params, x: x @ lora.dequantise(params)["w"])
        run = {name: partial(product.lower(base, x).compile(), base, x) for name, base in bases.items()}
        times = record[n] = rounds(run, count, clock=clock)
        rows.append([str(n), *(f"{ratio(times, name, 'float32')[0]:.2f}" for name in TIMED), str(goal)])
    report.add("x @ w, 2048 by 2048: time / float32", ["rows of x", *TIMED, "goal (nf4)"], rows)
    return record


def measure_steps(report: Tables, count: int, clock: str) -> dict[str, Any]:
    """Memory, operations and time of a training step, and of its compilation, of those on a float32 base."""
    stack = Stack()
    step, adapter, x = stack.step()
    params = filled(stack.params())
    given = filled(adapter), filled(x)
    bases = {"float32": params} | {name: small(params, name) for name in TIMED}
    programs = {name: jax.jit(step).lower(base, *given).compile() for name, base in bases.items()}
    times = rounds({name: partial(programs[name], base, *given) for name, base in bases.items()}, count, clock=clock)
    compiling = {name: partial(compiled, step, base, *given) for name, base in bases.items()}
    compiled_in = rounds(compiling, max(3, count // 4), clock=clock)
    memory = {name: held(program) for name, program in programs.items()}
    flops = {name: program.cost_analysis()["flops"] for name, program in programs.items()}
    found = {
        name: (
            memory[name] / memory["float32"], flops[name] / flops["float32"],
            ratio(times, name, "float32")[0], ratio(compiled_in, name, "float32")[0],
        )
        for name in TIMED
    }  # fmt: skip
    rows = [[name, *(f"{each:.2f}" for each in four)] for name, four in found.items()]
    rows.append(["goal", str(MEMORY_GOAL), "1.00", str(TIME_GOAL), str(COMPILE_GOAL)])
    columns = ["base", "arguments + temporaries", "operations", "time", "compilation"]
    report.add(f"Training step of {stack.layers} scanned layers with remat, of that on a float32 base", columns, rows)
    return found


def compiled(step: Callable[..., Any], *args: Any) -> None:
    """Trace and compile anew."""
    jax.jit(lambda *args: step(*args)).lower(*args).compile()


def held(program: Any) -> int:
    """Bytes of a program's arguments and temporaries."""
    memory = program.memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes


def measure_tpu(report: Tables) -> dict[str, tuple[float, float]]:
    """Bytes and memory of a training step on a TPU v5e, of those on a bfloat16 base."""
    if why := missing():
        report.add("TPU v5e, ahead of time", ["skipped"], [[why]])
        return {}
    stack = Stack(width=1024, hidden=4096, tokens=2048, dtype=jnp.bfloat16)
    step, adapter, x = stack.step()
    costs = {}
    for name in ("bfloat16", *TIMED):
        base = stack.params() if name == "bfloat16" else small(stack.params(), name)
        costs[name] = cost(step, base, adapter, x), size(base)
    plain, plain_size = costs["bfloat16"]
    found = {
        name: (each.nbytes / plain.nbytes, (each.temporary + nbytes) / (plain.temporary + plain_size))
        for name, (each, nbytes) in costs.items()
    }
    rows = [[name, *(f"{each:.2f}" for each in two)] for name, two in found.items()]
    report.add("The same for a TPU v5e, ahead of time", ["base", "bytes moved", "base + temporaries"], rows)
    return found


def size(tree: Any) -> float:
    """Bytes of a base."""
    return sum(leaf.size * jax.dtypes.itemsize_bits(leaf.dtype) / 8 for leaf in jax.tree.leaves(tree))


def exceeded(sizes: dict[str, float], steps: dict[str, Any], tpu: dict[str, Any]) -> list[str]:
    """Which counts are larger than what was last measured."""
    limits = [(f"bytes of a number, {name}", sizes[name], goal) for name, goal in NUMBER_GOALS.items()]
    for name, (memory, operations, *_) in steps.items():
        limits += [(f"memory of a step, {name}", memory, LAST_MEMORY[name])]
        limits += [(f"operations of a step, {name}", operations, OPERATIONS)]
    for name in TIMED if tpu else ():
        both = zip(("bytes", "memory"), tpu[name], LAST_TPU[name], strict=True)
        limits += [(f"TPU {what}, {name}", found, last) for what, found, last in both]
    return [f"{what}: {found:.3f}, and at most {most} expected" for what, found, most in limits if found > most]


def main() -> None:
    """Measure, print, and check what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="at least 11 for times that mean something")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--check", action="store_true", help="fail where a count exceeds what was last measured")
    parser.add_argument("--json", type=Path, help="write every time and count to this file")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    given = parser.parse_args()
    report = Tables(machine())
    sizes = measure_sizes(report)
    products = measure_products(report, given.rounds, given.clock)
    steps = measure_steps(report, given.rounds, given.clock)
    tpu = measure_tpu(report)
    if given.json:
        record = {"machine": machine(), "sizes": sizes, "products": products, "steps": steps, "tpu": tpu}
        given.json.write_text(json.dumps(record, indent=1))
    print(report.markdown()) if given.markdown else report.print()
    if given.check and (wrong := exceeded(sizes, steps, tpu)):
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
