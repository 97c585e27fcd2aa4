"""From tokens to text as they come: whole characters only, up to a token or a string that ends the text."""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Literal, NamedTuple

Ended = Literal["token", "stop", "length"]
_BROKEN = "\ufffd"
"""What a decoder writes for bytes that are no character yet."""


class Answer(NamedTuple):
    """A finished text.

    Attributes:
      text: without the stop string that ended it.
      tokens: without the token that ended it.
      ended: by a `token` that ends texts, by a `stop` string, or by the `length` that was allowed.

    Example:
      >>> answer = Answer(text="yes", tokens=(4, 7), ended="token")
      >>> answer.text, len(answer.tokens)
      ('yes', 2)
    """

    text: str
    tokens: tuple[int, ...]
    ended: Ended


class Text:
    """One text that grows by tokens.

    Args:
      decode: from tokens to text.
      ends: tokens that end it.
      stops: strings that end it.

    Example:
      >>> text = Text(lambda tokens: "".join("abc"[token] for token in tokens), ends=[9], stops=["cb"])
      >>> text.push([0, 2]), text.push([2, 1, 0]), text.answer()
      ('a', 'c', Answer(text='ac', tokens=(0, 2, 2, 1), ended='stop'))
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], ends: Collection[int], stops: Collection[str] = ()):
        self._decode, self._ends, self._stops = decode, frozenset(ends), [stop for stop in stops if stop]
        self._tokens: list[int] = []
        self._text, self._shown = "", 0
        self.ended: Ended | None = None

    def push(self, tokens: Iterable[int]) -> str:
        """Take tokens, and return the text that is certain now and was not before.

        Args:
          tokens: the next ones; negative ones are none, and those after the end are of no effect.
        """
        for token in tokens:
            if self.ended or token < 0:
                break
            self._take(int(token))
        sure = len(self._text) if self.ended else self._sure()
        new, self._shown = self._text[self._shown : sure], max(self._shown, sure)
        return new

    def close(self) -> str:
        """End the text here, if it has not ended: what was held back comes now."""
        self.ended = self.ended or "length"
        return self.push(())

    def answer(self) -> Answer:
        """The text so far."""
        return Answer(self._text, tuple(self._tokens), self.ended or "length")

    def _take(self, token: int) -> None:
        if token in self._ends:
            self.ended = "token"
            return
        self._tokens.append(token)
        self._text = self._decode(self._tokens)
        if places := [place for stop in self._stops if (place := self._text.find(stop)) >= 0]:
            self._text, self.ended = self._text[: min(places)], "stop"

    def _sure(self) -> int:
        """How much of the text cannot change: no broken character, and nothing that may begin a stop string."""
        sure = len(self._text.rstrip(_BROKEN))
        starts = (stop[:size] for stop in self._stops for size in range(len(stop) - 1, 0, -1))
        held = max((len(start) for start in starts if self._text[:sure].endswith(start)), default=0)
        return max(sure - held, self._shown)
