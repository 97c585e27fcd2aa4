"""Files made of pieces of every format, at random: each is read, or refused with an error of ours."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save
from two_blocks import load

import lora_jax as lora
from lora_jax.io.inspect import inspect
from lora_jax.io.peft import read_peft

WORDS = [
    "lora_down", "lora_up", "lora_A", "lora_B", "lora_a", "lora_b", "weight", "alpha", "m", "lora", "down", "up",
    "processor", "to_q_lora", "default", "blocks", "0", "lora_unet_a_b", "hada_w1_a", "unet", "model", "scale",
    "lora_E", "lora_mid", "base_layer", "modules_to_save", "é", "\n", "", "lora_embedding_A",
]  # fmt: skip
PAIRS = [("lora_down.weight", "lora_up.weight"), ("lora_a", "lora_b"), ("lora_A", "lora_B"),
         ("lora.down.weight", "lora.up.weight")]  # fmt: skip
MODULES = ["blocks.0.attn.to_q", "unet.x", "lora_unet_a"]
SHAPES = [(2, 3), (3, 2), (2, 2), (), (1,), (2, 3, 1, 1), (0, 2)]
DTYPES: list[Any] = [np.float32, np.float16, np.int32, np.bool_]
CONFIGS: list[Any] = [
    None, {}, {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 1.0}}, {"lora_layers": 3},
    {"peft_type": "LORA", "r": 2, "lora_alpha": 4},
]  # fmt: skip
METADATA = [None, '{"r": 2, "lora_alpha": 4}', '{"unet.r": 2}', '{"a.r": null, ".": 1}']


def fuzzed(draw: random.Random, folder: Path) -> None:
    tensors = {
        ".".join(draw.choices(WORDS, k=draw.randint(1, 5))): np.ones(draw.choice(SHAPES), draw.choice(DTYPES))
        for _ in range(draw.randint(0, 4))
    }
    if draw.random() < 0.7:
        module, (a, b) = draw.choice(MODULES), draw.choice(PAIRS)
        tensors |= {f"{module}.{a}": np.ones((2, 3), np.float32), f"{module}.{b}": np.ones((4, 2), np.float32)}
    noted = draw.choice(METADATA)
    data = bytearray(save(tensors, None if noted is None else {"lora_adapter_metadata": noted}))
    if draw.random() < 0.1:
        data[draw.randrange(len(data))] = draw.randrange(256)
    (folder / "adapter_model.safetensors").write_bytes(data)
    (folder / "adapter_config.json").unlink(missing_ok=True)
    if (config := draw.choice(CONFIGS)) is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("seed", range(8))
def test_random_files(seed: int, tmp_path: Path) -> None:
    draw, outcomes = random.Random(seed), {True: 0, False: 0}
    for _ in range(60):
        fuzzed(draw, tmp_path)
        for face in (read_peft, inspect, lambda path: load(path, alpha=draw.choice([None, 2]))):
            try:
                face(tmp_path)
            except lora.LoraError:
                outcomes[False] += 1
            else:
                outcomes[True] += 1
    assert all(outcomes.values())
