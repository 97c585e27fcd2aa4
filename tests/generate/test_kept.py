"""The cache of a conversation: turns give the tokens that reading all of it anew gives, and read little."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tokenizers")

from talking_models import talking_directory

from lora_jax import models
from lora_jax.generate import Generator
from lora_jax.generate import generator as module

MORE = 12


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens were read, each time."""
    counts: list[int] = []
    usual = module.read

    def counted(forward: Any, weights: Any, tokens: Any, lengths: Any, *args: Any, **options: Any) -> Any:
        counts.append(int(lengths.max()))
        return usual(forward, weights, tokens, lengths, *args, **options)

    monkeypatch.setattr(module, "read", counted)
    return counts


def generator(path: Path, family: str = "llama") -> Generator:
    return Generator(models.load(talking_directory(path, family=family)))


def turns(made: Generator, keep: bool, count: int = 4) -> list[tuple[int, ...]]:
    """The answers of a conversation, as tokens; each turn has all that was before."""
    prompt, answers, draw = [5, 6, 7, *range(40, 60)], [], np.random.default_rng(0)
    for _ in range(count):
        continuation = made.stream([prompt], max_tokens=MORE, keep=keep)
        for _ in continuation:
            pass
        answers.append(continuation.answers[0].tokens)
        prompt = [*prompt, *answers[-1], *draw.integers(40, 90, 9).tolist()]
    return answers


@pytest.mark.parametrize("family", ["llama", "mistral"])  # The other one has windows of five tokens.
def test_turns_give_the_same_tokens_and_read_little(family: str, read: list[int], tmp_path: Path) -> None:
    made = generator(tmp_path / "m", family)
    anew = turns(made, keep=False)
    lengths = read.copy()
    assert turns(made, keep=True) == anew
    kept = read[len(lengths) :]
    assert kept[0] == lengths[0] and lengths == sorted(lengths) and lengths[-1] > 64
    assert kept[1:] == [32] * 3


def test_another_conversation_is_read_from_its_beginning(read: list[int], tmp_path: Path) -> None:
    made = generator(tmp_path / "m")
    first, other = list(range(40, 90)), list(range(41, 95))
    list(made.stream([first], max_tokens=3, keep=True))
    continuation = made.stream([other], max_tokens=3, keep=True)
    list(continuation)
    assert read == [50, 54]
    assert continuation.answers[0].tokens == made([other], max_tokens=3)[0].tokens


def test_a_conversation_that_the_cache_has_no_room_for_gets_another(read: list[int], tmp_path: Path) -> None:
    made = generator(tmp_path / "m")
    long = list(range(40, 90))
    list(made.stream([long], max_tokens=3, keep=True))
    continuation = made.stream([long * 4], max_tokens=3, keep=True)
    list(continuation)
    assert read == [50, 200]
    assert continuation.answers[0].tokens == made([long * 4], max_tokens=3)[0].tokens


def test_a_prompt_that_was_read_whole_is_read_at_its_end(read: list[int], tmp_path: Path) -> None:
    made = generator(tmp_path / "m")
    prompt = list(range(40, 90))
    answers = []
    for _ in range(2):
        continuation = made.stream([prompt], max_tokens=3, keep=True)
        list(continuation)
        answers.append(continuation.answers)
    assert read == [50, 32] and answers[0] == answers[1]
