"""Regular expressions over names, in time bounded by pattern times name: one from a file cannot make a program hang.

`re` backtracks, so that `(a+)+` on forty letters takes for ever. Here a pattern is a graph of states, and what is kept
of a match is, for each state, the set of positions at which it was reached, as the bits of an integer. No state takes
the same position twice. What is left out is what needs more than that: back-references and the like.
"""

from collections import defaultdict
from collections.abc import Callable
from functools import lru_cache
from heapq import heappop, heappush
from typing import TypeAlias

from lora_jax.errors import ConfigError
from lora_jax.regex.parse import KINDS, At, Choice, Look, Node, One, Repeat, Sequence, Test, Word, parse, shown

_LONGEST_NAME, _MOST_COPIES, _MOST_STEPS = 4096, 2000, 500_000


def fullmatch(pattern: str, name: str) -> bool:
    """Whether a pattern matches the whole of a name, as `re.fullmatch` says.

    Raises:
      ConfigError: see `check`; or the name is longer than any parameter's.

    Example:
      >>> fullmatch(r"^(?!.*visual).*\\.(q|v)_proj$", "model.layers.0.q_proj"), fullmatch("(a+)+", "a" * 99 + "b")
      (True, False)
    """
    if len(name) > _LONGEST_NAME:
        raise ConfigError(f"a name of {len(name)} characters, {name[:40]!r}..., is too long to be a parameter's")
    text = _Text(name)
    try:
        # Backwards, as most patterns say how a name ends: one that does not fit fails at once.
        return bool(_reached(_compiled(pattern), 1 << len(name), text) & 1)
    except _TooLong:
        raise ConfigError(f"{shown(pattern)} takes too long on {name!r}: write it with fewer repetitions") from None


def check(pattern: str) -> None:
    """Refuse what is no regular expression, or what `fullmatch` does not support.

    Supported is all of `re` but back-references, conditions, atomic groups, possessive repetitions, flags, comments and
    octal numbers.

    Raises:
      ConfigError: names the pattern and what is wrong with it.

    Example:
      >>> try:
      ...     check(r"(a)\\1")
      ... except ConfigError as error:
      ...     print(str(error)[:29])
      '(a)\\\\1' has a back-reference
    """
    _compiled(pattern)


class _TooLong(Exception):
    """More steps than any pattern that is meant well takes."""


class _Text:
    """A name while it is matched: where each character stands, as bits, and what is known about it by now."""

    def __init__(self, name: str):
        self.name, self.chars, self.steps = name, _places(name), 0
        self.everywhere = (2 << len(name)) - 1
        self.known: dict[object, int] = {}


@lru_cache(maxsize=4096)
def _places(name: str) -> dict[str, int]:
    places: defaultdict[str, int] = defaultdict(int)
    for place, char in enumerate(name):
        places[char] |= 1 << place
    return dict(places)


_Step: TypeAlias = Callable[[int, _Text], int]


