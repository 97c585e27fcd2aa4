"""The model and the data of a run that names none: a small model of bytes, made once, and English about Python."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from lora_jax import models
from lora_jax.errors import CheckpointError
from lora_jax.models.initial import random_tensors
from lora_jax.models.read_config import decoder_config
from lora_jax.models.tensors import decoder_leaves
from lora_jax.publish import publish, publish_file
from lora_jax.report.terminal import Progress
from lora_jax.train.pretrain import Recipe, pretrain
from lora_jax.train.texts import python_source, python_topics

RATE = 3e-3
"""Peak learning rate of adapters of the built-in model."""
_END = "<|endoftext|>"
_CONFIG: Mapping[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 257, "hidden_size": 128,
    "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
    "bos_token_id": None, "eos_token_id": 256, "torch_dtype": "float32",
}  # fmt: skip


def cache() -> Path:
    """Where what is made once is kept: `LORA_JAX_CACHE`, or the user's cache."""
    if own := os.environ.get("LORA_JAX_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_jax"


def data() -> Path:
    """A text file with the language topics of Python's `help()`, in English.

    Raises:
      TextError: this Python comes without them.
    """
    text = python_topics()
    name = f"topics-{sha256(text).hexdigest()[:20]}.txt"
    for folder in (cache(), Path(tempfile.gettempdir())):
        if (path := folder / name).exists() and path.read_bytes() == text:
            return path
        with suppress(CheckpointError, OSError):
            folder.mkdir(parents=True, exist_ok=True)
            publish_file(path, text)
            return path
    raise CheckpointError(f"{cache()} cannot be written, and no temporary directory either: give a file with --data")


def directory(recipe: Recipe) -> Path:
    """Where the model that was pre-trained by a recipe is kept, under a name that depends on all that it depends on."""
    facts = {"config": dict(_CONFIG), "recipe": asdict(recipe), "text": sha256(python_source()).hexdigest()}
    digest = sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return cache() / f"base-{digest[:20]}"


def blank(load: Callable[[Path], Any] = models.load, seed: int = 0) -> Any:
    """The model before it is pre-trained: random parameters out of a directory like any other, which goes at once."""
    with tempfile.TemporaryDirectory(prefix="lora_jax-") as name:
        _write(Path(name), random_tensors(_CONFIG, seed))
        model = load(Path(name))
        _ = model.tokenizer  # Read while the directory is there.
        return model


def _write(folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
    (folder / "config.json").write_text(json.dumps(_CONFIG, indent=1) + "\n", encoding="utf-8")
    write_tokenizer(folder)
    save_file(dict(tensors), folder / "model.safetensors")


def _letters() -> list[str]:
    """The letter that stands for each byte in tokenizers of bytes: itself if it can be seen, else one from 256 on."""
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in seen else chr(next(hidden)) for byte in range(256)]


def _tokenizer() -> dict[str, Any]:
    """`tokenizer.json`: every byte is the token of its number, and one more ends a text."""
    end = {"id": 256, "content": _END, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
           "special": True}  # fmt: skip
    bytelevel = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    vocab = {letter: byte for byte, letter in enumerate(_letters())}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocab,
             "merges": []}  # fmt: skip
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [end], "normalizer": None,
            "pre_tokenizer": bytelevel, "post_processor": None, "decoder": bytelevel, "model": model}  # fmt: skip


def write_tokenizer(folder: Path) -> None:
    """Write the files of the tokenizer of bytes into a model's directory."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _END, "model_max_length": 2048}
    for name, values in {"tokenizer.json": _tokenizer(), "tokenizer_config.json": config}.items():
        (folder / name).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def kept(recipe: Recipe, load: Callable[[Path], Any] = models.load) -> Any | None:
    """The pre-trained model, if it is there and whole."""
    path = directory(recipe)
    try:
        return load(path) if path.exists() else None
    except CheckpointError:
        return None


def base(recipe: Recipe | None = None) -> Any:
    """The pre-trained model, made now if it is not kept yet; for programs of one's own.

    Raises:
      CheckpointError: the cache cannot be written.
    """
    recipe = recipe or Recipe()
    if (model := kept(recipe)) is not None:
        return model
    with tempfile.TemporaryDirectory() as states:
        report = partial(Progress, "pre-training", recipe.steps)
        params = pretrain(blank(), python_source(), recipe, Path(states), report)
    return models.load(keep(recipe, params))


def keep(recipe: Recipe, params: Any) -> Path:
    """Keep a pre-trained model for the next run.

    Raises:
      CheckpointError: the cache cannot be written.
    """
    path = directory(recipe)
    publish(path, lambda folder: _write(folder, _unstacked(params)), replace=lambda old: None)
    return path


def _unstacked(params: Any) -> dict[str, np.ndarray]:
    """Tensors by the names that a checkpoint has for them."""
    found = {}
    for leaf in decoder_leaves(decoder_config("config.json", _CONFIG)):
        array = params
        for key in leaf.path:
            array = array[key]
        for index, name in leaf.members():
            found[name] = np.ascontiguousarray(np.asarray(array)[index])
    return found
