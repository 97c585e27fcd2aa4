"""Keys of patterns that are letters and dots only: matched directly, as the regular expressions that they are."""

import random
import re

from lora_jax.io.peft.match import exact_key, in_pattern, is_plain

LETTERS = ["a", "b", ".", r"\.", "^", "-", r"\-", "_", "0", "a*", "(a)"]


def test_as_the_regular_expression() -> None:
    """Of random keys and names; some are no plain ones, and some match."""
    draw, found, plain = random.Random(0), 0, 0
    for _ in range(5000):
        key = "".join(draw.choices(LETTERS, k=draw.randint(0, 4)))
        name = "".join(draw.choices(["a", "b", ".", "-", "_", "0", "\n"], k=draw.randint(0, 5)))
        want = re.fullmatch(rf"(.*\.)?({key})", name) is not None
        assert (in_pattern({key: 1}, name) == 1) == want, (key, name)
        plain, found = plain + is_plain(key), found + want
    assert 1000 < plain < 5000 and found > 100


def test_exact_keys_are_plain_and_exact() -> None:
    for name in ("layers.0.q", "a-b.c", "x\\y", "sp ace", "br[0]", "ü.q", "d(1)"):
        assert is_plain(exact_key(name))
        others = (f"x.{name}", name.replace(".", "_") + "_", f"{name}.x", name.upper())
        assert [in_pattern({exact_key(name): 1}, each) for each in (name, *others)] == [1, None, None, None, None]
