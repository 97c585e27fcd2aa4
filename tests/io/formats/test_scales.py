"""The scale of an adapter is what its config, its metadata, its alpha tensors or the caller say, and never a guess."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from two_blocks import FACTORS, RANK, alphas, base, check, factors, load, written

import lora_jax as lora
from lora_jax.cli import main
from lora_jax.io.inspect import inspect, read_factors
from lora_jax.io.peft import merge_checkpoint, read_peft, write_peft

QUERY, OUT = "blocks.1.attn.to_q", "blocks.0.ff.out"


def noted(path: Path, rename: Any = str, **fields: Any) -> Path:
    """A file with diffusers' metadata."""
    return written(path, factors(rename=rename), {"lora_adapter_metadata": json.dumps(fields)})


CONFIGS: dict[str, tuple[dict[str, Any], Any]] = {
    "plain": ({"r": 2, "lora_alpha": 16, "target_modules": ["to_q", "out"]}, 8),
    "rsLoRA": ({"r": 2, "lora_alpha": 16, "use_rslora": True}, 16 / 2**0.5),
    "PEFT's default": ({"r": 2}, 4),
    "pattern": ({"r": 2, "lora_alpha": 4, "alpha_pattern": {"1.attn.to_q": 10}},
                {name: 5.0 if name == QUERY else 2.0 for name in FACTORS}),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "scale"), CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("part", ["", "transformer"])
def test_metadata_of_diffusers(fields: dict[str, Any], scale: Any, part: str, tmp_path: Path) -> None:
    rename = (lambda name: f"{part}.{name}") if part else str
    path = noted(tmp_path / "x.safetensors", rename, **{f"{part}.{k}" if part else k: v for k, v in fields.items()})
    files = read_peft(path)
    want = scale if isinstance(scale, dict) else dict.fromkeys(FACTORS, scale)
    assert {name: pytest.approx(files.scale(rename(name))) for name in FACTORS} == want
    assert {entry.name: entry.scale for entry in inspect(path).entries} == pytest.approx(
        {rename(name): each for name, each in want.items()}
    )
    if not part:
        check(load(path), scale)


def test_metadata_for_several_parts(tmp_path: Path) -> None:
    unet, text = (lambda name: f"unet.{name}"), (lambda name: f"text_encoder.{name}")
    metadata = {"unet.r": 2, "unet.lora_alpha": 4, "text_encoder.r": 2, "text_encoder.lora_alpha": 10}
    tensors = factors(rename=unet) | factors(rename=text)
    files = read_peft(written(tmp_path / "x", tensors, {"lora_adapter_metadata": json.dumps(metadata)}))
    assert (files.scale(f"unet.{OUT}"), files.scale(f"text_encoder.{OUT}")) == (2, 5)
    del metadata["text_encoder.r"], metadata["text_encoder.lora_alpha"]
    written(tmp_path / "x", tensors, {"lora_adapter_metadata": json.dumps(metadata)})
    with pytest.raises(lora.CheckpointError, match="nothing tells what the updates of text_encoder"):
        read_peft(tmp_path / "x").check_scales()
    assert read_peft(tmp_path / "x", alpha=6).scale(f"text_encoder.{OUT}") == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "holds a list"),
        ("[" * 100_000, "is no JSON"),
        ('{"r": "2"}', "r='2' must be"),
        ('{"r": 3, "lora_alpha": 4}', "has rank 2, but"),
        ('{"unet.r": 3, "unet.lora_alpha": 4}', "has rank 2, but lora_adapter_metadata .* says 3"),
        ('{"r": 2, "lora_alpha": NaN}', "lora_alpha=nan must be"),
        ('{"r": 2, "peft_type": "LOHA"}', "peft_type='LOHA' cannot be read"),
    ],
)
def test_metadata_that_is_wrong(text: str, message: str, tmp_path: Path) -> None:
    rename = (lambda name: f"unet.{name}") if "unet" in text else str
    path = written(tmp_path / "x", factors(rename=rename), {"lora_adapter_metadata": text})
    with pytest.raises(lora.CheckpointError, match=message):
        read_peft(path)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.float64])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_alpha_tensors(dtype: Any, shape: tuple[int, ...], tmp_path: Path) -> None:
    own = {f"{name}.alpha": np.full(shape, 1 + place, dtype) for place, name in enumerate(FACTORS)}
    path = written(tmp_path / "x", factors() | own)
    scales = {name: (1 + place) / RANK for place, name in enumerate(FACTORS)}
    check(load(path), scales)
    assert {entry.name: entry.scale for entry in inspect(path).entries} == scales
    merge_checkpoint(base(tmp_path / "base"), path, tmp_path / "out")
    again = tmp_path / "peft"
    write_peft(again, read_peft(path))
    check(load(again), scales)


@pytest.mark.parametrize("alpha", [np.ones(2, np.float32), np.float32(0), np.ones((0,), np.float32), np.bool_(True)])
def test_alpha_tensors_that_are_no_number(alpha: Any, tmp_path: Path) -> None:
    with pytest.raises(lora.CheckpointError, match="must be a module's alpha: one number, and not 0"):
        read_peft(written(tmp_path / "x", factors() | alphas(alpha)))


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
@pytest.mark.parametrize("name", ["", ".default", ".style"])
def test_alpha_tensors_of_wrapped_modules(prefix: str, name: str, tmp_path: Path) -> None:
    tensors = factors(f"lora_A{name}.weight", f"lora_B{name}.weight", lambda module: prefix + module)
    check(load(written(tmp_path / "x", tensors | alphas(np.uint8(4)))), 2)


