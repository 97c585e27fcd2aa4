"""What two runs of `lora-jax finetune` learned, and what rounding would do to their base: tables and pictures.

Run from the root of the repository, after `lora-jax finetune --out one` and `lora-jax finetune --out two --seed 1`:
`python -m benchmarks.analysis one two --images docs/images`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import lora_jax as lora
from lora_jax.models import Transformer, TransformerConfig
from lora_jax.report.tables import show
from lora_jax.train.data import python_source, split
from lora_jax.train.pretrain import Recipe, cache_path, load_cached


def base_of(folder: Path) -> tuple[Transformer, Any, Any]:
    """The model of a run, its parameters, and text of the kind it was pre-trained on."""
    config = json.loads((folder / "config.json").read_text())
    seq_len, steps = config["options"]["training"]["length"], config["options"]["pretrain_steps"]
    model, source = Transformer(TransformerConfig(**config["model"])), split("Python source", python_source(), seq_len)
    tokens = jnp.asarray(source.held_out[: 16 * seq_len].reshape(16, seq_len))
    abstract = jax.eval_shape(model.init, jax.random.key(0), tokens)
    path = cache_path(model, Recipe(steps=steps, seq_len=seq_len), source)
    params = load_cached(path, abstract)
    if params is None:
        raise SystemExit(f"{path} is gone: run lora-jax finetune again")
    return model, params, tokens


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("first", type=Path)
    options.add_argument("second", type=Path)
    options.add_argument("--images", type=Path, default=Path("."))
    args = options.parse_args()
    model, params, tokens = base_of(args.first)
    one, other = (lora.load(folder / "adapter") for folder in (args.first, args.second))
    captured = lora.capture(model.apply, params, [(tokens,)], "inputs")
    sites = lora.find_sites(model.apply, params, tokens)
    task = "Python source, adapted to English"
    reports = {
        "spectra": (lora.analysis.spectra(one, params), f"Updates of rank 8: {task}"),
        "overlap": (lora.analysis.overlap(one, other), f"Two seeds of one task: {task}"),
        "intruders": (lora.analysis.intruders(params, one), f"Intruder dimensions: {task}"),
        "rounding": (
            lora.analysis.rounding(params, [sites[path] for path in captured], captured),
            "Rounding against truncation at equal bytes: a model of Python source",
        ),
    }
    for name, (report, title) in reports.items():
        show(report.summary())
        report.plot(args.images / f"{name}.png", title)
    print(f"intruders: {reports['intruders'][0].count}")


if __name__ == "__main__":
    main()
