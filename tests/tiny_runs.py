"""A tiny random model that reads bytes, and examples for it: what runs of `lora-jax finetune` need."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from helpers import assert_same
from safetensors.numpy import load_file, save_file
from tiny_models import tiny_directory

from lora_jax.models.encoder_config import encoder_config, encoder_leaves
from lora_jax.train.builtin import write_tokenizer


def bytes_model(path: Path, family: str = "llama", **changes: object) -> Path:
    """A tiny random model that reads bytes."""
    sizes = {"vocab_size": 257, "num_hidden_layers": 2, "tie_word_embeddings": True, "rope_parameters": None}
    tiny_directory(path, family, **{**sizes, **changes})
    write_tokenizer(path)
    return path


def bytes_encoder(path: Path, *, pooled: bool = True, **changes: object) -> Path:
    """A tiny random BERT that reads bytes and tells two classes apart; or without a layer on the first token."""
    values = {
        "model_type": "bert", "architectures": ["BertForSequenceClassification"], "vocab_size": 257, "hidden_size": 16,
        "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 64,
        "id2label": {"0": "no", "1": "yes"}, "hidden_act": "gelu", **changes,
    }  # fmt: skip
    draw, tensors = np.random.default_rng(0), {}
    for leaf in encoder_leaves(
        encoder_config("config.json", values, ["pooler.dense.weight"] if pooled else []), unrolled=True
    ):
        normal = draw.normal(size=leaf.shape) * leaf.shape[-1] ** -0.5
        norm = leaf.template.endswith("LayerNorm.weight")
        tensors[leaf.template] = np.asarray(np.ones(leaf.shape) if norm else normal, np.float32)
    path.mkdir()
    (path / "config.json").write_text(json.dumps(values))
    save_file(tensors, path / "model.safetensors")
    write_tokenizer(path)
    return path


def sums(path: Path) -> Path:
    """Examples with a prompt and an answer."""
    lines = [{"prompt": f"{i}+{j}=", "completion": f"{i + j}"} for i in range(8) for j in range(8)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def assert_equal_runs(one: Path, other: Path) -> None:
    """Two runs left the same files, with the same metrics and adapter, bit for bit."""
    assert (one / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()
    assert_same(*(load_file(path / "adapter" / "adapter_model.safetensors") for path in (one, other)))
    assert sorted(each.name for each in one.iterdir()) == sorted(each.name for each in other.iterdir())


def in_two_processes(args: Sequence[str]) -> None:
    """Run `lora-jax` in two processes of two devices each, which know of each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PLATFORMS": "cpu",
              "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo", "JAX_NUM_CPU_DEVICES": "2"}  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "lora_jax", *args], env=os.environ | shared | {"JAX_PROCESS_ID": str(number)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=400)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
