"""Batches as arrays: rows of packed examples, rows with a class, and pairs of rows."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_jax.data.example import Example, Pair


class Batch(NamedTuple):
    """Rows of tokens.

    Attributes:
      tokens: `[rows, time]`, int32; 0 where there is none.
      trained: `[rows, time]`, bool: this token is a target, to be predicted from the tokens of its segment before it.
      segments: `[rows, time]`, int32: the number of the example in its row, from 1; 0 where there is none.
      positions: `[rows, time]`, int32: the number of the token in its example, from 0.

    Example:
      >>> text_rows([[Example(np.array([7, 8], np.int32), np.array([False, True]), 1)]], 4).trained
      array([[False,  True, False, False]])
    """

    tokens: NDArray[np.int32]
    trained: NDArray[np.bool_]
    segments: NDArray[np.int32]
    positions: NDArray[np.int32]


class LabelBatch(NamedTuple):
    """Texts and their classes.

    Attributes:
      tokens: `[rows, time]`, int32; 0 where there is none.
      segments: `[rows, time]`, int32: 1 for tokens of the text, 0 where there is none.
      positions: `[rows, time]`, int32: the number of the token.
      labels: `[rows]`, int32: the number of the class; -1 for a row that is empty, as the last batch may have.

    Example:
      >>> label_rows([[Example(np.array([7], np.int32), np.array([False]), 1, label=3)], []], 4).labels
      array([ 3, -1], dtype=int32)
    """

    tokens: NDArray[np.int32]
    segments: NDArray[np.int32]
    positions: NDArray[np.int32]
    labels: NDArray[np.int32]


class PairBatch(NamedTuple):
    """Chosen and rejected answers: row by row to the same prompt.

    Attributes:
      chosen: the better ones.
      rejected: the others.

    Example:
      >>> better, other = (Example(np.array([7, n], np.int32), np.array([False, True]), 1) for n in (8, 9))
      >>> pair_rows([[Pair(better, other)]], 3).rejected.tokens
      array([[7, 9, 0]], dtype=int32)
    """

    chosen: Batch
    rejected: Batch


def text_rows(rows: Sequence[Sequence[Example]], length: int) -> Batch:
    """Write examples into rows, one after the other.

    Args:
      rows: the examples of each; empty rows are all padding.
      length: of a row.

    Example:
      >>> one = Example(np.array([7, 8], np.int32), np.array([False, True]), 1)
      >>> text_rows([[one, one]], 5).segments, text_rows([[one, one]], 5).positions
      (array([[1, 1, 2, 2, 0]], dtype=int32), array([[0, 1, 0, 1, 0]], dtype=int32))
    """
    shape = len(rows), length
    tokens, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
    batch = Batch(tokens, np.zeros(shape, np.bool_), segments, positions)
    for row, examples in enumerate(rows):
        begin = 0
        for number, example in enumerate(examples, 1):
            place = row, slice(begin, begin + len(example))
            batch.tokens[place], batch.trained[place] = example.tokens, example.trained
            batch.segments[place], batch.positions[place] = number, np.arange(len(example))
            begin += len(example)
    return batch


def label_rows(rows: Sequence[Sequence[Example]], length: int) -> LabelBatch:
    """Write a text into each row, and its class beside it."""
    tokens, _, segments, positions = text_rows(rows, length)
    labels = np.array([examples[0].label if examples else -1 for examples in rows], np.int32)
    return LabelBatch(tokens, segments, positions, labels)


def pair_rows(rows: Sequence[Sequence[Pair]], length: int) -> PairBatch:
    """Write the two answers of each pair into rows of the same number."""
    chosen = [[pair.chosen for pair in pairs] for pairs in rows]
    rejected = [[pair.rejected for pair in pairs] for pairs in rows]
    return PairBatch(text_rows(chosen, length), text_rows(rejected, length))
