"""`with_classes`: a model that tells classes apart, with a new head where it has none; and what classes are called."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.errors import ConfigError
from lora_jax.models.encoder_config import ENCODERS, EncoderConfig, encoder_leaves
from lora_jax.models.load import Model
from lora_jax.models.tensors import decoder_leaves
from lora_jax.quantised.leaf import is_quantised

_DEVIATION = 0.02
_OTHER_HEADS = re.compile(r"(For\w+|LMHeadModel|Model)?$")
_UNNAMED = re.compile(r"LABEL_\d+")


def with_classes(model: Model, names: Sequence[str], *, seed: int = 0) -> Model:
    """The model itself if it has a head for as many classes, or the same with a new one, to be trained in full.

    The new head is the one that `AutoModelForSequenceClassification` makes, with its names and its spread of random
    numbers: `score` of a decoder, on the last token of each text, and `classifier` of an encoder, with the layer on the
    first token where BERT has none. PEFT's task_type `SEQ_CLS` takes both.

    Args:
      model: of `load`.
      names: of the classes, in the order of their numbers.
      seed: of a new head.

    Raises:
      ConfigError: the model has a head for another number of classes.

    Example:
      >>> import numpy as np
      >>> from lora_jax.models import initial
      >>> sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
      >>> model = initial({"model_type": "llama", "vocab_size": 9, **sizes})
      >>> tokens = np.zeros((3, 5), np.int32)
      >>> model = with_classes(model, ["no", "yes"])
      >>> model.apply(model.params, tokens).shape, class_names(model)
      ((3, 2), ('no', 'yes'))
    """
    found = model.config.labels
    if found not in (0, len(names)):
        raise ConfigError(
            f"{model.directory} has a head for {found} classes, and the data have {len(names)}: save it as "
            f"AutoModelForSequenceClassification.from_pretrained(..., num_labels={len(names)}) does"
        )
    return model if found else _with_new_head(model, names, seed)


def class_names(model: Model) -> tuple[str, ...]:
    """What the classes are called, by their numbers; empty without a head, or where nobody gave them names."""
    names = model.source.get("id2label")
    if not model.config.labels or not isinstance(names, Mapping):
        return ()
    found = tuple(str(names[number]) for number in sorted(names, key=int))
    return () if any(_UNNAMED.fullmatch(name) for name in found) else found


def class_logits(model: Model, params: Any, tokens: jax.Array, segments: jax.Array) -> jax.Array:
    """Logits of classes `[batch, labels]` of a decoder or an encoder; segments are 0 for padding."""
    if isinstance(model.config, EncoderConfig):
        return model.apply(params, tokens, mask=segments)
    return model.apply(params, tokens, segments=segments)


def _with_new_head(model: Model, names: Sequence[str], seed: int) -> Model:
    config: Any = replace(model.config, labels=len(names))
    if isinstance(config, EncoderConfig):
        root = ENCODERS[config.family]
        config = replace(config, root=root, pooler=root == "bert")
        params, leaves = {root: {**model.params}}, encoder_leaves(config)
    else:
        root = config.modules.root.partition(".")[0]
        params, leaves = {root: model.params[root]}, decoder_leaves(config)
    pooled = "pooler" in params[root]
    new = [leaf.path for leaf in leaves if leaf.path[0] != root or (leaf.path[1] == "pooler" and not pooled)]
    shapes = {leaf.path: leaf.shape for leaf in leaves}
    for key, path in zip(jax.random.split(jax.random.key(seed), len(new)), new, strict=True):
        inner: dict[str, Any] = params
        for part in path[:-1]:
            inner = inner.setdefault(part, {})
        inner[path[-1]] = _drawn(key, path, shapes[path], model.params)
    changed = model.changed(config, params, _source(model, names))
    return replace(changed, beside={}) if isinstance(config, EncoderConfig) else changed


def _drawn(key: jax.Array, path: Sequence[str], shape: tuple[int, ...], like: Any) -> jax.Array:
    """A new tensor, in the dtype of the others and with a copy on each of their devices."""
    other: Any = jax.tree.leaves(like, is_leaf=is_quantised)[0]
    value = jnp.zeros(shape) if path[-1] == "bias" else _DEVIATION * jax.random.normal(key, shape)
    value = value.astype(other.dtype)
    if not isinstance(other.sharding, NamedSharding):
        return value
    host = np.asarray(value)
    return jax.make_array_from_callback(shape, NamedSharding(other.sharding.mesh, PartitionSpec()), lambda at: host[at])


def _source(model: Model, names: Sequence[str]) -> Mapping[str, Any]:
    """What the `config.json` of the model with its classes says."""
    given = model.source.get("architectures") or [str(model.source["model_type"]).title()]
    return {
        **model.source,
        "architectures": [_OTHER_HEADS.sub("", str(given[0])) + "ForSequenceClassification"],
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }
