"""Generation: the tokens of the model without a cache, whatever the prompts' lengths, alone and with adapters."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_adapter

pytest.importorskip("tokenizers")

from talking_models import END, talking_directory

import lora_jax as lora
from lora_jax import models
from lora_jax.errors import CheckpointError, ConfigError, ParameterError
from lora_jax.generate import Generator, Sampling, load_adapter, load_adapters
from lora_jax.generate.adapters import adapter_name, model_sites
from lora_jax.generate.decoding import read, write

PROMPTS = ["a", "def f(x):", "The quick brown fox jumps over the lazy dog, twice.", "0123456789abcdef0123456789abcdef0"]
COUNT = 11


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> models.Model:
    return models.load(talking_directory(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def adapters(model: models.Model) -> dict[str, lora.Adapter]:
    return {name: random_adapter(model_sites(model), seed) for seed, name in enumerate(("one", "two", "three"))}


@pytest.fixture(scope="module")
def plain(model: models.Model) -> Generator:
    return Generator(model)


@pytest.fixture(scope="module")
def adapted(model: models.Model, adapters: dict[str, lora.Adapter]) -> Generator:
    return Generator(model, adapters["one"])


@pytest.fixture(scope="module")
def routed(model: models.Model, adapters: dict[str, lora.Adapter]) -> Generator:
    return Generator(model, adapters)


def without_cache(model: models.Model, params: Any, prompt: str, count: int = COUNT) -> tuple[int, ...]:
    """The most probable tokens, each from all of the text before it."""
    tokens = model.tokenizer.encode(prompt)
    for _ in range(count):
        row = jnp.asarray([tokens + [0] * (64 - len(tokens))])
        tokens.append(int(_logits(model.apply, params, row)[0, len(tokens) - 1].argmax()))
    return tuple(tokens[-count:])


_logits = jax.jit(lambda apply, params, tokens: apply(params, tokens), static_argnums=0)


def test_tokens_are_those_of_the_model_without_a_cache(model: models.Model, plain: Generator) -> None:
    answers = plain(PROMPTS, max_tokens=COUNT)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        expected = without_cache(model, model.params, prompt)
        assert answer.tokens == expected[: len(answer.tokens)] and len(answer.tokens) > 3
        assert answer.ended == "length" or expected[len(answer.tokens)] == END


def test_an_adapter_is_its_merged_model(
    model: models.Model, adapted: Generator, adapters: dict[str, lora.Adapter]
) -> None:
    merged = lora.merge(model.params, adapters["one"])
    for prompt, answer in zip(PROMPTS, adapted(PROMPTS, max_tokens=COUNT), strict=True):
        assert answer.tokens == without_cache(model, merged, prompt)[: len(answer.tokens)]


def test_every_prompt_may_have_its_own_adapter(
    model: models.Model, routed: Generator, adapters: dict[str, lora.Adapter]
) -> None:
    names = ["two", None, "one", "three"]
    answers = routed(PROMPTS, max_tokens=COUNT, adapters=names)
    for prompt, name, answer in zip(PROMPTS, names, answers, strict=True):
        params = model.params if name is None else lora.merge(model.params, adapters[name])
        assert answer.tokens == without_cache(model, params, prompt)[: len(answer.tokens)]


def test_others_need_no_other_program(
    model: models.Model, plain: Generator, routed: Generator, adapters: dict[str, lora.Adapter]
) -> None:
    plain(PROMPTS, max_tokens=COUNT)
    routed(PROMPTS, max_tokens=COUNT)
    before = read._cache_size(), write._cache_size()
    plain(["x"] * 4, max_tokens=30)
    plain(
        [prompt + PROMPTS[2][:40] for prompt in PROMPTS[::-1]],
        max_tokens=5,
        sampling=Sampling(temperature=0.9, top_k=3),
    )
    routed(PROMPTS[::-1], max_tokens=3, adapters=["one", "one", "three", None], stops=["q"])
    assert (read._cache_size(), write._cache_size()) == before


def test_parts_are_the_answers(plain: Generator) -> None:
    continuation = plain.stream(PROMPTS, max_tokens=20)
    parts = list(continuation)
    assert len(parts) == 4  # Eight tokens, eight, four, and what was held back.
    joined = ["".join(each) for each in zip(*parts, strict=True)]
    assert joined == [answer.text for answer in continuation.answers]
    assert continuation.tokens == sum(len(each.tokens) + (each.ended == "token") for each in continuation.answers)
    assert continuation.waited > 0 and continuation.rate is not None


def test_texts_end_at_strings_and_tokens(plain: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = plain(PROMPTS, max_tokens=20)[1].text
    stop = whole[6:9]
    cut = plain(PROMPTS, max_tokens=20, stops=[stop])[1]
    assert cut.text == whole[: whole.index(stop)] and cut.ended == "stop"
    tokens = plain(PROMPTS, max_tokens=20)[1].tokens
    monkeypatch.setattr(plain.tokenizer, "eos_ids", (END, tokens[4]))
    answer = plain(PROMPTS, max_tokens=20)[1]
    assert answer.ended == "token" and answer.tokens == tokens[: tokens.index(tokens[4])]


def test_drawing_follows_the_seed(plain: Generator) -> None:
    sampling = Sampling(temperature=1.0)
    one, again, other = (plain(PROMPTS, max_tokens=8, sampling=sampling, seed=seed) for seed in (1, 1, 2))
    assert one == again != other


def test_adapters_are_read_in_both_formats(
    model: models.Model, adapters: dict[str, lora.Adapter], tmp_path: Path
) -> None:
    sites = model_sites(model)
    lora.save(tmp_path / "own", adapters["one"])
    lora.peft.save(tmp_path / "two" / "adapter", adapters["two"], sites=sites)
    found = load_adapters([str(tmp_path / "own"), str(tmp_path / "two" / "adapter")], model)
    assert list(found) == ["own", "two"]
    tokens = jnp.asarray([model.tokenizer.encode("def")])
    for name, original in (("own", "one"), ("two", "two")):
        theirs, ours = (lora.merge(model.params, each) for each in (found[name], adapters[original]))
        np.testing.assert_allclose(*(_logits(model.apply, each, tokens) for each in (theirs, ours)), atol=1e-4)
    with pytest.raises(CheckpointError, match="two adapters are called 'own'"):
        load_adapters([str(tmp_path / "own"), f"own={tmp_path / 'two'}"], model)
    with pytest.raises(CheckpointError, match="There is nothing at"):
        load_adapter(tmp_path / "missing", model)
    assert (
        adapter_name("x=/a/b") == "x" and adapter_name("/a/b/adapter/") == "b" and adapter_name("adapter") == "adapter"
    )


def test_what_cannot_be_continued_is_refused(plain: Generator, routed: Generator, tmp_path: Path) -> None:
    for prompts, said in (([], "there is no prompt"), (["a", ""], "prompt 2 is empty")):
        with pytest.raises(ConfigError, match=said):
            plain.stream(prompts)
    with pytest.raises(ConfigError, match="max_tokens=0"):
        plain.stream(["a"], max_tokens=0)
    with pytest.raises(ConfigError, match="top_p=2"):
        plain.stream(["a"], sampling=Sampling(top_p=2.0))
    with pytest.raises(ParameterError, match="no adapter 'on'; nearest: one"):
        routed.stream(["a"], adapters=["on"])
    with pytest.raises(ConfigError, match="no tokenizer"):
        Generator(models.load(talking_directory(tmp_path / "mute", mute=True)))
