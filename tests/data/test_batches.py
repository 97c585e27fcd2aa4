"""Packing and batches: every token is in an epoch once, and a batch depends on its step alone."""

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_jax.data import Batches, DataError, EncodeCounts, Example, Examples, Pair, pack
from lora_jax.data.pack import fill

LENGTH = 16
lengths = st.lists(st.integers(2, LENGTH), min_size=1, max_size=60)
seeds = st.none() | st.integers(0, 2**32)


def texts(sizes: list[int]) -> Examples:
    """Examples whose every token is another number, and which are marked at random."""
    ends = np.cumsum(sizes)
    draw = np.random.default_rng(len(sizes))
    items = [
        Example(np.arange(end - size + 1, end + 1, dtype=np.int32), draw.random(size) < 0.5, line)
        for line, (size, end) in enumerate(zip(sizes, ends.tolist(), strict=True))
    ]
    return Examples("text", tuple(items), EncodeCounts("data.jsonl"))


@given(lengths, seeds)
def test_every_example_is_in_one_row_and_no_row_is_overfull(sizes: list[int], seed: int | None) -> None:
    rows = pack(sizes, LENGTH, seed)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    assert all(0 < sum(sizes[i] for i in row) <= LENGTH for row in rows)
    assert rows == pack(sizes, LENGTH, seed)


def test_examples_of_many_windows_are_each_in_one_row() -> None:
    sizes = np.random.default_rng(0).integers(2, 300, 5000)
    rows = pack(sizes, 512)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    assert max(sizes[row].sum() for row in rows) <= 512


@pytest.mark.parametrize(("mean", "length"), [(5.0, 1024), (6.0, 2048), (5.0, 4096)])
def test_rows_are_full_and_soon_found(mean: float, length: int) -> None:
    """99.9 % and 15 µs an example here; the bound on the time leaves room for slow machines."""
    sizes = np.clip(np.random.default_rng(0).lognormal(mean, 0.9, 10_000), 4, length).astype(int)
    begin = time.process_time()
    rows = pack(sizes, length)
    assert (time.process_time() - begin) / len(sizes) < 100e-6
    assert fill(rows, sizes, length) > 0.99


def test_examples_that_fit_nowhere_take_time_in_proportion() -> None:
    sizes = np.random.default_rng(0).integers(513, 1025, 8000)
    begin = time.process_time()
    assert len(pack(sizes, 1024)) == 8000
    assert (time.process_time() - begin) / len(sizes) < 400e-6


def epoch(examples: Examples, number: int = 0, **options: Any) -> list[Any]:
    batches = Batches(examples, **options)
    return [batches[number * len(batches) + i] for i in range(len(batches))]


@given(lengths, seeds, st.integers(1, 5), st.booleans(), st.integers(0, 3))
def test_every_token_is_in_an_epoch_once(sizes: list[int], seed: int | None, batch: int, packed: bool, at: int) -> None:
    examples = texts(sizes)
    found = epoch(examples, at, batch=batch, length=LENGTH, seed=seed, packed=packed)
    tokens, trained, segments, positions = (np.concatenate(field) for field in zip(*found, strict=True))
    assert tokens.shape == (len(found) * batch, LENGTH)
    assert (tokens.dtype, trained.dtype, segments.dtype, positions.dtype) == ("int32", "bool", "int32", "int32")
    assert sorted(tokens[segments > 0].tolist()) == list(range(1, sum(sizes) + 1))
    targets = np.concatenate([each.tokens[each.trained] for each in examples])
    assert sorted(tokens[trained].tolist()) == targets.tolist()
    padding = segments == 0
    assert not (tokens[padding].any() or trained[padding].any() or positions[padding].any())
    for row in range(len(tokens)):
        check_row(examples, tokens[row], segments[row], positions[row])
    if not packed:
        assert segments.max() == 1


def check_row(examples: Examples, tokens: np.ndarray, segments: np.ndarray, positions: np.ndarray) -> None:
    """Segments are one after the other, each a whole example with positions from 0."""
    used = segments[segments > 0]
    assert segments[: len(used)].tolist() == sorted(used.tolist())
    assert sorted({*used.tolist()}) == list(range(1, segments.max() + 1))
    by_first = {int(each.tokens[0]): each for each in examples}
    for number in range(1, segments.max() + 1):
        inside = segments == number
        assert tokens[inside].tolist() == by_first[tokens[inside][0]].tokens.tolist()
        assert positions[inside].tolist() == list(range(inside.sum()))


