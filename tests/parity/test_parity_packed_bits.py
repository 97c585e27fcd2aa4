"""Directories in packed formats: the numbers are those of transformers and of compressed-tensors, and so are logits."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from packed_directories import Tensors, kernels, mxfp4, packed, written
from tiny_models import tiny_config, tiny_tensors

from lora_jax import models
from lora_jax.paths import named_leaves
from lora_jax.quantised.leaf import Quantised

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOKENS = np.arange(24)[None]
GPT_OSS = tiny_config("gpt_oss", hidden_size=64, intermediate_size=32, num_local_experts=3)
LLAMA = tiny_config("llama", hidden_size=64, intermediate_size=128, head_dim=16)


def leaves_by_name(directory: Path, **options: Any) -> dict[str, Quantised]:
    """The quantised parameters, by the names of their tensors."""
    found, _ = named_leaves(models.load(directory, unrolled=True, **options).params)
    return {path.replace("/", "."): leaf for path, leaf in found.items() if isinstance(leaf, Quantised)}


def test_experts_of_gpt_oss_are_transformers(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    stored, _ = mxfp4(tiny_tensors(GPT_OSS))
    directory = written(GPT_OSS, tmp_path / "model", stored, {"quant_method": "mxfp4"})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, quantization_config=transformers.Mxfp4Config(dequantize=True)
    )
    small = leaves_by_name(directory)
    assert len(small) == 8
    for name, leaf in small.items():
        parts = [torch.tensor(stored[name + part]) for part in ("_blocks", "_scales")]
        for dtype in (torch.float32, torch.bfloat16):
            expected = convert_moe_packed_tensors(*parts, dtype=dtype).float().numpy()
            np.testing.assert_array_equal(np.asarray(leaf.dense()), expected)
        read = theirs.get_parameter(name).detach().float().numpy()
        np.testing.assert_array_equal(np.asarray(leaf.dense()), read)


def pack_quantized(bits: int, block: int, shifted: bool) -> dict[str, Any]:
    size: dict[str, Any] = {"group_size": block, "strategy": "group"} if block > 0 else {"strategy": "channel"}
    weights = {"num_bits": bits, "type": "int", "symmetric": not shifted} | size
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
        "quantization_status": "compressed", "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }  # fmt: skip


def decompressed(stored: Tensors, module: str, said: dict[str, Any], dtype: Any) -> np.ndarray:
    """What compressed-tensors makes of one module."""
    compressor = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    tensors = {}
    for name, each in stored.items():
        if name.startswith(f"{module}.weight_"):
            wide = each.astype(np.float32) if each.dtype.kind in "fV" else np.ascontiguousarray(each)
            tensors[name.removeprefix(f"{module}.")] = torch.tensor(wide)
    tensors["weight_scale"] = tensors["weight_scale"].to(dtype)
    scheme = quantization.QuantizationScheme(**said["config_groups"]["group_0"])
    found = compressor.PackedQuantizationCompressor.decompress(tensors, scheme)["weight"]
    assert found.dtype == dtype
    return found.float().numpy()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(
    ("bits", "block", "shifted"), [(4, 32, False), (4, 32, True), (4, -1, False), (4, -1, True), (8, 32, True)]
)
def test_packed_numbers_are_those_of_compressed_tensors(
    bits: int, block: int, shifted: bool, dtype: str, tmp_path: Path
) -> None:
    said, own = pack_quantized(bits, block, shifted), getattr(ml_dtypes, dtype, None) or np.dtype(dtype)
    stored, _ = packed(tiny_tensors(LLAMA), bits, block, shifted=shifted, dtype=own)
    directory = written(LLAMA | {"dtype": dtype}, tmp_path / "model", stored, said)
    small = leaves_by_name(directory)
    assert small.keys() == set(kernels(tiny_tensors(LLAMA)))
    for name, leaf in small.items():
        expected = decompressed(stored, name.removesuffix(".weight"), said, getattr(torch, dtype))
        np.testing.assert_array_equal(np.asarray(leaf.dense()).astype(np.float32), expected)


def test_packed_models_have_the_logits_that_they_have_in_transformers(tmp_path: Path) -> None:
    """Of those with zero points its own loading fails: it expects them as they are before they are packed."""
    pytest.importorskip("compressed_tensors")
    stored, _ = packed(tiny_tensors(LLAMA), dtype=np.float32)
    directory = written(LLAMA, tmp_path / "model", stored, pack_quantized(4, 32, False))
    model = models.load(directory)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        logits = theirs(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(model.apply(model.params, TOKENS), logits, atol=2e-5)
