"""Directories in the packed formats of GPTQ, AWQ, compressed-tensors and gpt-oss, and the numbers they stand for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

Tensors = dict[str, Any]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
FP4 = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def kernels(tensors: Tensors) -> list[str]:
    return [name for name, tensor in tensors.items() if name.endswith("proj.weight") and tensor.ndim == 2]


def written(config: dict[str, Any], path: Path, stored: Tensors, said: dict[str, Any]) -> Path:
    """A directory with these tensors, whose config says how they are quantised."""
    path.mkdir()
    whole = {"dtype": "float32"} | config | {"quantization_config": said}
    (path / "config.json").write_text(json.dumps(whole))
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in stored.items()}, path / "model.safetensors")
    return path


def words(codes: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """Unsigned codes in words along the last axis, the first of each in its lowest bits."""
    count = 32 // bits
    padded = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % count)])
    parts = padded.reshape(*codes.shape[:-1], -1, count).astype(np.uint32)
    found = np.zeros(parts.shape[:-1], np.uint32)
    for place, which in enumerate(order or range(count)):
        found |= parts[..., which] << np.uint32(bits * place)
    return found.view(np.int32)


def in_groups(
    value: np.ndarray, bits: int, group_of: np.ndarray, shifted: bool, seed: int = 0, dtype: Any = np.float16
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Codes `[out, in]`, scales and zero points `[out, groups]` of a kernel, and its numbers."""
    draw, count, middle = np.random.default_rng(seed), int(group_of.max()) + 1, 1 << (bits - 1)
    scale = (np.abs(value).max() / middle * draw.uniform(0.5, 1, (len(value), count))).astype(dtype)
    zero = draw.integers(1, 2 * middle, scale.shape) if shifted else np.full(scale.shape, middle)
    wide, zeros = scale.astype(np.float32)[:, group_of], zero[:, group_of]
    codes = np.clip(np.round(value / wide) + zeros, 0, 2 * middle - 1).astype(np.int32)
    numbers = (codes - zeros).astype(np.float32) * wide
    return codes, scale, zero, numbers


def groups(inputs: int, block: int, shuffled: bool = False) -> np.ndarray:
    """The group of each input."""
    found = np.arange(inputs, dtype=np.int32) // (block if block > 0 else inputs)
    return np.random.default_rng(1).permutation(found) if shuffled else found


def each_kernel(
    tensors: Tensors, pack: Callable[[str, np.ndarray], tuple[Tensors, np.ndarray]]
) -> tuple[Tensors, Tensors]:
    """The tensors with every kernel packed, and with the numbers of every kernel."""
    stored, numbers = dict(tensors), dict(tensors)
    for name in kernels(tensors):
        parts, numbers[name] = pack(name.removesuffix(".weight"), stored.pop(name))
        stored |= parts
    return stored, numbers


def gptq(
    tensors: Tensors, bits: int = 4, block: int = 32, *, shifted: bool = False, added: int = 1, shuffled: bool = False,
    said: bool = True, dtype: Any = np.float16,
) -> tuple[Tensors, Tensors]:  # fmt: skip
    def pack(module: str, value: np.ndarray) -> tuple[Tensors, np.ndarray]:
        group_of = groups(value.shape[1], block, shuffled)
        codes, scale, zero, numbers = in_groups(value, bits, group_of, shifted, dtype=dtype)
        parts = {
            f"{module}.qweight": words(codes, bits).T, f"{module}.scales": scale.T,
            f"{module}.qzeros": words((zero.T - added) % (1 << bits), bits),
        }  # fmt: skip
        return parts | ({f"{module}.g_idx": group_of} if said else {}), numbers

    return each_kernel(tensors, pack)


def awq(tensors: Tensors, block: int = 32) -> tuple[Tensors, Tensors]:
    def pack(module: str, value: np.ndarray) -> tuple[Tensors, np.ndarray]:
        codes, scale, zero, numbers = in_groups(value, 4, groups(value.shape[1], block), True)
        parts = {"qweight": words(codes.T, 4, AWQ_ORDER), "qzeros": words(zero.T, 4, AWQ_ORDER), "scales": scale.T}
        return {f"{module}.{part}": each for part, each in parts.items()}, numbers

    return each_kernel(tensors, pack)


def packed(
    tensors: Tensors, bits: int = 4, block: int = 32, *, shifted: bool = False, shuffled: bool = False,
    dtype: Any = np.float16,
) -> tuple[Tensors, Tensors]:  # fmt: skip
    """As compressed-tensors does it."""

    def pack(module: str, value: np.ndarray) -> tuple[Tensors, np.ndarray]:
        group_of = groups(value.shape[1], block, shuffled)
        codes, scale, zero, numbers = in_groups(value, bits, group_of, shifted, dtype=dtype)
        parts = {"packed": words(codes, bits), "scale": scale, "shape": np.int64(value.shape)}
        parts |= {"zero_point": words(zero.T, bits).T} if shifted else {}
        parts |= {"g_idx": group_of} if shuffled else {}
        return {f"{module}.weight_{part}": each for part, each in parts.items()}, numbers

    return each_kernel(tensors, pack)


def mxfp4(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Experts of gpt-oss, `[experts, in, out]`, as its own directories have them."""
    stored, numbers, draw = dict(tensors), dict(tensors), np.random.default_rng(2)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        count, inputs, outputs = stored.pop(name).shape
        codes = draw.integers(0, 16, (count, outputs, inputs // 32, 16, 2), np.uint8)
        powers = draw.integers(118, 126, codes.shape[:3], np.uint8)
        stored |= {f"{name}_blocks": codes[..., 0] | codes[..., 1] << 4, f"{name}_scales": powers}
        values = FP4[codes] * np.exp2(powers.astype(np.float32) - 127)[..., None, None]
        numbers[name] = values.reshape(count, outputs, inputs).swapaxes(1, 2)
    return stored, numbers
