"""What two runs of `lora-jax finetune` learned, and what rounding would do to their base: tables and pictures.

Run from the root of the repository, after `lora-jax finetune --out one` and `lora-jax finetune --out two --seed 1`:
`python -m benchmarks.analysis one two --images docs/images`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp

import lora_jax as lora
from lora_jax import models
from lora_jax.report.tables import show
from lora_jax.train.texts import python_source, rows_evenly, split


def base_of(folder: Path) -> tuple[Any, Any]:
    """The model of a run, and text of the kind it was pre-trained on."""
    config = json.loads((folder / "config.json").read_text())
    return models.load(config["model"]["name"]), jnp.asarray(rows_evenly(split(python_source())[1], 16, 256))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("first", type=Path)
    options.add_argument("second", type=Path)
    options.add_argument("--images", type=Path, default=Path("."))
    args = options.parse_args()
    model, tokens = base_of(args.first)
    params, sites = model.params, lora.find_sites(model.apply, model.params, tokens)
    one, other = (lora.peft.load(folder / "adapter", params, sites) for folder in (args.first, args.second))
    captured = lora.capture(model.apply, params, [(tokens,)], "inputs")
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
