"""What a LoRA step takes of each chip of a mesh: memory, collectives and bytes, beside the frozen model and by hand.

XLA's compiler for TPUs compiles the step of a whole Llama-shaped stack (layers scanned under `jax.checkpoint`, without
embedding and head; bfloat16, rank 16) for 8, 64 or 256 chips of a v5e that are not there. Kernels are spread over the
mesh axes `fsdp` and `tensor`. Run from the root of the repository, with libtpu (`pip install --group bench-tpu`):
`python -m benchmarks.scale`. `--markdown` prints the tables of docs/scale.md.
"""

import argparse
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from benchmarks.ahead import missing, topology
from benchmarks.compiled import block, layers
from benchmarks.harness import Tables

RANK, LENGTH = 16, 2048
READS, WRITES = ("q", "k", "v", "gate", "up"), ("o", "down")
"""Kernels that read the residual stream, and those that write into it."""
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
GB = 1e9


class Model(NamedTuple):
    """A stack of Llama blocks."""

    layers: int
    width: int
    hidden: int
    keys: int

    def kernels(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each kernel."""
        inner = (self.width, self.keys, self.keys, self.hidden, self.hidden)
        reads = {name: (self.width, out) for name, out in zip(READS, inner, strict=True)}
        return reads | {"o": (self.width, self.width), "down": (self.hidden, self.width)}


MODELS = {"8B": Model(32, 4096, 14336, 1024), "70B": Model(80, 8192, 28672, 1024)}
MESHES = {8: ("2x4", 2), 64: ("8x8", 8), 256: ("16x16", 16)}
"""By the number of chips: their topology, and how many the axis `fsdp` has."""

plain = partial(layers, jax.checkpoint)
"""The model."""


def by_hand(params: Any, factors: Any, x: jax.Array) -> jax.Array:
    """The model with LoRA written into it."""

    def layer(x: jax.Array, given: Any) -> tuple[jax.Array, None]:
        each, thin = given

        def product(y: jax.Array, name: str) -> jax.Array:
            a, b = (factor.astype(y.dtype) for factor in thin[name])
            return y @ each[name] + (y @ a.T) @ b

        return block(x, each, product), None

    return jax.lax.scan(jax.checkpoint(layer), x, (params, factors))[0]


def spread(mesh: Mesh, dtype: Any, spec: P, *shape: int) -> jax.ShapeDtypeStruct:
    """The shape of an array on a mesh."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def base(model: Model, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the parameters: what a block reads by has its outputs on `tensor`, what it writes by its inputs."""
    specs = dict.fromkeys(READS, P(None, "fsdp", "tensor")) | dict.fromkeys(WRITES, P(None, "tensor", "fsdp"))
    kernels = {
        name: spread(mesh, jnp.bfloat16, specs[name], model.layers, *pair) for name, pair in model.kernels().items()
    }
    one = spread(mesh, jnp.bfloat16, P(), model.layers, model.width)
    return kernels | dict.fromkeys(("norm_1", "norm_2"), one)


def adapters(params: Any, x: Any) -> dict[str, Any]:
    """Shapes of the adapter, placed beside the parameters, and along `tensor` alone."""
    sites = lora.find_sites(plain, params, x)
    config = lora.LoraConfig(rank=RANK, targets=tuple(sites))
    shapes = jax.eval_shape(lambda params: lora.init(jax.random.key(0), config, params, sites), params)
    ways = {"LoRA": lora.adapter_sharding(shapes, params), "LoRA, axes=('tensor',)": along_tensor(shapes, params)}
    place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)  # noqa: E731
    return {name: jax.tree.map(place, shapes, places) for name, places in ways.items()}


def along_tensor(adapter: Any, params: Any) -> Any:
    """Where an adapter goes that is whole along `fsdp`."""
    return lora.adapter_sharding(adapter, params, axes=("tensor",))


def step(fn: Callable[..., Any], *, trains: bool) -> Callable[..., Any]:
    """Gradients of what trains beside the parameters, or of the activation."""

    def loss(trained: Any, params: Any, x: Any) -> jax.Array:
        y = fn(params, trained, x) if trains else fn(params, trained)
        return jnp.square(y.astype(jnp.float32)).mean()

    return jax.value_and_grad(loss)


