"""What merging an adapter into a checkpoint on disk costs: time beside a file copy, and memory beside its tensors.

Run from the root of the repository: `python -m benchmarks.merge_checkpoint`. PEFT is compared with if torch,
transformers and peft are installed. Every merge runs in a process of its own, so that its peak memory is its own.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks.harness import Tables, machine
from lora_jax.io.hf.tensors import Item, write_file
from lora_jax.io.peft import Module, PeftFiles, write_peft

WIDTH, HIDDEN, VOCABULARY = 2048, 5632, 32000
LINEARS = {
    "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (512, WIDTH), "self_attn.v_proj": (512, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH), "mlp.gate_proj": (HIDDEN, WIDTH), "mlp.up_proj": (HIDDEN, WIDTH),
    "mlp.down_proj": (WIDTH, HIDDEN),
}  # fmt: skip
SHARD = 500_000_000

MEASURE = """
import resource, time
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
"""
OURS = (
    MEASURE
    + """
import sys
import lora_jax as lora
before, start = peak(), time.perf_counter()
lora.peft.merge_checkpoint(*sys.argv[1:4])
print(time.perf_counter() - start, before, peak())
"""
)
PEFT = (
    MEASURE
    + """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
before, start = peak(), time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload()
model.save_pretrained(sys.argv[3], max_shard_size="500MB")
print(time.perf_counter() - start, before, peak())
"""
)


def tensors(layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama with so many layers."""
    named: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        named |= {f"{prefix}.{name}.weight": shape for name, shape in LINEARS.items()}
        named |= {f"{prefix}.{name}.weight": (WIDTH,) for name in ("input_layernorm", "post_attention_layernorm")}
    return named | {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCABULARY, WIDTH)}


def make_base(folder: Path, layers: int) -> int:
    """Write a checkpoint of random numbers in shards; returns its bytes."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": HIDDEN,
        "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": VOCABULARY,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    for entry in tensors(layers).items():
        if sum(2 * prod(shape) for _, shape in [*shards[-1], entry]) > SHARD:
            shards.append([])
        shards[-1].append(entry)
    draw, weight_map = np.random.default_rng(0), {}
    for number, entries in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        items = [Item(key, "BF16", shape, 2 * prod(shape), _random(draw, prod(shape))) for key, shape in entries]
        write_file(folder / name, {"format": "pt"}, items, lambda _: None)
        weight_map |= dict.fromkeys((key for key, _ in entries), name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(2 * prod(shape) for shape in tensors(layers).values())


def _random(draw: np.random.Generator, size: int) -> Any:
    for start in range(0, size, 1 << 22):
        values = draw.standard_normal(min(1 << 22, size - start), np.float32) * np.float32(0.02)
        yield values.astype(jnp.bfloat16).view(np.uint8).data


def make_adapter(folder: Path, layers: int, rank: int) -> None:
    """Write an adapter of every linear layer."""
    draw = np.random.default_rng(1)
    modules = {
        f"model.layers.{layer}.{name}": Module(
            "linear",
            draw.standard_normal((rank, shape[1]), np.float32) * np.float32(0.02),
            draw.standard_normal((shape[0], rank), np.float32) * np.float32(0.02),
        )
        for layer in range(layers)
        for name, shape in LINEARS.items()
    }
    targets = sorted({name.rpartition(".")[2] for name in LINEARS})
    write_peft(folder, PeftFiles({"r": rank, "lora_alpha": 2 * rank, "target_modules": targets}, modules))


def arithmetic(layers: int, rank: int) -> float:
    """Seconds that the products, sums and conversions take on arrays that are in memory."""
    total = 0.0
    for shape in LINEARS.values():
        weight = np.ones(shape, jnp.bfloat16)
        b, a = np.ones((shape[0], rank), np.float32), np.ones((rank, shape[1]), np.float32)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            (weight.astype(np.float32) + b @ a).astype(jnp.bfloat16)
            times.append(time.perf_counter() - start)
        total += layers * median(times)
    return total


def child(code: str, base: Path, adapter: Path, out: Path) -> tuple[float, float, float]:
    """Seconds, and peak bytes before and after, of a merge in a process of its own."""
    os.sync()  # what an earlier run wrote shall not slow this one down
    arguments = [sys.executable, "-c", code, str(base), str(adapter), str(out)]
    shown = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True)
    seconds, before, after = map(float, shown.stdout.split()[-3:])
    shutil.rmtree(out)
    return seconds, before, after


def copy(base: Path, out: Path) -> float:
    """Seconds that copying the files takes."""
    os.sync()
    start = time.perf_counter()
    shutil.copytree(base, out)
    seconds = time.perf_counter() - start
    shutil.rmtree(out)
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=20, help="100 million bytes each, beside 0.26 GB of tables")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to put the files, three times the checkpoint's size")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    given = parser.parse_args()
    report = Tables(machine())
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        base, adapter, out = (Path(folder) / name for name in ("base", "adapter", "out"))
        size = make_base(base, given.layers)
        make_adapter(adapter, given.layers, given.rank)
        largest = max(2 * prod(shape) for shape in tensors(given.layers).values())
        codes = {"lora_jax": OURS} | ({"PEFT": PEFT} if find_spec("peft") and find_spec("transformers") else {})
        copies, results = [], {name: [] for name in codes}
        for _ in range(given.rounds):
            copies.append(copy(base, out))
            for name, code in codes.items():
                results[name].append(child(code, base, adapter, out))
    rows = [["file copy", f"{median(copies):.2f} s", "1.00", "", ""]]
    sums = arithmetic(given.layers, given.rank)
    rows.append(["arithmetic in memory", f"{sums:.2f} s", f"{sums / median(copies):.2f}", "", ""])
    for name, found in results.items():
        seconds, peak = median(each[0] for each in found), median(each[2] for each in found)
        before = median(each[1] for each in found)
        relative = median(each[0] / copied for each, copied in zip(found, copies, strict=True))
        rows.append(
            [name, f"{seconds:.2f} s", f"{relative:.2f}", f"{peak / 1e6:.0f} MB", f"{(peak - before) / 1e6:.0f} MB"]
        )
    columns = ["", "time", "/ file copy", "peak memory", "above imports"]
    title = (
        f"{size / 1e9:.2f} GB bfloat16, largest tensor {largest / 1e6:.0f} MB, rank {given.rank}, {given.rounds} rounds"
    )
    report.add(title, columns, rows)
    print(report.markdown()) if given.markdown else report.print()


if __name__ == "__main__":
    main()
