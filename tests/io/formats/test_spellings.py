"""The same factors under the keys of kohya, ComfyUI, diffusers, loralib and PEFT are the same adapter."""

from pathlib import Path

import numpy as np
import pytest
from helpers import assert_same
from two_blocks import FACTORS, alphas, base, check, factors, load, written

import lora_jax as lora
from lora_jax.io.formats.spellings import respelled
from lora_jax.io.peft import merge_checkpoint, read_peft

SPELLINGS = {
    "PEFT": ("lora_A.weight", "lora_B.weight"),
    "PEFT, live": ("lora_A.default.weight", "lora_B.default.weight"),
    "kohya": ("lora_down.weight", "lora_up.weight"),
    "diffusers": ("lora.down.weight", "lora.up.weight"),
    "diffusers, text": ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    "loralib": ("lora_A", "lora_B"),
}


@pytest.mark.parametrize("keys", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_spellings_are_one_adapter(keys: tuple[str, str], prefix: str, tmp_path: Path) -> None:
    rename = lambda name: prefix + name  # noqa: E731
    path = written(tmp_path / "x.safetensors", factors(*keys, rename) | alphas(np.float32(3), rename))
    check(load(path), 1.5)
    assert_same(load(path), load(written(tmp_path / "peft", factors() | alphas(np.float32(3)))))
    bare = written(tmp_path / "bare", factors(*keys, rename))
    assert_same(load(bare, alpha=3), load(path))
    merge_checkpoint(base(tmp_path / "base"), path, tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "module"),
    [
        ("unet.attn1.processor.to_q_lora.down.weight", "unet.attn1.to_q"),
        ("unet.attn1.processor.to_out_lora.down.weight", "unet.attn1.to_out.0"),
        ("attn.processor.add_k_proj_lora.down.weight", "attn.add_k_proj"),
        ("text_encoder.layers.0.self_attn.to_out_lora.down.weight", "text_encoder.layers.0.self_attn.out_proj"),
        ("text_encoder.layers.0.self_attn.to_q_lora.down.weight", "text_encoder.layers.0.self_attn.q_proj"),
        ("q.lora_linear_layer.down.weight", "q"),
        ("lora_unet_mid_block_to_q.lora_down.weight", "lora_unet_mid_block_to_q"),
    ],
)
def test_modules_of_keys(key: str, module: str) -> None:
    a, b = np.ones((2, 3)), np.ones((4, 2))
    assert set(respelled("x", {key: a, key.replace("down", "up"): b}).arrays) == {
        f"{module}.lora_A.weight", f"{module}.lora_B.weight",
    }  # fmt: skip


def test_convolutions_of_locon(tmp_path: Path) -> None:
    tensors = {"conv.lora_down.weight": np.ones((2, 3, 3, 3)), "conv.lora_up.weight": np.ones((4, 2, 1, 1))}
    files = read_peft(written(tmp_path / "x", tensors | {"conv.alpha": np.float32(1)}))
    assert (files.modules["conv"].kind, files.scale("conv")) == ("conv", 0.5)


def test_tables_of_loralib(tmp_path: Path) -> None:
    files = read_peft(written(tmp_path / "x", {"wte.lora_A": np.ones((2, 9)), "wte.lora_B": np.ones((4, 2))}), alpha=2)
    assert files.modules["wte"].kind == "embedding" and files.delta("wte", (9, 4)).shape == (9, 4)


def test_factors_without_their_other_half(tmp_path: Path) -> None:
    tensors = factors("lora_down.weight", "lora_up.weight")
    del tensors["blocks.0.ff.out.lora_up.weight"]
    with pytest.raises(lora.CheckpointError, match=r"blocks.0.ff.out.lora_B.weight is missing"):
        read_peft(written(tmp_path / "x", tensors), alpha=2)


def test_one_module_under_two_spellings(tmp_path: Path) -> None:
    tensors = factors() | factors("lora_down.weight", "lora_up.weight")
    with pytest.raises(lora.CheckpointError, match="and another key mean the same tensor"):
        read_peft(written(tmp_path / "x", tensors), alpha=2)


def test_factors_that_hold_nothing(tmp_path: Path) -> None:
    name = next(iter(FACTORS))
    for key in ("lora.down.weight", "lora_down.weight", "lora_A"):
        with pytest.raises(lora.CheckpointError, match=r"so it holds nothing|must share the rank"):
            read_peft(written(tmp_path / "x", {f"{name}.{key}": np.ones((0, 4))}), alpha=2)
