"""Parameters in codes as bitsandbytes stores them, for transformers and PEFT to load."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from lora_jax.errors import ParameterError
from lora_jax.io.hf.tensors import Item, bytes_of
from lora_jax.quantised.formats import FORMATS
from lora_jax.quantised.leaf import Quantised

_FORMATS = ("nf4", "fp4")


def check_packable(path: str, leaf: Quantised) -> None:
    """Refuse codes that bitsandbytes has no tensors for.

    Raises:
      ParameterError: they are.
    """
    if leaf.format not in _FORMATS:
        raise ParameterError(
            f"{path} is {leaf.format}, and directories hold codes of {' and '.join(_FORMATS)} only: quantise the base "
            "with nf4, or save its numbers, with codes=False"
        )


def packed_items(name: str, leaf: Quantised) -> Iterator[Item]:
    """The tensors of one weight: codes, the scale of every block, the levels, and what they are."""
    facts = {"quant_type": leaf.format, "blocksize": leaf.block, "dtype": leaf.dtype.name, "shape": list(leaf.shape)}
    levels = np.asarray(FORMATS[leaf.format].levels, np.float32)
    said = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    codes = np.asarray(leaf.codes).astype(np.uint8).reshape(-1, 2) & 15
    yield _item(name, "U8", (len(codes), 1), codes[:, 0] << 4 | codes[:, 1])
    yield _item(f"{name}.absmax", "F32", (leaf.scale.size,), leaf.scales())
    yield _item(f"{name}.quant_map", "F32", levels.shape, levels)
    yield _item(f"{name}.quant_state.bitsandbytes__{leaf.format}", "U8", said.shape, said)


def packed_config(leaves: Iterable[Quantised], plain: Iterable[str]) -> dict[str, Any]:
    """What `config.json` says of it.

    Args:
      leaves: the quantised parameters.
      plain: names of the modules that are not quantised.
    """
    first = next(iter(leaves))
    return {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False,
        "bnb_4bit_quant_type": first.format, "bnb_4bit_use_double_quant": False, "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": first.dtype.name, "llm_int8_skip_modules": sorted({*plain}),
    }  # fmt: skip


def _item(name: str, dtype: str, shape: tuple[int, ...], value: Any) -> Item:
    size = int(np.prod(shape)) * (4 if dtype == "F32" else 1)
    return Item(name, dtype, shape, size, _bytes(value))


def _bytes(value: Any) -> Iterator[memoryview]:
    yield bytes_of(value)