class Taken(NamedTuple):
    """What a compiled step takes of each chip; collectives are those in the program's text, of a layer once."""

    arguments: float
    temporary: float
    collectives: dict[str, int]
    moved: int


def measure(fn: Callable[..., Any], *args: Any, mesh: Mesh) -> Taken:
    """Compile a step, and read what it takes."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), jax.default_device(mesh.devices.flat[0]):
        traced = jax.jit(fn).trace(*args)
    program = traced.lower(lowering_platforms=("tpu",)).compile()
    memory, found = program.memory_analysis(), collectives(program.as_text())
    counts = {kind: len(sizes) for kind, sizes in found.items()}
    moved = sum(map(sum, found.values()))
    return Taken(memory.argument_size_in_bytes, memory.temp_size_in_bytes, counts, moved)


def collectives(text: str) -> dict[str, list[int]]:
    """Bytes of the result of every collective in a program, by kind."""
    found: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for line in text.splitlines():
        named = re.search(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
        if named:
            found[named[2]].append(sum(map(nbytes, re.findall(r"(\w+)\[([\d,]*)\]", named[1]))))
    return found


def nbytes(array: tuple[str, str]) -> int:
    """Bytes of an array in a program's text: `("bf16", "8,128")`."""
    kind, sizes = array
    bits = re.search(r"\d+", kind)
    return int(np.prod([int(n) for n in sizes.split(",") if n])) * (int(bits[0]) if bits else 8) // 8


def compare(model: Model, chips: int) -> dict[str, Taken]:
    """The floor, LoRA by hand, and an adapter, on one mesh."""
    grid, fsdp = MESHES[chips]
    mesh = Mesh(np.asarray(topology(grid).devices).reshape(fsdp, -1), ("fsdp", "tensor"))
    params = base(model, mesh)
    x = spread(mesh, jnp.bfloat16, P("fsdp", None, None), fsdp, LENGTH, model.width)
    ways = adapters(params, x)
    factors = {path: (update.a, update.b) for path, update in ways["LoRA"].items()}
    hand = lambda params, factors, x: by_hand(params, factors, x)  # noqa: E731
    found = {"no adapter": measure(lambda params, x: step(plain, trains=False)(x, params, x), params, x, mesh=mesh)}
    found["by hand"] = measure(step(hand, trains=True), factors, params, x, mesh=mesh)
    for name, adapter in ways.items():
        found[name] = measure(step(lora.adapt(plain), trains=True), adapter, params, x, mesh=mesh)
    return found


def rows(found: dict[str, Taken]) -> list[list[str]]:
    """A line for each way to write the step."""
    return [
        [
            name, f"{each.arguments / GB:.2f}", f"{each.temporary / GB:.2f}",
            f"{(each.arguments + each.temporary) / GB:.2f}",
            *(str(each.collectives[kind]) for kind in KINDS), f"{each.moved / 1e6:,.0f}",
        ]
        for name, each in found.items()
    ]  # fmt: skip


def main() -> None:
    """Compile and print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--chips", nargs="+", type=int, choices=MESHES, default=[*MESHES])
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    given = parser.parse_args()
    if why := missing():
        print(f"SKIPPED: {why}")
        return
    report = Tables({"jax": jax.__version__, "chip": "TPU v5e, compiled ahead of time", "rank": str(RANK)})
    columns = ["", "arguments, GB", "temporaries, GB", "peak, GB", *KINDS, "MB in collectives, of a layer"]
    for name in given.models:
        for chips in given.chips:
            grid, fsdp = MESHES[chips]
            title = f"{name}, {chips} chips ({grid}): fsdp {fsdp} × tensor {chips // fsdp}, {fsdp} × {LENGTH} tokens"
            report.add(title, columns, rows(compare(MODELS[name], chips)))
    print(report.markdown()) if given.markdown else report.print()


if __name__ == "__main__":
    main()
