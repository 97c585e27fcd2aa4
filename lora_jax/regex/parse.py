"""A regular expression as a tree: read from its text once `re` has accepted it, or refused for what it uses."""

import re
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from lora_jax.errors import ConfigError

_LONGEST, _DEEPEST = 1 << 16, 64

_REPETITION = re.compile(r"[*+?]|\{(?!\})([0-9]*)(,?)([0-9]*)\}")
_GROUP = re.compile(r"\((?:\?(?:P<[^>]*>|:|(<?)([=!])))?")
_UNSUPPORTED = (
    ("(?P=", "a back-reference"), ("(?(", "a condition"), ("(?>", "an atomic group"), ("(?#", "a comment"),
    ("(?", "a flag"), ("\\N", "a character by its name"), ("\\", "a back-reference or an octal number"),
)  # fmt: skip
_CONTROL = {"a": "\a", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
_HEX = {"x": 2, "u": 4, "U": 8}

Test: TypeAlias = Callable[[str], bool]
KINDS: dict[str, Test] = {
    "d": str.isdecimal,
    "s": str.isspace,
    "w": lambda char: char.isalnum() or char == "_",
    "D": lambda char: not char.isdecimal(),
    "S": lambda char: not char.isspace(),
    "W": lambda char: not (char.isalnum() or char == "_"),
}


class Word(NamedTuple):
    """Characters as they are."""

    chars: str


class One(NamedTuple):
    """One character that passes a test."""

    test: Test


class At(NamedTuple):
    """A place: `^`, `A` the start; `$` the end, or before a last line break; `Z` the end; `b`, `B` word boundaries."""

    place: str


class Look(NamedTuple):
    """What has to follow, or to stand before, or must not."""

    node: "Node"
    behind: bool
    negated: bool


class Sequence(NamedTuple):
    """One after the other."""

    nodes: "tuple[Node, ...]"


class Choice(NamedTuple):
    """One of several."""

    nodes: "tuple[Node, ...]"


class Repeat(NamedTuple):
    """The same so many times, without an upper limit if `most` is None."""

    node: "Node"
    least: int
    most: int | None


Node: TypeAlias = Word | One | At | Look | Sequence | Choice | Repeat


def parse(pattern: str) -> Node:
    """The tree of a pattern.

    Raises:
      ConfigError: it is no regular expression, is too long, or uses what is not supported.

    Example:
      >>> parse("ab|c*")
      Choice(nodes=(Word(chars='ab'), Repeat(node=Word(chars='c'), least=0, most=None)))
    """
    if len(pattern) > _LONGEST:
        raise ConfigError(f"{shown(pattern)} has {len(pattern)} characters; at most {_LONGEST} are read")
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"{shown(pattern)} is not a regular expression: {error or type(error).__name__}") from None
    return _Parser(pattern).choice()


def shown(pattern: str) -> str:
    """A pattern in an error message, cut if it is long.

    >>> shown("a\\nb")
    "'a\\\\nb'"
    """
    text = ascii(pattern)
    return text if len(text) <= 120 else f"{text[:117]}..."


class _Parser:
    """Reads a pattern that `re` accepts; methods read on from where they are."""

    def __init__(self, pattern: str):
        self.pattern, self.at, self.depth = pattern, 0, 0

    def take(self, expected: str) -> bool:
        found = self.pattern.startswith(expected, self.at)
        self.at += len(expected) * found
        return found

    def refuse(self, start: int) -> ConfigError:
        what = next(name for begin, name in _UNSUPPORTED if self.pattern.startswith(begin, start))
        return self._unsupported(what, start)

    def _unsupported(self, what: str, start: int) -> ConfigError:
        return ConfigError(
            f"{shown(self.pattern)} has {what} ({self.pattern[start : start + 4]!r}), which is not supported. Write it "
            "with groups, alternatives, repetitions, classes, anchors and look-around, or list the names themselves."
        )

    def choice(self) -> Node:
        options = [self.sequence()]
        while self.take("|"):
            options.append(self.sequence())
        return options[0] if len(options) == 1 else Choice(tuple(options))

    def sequence(self) -> Node:
        nodes: list[Node] = []
        while self.at < len(self.pattern) and self.pattern[self.at] not in "|)":
            node = self.repeated(self.atom())
            if nodes and isinstance(node, Word) and isinstance(nodes[-1], Word):
                nodes[-1] = Word(nodes[-1].chars + node.chars)
            else:
                nodes.append(node)
        return nodes[0] if len(nodes) == 1 else Sequence(tuple(nodes))

    def repeated(self, node: Node) -> Node:
        start, found = self.at, _REPETITION.match(self.pattern, self.at)
        if found is None:
            return node
        self.at = found.end()
        if self.pattern.startswith("+", self.at):
            raise self._unsupported("a possessive repetition", start)
        self.take("?")
        if found[0] in "*+?":
            return Repeat(node, int(found[0] == "+"), 1 if found[0] == "?" else None)
        most = found[3] if found[2] else found[1]
        return Repeat(node, int(found[1] or 0), int(most) if most else None)

    def atom(self) -> Node:
        char, start = self.pattern[self.at], self.at
        if char == "(":
            return self.group()
        self.at += 1
        if char == "[":
            return self.members()
        if char in "^$":
            return At(char)
        if char == ".":
            return One(lambda each: each != "\n")
        if char != "\\":
            return Word(char)
        if self.pattern[self.at] in "AZbB":
            self.at += 1
            return At(self.pattern[self.at - 1])
        self.at = start
        found = self.member()
        return Word(found) if isinstance(found, str) else One(found)

    def group(self) -> Node:
        found = _GROUP.match(self.pattern, self.at)
        if found is None or (found[0] == "(" and self.pattern.startswith("(?", self.at)):
            raise self.refuse(self.at)
        self.at, self.depth = found.end(), self.depth + 1
        if self.depth > _DEEPEST:
            raise ConfigError(f"{shown(self.pattern)} has groups in each other, more than {_DEEPEST} deep")
        inside = self.choice()
        self.at, self.depth = self.at + 1, self.depth - 1
        return Look(inside, found[1] == "<", found[2] == "!") if found[2] else inside

    def members(self) -> Node:
        """A class, from behind its bracket."""
        negated, tests, first = self.take("^"), list[Test](), self.at
        while self.at == first or not self.pattern.startswith("]", self.at):
            low = self.member(in_class=True)
            if self.pattern.startswith("-", self.at) and not self.pattern.startswith("-]", self.at):
                self.at += 1
                tests.append(_between(str(low), str(self.member(in_class=True))))
            else:
                tests.append(_between(low, low) if isinstance(low, str) else low)
        self.at += 1
        return One(lambda char: any(test(char) for test in tests) != negated)

    def member(self, in_class: bool = False) -> str | Test:
        """A character, or an escape for one or for a kind of characters."""
        start = self.at
        if not self.take("\\"):
            self.at += 1
            return self.pattern[start]
        char = self.pattern[self.at]
        self.at += 1
        if char in KINDS:
            return KINDS[char]
        if char in _HEX:
            self.at += _HEX[char]
            return chr(int(self.pattern[start + 2 : self.at], 16))
        if char == "b" and in_class:
            return "\b"
        if char in _CONTROL:
            return _CONTROL[char]
        if char.isascii() and char.isalnum():
            raise self.refuse(start)
        return char


def _between(low: str, high: str) -> Test:
    return lambda char: low <= char <= high
