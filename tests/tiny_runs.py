"""A tiny random model that reads bytes, and examples for it: what runs of `lora-jax finetune` need."""

import json
from pathlib import Path

from tiny_models import tiny_directory

from lora_jax.train.builtin import write_tokenizer


def bytes_model(path: Path, family: str = "llama", **changes: object) -> Path:
    """A tiny random model that reads bytes."""
    sizes = {"vocab_size": 257, "num_hidden_layers": 2, "tie_word_embeddings": True, "rope_parameters": None}
    tiny_directory(path, family, **{**sizes, **changes})
    write_tokenizer(path)
    return path


def sums(path: Path) -> Path:
    """Examples with a prompt and an answer."""
    lines = [{"prompt": f"{i}+{j}=", "completion": f"{i + j}"} for i in range(8) for j in range(8)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
