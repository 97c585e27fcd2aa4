"""`Batches`: the batch of a step, as a function of examples, seed and step alone."""

from collections.abc import Iterator
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_jax.data.errors import DataError
from lora_jax.data.example import Example, Examples, Pair, texts_of
from lora_jax.data.pack import pack, shuffled
from lora_jax.data.rows import Batch, LabelBatch, PairBatch, label_rows, pair_rows, text_rows

_ROUND = 64


class Batches:
    """The batches of a run, by step.

    Batch number `step` depends on nothing but the arguments and the step, so that a run that is resumed sees what an
    undisturbed one sees. All batches have one shape. Of an epoch every example is in exactly one batch; the last one is
    filled up with empty rows.

    Texts share rows, with their segments and positions; classes and preferences have a row each.

    Args:
      examples: of `encode`.
      batch: rows of a batch, over all processes.
      length: tokens of a row, not less than those of any example; by default of the longest, rounded up to 64, and
        where texts share rows at least 1,024.
      seed: of the orders of examples; None for the order that they have, as for evaluation.
      packed: whether texts share rows.
      process: this process's number and the number of processes, each of which gets as many rows of every batch.

    Attributes:
      steps_per_epoch: batches in which every example is once.
      length: tokens of a row.
      fill: share of the places in the rows of an epoch that hold tokens.
      trained: how many tokens are trained on in each row of an epoch (of a pair in both), the most first.

    Raises:
      DataError: an example is longer than the rows, or the rows do not divide among the processes.

    Example:
      >>> import numpy as np
      >>> from lora_jax.data import EncodeCounts
      >>> texts = [Example(np.full(n, n, np.int32), np.arange(n) > 0, n) for n in (3, 4, 5)]
      >>> batches = Batches(Examples("text", tuple(texts), EncodeCounts("a.jsonl")), batch=2, length=8)
      >>> batches.steps_per_epoch, batches[0].tokens.shape
      (1, (2, 8))
      >>> bool((batches[7].tokens == batches[7].tokens).all())
      True
    """

    def __init__(
        self,
        examples: Examples,
        *,
        batch: int,
        length: int | None = None,
        seed: int | None = 0,
        packed: bool = True,
        process: tuple[int, int] = (0, 1),
    ):
        index, count = process
        if batch < 1 or batch % count or not 0 <= index < count:
            raise DataError(
                f"batches of {batch} rows for process {index} of {count}: there must be rows, as many for each "
                "process, and processes are numbered from 0"
            )
        sizes = [_size(each) for each in examples]
        shared = packed and examples.kind not in ("label", "preference")
        longest = -(-max(sizes) // _ROUND) * _ROUND
        self.length = length or (max(longest, 1024) if shared else longest)
        if max(sizes) > self.length:
            raise DataError(
                f"an example of {max(sizes)} tokens does not fit into rows of {self.length}: encode with "
                f"Options(length={self.length}), or make longer rows"
            )
        self._examples, self._seed, self._batch = examples, seed, batch
        self._slice = slice(index * (batch // count), (index + 1) * (batch // count))
        self._rows = pack(sizes, self.length, seed) if shared else [[i] for i in range(len(sizes))]
        self.steps_per_epoch = -(-len(self._rows) // batch)
        self.fill = sum(sizes) / (len(self._rows) * self.length)
        self._order = lru_cache(maxsize=2)(self._ordered)

    @cached_property
    def trained(self) -> NDArray[np.int64]:
        """How many tokens are trained on in each row of an epoch, the most first."""
        targets = [sum(int(each.trained.sum()) for each in texts_of(item)) for item in self._examples]
        return np.sort([sum(targets[i] for i in row) for row in self._rows])[::-1]

    def lines(self, step: int) -> tuple[int, ...]:
        """Numbers of the lines of the file that the examples of a step are from, those of all processes."""
        found = {each.line for row in self._whole(step) for i in row for each in texts_of(self._examples[i])}
        return tuple(sorted(found))

    def _ordered(self, epoch: int) -> list[list[int]]:
        return shuffled(self._rows, self._seed, epoch)

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __getitem__(self, step: int) -> Any:
        """The batch of a step: a `Batch`, a `LabelBatch` or a `PairBatch`, as the examples are."""
        rows = self._whole(step)
        rows = [*rows, *[[]] * (self._batch - len(rows))][self._slice]
        write = {"label": label_rows, "preference": pair_rows}.get(self._examples.kind, text_rows)
        return write([[self._examples[i] for i in row] for row in rows], self.length)

    def _whole(self, step: int) -> list[list[int]]:
        """The rows of a step that are not empty, of all processes."""
        if step < 0:
            raise DataError(f"step {step}: steps are numbered from 0")
        epoch, place = divmod(step, self.steps_per_epoch)
        return self._order(epoch)[place * self._batch : (place + 1) * self._batch]

    def __iter__(self) -> Iterator[Batch | LabelBatch | PairBatch]:
        """The batches of the first epoch."""
        return (self[step] for step in range(self.steps_per_epoch))


def _size(item: Example | Pair) -> int:
    return max(map(len, texts_of(item)))
