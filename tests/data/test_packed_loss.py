"""Packed rows in a model: the losses of examples that share rows are those of each alone."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from tiny_models import tiny_directory

from lora_jax.data import Batch, Batches, EncodeCounts, Example, Examples
from lora_jax.models import load
from lora_jax.models.loss import token_losses

WORDS = 61


@pytest.mark.parametrize("family", ["gpt2", pytest.param("qwen2", marks=pytest.mark.full)])
def test_packed_and_padded_rows_have_the_same_losses(tmp_path: Path, family: str) -> None:
    model = load(tiny_directory(tmp_path / family, family))
    draw = np.random.default_rng(0)
    items = [
        Example(draw.integers(WORDS, size=n).astype(np.int32), np.arange(n) > n // 2, n) for n in (3, 9, 5, 14, 7, 2)
    ]
    examples = Examples("text", tuple(items), EncodeCounts("a"))

    @jax.jit
    def losses(tokens: jax.Array, trained: jax.Array, segments: jax.Array, positions: jax.Array) -> jax.Array:
        hidden = model.hidden(model.params, tokens, positions=positions, segments=segments)
        head = lambda states: model.head(model.params, states)  # noqa: E731
        return token_losses(head, hidden[:, :-1], tokens[:, 1:], trained[:, 1:]).loss

    def by_token(batches: Batches) -> dict[int, list[float]]:
        """The losses of each example, by its length."""
        found = {}
        for batch in batches:
            assert isinstance(batch, Batch)
            values = np.asarray(losses(*map(jnp.asarray, batch)))
            for row, segments in enumerate(batch.segments):
                for number in range(1, segments.max() + 1):
                    inside = segments[1:] == number
                    found[int((segments == number).sum())] = values[row][inside & batch.trained[row, 1:]].tolist()
        return found

    packed = by_token(Batches(examples, batch=2, length=16))
    alone = by_token(Batches(examples, batch=3, length=16, packed=False))
    assert sorted(packed) == sorted(alone) == [2, 3, 5, 7, 9, 14]
    for length, values in alone.items():
        assert len(values) == length - 1 - length // 2
        assert_close(np.float32(packed[length]), np.float32(values))
