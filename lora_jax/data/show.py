"""`show`: an example as text, with what is trained on marked, so that a person sees it before hours are spent."""

import os
import sys
from itertools import groupby

import numpy as np

from lora_jax.data.example import Example
from lora_jax.report.tables import escaped
from lora_jax.report.terminal import is_terminal
from lora_jax.text import Tokenizer

_ON, _OFF = "\x1b[1;32m", "\x1b[0m"


def runs(example: Example, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The text of an example in parts, and whether each is trained on."""
    parts, end, before = [], 0, ""
    for trained, group in groupby(example.trained.tolist()):
        begin, end = end, end + len(list(group))
        whole = tokenizer.decode(example.tokens[:end], skip_special=False)
        # Half of a character, which is whole with the next token, is not what the longer text begins with.
        alone = tokenizer.decode(example.tokens[begin:end], skip_special=False)
        parts.append((whole[len(before) :] if whole.startswith(before) else alone, bool(trained)))
        before = whole
    return parts


def marked(example: Example, tokenizer: Tokenizer, colours: bool = False) -> str:
    r"""The text of an example, with what is trained on in `[` and `]`, or in colour; control bytes are spelled out.

    Args:
      example: of `encode`.
      tokenizer: that it was encoded with.
      colours: for a terminal: green and bold instead of brackets.

    Example:
      >>> from lora_jax.text import byte_tokenizer
      >>> tokens = np.array(byte_tokenizer().encode("\x1byes"), np.int32)
      >>> print(marked(Example(tokens, np.arange(4) > 0, 1), byte_tokenizer()))
      \x1b[yes]
    """
    begin, end = (_ON, _OFF) if colours else ("[", "]")
    parts = []
    for text, trained in runs(example, tokenizer):
        shown = "\n".join(map(escaped, text.split("\n")))
        parts.append(f"{begin}{shown}{end}" if trained else shown)
    return "".join(parts)


def show(example: Example, tokenizer: Tokenizer) -> None:
    """Print an example with what is trained on marked: in colour on a terminal, in brackets elsewhere.

    Args:
      example: of `encode`; of a pair, one of both.
      tokenizer: that it was encoded with.

    Example:
      >>> from lora_jax.text import byte_tokenizer
      >>> tokens = np.array(byte_tokenizer().encode("1+1=2"), np.int32)
      >>> show(Example(tokens, np.arange(5) > 3, line=1), byte_tokenizer())
      Line 1, 5 tokens, of which the 1 in [brackets] is trained on:
        1+1=[2]
    """
    colours = is_terminal(sys.stdout) and not os.environ.get("NO_COLOR")
    count, trained = int(np.sum(example.trained)), "in green" if colours else "in [brackets]"
    said = f", of which the {count:,} {trained} {'is' if count == 1 else 'are'} trained on" if example.label < 0 else ""
    print(f"Line {example.line}, {len(example):,} tokens{said}:")
    print("\n".join(f"  {line}".rstrip() for line in marked(example, tokenizer, colours).split("\n")), flush=True)
