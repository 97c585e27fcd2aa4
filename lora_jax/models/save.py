"""`models.save`: a model as a Hugging Face directory, with the files beside its weights as they were."""

import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.errors import CheckpointError, ParameterError
from lora_jax.io.hf.folder import CONFIG, INDEX, SINGLE, dump, open_checkpoint
from lora_jax.io.hf.tensors import FLOATS, Item, bytes_of, opened, write_file
from lora_jax.models.config import DecoderConfig
from lora_jax.models.encoder_config import EncoderConfig, encoder_leaves
from lora_jax.models.load import Model
from lora_jax.models.pack import check_packable, packed_config, packed_items
from lora_jax.models.tensors import Leaf, decoder_leaves
from lora_jax.processes import gathered, written_by_the_first
from lora_jax.publish import place, publish
from lora_jax.quantise import dequantise
from lora_jax.quantised.leaf import Quantised, is_quantised

SHARD_BYTES = 5_000_000_000
"""The most bytes of one file, unless one tensor alone is larger: what transformers takes too."""


def save(
    directory: str | PathLike[str],
    model: Model,
    params: Mapping[str, Any] | None = None,
    *,
    codes: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a directory that transformers loads: the model's config and tokenizer as they were read, and its weights.

    The directory is written beside its place and appears at once and whole. Weights are written one tensor at a time.
    Quantised parameters are written as the numbers that their codes stand for, unless `codes` is set.
    In a program of several processes all call it, and the first one writes: it holds what is spread over them whole.

    Args:
      directory: the place.
      model: as `load` gives it.
      params: other parameters of the same model, such as merged ones; the model's own by default.
      codes: write parameters in nf4 as bitsandbytes does, which transformers and PEFT load.
      overwrite: replace a model that is there. Files that the new one does not have stay.

    Raises:
      CheckpointError: something is there, or the files beside the weights are no longer where the model was read.
      ParameterError: the parameters are not those of this model.

    Example:
      >>> save("merged", model, lora.merge(model.params, adapter))  # doctest: +SKIP
    """
    where = place(directory)
    if where.resolve().is_relative_to(model.directory.resolve()):
        raise CheckpointError(f"{where} is inside of the model that it would be a copy of. Choose another directory.")
    # A GGUF file has nothing beside it: its tokenizer is written as Hugging Face's files.
    beside_weights = () if model.directory.is_file() else open_checkpoint(model.directory, quantised=True).others
    given = model.params if params is None else params
    given = given if codes else dequantise(given)
    shards = _shards(list(_items(model, given)))
    config = {**_config(model.source, shards.values()), **_said(model.config, given)}

    def write(beside: Path) -> None:
        for file in beside_weights:
            target = beside / file
            target.parent.mkdir(parents=True, exist_ok=True)
            with opened(model.directory / file) as given, target.open("xb") as copy:
                shutil.copyfileobj(given, copy)
        if model.directory.is_file() and model.tokenizer is not None:
            model.tokenizer.save(beside)
        dump(beside / CONFIG, config)
        _write(beside, shards)

    replace = (lambda there: _check_replaceable(there, shards)) if overwrite else None
    written_by_the_first(where, lambda: publish(where, write, replace=replace))


def _check_replaceable(where: Path, new: Collection[str]) -> None:
    """Let a model be replaced by one with the same files of weights: others would be left beside them."""
    weights = {file.name for file in where.glob("*.safetensors*")} if where.is_dir() else set()
    if not weights or not (where / CONFIG).is_file():
        raise CheckpointError(f"{where} exists and is no model, so it is left alone. Choose another path.")
    if other := sorted(weights.difference({*new, INDEX} if len(new) > 1 else new)):
        raise CheckpointError(f"{where} holds {other[0]}, which would stay beside the new model. Choose another path.")


def _items(model: Model, params: Mapping[str, Any]) -> Iterator[Item]:
    """Every tensor to be written; nothing is fetched from its device yet but what is spread over several processes."""
    leaves = _leaves(model.config, params)
    names = {dtype: name for name, dtype in FLOATS.items()}
    for leaf in leaves:
        array = _found(leaf, params)
        if isinstance(array, Quantised):
            for index, name in leaf.members():
                yield from packed_items(name, jax.tree.map(lambda part, index=index: gathered(part)[index], array))
            continue
        if array.dtype not in names:
            raise ParameterError(f"{'/'.join(leaf.path)} is {array.dtype}; a directory holds {', '.join(FLOATS)}")
        size = int(np.prod(leaf.shape, dtype=np.int64)) * array.dtype.itemsize
        whole = gathered(array)
        here = whole if jax.process_index() == 0 else None
        for index, name in leaf.members():
            yield Item(name, names[array.dtype], leaf.shape, size, _pieces(here, index))
    for name, each in model.beside.items():
        yield Item(name, each.dtype, each.shape, each.nbytes, each.pieces())


def _said(config: DecoderConfig | EncoderConfig, params: Mapping[str, Any]) -> dict[str, Any]:
    """What the config says of codes, where there are any."""
    found = {leaf: _found(leaf, params) for leaf in _leaves(config, params)}
    small = {leaf: value for leaf, value in found.items() if isinstance(value, Quantised)}
    for leaf, value in small.items():
        check_packable("/".join(leaf.path), value)
    plain = [leaf.path[-2] for leaf in found if leaf not in small and len(leaf.shape) > 1 and len(leaf.path) > 1]
    return {"quantization_config": packed_config(small.values(), plain)} if small else {}


def _leaves(config: DecoderConfig | EncoderConfig, params: Mapping[str, Any]) -> list[Leaf]:
    """What the parameters should be, stacked or one by one, whichever they are."""
    leaves_of: Any = encoder_leaves if isinstance(config, EncoderConfig) else decoder_leaves
    given = {
        tuple(key.key for key in path)
        for path, _ in jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantised)[0]
    }
    forms: list[list[Leaf]] = [leaves_of(config, unrolled=unrolled) for unrolled in (False, True)]
    leaves = max(forms, key=lambda form: len(given & {leaf.path for leaf in form}))
    if unknown := sorted("/".join(path) for path in given - {leaf.path for leaf in leaves}):
        raise ParameterError(f"{unknown[0]!r} is no parameter of this model, so the directory would not be it")
    return leaves


def _found(leaf: Leaf, params: Any) -> Any:
    path = "/".join(leaf.path)
    for part in leaf.path:
        if not isinstance(params, Mapping) or part not in params:
            raise ParameterError(f"{path!r} is missing from the parameters")
        params = params[part]
    if jnp.shape(params) != leaf.whole:
        raise ParameterError(f"{path!r} has shape {jnp.shape(params)}, and this model's is {leaf.whole}")
    return params


def _pieces(array: Any, index: tuple[int, ...]) -> Iterator[memoryview]:
    """The bytes of one tensor of a stack."""
    yield bytes_of(array[index] if index else array)


def _config(source: Mapping[str, Any], shards: Iterable[list[Item]]) -> Mapping[str, Any]:
    """The config as it was read, but for the dtype where that is another now: transformers would round to it."""
    dtypes = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    kept = [item for items in shards for item in items if not item.name.endswith((".absmax", ".quant_map"))]
    found = {dtypes[item.dtype] for item in kept if item.dtype in dtypes}
    names = [name for name in ("dtype", "torch_dtype") if name in source] or ["dtype"]
    return source if len(found) > 1 else {**source, **dict.fromkeys(names, found.pop())}


def _shards(items: list[Item]) -> dict[str, list[Item]]:
    """What each file holds."""
    found: list[list[Item]] = [[]]
    for item in items:
        if found[-1] and sum(each.nbytes for each in found[-1]) + item.nbytes > SHARD_BYTES:
            found.append([])
        found[-1].append(item)
    if len(found) == 1:
        return {SINGLE: found[0]}
    return {f"model-{1 + place:05}-of-{len(found):05}.safetensors": each for place, each in enumerate(found)}


def _write(folder: Path, shards: Mapping[str, list[Item]]) -> None:
    for name, items in shards.items():
        write_file(folder / name, {"format": "pt"}, items, lambda count: None)
    if len(shards) > 1:
        weights = {item.name: name for name, items in shards.items() for item in items}
        total = sum(item.nbytes for items in shards.values() for item in items)
        dump(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))})
