"""Names of wrapped models, parts of pipelines and kohya's flat names find the model's modules, or say both readings."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_same
from safetensors.numpy import load_file
from two_blocks import FACTORS, NAMES, PARAMS, RANK, SITES, WEIGHTS, alphas, base, check, draw, factors, load, written

import lora_jax as lora
from lora_jax.cli import main
from lora_jax.io.formats.resolve import resolve
from lora_jax.io.inspect import inspect
from lora_jax.io.peft import merge_checkpoint, read_peft
from lora_jax.io.peft.mlx import write_mlx

PREFIXES = [
    "", "base_model.model.", "_orig_mod.", "module.", "model.", "model.model.", "base_model.model.model.",
    "module.base_model.model.", "base_model.model._orig_mod.module.", "base_model.model.base_model.model.",
    "diffusion_model.", "unet.", "transformer.", "text_encoder.", "model.diffusion_model.", "clip_l.",
    "_orig_mod.transformer.",
]  # fmt: skip


def prefixed(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name


def flat(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name.replace(".", "_")


RENAMINGS = {name: prefixed(name) for name in PREFIXES} | {
    name: flat(name) for name in ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_transformer_", "lycoris_")
}


@pytest.mark.parametrize("rename", RENAMINGS.values(), ids=RENAMINGS)
def test_the_same_modules_under_any_name(rename: Callable[[str], str], tmp_path: Path) -> None:
    own = {f"{rename(name)}.alpha": np.float32(1 + place) for place, name in enumerate(FACTORS)}
    scales = {name: (1 + place) / RANK for place, name in enumerate(FACTORS)}
    path = written(tmp_path / "x.safetensors", factors("lora_down.weight", "lora_up.weight", rename) | own)
    check(load(path), scales)
    merge_checkpoint(base(tmp_path / "base"), path, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, (a, b) in FACTORS.items():
        np.testing.assert_allclose(merged[f"{name}.weight"], WEIGHTS[name] + scales[name] * b @ a, rtol=1e-4, atol=1e-5)
    assert {entry.scale for entry in inspect(path).entries} == set(scales.values())


def test_three_spellings_are_one_adapter(tmp_path: Path) -> None:
    names = flat("lora_unet_")
    kohya = factors("lora_down.weight", "lora_up.weight", names) | alphas(np.float32(4), names)
    diffusers = factors(rename=prefixed("unet."))
    metadata = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 4})}
    comfy = factors(rename=prefixed("diffusion_model.")) | alphas(np.float32(4), prefixed("diffusion_model."))
    one = load(written(tmp_path / "kohya.safetensors", kohya, {"ss_network_module": "networks.lora"}))
    two = load(written(tmp_path / "diffusers.safetensors", diffusers, metadata))
    three = load(written(tmp_path / "comfy.safetensors", comfy))
    check(one, 2)
    assert_same(one, two)
    assert_same(one, three)


@pytest.mark.parametrize(
    ("name", "known", "message"),
    [
        ("module.h.0.up", ["model.h.0.up", "model.model.h.0.up"], "may be model.h.0.up or model.model.h.0.up"),
        ("lora_unet_a_b_c", ["a.b_c", "a_b.c"], "may be a.b_c or a_b.c of the model"),
    ],
)
def test_two_readings_are_an_error(name: str, known: list[str], message: str) -> None:
    with pytest.raises(lora.CheckpointError, match=message):
        resolve("x", [name], known)
    assert resolve("x", [known[0]], known) == {}


def test_two_parts_of_a_pipeline_are_not_mixed_up(tmp_path: Path) -> None:
    tensors = factors(rename=prefixed("unet.")) | factors(rename=prefixed("text_encoder."))
    with pytest.raises(lora.CheckpointError, match=r"text_encoder.* and unet.* both mean blocks.0.attn.to_q"):
        load(written(tmp_path / "x", tensors), alpha=2)


def test_names_that_are_none_are_left_over(tmp_path: Path) -> None:
    tensors = {"lora_unet_up.lora_down.weight": draw(2, 6), "lora_unet_up.lora_up.weight": draw(5, 2)}
    path = written(tmp_path / "x.safetensors", tensors | alphas(np.float32(1), lambda name: "lora_unet_up"))
    with pytest.raises(lora.CheckpointError, match="kohya's names, with _ for every dot"):
        load(path)
    with pytest.raises(lora.CheckpointError, match="lora_unet_up are kohya's names"):
        merge_checkpoint(base(tmp_path / "base"), path, tmp_path / "out")
    _, left_out = lora.peft.load(path, PARAMS, SITES, NAMES, strict=False)
    assert left_out.unexpected == ("lora_unet_up",)


def test_a_config_goes_by_the_names_of_the_file(tmp_path: Path) -> None:
    patterns = {"alpha_pattern": {"^module.blocks.1.attn.to_q": 10}, "target_modules": ["to_q", "out"]}
    written(tmp_path / "adapter_model.safetensors", factors(rename=prefixed("module.")))
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **patterns}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    check(load(tmp_path), {name: 5.0 if name == "blocks.1.attn.to_q" else 2.0 for name in FACTORS})


def test_whole_tensors_move_too(tmp_path: Path) -> None:
    head = "module.blocks.0.ff.out"
    tensors = {key: value for key, value in factors(rename=prefixed("module.")).items() if not key.startswith(head)}
    whole = draw(*WEIGHTS["blocks.0.ff.out"].shape)
    written(tmp_path / "adapter_model.safetensors", tensors | {f"{head}.weight": whole})
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["to_q"], "modules_to_save": ["blocks.0.ff.out"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"exclude_modules": ["x"]}), encoding="utf-8")
    adapter, _ = lora.peft.load(tmp_path, PARAMS, SITES, NAMES, strict=False)
    found = lora.merge(PARAMS, adapter)
    np.testing.assert_array_equal(found["blocks"]["0"]["ff"]["out"]["kernel"], whole.T)


def test_compose_knows_modules_by_any_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unet, kohya = prefixed("unet."), flat("lora_unet_")
    one = written(tmp_path / "one.safetensors", factors() | alphas(np.float32(2)))
    two = written(tmp_path / "two.safetensors", factors(rename=unet) | alphas(np.float32(6), unet))
    names = factors("lora_down.weight", "lora_up.weight", kohya) | alphas(np.float32(4), kohya)
    three = written(tmp_path / "three.safetensors", names)
    assert not main(["compose", str(one), str(two), str(three), "--out", str(tmp_path / "out")])
    check(load(tmp_path / "out"), 1 + 3 + 2)
    assert main(["compose", str(three), str(three), "--out", str(tmp_path / "flat")])
    assert "--base" in capsys.readouterr().err
    with pytest.raises(lora.CheckpointError, match="has kohya's names"):
        write_mlx(tmp_path / "mlx", read_peft(three))
    given = ["--base", str(base(tmp_path / "base"))]
    assert not main(["compose", str(three), str(three), "--out", str(tmp_path / "flat"), *given])
    assert set(read_peft(tmp_path / "flat").modules) == set(FACTORS)
