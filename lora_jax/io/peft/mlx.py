"""A PEFT adapter as the folder that mlx-lm's `load_adapters` reads."""

import json
import re
from os import PathLike
from typing import Any

import numpy as np

from lora_jax.errors import CheckpointError
from lora_jax.io.formats.recognise import MLX_FILE
from lora_jax.io.peft.files import PeftFiles
from lora_jax.io.peft.module import Module
from lora_jax.io.peft.portability import row
from lora_jax.io.peft.rename import check_names
from lora_jax.io.peft.uniform import uniform
from lora_jax.io.peft.write import fill, storable
from lora_jax.publish import place, publish

_LAYER = re.compile(r"^(?:.*?\.)?\d+\.")
"""What stands before the name of a module within its layer."""


def write_mlx(path: str | PathLike[str], files: PeftFiles) -> None:
    """Write an adapter as mlx-lm's folder.

    `lora_a` is `[in, rank]` and `lora_b` `[rank, out]`. mlx-lm has one rank and one scale for all modules, so factors
    are padded and scales folded as by `uniform`. DoRA's magnitudes become its `m`.

    Args:
      path: the directory to create.
      files: plain LoRA, DoRA or AdaLoRA; left as it is.

    Raises:
      CheckpointError: `path` exists, or the adapter holds what mlx-lm has no place for.

    Example:
      >>> import os, pathlib, tempfile
      >>> module = Module("linear", np.ones((2, 4), np.float32), np.ones((3, 2), np.float32))
      >>> folder = tempfile.mkdtemp() + "/adapter"
      >>> write_mlx(folder, PeftFiles({"r": 2, "lora_alpha": 4}, {"model.layers.0.self_attn.q_proj": module}))
      >>> config = json.loads(pathlib.Path(folder, "adapter_config.json").read_text(encoding="utf-8"))
      >>> sorted(os.listdir(folder)), config["lora_parameters"]["keys"], config["lora_parameters"]["scale"]
      (['adapter_config.json', 'adapters.safetensors'], ['self_attn.q_proj'], 2.0)
    """
    check_names(files)
    where, made = place(path), uniform(files)
    found = row(made, "mlx", form=False)
    if found.verdict != "reads":
        raise CheckpointError(f"{files.where} cannot be written for mlx-lm. {'; '.join(found.reasons)}")
    arrays = storable(
        {key: each for name, module in made.modules.items() for key, each in _arrays(name, module).items()}
    )
    text = json.dumps(_config(made), indent=2, sort_keys=True) + "\n"
    publish(where, lambda folder: fill(folder, MLX_FILE, arrays, {"format": "mlx"}, text))


def _arrays(name: str, module: Module) -> dict[str, np.ndarray]:
    found = {"lora_a": module.a.T, "lora_b": module.b.T}
    if module.magnitude is not None:
        found["m"] = module.magnitude.reshape(-1)
    return {f"{name}.{part}": array for part, array in found.items()}


def _config(files: PeftFiles) -> dict[str, Any]:
    """Keys are names within a layer, as mlx-lm looks for them in `num_layers` layers, -1 for all; others are whole."""
    return {
        "fine_tune_type": "dora" if any(each.magnitude is not None for each in files.modules.values()) else "lora",
        "num_layers": -1,
        "lora_parameters": {
            "rank": files.config["r"],
            "scale": files.config["lora_alpha"] / files.config["r"],
            "dropout": float(files.config.get("lora_dropout") or 0.0),
            "keys": sorted({_LAYER.sub("", name, count=1) for name in files.modules}),
        },
    }