@given(lengths, st.integers(0, 9), st.sampled_from([1, 2, 3]))
def test_processes_together_have_the_batches_of_one(sizes: list[int], step: int, count: int) -> None:
    examples = texts(sizes)
    whole = Batches(examples, batch=6, length=LENGTH)[step]
    parts = [Batches(examples, batch=6, length=LENGTH, process=(i, count))[step] for i in range(count)]
    for field, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        np.testing.assert_array_equal(field, np.concatenate(pieces))


def test_a_batch_depends_on_its_step_alone_and_epochs_differ() -> None:
    examples = texts([5] * 100)
    batches = Batches(examples, batch=4, length=LENGTH, seed=3)
    later = [batches[step] for step in reversed(range(60))][::-1]
    for step in (0, 7, len(batches), 59):
        for one, other in zip(Batches(examples, batch=4, length=LENGTH, seed=3)[step], later[step], strict=True):
            np.testing.assert_array_equal(one, other)
    assert not np.array_equal(later[0].tokens, later[len(batches)].tokens)
    assert not np.array_equal(later[0].tokens, Batches(examples, batch=4, length=LENGTH, seed=4)[0].tokens)


def test_steps_name_their_lines_and_rows_are_counted() -> None:
    examples = texts([5, 6, 16, 2])
    batches = Batches(examples, batch=2, length=LENGTH, seed=None, process=(1, 2))
    assert [batches.lines(step) for step in (0, 1, 7)] == [(0, 1, 2, 3), (), ()][:1] * 3
    assert Batches(examples, batch=1, length=LENGTH, seed=None).lines(3) == (0, 1, 3)
    whole = Batches(examples, batch=2, length=LENGTH, seed=None)[0]
    assert batches.trained.tolist() == sorted(whole.trained.sum(1).tolist(), reverse=True)


def test_without_a_seed_the_order_is_that_of_the_examples() -> None:
    found = epoch(texts([3, 4, 5]), batch=2, length=LENGTH, seed=None, packed=False)
    firsts = [int(row[0]) for batch in found for row in batch.tokens]
    assert firsts == [1, 4, 8, 0]
    assert [len(list(Batches(texts([3, 4, 5]), batch=2, seed=None, packed=False))) for _ in range(2)] == [2, 2]


def test_rows_have_the_length_of_the_longest_by_default() -> None:
    assert Batches(texts([3, 70]), batch=1, packed=False)[0].tokens.shape == (1, 128)
    assert Batches(texts([3, 70]), batch=1)[0].tokens.shape == (1, 1024)
    assert Batches(texts([3, 2000]), batch=1).length == 2048


def test_classes_have_a_row_each_and_empty_rows_none() -> None:
    items = tuple(
        Example(each.tokens, each.trained, 1, label) for each, label in zip(texts([3, 4, 5]), (2, 0, 1), strict=True)
    )
    examples = Examples("label", items, EncodeCounts("a"), ("x", "y", "z"))
    first, last = epoch(examples, batch=2, seed=None)
    assert (first.labels.tolist(), last.labels.tolist(), str(first.labels.dtype)) == ([2, 0], [1, -1], "int32")
    assert first.segments.sum(1).tolist() == [3, 4]
    shuffled = epoch(examples, batch=3)[0]
    assert sorted(zip(shuffled.labels.tolist(), shuffled.tokens[:, 0].tolist(), strict=True)) == [
        (0, 4),
        (1, 8),
        (2, 1),
    ]


def test_pairs_stay_together() -> None:
    ones, others = texts([3, 4, 5]), texts([6, 2, 9])
    pairs = tuple(Pair(one, other) for one, other in zip(ones, others, strict=True))
    (batch,) = epoch(Examples("preference", pairs, EncodeCounts("a")), batch=3)
    firsts = zip(batch.chosen.tokens[:, 0].tolist(), batch.rejected.tokens[:, 0].tolist(), strict=True)
    assert sorted(firsts) == [(1, 1), (4, 7), (8, 9)]
    batches = Batches(Examples("preference", pairs, EncodeCounts("a")), batch=1, seed=None)
    assert (batches.lines(1), batches.trained.tolist()) == (
        (1,),
        sorted((int(p.chosen.trained.sum() + p.rejected.trained.sum()) for p in pairs), reverse=True),
    )
    assert batch.chosen.tokens.shape == batch.rejected.tokens.shape == (3, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batches of 0 rows"),
        ({"batch": 3, "process": (0, 2)}, "batches of 3 rows for process 0 of 2"),
        ({"batch": 4, "process": (2, 2)}, "for process 2 of 2"),
        ({"batch": 1, "length": 4}, "an example of 9 tokens does not fit into rows of 4"),
    ],
)
def test_batches_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Batches(texts([9, 2]), **options)


def test_steps_are_not_counted_from_the_end() -> None:
    with pytest.raises(DataError, match="step -1"):
        _ = Batches(texts([9, 2]), batch=1)[-1]
