"""Sampling: what each filter leaves, by its definition in NumPy; and how often tokens are drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.errors import ConfigError
from lora_jax.generate.sampling import Sampling, kept, sample

VOCABULARY = 50


def logits(batch: int = 6) -> np.ndarray:
    return np.random.default_rng(0).normal(scale=2.0, size=(batch, VOCABULARY)).astype(np.float32)


def defined(row: np.ndarray, top_k: int, top_p: float, min_p: float) -> set[int]:
    """What is left of one row, by the words of the definition."""
    left = list(np.argsort(-row))[: top_k or None]
    shares = np.exp(row[left] - row.max())
    shares = shares / shares.sum()
    total, some = 0.0, []
    for token, share in zip(left, shares, strict=True):
        some.append(token)
        total += share
        if total >= top_p < 1:
            break
    best = max(row[some])
    return {int(token) for token in some if np.exp(row[token] - best) >= min_p}


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(0, 1.0, 0.0), (5, 1.0, 0.0), (1, 1.0, 0.0), (90, 1.0, 0.0), (0, 0.7, 0.0), (0, 1e-6, 0.0), (0, 1.0, 0.1),
     (0, 1.0, 1.0), (12, 0.8, 0.05)],
)  # fmt: skip
def test_filters_leave_what_they_are_defined_to(top_k: int, top_p: float, min_p: float) -> None:
    rows = logits()
    left = np.asarray(kept(jnp.asarray(rows), Sampling(top_k=top_k, top_p=top_p, min_p=min_p)))
    assert [set(np.flatnonzero(row)) for row in left] == [defined(row, top_k, top_p, min_p) for row in rows]


def test_temperature_0_is_the_most_probable_token() -> None:
    rows = logits()
    for key in range(3):
        chosen = sample(jax.random.key(key), jnp.asarray(rows), Sampling(top_p=0.5))
        np.testing.assert_array_equal(chosen, rows.argmax(-1))
        assert chosen.dtype == jnp.int32


def test_tokens_are_drawn_as_often_as_they_are_probable() -> None:
    row, temperature, count = logits(1)[0], 1.5, 40_000
    sampling = Sampling(temperature=temperature, top_k=4)
    drawn = np.asarray(sample(jax.random.key(0), jnp.broadcast_to(row, (count, VOCABULARY)), sampling))
    best = np.argsort(-row)[:4]
    shares = np.exp(row[best] / temperature)
    np.testing.assert_allclose([np.mean(drawn == token) for token in best], shares / shares.sum(), atol=0.01)


def test_other_numbers_need_no_other_program() -> None:
    program = jax.jit(sample)
    for sampling in (Sampling(), Sampling(temperature=0.5), Sampling(temperature=2.0, top_k=3, top_p=0.4, min_p=0.1)):
        program(jax.random.key(0), jnp.asarray(logits()), sampling)
    assert program._cache_size() == 1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"temperature": -1.0}, "temperature=-1.0"), ({"top_k": -2}, "top_k=-2"), ({"top_p": 0.0}, "top_p=0.0"),
     ({"min_p": 1.5}, "min_p=1.5"), ({"temperature": float("nan")}, "temperature=nan")],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(wrong: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Sampling(**wrong).checked()  # type: ignore[arg-type]
