"""Loading many PEFT adapters of one base, beside PEFT's own `load_adapter`.

Run from the root of the repository, with torch, transformers and peft installed: `python -m benchmarks.load_adapters`.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
import transformers

import lora_jax as lora
from benchmarks.harness import Tables, machine
from lora_jax.io.peft import Module, PeftFiles, write_peft

WIDTH, HIDDEN = 512, 1408
LINEARS = {
    "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (WIDTH, WIDTH), "self_attn.v_proj": (WIDTH, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH), "mlp.gate_proj": (HIDDEN, WIDTH), "mlp.up_proj": (HIDDEN, WIDTH),
    "mlp.down_proj": (WIDTH, HIDDEN),
}  # fmt: skip


def write_adapters(folder: Path, count: int, layers: int, rank: int) -> list[Path]:
    """Adapters of every linear layer, each with other numbers."""
    paths, draw = [], np.random.default_rng(0)
    targets = sorted({name.rpartition(".")[2] for name in LINEARS})
    for number in range(count):
        modules = {
            f"model.layers.{layer}.{name}": Module(
                "linear",
                draw.standard_normal((rank, shape[1]), np.float32),
                draw.standard_normal((shape[0], rank), np.float32),
            )
            for layer in range(layers)
            for name, shape in LINEARS.items()
        }
        paths.append(folder / str(number))
        write_peft(paths[-1], PeftFiles({"r": rank, "lora_alpha": rank, "target_modules": targets}, modules))
    return paths


def our_model(layers: int) -> tuple[Any, lora.Sites]:
    """Parameters under PyTorch's names, and where they are used."""
    params: dict[str, Any] = {}
    for layer in range(layers):
        for name, (out, into) in LINEARS.items():
            block, module = name.split(".")
            spot = params.setdefault("model", {}).setdefault(f"layers_{layer}", {}).setdefault(block, {})
            spot[module] = {"kernel": jax.ShapeDtypeStruct((into, out), jnp.float32)}

    def fn(params: Any) -> Any:
        return [jnp.ones((1, leaf.shape[0])) @ leaf for leaf in jax.tree.leaves(params)]

    return params, lora.find_sites(fn, params)


def their_model(layers: int) -> Any:
    """A Llama without a vocabulary to speak of."""
    config = transformers.LlamaConfig(
        hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=layers, num_attention_heads=8, vocab_size=64
    )
    return transformers.LlamaForCausalLM(config)


def seconds(load: Any, paths: list[Path]) -> list[float]:
    """Time of each load, in order."""
    times = []
    for path in paths:
        start = time.perf_counter()
        load(path)
        times.append(time.perf_counter() - start)
    return times


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    given = parser.parse_args()
    torch.manual_seed(0)
    params, sites = our_model(given.layers)
    kept: list[lora.Adapter] = []
    with tempfile.TemporaryDirectory() as folder:
        first, *paths = write_adapters(Path(folder), given.adapters + 1, given.layers, given.rank)
        model = peft.PeftModel.from_pretrained(their_model(given.layers), first, adapter_name="first")
        lora.peft.load(first, params, sites)
        ours = seconds(lambda path: kept.append(lora.peft.load(path, params, sites)), paths)
        theirs = seconds(lambda path: model.load_adapter(path, adapter_name=path.name), paths)
    tenth = max(given.adapters // 10, 1)
    rows = []
    for name, times in {"lora_jax.peft.load": ours, "PEFT's load_adapter": theirs}.items():
        early, late = (1e3 * sum(some) / tenth for some in (times[:tenth], times[-tenth:]))
        rows.append([name, f"{sum(times):.2f} s", f"{early:.1f} ms", f"{late:.1f} ms"])
    report = Tables(machine())
    title = f"{given.adapters} adapters of {given.layers * len(LINEARS)} modules, rank {given.rank}"
    report.add(title, ["", "all", "each of the first tenth", "each of the last tenth"], rows)
    print(report.markdown()) if given.markdown else report.print()


if __name__ == "__main__":
    main()
