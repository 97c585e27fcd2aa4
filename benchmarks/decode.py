"""Tokens per second of requests that each have an adapter of their own, beside the merged model's.

Run from the root of the repository: `python -m benchmarks.decode`, or with `--model smollm2`.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

import lora_jax as lora
from benchmarks.harness import CLOCKS, Tables, machine, ratio, rounds
from benchmarks.route import bank_of
from lora_jax import models
from lora_jax.generate.adapters import model_sites
from lora_jax.generate.decoding import padded, places, read, write
from lora_jax.generate.forward import programs
from lora_jax.generate.sampling import Sampling
from lora_jax.models.read_config import decoder_config
from lora_jax.models.tensors import decoder_leaves

CONFIG = {
    "model_type": "llama", "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": True, "hidden_act": "silu",
}  # fmt: skip


def random_model(folder: Path) -> models.Model:
    """Four layers of width 512."""
    draw = np.random.default_rng(0)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    leaves = decoder_leaves(decoder_config(folder / "config.json", CONFIG))
    shapes = {name: leaf.shape for leaf in leaves for _, name in leaf.members()}
    save_file(
        {name: draw.standard_normal(shape, np.float32) / 30 for name, shape in shapes.items()},
        folder / "model.safetensors",
    )
    return models.load(folder)


def measure(
    report: Tables, model: models.Model, requests: int, adapters: int, rank: int, steps: int, count: int, clock: str
) -> dict[str, Any]:
    """Times of some tokens more for all requests: base, merged, one adapter for all, and one for each."""
    sites = [site for path, site in model_sites(model).items() if "_proj/" in path]
    bank = bank_of(sites, adapters, rank)
    one = bank.get(1)
    ids = jnp.arange(requests, dtype=jnp.int32) % adapters + 1
    forms = programs(model)
    weights: dict[str, tuple[Any, Any]] = {
        "base": (forms.plain, model.params),
        "merged": (forms.plain, lora.merge(model.params, one)),
        "one adapter": (forms.adapted, (model.params, one)),
        f"{adapters} adapters": (forms.routed, (model.params, bank, ids)),
    }
    prompts = padded([list(range(5, 25 + row)) for row in range(requests)])
    room = places(prompts, steps)
    tokens = np.zeros((requests, room), np.int32)
    tokens[:, -prompts.tokens.shape[1] :] = prompts.tokens
    runs = {}
    for name, (forward, held) in weights.items():
        cache = models.empty_cache(model.config, requests, room)
        state = read(forward, held, tokens, prompts.lengths, cache, jax.random.key(0), width=prompts.width)
        # Not donated here, so that it can be continued again.
        more = jax.jit(partial(write.__wrapped__, forward, steps=steps))
        runs[name] = partial(more, held, state, Sampling(), jnp.array([-1]), jnp.int32(steps))
    times, rows = rounds(runs, count, clock=clock), []
    for name, each in times.items():
        rows.append([name, f"{requests * steps / median(each):,.0f}", f"{1 / ratio(times, name, 'merged')[0]:.2f}"])
    report.add(
        f"{requests} requests, {steps} tokens each, rank {rank}, {count} rounds",
        ["weights", "tokens/s", "of the merged model's"], rows,
    )  # fmt: skip
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a directory, a .gguf file or smollm2; random weights of 4 layers by default")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args()
    report = Tables(machine())
    with tempfile.TemporaryDirectory() as folder:
        model = models.load(options.model) if options.model else random_model(Path(folder))
    measure(
        report, model, options.requests, options.adapters, options.rank, options.tokens, options.rounds, options.clock
    )
    report.print()


if __name__ == "__main__":
    main()