class _Graph:
    """States and steps between them; a step takes a set of positions to the set of those it leads to."""

    def __init__(self, node: Node, back: bool, pattern: str):
        self.edges: list[list[tuple[_Step, int]]] = [[]]
        self.back, self.pattern, self.nodes = back, pattern, 0
        self.final = self.link(node, 0)

    def to(self, step: _Step, start: int, end: int | None = None) -> int:
        if end is None:
            end = len(self.edges)
            self.edges.append([])
        self.edges[start].append((step, end))
        return end

    def link(self, node: Node, start: int) -> int:
        """Add a node behind a state; the state in which it ends."""
        self.nodes += 1
        if self.nodes > len(self.pattern) + _MOST_COPIES:
            raise ConfigError(f"{shown(self.pattern)} repeats too much: {self.nodes} parts and more, written out")
        if isinstance(node, Sequence):
            for each in reversed(node.nodes) if self.back else node.nodes:
                start = self.link(each, start)
            return start
        if isinstance(node, Choice):
            ends = [self.link(each, start) for each in node.nodes]
            end = self.to(_stay, ends[0])
            for other in ends[1:]:
                self.to(_stay, other, end)
            return end
        return self.repeat(node, start) if isinstance(node, Repeat) else self.to(self.step(node), start)

    def repeat(self, node: Repeat, start: int) -> int:
        for _ in range(node.least):
            start = self.link(node.node, start)
        if node.most is None:
            if isinstance(node.node, One):
                return self.to(_flood(node.node.test, self.back), start)
            loop = self.to(_stay, start)
            self.to(_stay, self.link(node.node, loop), loop)
            return loop
        ends = [start]
        for _ in range(node.most - node.least):
            ends.append(self.link(node.node, ends[-1]))
        end = self.to(_stay, ends[-1])
        for other in ends[:-1]:
            self.to(_stay, other, end)
        return end

    def step(self, node: Word | One | At | Look) -> _Step:
        if isinstance(node, Word):
            return _word(node.chars, self.back)
        if isinstance(node, One):
            return _one(node.test, self.back)
        if isinstance(node, At):
            return lambda bits, text: bits & _place(node.place, text)
        # Where it may start is asked from all ends, and the other way round: one pass for all positions.
        graph = _Graph(node.node, not node.behind, self.pattern)
        self.nodes += graph.nodes
        return _look(graph, node.negated)


def _stay(bits: int, _: _Text) -> int:
    return bits


def _word(chars: str, back: bool) -> _Step:
    def step(bits: int, text: _Text) -> int:
        for char in reversed(chars) if back else chars:
            places = text.chars.get(char, 0)
            bits = bits >> 1 & places if back else (bits & places) << 1
            if not bits:
                break
        return bits

    return step


def _passing(test: Test, text: _Text) -> int:
    if test not in text.known:
        text.known[test] = sum(places for char, places in text.chars.items() if test(char))
    return text.known[test]


def _one(test: Test, back: bool) -> _Step:
    def step(bits: int, text: _Text) -> int:
        places = _passing(test, text)
        return bits >> 1 & places if back else (bits & places) << 1

    return step


def _flood(test: Test, back: bool) -> _Step:
    """Any number of such characters: distances are doubled until they reach across the name."""

    def step(bits: int, text: _Text) -> int:
        places, distance = _passing(test, text) << (not back), 1
        while places:
            bits |= places & (bits >> distance if back else bits << distance)
            places &= places >> distance if back else places << distance
            distance *= 2
        return bits

    return step


def _place(place: str, text: _Text) -> int:
    end = 1 << len(text.name)
    if place in "^A":
        return 1
    if place in "$Z":
        return end | (end >> 1 if place == "$" and text.name.endswith("\n") else 0)
    words = _passing(KINDS["w"], text)
    boundaries = words ^ words << 1
    return boundaries if place == "b" else (text.everywhere & ~boundaries if text.name else 0)


def _look(graph: _Graph, negated: bool) -> _Step:
    def step(bits: int, text: _Text) -> int:
        if graph not in text.known:
            text.known[graph] = _reached(graph, text.everywhere, text)
        return bits & ~text.known[graph] if negated else bits & text.known[graph]

    return step


def _reached(graph: _Graph, start: int, text: _Text) -> int:
    """Where a match may end that begins at one of these positions."""
    reached, fresh, queue = defaultdict[int, int](int, {0: start}), defaultdict[int, int](int, {0: start}), [0]
    while queue:
        state = heappop(queue)
        bits, fresh[state] = fresh[state], 0
        text.steps += len(graph.edges[state])
        if text.steps > _MOST_STEPS:
            raise _TooLong
        for step, target in graph.edges[state]:
            new = step(bits, text) & ~reached[target]
            if new:
                if not fresh[target]:
                    heappush(queue, target)
                reached[target] |= new
                fresh[target] |= new
    return reached[graph.final]


@lru_cache(maxsize=16384)
def _compiled(pattern: str) -> _Graph:
    return _Graph(parse(pattern), True, pattern)
