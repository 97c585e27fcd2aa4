"""Models for classes as a run takes them: what is trained of a head, and which class has which number."""

from typing import Any

from lora_jax.data.records import Records
from lora_jax.errors import LoraError
from lora_jax.models.classes import class_names
from lora_jax.models.encoder_config import EncoderConfig


class ClassesError(LoraError, ValueError):
    """A model that does not do what a task needs."""


def trained_with(model: Any, base: Any) -> tuple[str, ...]:
    """What is trained in full beside the factors: the head, and what the base has not.

    Args:
      model: of `lora_jax.models.classes.with_classes`.
      base: what it was made of.
    """
    if not isinstance(model.config, EncoderConfig):
        return ("score",)
    return ("classifier", "pooler") if model.config.pooler and not base.config.pooler else ("classifier",)


def numbered(model: Any, records: Records) -> tuple[str, ...] | None:
    """The names of the model's classes, if those of the data are among them: their numbers are then the model's."""
    names = class_names(model)
    return names if {str(record.values.get("label")) for record in records} <= {*names} else None


def check_continues(model: Any) -> None:
    """Refuse a model that cannot continue texts.

    Raises:
      ClassesError: it is an encoder, or has a head for classes.
    """
    if not model.continues:
        raise ClassesError(f"{model.directory} is {model.what}, which continues no texts: --task classify trains it")
