"""Tokens become text as they come: whole characters, no stop strings, nothing taken back."""

from collections.abc import Sequence

import pytest

from lora_jax.generate.text import Text

END = 0


def decode(tokens: Sequence[int]) -> str:
    return bytes(tokens).decode(errors="replace")


def streamed(text: Text, data: bytes, chunk: int) -> list[str]:
    return [*(text.push(data[at : at + chunk]) for at in range(0, len(data), chunk)), text.close()]


@pytest.mark.parametrize("chunk", [1, 2, 3, 50])
def test_parts_are_the_text_and_characters_are_whole(chunk: int) -> None:
    text, said = Text(decode, [END]), "naïve 🙂 東京"
    parts = streamed(text, said.encode(), chunk)
    assert "".join(parts) == said == text.answer().text
    assert "\ufffd" not in "".join(parts)
    assert text.answer().ended == "length"


def test_bytes_that_never_become_a_character_come_at_the_end() -> None:
    text = Text(decode, [END])
    assert streamed(text, b"a\xf0\x9f", 1) == ["a", "", "", "\ufffd"]


@pytest.mark.parametrize("chunk", [1, 2, 50])
def test_a_stop_string_is_never_shown(chunk: int) -> None:
    text = Text(decode, [END], ["\nUser:", "##", ""])
    assert "".join(streamed(text, b"one\nUs two#\nUser: three##", chunk)) == "one\nUs two#"
    assert text.answer().ended == "stop"


def test_what_only_began_like_a_stop_string_comes_late() -> None:
    text = Text(decode, [END], ["stop"])
    assert [text.push(b"a st"), text.push(b"o"), text.push(b"ne"), text.close()] == ["a ", "", "stone", ""]


def test_of_two_stop_strings_the_first_in_the_text_counts() -> None:
    text = Text(decode, [END], ["b", "ab"])
    text.push(b"xab")
    assert text.answer().text == "x"


def test_the_token_that_ends_it_is_no_part_of_it() -> None:
    text = Text(decode, [END, 7])
    assert text.push([65, 66, 7, 67]) == "AB"
    assert text.push([68]) == "" and text.close() == ""
    assert text.answer() == ("AB", (65, 66), "token")


def test_tokens_that_are_none_end_nothing() -> None:
    text = Text(decode, [END])
    assert text.push([65, -1, -1]) == "A" and text.ended is None
