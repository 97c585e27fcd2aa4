"""A model for classes: a decoder with a new head on the last token of each text, or an encoder that has one."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.errors import LoraError
from lora_jax.models.encoder_config import EncoderConfig

HEAD = "score"
"""What transformers calls the head of a decoder for classes."""
_DEVIATION = 0.02


class ClassesError(LoraError, ValueError):
    """A model whose classes are not those of the data."""


def classifier(model: Any, labels: int, seed: int = 0) -> Any:
    """A model whose `apply(params, tokens, segments)` gives logits `[batch, labels]`.

    A decoder gets a head `score` with random numbers, as `AutoModelForSequenceClassification` makes one; it is to be
    trained in full. An encoder must have a classifier for as many classes.

    Args:
      model: of `lora_jax.models`.
      labels: how many classes there are.
      seed: of the head.

    Raises:
      ClassesError: an encoder has no classifier, or one for other classes.
    """
    if _is_encoder(model):
        found = model.config.labels
        if found != labels:
            has = f"a classifier for {found} classes" if found else "no classifier"
            raise ClassesError(
                f"{model.directory} has {has}, and the data have {labels}: save it as "
                f"AutoModelForSequenceClassification.from_pretrained(..., num_labels={labels}) does"
            )
        return replace(model, apply=lambda params, tokens, segments: encoded(model, params, tokens, segments))
    width = jax.eval_shape(model.hidden, model.params, jax.ShapeDtypeStruct((1, 8), np.int32)).shape[-1]
    draw = _DEVIATION * jax.random.normal(jax.random.key(seed), (labels, width))
    params = {**model.params, HEAD: {"weight": draw}}
    return replace(model, params=params, apply=lambda params, tokens, segments: last(model, params, tokens, segments))


def encoded(model: Any, params: Any, tokens: jax.Array, segments: jax.Array) -> jax.Array:
    """Logits of an encoder."""
    return model.apply(params, tokens, mask=segments)


def last(model: Any, params: Any, tokens: jax.Array, segments: jax.Array) -> jax.Array:
    """Logits of the last token of each text."""
    hidden = model.hidden(params, tokens, segments=segments)
    at = jnp.maximum((segments > 0).sum(1) - 1, 0)
    pooled = jnp.take_along_axis(hidden, at[:, None, None], 1)[:, 0]
    return pooled.astype(jnp.float32) @ params[HEAD]["weight"].T


def trained_with(model: Any) -> tuple[str, ...]:
    """What is trained in full beside the factors: the head."""
    return ("classifier",) if _is_encoder(model) else (HEAD,)


def check_continues(model: Any) -> None:
    """Refuse a model that cannot continue texts.

    Raises:
      ClassesError: it is an encoder.
    """
    if _is_encoder(model):
        raise ClassesError(f"{model.directory} is an encoder, which continues no texts: --task classify trains it")


def _is_encoder(model: Any) -> bool:
    return isinstance(model.config, EncoderConfig)
