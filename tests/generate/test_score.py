"""Scores: what the logits of each example alone say, whatever is scored together."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import random_adapter

pytest.importorskip("tokenizers")

from talking_models import talking_directory

import lora_jax as lora
from lora_jax import models
from lora_jax.data.example import Example
from lora_jax.generate.adapters import model_sites
from lora_jax.generate.score import score


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> models.Model:
    return models.load(talking_directory(tmp_path_factory.mktemp("models") / "tiny"))


def logits(model: models.Model, params: Any, tokens: np.ndarray) -> np.ndarray:
    padded = jnp.zeros((1, 96), jnp.int32).at[0, : len(tokens)].set(tokens)
    return np.asarray(_apply(model.apply, params, padded))[0, : len(tokens)]


_apply = jax.jit(lambda apply, params, tokens: apply(params, tokens), static_argnums=0)


def examples(model: models.Model, params: Any) -> list[Example]:
    """Of several lengths; the third is what the model itself would say."""
    draw, found = np.random.default_rng(0), []
    for number, length in enumerate((5, 40, 12, 7, 80)):
        tokens = draw.integers(0, 256, length).astype(np.int32)
        trained = np.arange(length) >= length // 2
        if number == 2:
            for place in range(length // 2, length):
                tokens[place] = logits(model, params, tokens[:place])[-1].argmax()
        found.append(Example(tokens, trained, number))
    return found


def expected(model: models.Model, params: Any, given: list[Example]) -> tuple[float, float, float]:
    losses, right, exact = [], [], []
    for each in given:
        found, targets = logits(model, params, each.tokens)[:-1], each.tokens[1:]
        mine = np.asarray(optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(found), jnp.asarray(targets)))
        correct = (found.argmax(-1) == targets)[each.trained[1:]]
        losses += mine[each.trained[1:]].tolist()
        right += correct.tolist()
        exact.append(correct.all())
    return float(np.mean(losses)), float(np.mean(right)), float(np.mean(exact))


@pytest.mark.parametrize("adapted", [False, True])
def test_scores_are_those_of_each_example_alone(model: models.Model, adapted: bool) -> None:
    adapter = random_adapter(model_sites(model)) if adapted else None
    params = lora.merge(model.params, adapter) if adapter else model.params
    given, told = examples(model, params), []
    found = score(model, given, adapter, batch=2, progress=lambda done, loss: told.append((done, loss)))
    loss, accuracy, exact = expected(model, params, given)
    assert found.loss == pytest.approx(loss, rel=1e-5) and found.perplexity == pytest.approx(np.exp(loss), rel=1e-4)
    assert (found.accuracy, found.exact) == (pytest.approx(accuracy), exact) and found.exact >= 1 / 5
    assert (found.examples, found.tokens) == (5, sum(int(each.trained.sum()) for each in given))
    assert [done for done, _ in told] == [2, 4, 5] and told[-1][1] == found.loss


def test_a_loss_too_large_for_its_exponential_is_infinite() -> None:
    from lora_jax.generate.score import Score

    assert Score(1, 1, 800.0, 0.0, 0.0).perplexity == float("inf")
