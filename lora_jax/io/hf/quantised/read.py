"""`packed_tensors`: the tensors of a quantised directory, with those of each weight as one."""

from collections.abc import Mapping
from typing import Any

from lora_jax.io.hf.quantised.awq import awq
from lora_jax.io.hf.quantised.bitsandbytes import bitsandbytes
from lora_jax.io.hf.quantised.compressed import compressed
from lora_jax.io.hf.quantised.gptq import gptq
from lora_jax.io.hf.quantised.mxfp4 import mxfp4
from lora_jax.io.hf.quantised.packed import FLOAT_NAMES, Tensors, refuse
from lora_jax.io.hf.quantised.scaled import tiles
from lora_jax.io.hf.tensors import Tensor

_READERS = {
    "bitsandbytes": bitsandbytes, "fp8": tiles, "compressed-tensors": compressed, "gptq": gptq, "awq": awq,
    "mxfp4": mxfp4,
}  # fmt: skip


def packed_tensors(where: Any, said: Any, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensors:
    """The tensors of a directory, with those that make up a quantised weight as one.

    Read are bitsandbytes in 4 bits (nf4 and fp4, double quantisation too) and in 8 bits, GPTQ in 4 and 8 bits, AWQ in
    4 bits, mxfp4 as gpt-oss has it, fp8 in blocks (DeepSeek), and what compressed-tensors stores as whole float8 or
    int8 tensors, or packs in 4 or 8 bits.

    Args:
      where: the directory, for errors.
      said: its `quantization_config`.
      config: the rest of its `config.json`.
      tensors: its tensors by name.

    Raises:
      CheckpointError: the directory is quantised in another way, or tensors are missing or do not fit together.
    """
    facts = said if isinstance(said, Mapping) else {"quant_method": said}
    method = facts.get("quant_method")
    if method is None and ("load_in_4bit" in facts or "load_in_8bit" in facts):
        method = "bitsandbytes"
    reader = _READERS.get(str(method))
    if reader is None:
        refuse(where, f"quant_method={method!r}")
    return reader(where, facts, dict(tensors), _own_dtype(config))


def _own_dtype(config: Mapping[str, Any]) -> str:
    """The dtype of the numbers, by its name in files."""
    given = config.get("dtype") or config.get("torch_dtype")
    return FLOAT_NAMES.get(str(given).removeprefix("torch."), "BF16")
