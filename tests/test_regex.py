"""Regular expressions without backtracking agree with `re`, and none takes long."""

import gc
import random
import re
import time

import pytest

from lora_jax import regex
from lora_jax.errors import ConfigError

ATOMS = [
    "a",
    "b",
    ".",
    r"\.",
    "ab",
    "c",
    "[ab]",
    "[^a]",
    "[a-c]",
    r"\d",
    r"\w",
    r"\s",
    r"[\d_]",
    r"[^\w.]",
    "_",
    "1",
    "^",
    "$",
    r"\b",
    r"\B",
    r"\Z",
    r"\A",
    r"\S",
    r"\D",
    r"\W",
    "-",
    "[-a]",
    "[]a]",
    "\n",
    r"\n",
    r"\x61",
    r"\u00e9",
    "{",
    "}",
    "]",
    "é",
]
OFTEN = ["*", "+", "?", "{2}", "{1,}", "{,2}", "{0,3}", "{,}", "*?", "+?", "??", "{1,2}?"]
pytestmark = pytest.mark.filterwarnings("ignore:Possible (nested set|set):FutureWarning")


def pattern(draw: random.Random, depth: int) -> str:
    """A random pattern; not each is a valid one."""

    def inner() -> str:
        return pattern(draw, depth - 1)

    open_ = draw.choice(["(", "(?:", f"(?P<n{draw.randrange(10**9)}>"])
    kinds = {
        "atom": lambda: draw.choice(ATOMS),
        "sequence": lambda: inner() + inner(),
        "choice": lambda: f"{open_}{inner()}|{inner()})",
        "repeated": lambda: f"{open_}{inner()}){draw.choice(OFTEN)}",
        "look": lambda: f"({draw.choice(['?=', '?!', '?<=', '?<!'])}{inner()})",
    }
    kind = draw.choices(list(kinds), [35, 25, 13, 17, 10])[0] if depth else "atom"
    return kinds[kind]()


def test_it_agrees_with_re(pytestconfig: pytest.Config) -> None:
    draw, compared, matched = random.Random(0), 0, 0
    while compared < (1_000_000 if pytestconfig.getoption("full") else 30_000):
        text = pattern(draw, draw.randrange(1, 5))
        try:
            expected = re.compile(text)
        except re.error:
            with pytest.raises(ConfigError):
                regex.check(text)
            continue
        for _ in range(12):
            name = "".join(draw.choice("aaabbc..1_\n é-{") for _ in range(draw.randrange(9)))
            found = expected.fullmatch(name) is not None
            assert regex.fullmatch(text, name) == found, (text, name)
            compared, matched = compared + 1, matched + found
    assert matched > compared / 50


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (r".*\.(q_proj|v_proj)", "layers.0.attn.q_proj"),
        (r"^(?!.*visual).*(?:q_proj|k_proj)$", "model.layers.11.k_proj"),
        (
            r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q|up_proj).*?)|(?:layers\.[\d]{1,}\.(?:(?:q|k)))",
            "layers.7.k",
        ),
        (r"^(language_model(?=\.).*\.(up_proj|o_proj))$", "language_model.layers.0.up_proj"),
        (r"(?<!visual\.)layers\.(1[0-9]|2[0-3])\..*", "layers.23.mlp"),
        (r"layers\.\(?0\)*\.q", "layers.0.q"),
    ],
)
def test_idioms_of_real_files(text: str, name: str) -> None:
    for given in (name, f"visual.{name}", name[:-1]):
        assert regex.fullmatch(text, given) == bool(re.fullmatch(text, given))
    assert regex.fullmatch(text, name)


EVIL = [
    "(a+)+",
    "(a|a)*",
    "(a|aa)+",
    "((a*)b?){2,}",
    "(a{1,9})*",
    "(?:a|aa)+",
    "([)a]+)+",
    "(a*)*",
    "(a*a*a*)*",
    "(.*.*)*x",
    "(.*)*(.*)*(.*)*y",
    ".*.*.*.*.*.*.*.*.*x",
    "(a?){60}a{60}",
    "a?" * 60 + "a" * 60,
    "(a{1,30}){1,30}",
    "(((a*)*)*)*c",
    "(?=(a+)+$)a*",
    "(?!(a+)+c)(a+)+",
    "((a|b)*|(b|a)*)*c",
    "(a|b|ab)*(c|d)",
    r"(\w+\.?)+x",
    r"(\w+)*\.",
    r"([a-z]+)*\d",
    "^(([a-z])+.)+[A-Z]([a-z])+$",
    "(?:x?x?x?a)*b{2}",
    "(((a*b?)*c?)*d?)*e",
    "(.{0,40}){0,40}c",
    "(?<=a)(a+)+(?<!b)",
]


@pytest.mark.parametrize("text", EVIL)
def test_patterns_that_would_take_for_ever(text: str) -> None:
    """As little as 20 ms on an idle machine; what would hang takes a lifetime."""
    for name in ("a" * 60 + "b", "ab" * 30, "a" * 200, "layers.0." * 8 + "q"):
        gc.disable()  # a collection that falls into the match looks at all that the other tests have left
        started = time.thread_time()
        regex.fullmatch(text, name)
        taken = time.thread_time() - started
        gc.enable()
        assert taken < 0.1


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (r"(a)\1", "a back-reference"),
        ("(?P<n>a)(?P=n)", "a back-reference"),
        ("(a)?(?(1)b|c)", "a condition"),
        ("(?i)a", "a flag"),
        ("(?i:a)", "a flag"),
        ("(?#note)a", "a comment"),
        (r"\N{DASH}", "a character by its name|not a"),
        ("((((q{9}){9}){9}){9}){9}", "repeats too much"),
        ("(){5000}", "repeats too much"),
        ("a{99999999999}", "not a regular"),
        ("(" * 70 + ")" * 70, "more than 64 deep"),
        ("(" * 20_000, "not a regular"),
        ("a" * 70_000, "at most 65536"),
        ("*", "nothing to repeat"),
        ("a**", "multiple repeat"),
        ("(?<=a*)b", "fixed-width"),
    ],
)
def test_what_is_refused(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        regex.check(text)


def test_names_that_are_none() -> None:
    with pytest.raises(ConfigError, match="too long to be a parameter's"):
        regex.fullmatch("a*", "a" * 5000)
    with pytest.raises(ConfigError, match="takes too long"):
        regex.fullmatch(f"(?:{'|'.join(f'x{i}' for i in range(900))}|a)*", "a" * 4000)
