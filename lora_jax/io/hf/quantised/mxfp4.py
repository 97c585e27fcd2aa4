"""The experts of gpt-oss in mxfp4: 32 numbers of 4 bits along the inputs, and the exponent of their scale."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp

from lora_jax.io.hf.quantised.packed import Packed, Tensors, array, misfit, of_parts
from lora_jax.io.hf.quantised.whole_numbers import unpacked
from lora_jax.io.hf.tensors import FLOATS, Tensor
from lora_jax.quantised.leaf import Quantised

_BYTES = 16
"""Of a block: two numbers share one, the first in its lower half."""


def mxfp4(where: Any, said: Mapping[str, Any], tensors: dict[str, Tensor], dtype: str) -> Tensors:
    """The tensors of a directory, with those of each weight as one.

    Raises:
      CheckpointError: tensors are missing or do not fit together.
    """
    return of_parts(tensors, ("_blocks", "_scales"), "", partial(_experts, where, dtype))


def _experts(where: Any, dtype: str, name: str, parts: list[Tensor | None]) -> Packed:
    """Experts `(in, out)`, whose codes are `(out, in)`."""
    codes, scale = parts
    if codes is None or scale is None or not _fit(codes, scale):
        raise misfit(where, name, blocks=codes, scales=scale)
    count, outputs, groups, _ = codes.shape
    trailing = (2 * _BYTES * groups, outputs)

    def read() -> Quantised:
        each, powers = unpacked(array(codes), 4).astype(jnp.int4), array(scale).view(jnp.float8_e8m0fnu)
        return Quantised(
            each.reshape(count, -1), powers.reshape(count, -1), format="mxfp4",
            dtype=FLOATS[dtype], block=2 * _BYTES, trailing=trailing, transposed=True,
        )  # fmt: skip

    return Packed(name, dtype, (count, *trailing), read)


def _fit(codes: Tensor, scale: Tensor) -> bool:
    bytes = codes.dtype == scale.dtype == "U8"
    return bytes and len(codes.shape) == 4 and codes.shape[-1] == _BYTES and scale.shape == codes.shape[:-1]
