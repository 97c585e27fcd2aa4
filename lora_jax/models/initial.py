"""`initial`: a decoder with random parameters, from what its `config.json` would say."""

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from lora_jax.models.load import Model, load
from lora_jax.models.read_config import decoder_config
from lora_jax.models.tensors import decoder_leaves

_TABLE = 0.02


def initial(values: Mapping[str, Any], *, seed: int = 0, **options: Any) -> Model:
    """A decoder that nobody has trained, for tests, benchmarks and pre-training.

    Args:
      values: what `config.json` would hold.
      seed: of the parameters.
      options: of `load`.

    Raises:
      CheckpointError: the config describes what is not supported.

    Example:
      >>> import numpy as np
      >>> sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
      >>> model = initial({"model_type": "llama", "vocab_size": 9, "num_key_value_heads": 1, **sizes})
      >>> model.apply(model.params, np.zeros((1, 3), np.int32)).shape
      (1, 3, 9)
    """
    with TemporaryDirectory(prefix="lora_jax-") as name:
        (Path(name) / "config.json").write_text(json.dumps(dict(values)), encoding="utf-8")
        save_file(random_tensors(values, seed), Path(name) / "model.safetensors")
        return load(name, **options)


def random_tensors(values: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Tensors by their names: kernels keep the size of what they multiply, tables are small, vectors one."""
    draw, found = np.random.default_rng(seed), {}
    for leaf in decoder_leaves(decoder_config("config.json", values), unrolled=True):
        scale = _TABLE if "embed" in leaf.template else leaf.shape[-1] ** -0.5
        normal = draw.normal(size=leaf.shape) * scale if len(leaf.shape) > 1 else np.ones(leaf.shape)
        found[leaf.template] = np.asarray(normal, np.float32)
    return found
