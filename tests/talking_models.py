"""Small random models that read and write bytes: directories with a tokenizer and a chat template."""

import json
from pathlib import Path
from typing import Any

from tiny_models import tiny_config, tiny_directory, tiny_tensors

END = 256
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def talking_directory(path: Path, seed: int = 0, *, family: str = "llama", mute: bool = False, **changes: Any) -> Path:
    """A llama, or another family, in a new directory; without a tokenizer if `mute`. It never ends a text by itself."""
    sizes = {"vocab_size": 260, "eos_token_id": END, "hidden_size": 32, **changes}
    tensors = tiny_tensors(tiny_config(family, **sizes), seed)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 2
    tensors["lm_head.weight"][END:] = 0
    tiny_directory(path, family, tensors, **sizes)
    if not mute:
        _write_tokenizer(path)
    return path


def _write_tokenizer(path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend: Any = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<end>", special=True, normalized=False)])
    backend.save(str(path / "tokenizer.json"))
    config = {"eos_token": "<end>", "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