@pytest.mark.parametrize("leaf", ["scaling", "scale", "lora_alpha", "alpha.weight"])
def test_scales_under_other_names_are_no_whole_modules(leaf: str, tmp_path: Path) -> None:
    tensors = factors() | {f"{name}.{leaf}": np.float32(4) for name in FACTORS}
    for face in (inspect, load):
        with pytest.raises(lora.CheckpointError, match="are neither factors nor"):
            face(written(tmp_path / "x", tensors))


def test_an_alpha_of_no_module_is_not_lost(tmp_path: Path) -> None:
    with pytest.raises(lora.CheckpointError, match=r"neither factors .*blocks.7.alpha"):
        read_peft(written(tmp_path / "x", factors() | alphas(1.0) | {"blocks.7.alpha": np.float32(1)}))


def test_without_any_scale_alpha_is_asked_for(tmp_path: Path) -> None:
    path, out = written(tmp_path / "x.safetensors", factors()), tmp_path / "out"
    entries = inspect(path).entries
    assert all((entry.alpha, entry.scale, entry.norms[2], entry.rank) == (None, None, None, 2) for entry in entries)
    assert set(read_factors(path)[1].values()) == {"the file does not tell its scale"}
    for face in (
        lambda: load(path), lambda: merge_checkpoint(base(tmp_path / "base"), path, out),
        lambda: write_peft(out, read_peft(path)), lambda: read_peft(path).delta(OUT, (6, 5)),
    ):  # fmt: skip
        with pytest.raises(lora.CheckpointError, match=r"nothing tells .* Pass alpha="):
            face()
    check(load(path, alpha=6), 3)
    assert read_peft(path, alpha=6).delta(OUT, (6, 5)) == pytest.approx(3 * FACTORS[OUT][1] @ FACTORS[OUT][0])


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), True, "8"])
def test_alphas_that_are_no_number(alpha: Any, tmp_path: Path) -> None:
    with pytest.raises(lora.CheckpointError, match="must be a finite number"):
        load(written(tmp_path / "x", factors()), alpha=alpha)


def test_an_alpha_that_has_no_place(tmp_path: Path) -> None:
    path = written(tmp_path / "x", factors() | alphas(np.float32(4)))
    for face in (lambda: load(path, alpha=4), lambda: merge_checkpoint(base(tmp_path / "b"), path, "out", alpha=4)):
        with pytest.raises(lora.CheckpointError, match=r"tells the scales of all its modules .* Leave it out"):
            face()


def test_alpha_goes_to_modules_without_one(tmp_path: Path) -> None:
    path = written(tmp_path / "x", factors() | {f"{QUERY}.alpha": np.float32(10)})
    with pytest.raises(lora.CheckpointError, match=r"nothing tells what the updates of blocks.0"):
        load(path)
    check(load(path, alpha=4), {name: 5.0 if name == QUERY else 2.0 for name in FACTORS})


# An adapter that tells its strength twice.

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["to_q", "out"]}


@pytest.mark.parametrize(
    ("config", "alpha", "shown"),
    [
        (CONFIG, np.float32(4), None),
        ({**CONFIG, "lora_alpha": 0.1}, ml_dtypes.bfloat16(0.1), None),
        (CONFIG, np.float32(8), "adapter_config.json gives .* the scale 2, and .alpha tensors in the file 4"),
        ({**CONFIG, "use_rslora": True}, np.float32(4), "the scale 2.82843, and .alpha tensors in the file 2"),
    ],
)
def test_config_and_tensors(config: dict[str, Any], alpha: Any, shown: str | None, tmp_path: Path) -> None:
    path = written(tmp_path / "adapter_model.safetensors", factors() | alphas(alpha))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    if shown is None:
        check(load(tmp_path), config["lora_alpha"] / 2)
        return
    for face in (load, inspect, read_peft):
        with pytest.raises(lora.CheckpointError, match=shown):
            face(path)


def test_metadata_and_the_others(tmp_path: Path) -> None:
    metadata = {"lora_adapter_metadata": json.dumps({"r": 2, "lora_alpha": 16})}
    path = written(tmp_path / "adapter_model.safetensors", factors() | alphas(np.float32(4)), metadata)
    with pytest.raises(lora.CheckpointError, match=r"lora_adapter_metadata .* the scale 8, and .alpha tensors .* 2"):
        load(path)
    written(path, factors(), metadata)
    check(load(path), 8)
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    with pytest.raises(lora.CheckpointError, match=r"_config.json .* the scale 2, and lora_adapter_metadata .* 8"):
        load(path)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(base(tmp_path / "base")), str(written(tmp_path / "x.safetensors", factors()))]
    assert main(["merge", *paths, str(tmp_path / "out")]) and "--alpha" in capsys.readouterr().err
    assert not main(["merge", *paths, str(tmp_path / "out"), "--alpha", "4"])
    weights = load_file(tmp_path / "out" / "model.safetensors")
    want = load_file(tmp_path / "base" / "model.safetensors")[f"{OUT}.weight"] + 2 * FACTORS[OUT][1] @ FACTORS[OUT][0]
    np.testing.assert_allclose(weights[f"{OUT}.weight"], want, rtol=1e-5, atol=1e-6)
    both = [paths[1], paths[1], "--out", str(tmp_path / "two"), "--weights", "1", "1"]
    assert main(["compose", *both]) and "--alpha" in capsys.readouterr().err
    assert not main(["compose", *both, "--alpha", "4"])
    check(load(tmp_path / "two"), 4)
