"""The cache of a text that goes on: what a longer prompt has in common with it is not read again."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp

from lora_jax.models.cache import Cache

WIDTH = 32
"""Tokens that are read at once."""


class Kept(NamedTuple):
    """A cache of one text.

    Attributes:
      tokens: of the text; they stand at the end of what is filled.
      cache: of all of them.
    """

    tokens: list[int]
    cache: Cache

    def rest(self, prompt: Sequence[int], more: int) -> "Kept | None":
        """The cache as it was before the tokens that are still to be read, and those; None if it does not serve.

        As many are read that they fill whole parts of `WIDTH`: padding in between would widen windows.

        Args:
          prompt: begins as the text does.
          more: how many tokens may follow.
        """
        start = int(self.cache.filled) - len(self.tokens)
        same = next((at for at, pair in enumerate(zip(self.tokens, prompt, strict=False)) if pair[0] != pair[1]), None)
        same = min(len(self.tokens), len(prompt)) if same is None else same
        # One token at least is read, for what comes next.
        same = len(prompt) - -(-max(len(prompt) - same, 1) // WIDTH) * WIDTH
        if same <= 0 or start + len(prompt) + more > self.cache.length:
            return None
        cache = self.cache._replace(filled=jnp.int32(start + same), positions=jnp.full(1, same, jnp.int32))
        return Kept(list(prompt[same:]), cache)
