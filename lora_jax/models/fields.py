"""The fields of a `config.json`: each is read, known to change no logits, or refused by name."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lora_jax.errors import CheckpointError, listed

# What PreTrainedConfig keeps for training, generation and its own use.
_HARMLESS = re.compile(
    r"_.*|.*dropout.*|.*pdrop|.*_token_ids?|.*_token_index|output_.*|summary_.*|unsloth_.*|transformers.*|vocab_type"
    r"|architectures|auto_map|torch_dtype|dtype|torchscript|use_bfloat16|use_cache|initializer_range|pretraining_tp"
    r"|id2label|label2id|num_labels|problem_type|task_specific_params|finetuning_task|tokenizer_class|prefix|return_dict.*"
    r"|chunk_size_feed_forward|is_encoder_decoder|pooler_.*|directionality|sentence_transformers|tie_encoder_decoder|cache_implementation|gradient_checkpointing"
    r"|router_aux_loss_coef|router_jitter_noise|reorder_and_upcast_attn|attn_implementation|is_llama_config|n_ctx"
    r"|max_length|min_length|do_sample|early_stopping|num_beams|num_beam_groups|diversity_penalty|temperature|top_k|top_p"
    r"|typical_p|.*_penalty|.*no_repeat_ngram_size|bad_words_ids|num_return_sequences|remove_invalid_values"
    r"|.*suppress_tokens|tf_legacy_loss|tokenizer|model_max_length|eos_token|bos_token|use_reentrant"
)
# Fields that nothing but their emptiness makes harmless.
_EMPTY: tuple[Any, ...] = (None, False, [], {}, "")


class Fields:
    """The fields of a config, of which it notes which were read.

    Args:
      where: the file, for errors.
      values: its content.
      inside: name of the field that holds these, where they are nested.
      spelled: names in this file of fields that have another name elsewhere.

    Example:
      >>> fields = Fields("config.json", {"hidden_size": 8, "clip_qkv": 4.0})
      >>> fields.size("hidden_size")
      8
      >>> fields.check_all_read()  # doctest: +IGNORE_EXCEPTION_DETAIL
      Traceback (most recent call last):
      CheckpointError: config.json: clip_qkv=4.0 may change the logits and is not understood here. ...
    """

    def __init__(
        self, where: Any, values: Mapping[str, Any], inside: str = "", spelled: Mapping[str, str] | None = None
    ) -> None:
        self.where = where
        self._values, self._inside, self._spelled = values, inside, spelled or {}
        self._read: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        """A field, or the default where it is missing or null."""
        name = self._spelled.get(name, name)
        self._read.add(name)
        value = self._values.get(name)
        return default if value is None else value

    def nullable(self, name: str, default: Any) -> Any:
        """A field that may be null, which means something else than that it is missing."""
        return self.get(name, None if self._spelled.get(name, name) in self._values else default)

    def first(self, names: Iterable[str], default: Any = None) -> Any:
        """The first of several spellings of a field that is there; all count as read."""
        found = [value for name in names if (value := self.get(name)) is not None]
        return found[0] if found else default

    def size(self, name: str, default: int | None = None) -> int:
        """A positive whole number.

        Raises:
          CheckpointError: it is none, or missing without a default.
        """
        value = self.get(name, default)
        if value is None or isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(name, value, "must be a positive whole number")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number.

        Raises:
          CheckpointError: it is none, or missing without a default.
        """
        value = self.get(name, default)
        if value is None or isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
            raise self.error(name, value, "must be a positive number")
        return float(value)

    def switch(self, name: str, default: bool = False) -> bool:
        """True or false.

        Raises:
          CheckpointError: it is neither.
        """
        value = self.get(name, default)
        if value not in (True, False):
            raise self.error(name, value, "must be true or false")
        return bool(value)

    def optional(self, name: str) -> float | None:
        """A positive number, or None where it is missing or null.

        Raises:
          CheckpointError: it is none.
        """
        return None if self.get(name) is None else self.number(name)

    def choice(self, name: str, value: Any, known: Collection[str]) -> str:
        """A value of a field that must be one of those that are known.

        Raises:
          CheckpointError: it is another.
        """
        if not isinstance(value, str) or value not in known:
            raise self.error(name, value, f"is not known here; there are {', '.join(known)}")
        return value

    def nested(self, name: str) -> "Fields":
        """A field that holds fields."""
        value = self.get(name)
        if not isinstance(value, Mapping):
            raise self.error(name, value, "must be an object")
        return Fields(self.where, value, self.called(name))

    def expect(self, name: str, allowed: Any, why: str) -> None:
        """Refuse a field that is there and is not `allowed`.

        Raises:
          CheckpointError: it is another.
        """
        if (value := self.get(name, allowed)) != allowed:
            raise self.error(name, value, why)

    def called(self, name: str) -> str:
        """What the file calls a field."""
        name = self._spelled.get(name, name)
        return f"{self._inside}.{name}" if self._inside else name

    def error(self, name: str, value: Any, why: str) -> CheckpointError:
        """An error about one field."""
        return CheckpointError(f"{self.where}: {self.called(name)}={value!r} {why}")

    def check_all_read(self) -> None:
        """Refuse what was not read and may change the logits.

        Raises:
          CheckpointError: there is such a field.
        """
        for name, value in self._values.items():
            if name in self._read or value in _EMPTY or (not self._inside and _HARMLESS.fullmatch(name)):
                continue
            known = listed(sorted(self._read), count=60)
            raise self.error(
                name, value, f"may change the logits and is not understood here. Fields that are understood: {known}. "
                "If it changes nothing, remove it from the file."
            )  # fmt: skip


def labels(fields: Fields) -> int:
    """How many classes a head tells apart; 0 for a model of another kind.

    Raises:
      CheckpointError: the classes have no names.

    >>> labels(Fields("", {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "a", "1": "b"}}))
    2
    """
    if "ForSequenceClassification" not in str(fields.get("architectures")):
        return 0
    names = fields.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})
    if not isinstance(names, Mapping) or not names or not all(str(each).isdecimal() for each in names):
        raise fields.error("id2label", names, "must have a name for each class")
    return len(names)
