"""Directories of GPTQ, AWQ, compressed-tensors' packed tensors and gpt-oss's mxfp4: the numbers are those of the files."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from packed_directories import awq, gptq, kernels, mxfp4, packed, written
from safetensors.numpy import load_file, save_file
from tiny_models import tiny_config, tiny_tensors

import lora_jax as lora
from lora_jax import models
from lora_jax.cli import main
from lora_jax.paths import named_leaves
from lora_jax.quantised.leaf import Quantised, is_quantised

LLAMA = tiny_config("llama", hidden_size=64, intermediate_size=128, head_dim=16)
GPT_OSS = tiny_config("gpt_oss", hidden_size=64, intermediate_size=32, num_local_experts=3)
TOKENS = jnp.arange(12).reshape(2, 6)
GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
MXFP4: dict[str, Any] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


def compressed(
    bits: int = 4, block: int | None = 32, kind: str = "int", format: str = "pack-quantized"
) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "group_size": block, "strategy": "group" if block else "channel"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": groups, "ignore": ["lm_head"]}


DIRECTORIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "GPTQ": (gptq, GPTQ),
    "GPTQ with zero points": (partial(gptq, shifted=True), GPTQ | {"sym": False, "checkpoint_format": "gptq"}),
    "the second layout of GPTQ": (partial(gptq, shifted=True, added=0), GPTQ | {"checkpoint_format": "gptq_v2"}),
    "GPTQ in 8 bits": (partial(gptq, bits=8, shifted=True), GPTQ | {"bits": 8}),
    "GPTQ in act-order": (partial(gptq, shuffled=True, shifted=True), GPTQ | {"desc_act": True}),
    "GPTQ in act-order and 8 bits": (partial(gptq, bits=8, shuffled=True), GPTQ | {"bits": 8, "desc_act": True}),
    "GPTQ in one group": (partial(gptq, block=-1), GPTQ | {"group_size": -1}),
    "GPTQ whose last group is cut off": (partial(gptq, block=48, said=False), GPTQ | {"group_size": 48}),
    "GPTQ with float32 scales": (partial(gptq, shifted=True, dtype=np.float32), GPTQ),
    "AWQ": (awq, AWQ),
    "AWQ in one group": (partial(awq, block=-1), AWQ | {"group_size": -1}),
    "packed": (packed, compressed()),
    "packed with zero points": (partial(packed, shifted=True), compressed()),
    "packed by channel": (partial(packed, block=-1), compressed(block=None)),
    "packed in 8 bits": (partial(packed, bits=8, shifted=True), compressed(8)),
    "packed in act-order": (partial(packed, shuffled=True), compressed()),
    "packed with float32 scales": (partial(packed, shifted=True, dtype=np.float32), compressed()),
    "mxfp4": (mxfp4, MXFP4),
}  # fmt: skip


def both(name: str, path: Path, **options: Any) -> tuple[models.Model, models.Model]:
    """The model of a packed directory, and that of its numbers."""
    pack, said = DIRECTORIES[name]
    config = GPT_OSS if pack is mxfp4 else LLAMA
    stored, numbers = pack(tiny_tensors(config))
    plain = path / "plain"
    plain.mkdir()
    (plain / "config.json").write_text(json.dumps(config))
    save_file({each: np.ascontiguousarray(tensor) for each, tensor in numbers.items()}, plain / "model.safetensors")
    directory = written(config, path / "packed", stored, said)
    return models.load(directory, **options), models.load(plain, **options)


@pytest.mark.parametrize("name", DIRECTORIES)
def test_numbers_are_those_of_the_files(name: str, tmp_path: Path) -> None:
    model, plain = both(name, tmp_path)
    found, expected = named_leaves(model.params)[0], named_leaves(plain.params)[0]
    assert sum(map(is_quantised, found.values())) == (2 if name == "mxfp4" else 7)
    for path, leaf in found.items():
        np.testing.assert_array_equal(np.asarray(lora.dequantise(leaf)), np.asarray(expected[path]), path)
        assert leaf.shape == expected[path].shape and leaf.dtype == expected[path].dtype


@pytest.mark.parametrize("name", ["GPTQ in act-order", "AWQ", "mxfp4"])
@pytest.mark.parametrize("unrolled", [False, True])
def test_an_adapter_trains_beside_them(name: str, unrolled: bool, tmp_path: Path) -> None:
    model, plain = both(name, tmp_path, unrolled=unrolled)
    sites = lora.find_sites(model.apply, model.params, TOKENS)
    assert sites == lora.find_sites(plain.apply, plain.params, TOKENS)
    adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets="all-linear"), model.params, sites)
    run = lora.adapt(model.apply)
    loss = lambda adapter, params: jnp.square(run(params, adapter, TOKENS) - 1).mean()  # noqa: E731
    value, gradient = jax.jit(jax.value_and_grad(loss))(adapter, model.params)
    expected, other = jax.jit(jax.value_and_grad(loss))(adapter, plain.params)
    assert_close(value, expected)
    assert_close(gradient, other)


@pytest.mark.parametrize("name", ["GPTQ in act-order", "packed", "mxfp4"])
def test_on_a_mesh_codes_lie_where_the_numbers_would(name: str, tmp_path: Path) -> None:
    model, plain = both(name, tmp_path, mesh=jax.make_mesh((2, 2), ("fsdp", "tensor")))
    first = lambda leaf: (-1 if leaf.transposed else len(leaf.leading), *range(len(leaf.leading)))  # noqa: E731
    for path, leaf in named_leaves(model.params)[0].items():
        where = named_leaves(plain.params)[0][path].sharding
        if isinstance(leaf, Quantised):
            spec = (*where.spec, *[None] * (leaf.ndim - len(where.spec)))
            axes = first(leaf)
            assert [leaf.sharding.spec[axis] for axis in axes] == [spec[axis] for axis in axes]
            assert any(leaf.sharding.spec)
    logits = jax.jit(model.apply)(model.params, TOKENS)
    assert_close(np.asarray(logits), np.asarray(jax.jit(plain.apply)(plain.params, TOKENS)))


def test_layers_may_have_different_bits(tmp_path: Path) -> None:
    tensors = tiny_tensors(LLAMA)
    first = {name: each for name, each in tensors.items() if name.startswith("model.layers.0.")}
    stored, numbers = gptq({name: each for name, each in tensors.items() if name not in first})
    wide, of_the_first = gptq(first, bits=8)
    rule = {"+:model\\.layers\\.0\\..*": {"bits": 8}}
    directory = written(LLAMA, tmp_path / "model", stored | wide, GPTQ | {"dynamic": rule})
    with pytest.raises(lora.CheckpointError, match=r"are quantised in different ways: load .* unrolled=True"):
        models.load(directory)
    found, _ = named_leaves(models.load(directory, unrolled=True).params)
    assert {leaf.format for leaf in found.values() if isinstance(leaf, Quantised)} == {"int4", "int8"}
    for path, leaf in found.items():
        expected = (numbers | of_the_first)[path.replace("/", ".")]
        np.testing.assert_array_equal(np.asarray(lora.dequantise(leaf)), expected)


def test_experts_in_codes_take_their_bytes(tmp_path: Path) -> None:
    model, plain = both("mxfp4", tmp_path)
    leaf = model.params["model"]["layers"]["mlp"]["experts"]["gate_up_proj"]
    assert repr(leaf) == "Quantised(mxfp4, float32[4,3,64,64])"
    assert leaf.nbytes == leaf.size * (4 + 8 / 32) / 8
    assert_close(model.apply(model.params, TOKENS), plain.apply(plain.params, TOKENS))


def test_leaves_are_quantised_again_in_their_own_layout(tmp_path: Path) -> None:
    leaf = both("mxfp4", tmp_path)[0].params["model"]["layers"]["mlp"]["experts"]["down_proj"]
    value = jax.random.normal(jax.random.key(0), leaf.shape)
    inputs_last = np.asarray(value).swapaxes(2, 3).reshape(-1, 32)
    again = np.asarray(leaf.like(value).dense()).swapaxes(2, 3).reshape(-1, 32)
    assert (np.abs(again - inputs_last) <= np.abs(inputs_last).max(1, keepdims=True) / 6).all()


@pytest.mark.parametrize("name", ["GPTQ with zero points", "mxfp4"])
def test_saving_writes_numbers_and_no_codes(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, plain = both(name, tmp_path)
    models.save(tmp_path / "saved", model)
    for each, tensor in load_file(tmp_path / "saved" / "model.safetensors").items():
        np.testing.assert_array_equal(tensor, load_file(plain.directory / "model.safetensors")[each])
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    with pytest.raises(lora.ParameterError, match=r"is (int4|mxfp4), and directories hold codes of nf4 and fp4 only"):
        models.save(tmp_path / "codes", model, codes=True)
    assert main(["quantise", str(model.directory), str(tmp_path / "nf4")]) == 2
    assert "directories hold codes of nf4 and fp4 only" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (GPTQ | {"bits": 3}, r"GPTQ, bits=3, group_size=32, checkpoint_format='gptq'"),
        (GPTQ | {"bits": None}, r"GPTQ, bits=None"),
        (GPTQ | {"checkpoint_format": "marlin"}, r"checkpoint_format='marlin'"),
        (GPTQ | {"is_marlin_format": True}, r"checkpoint_format='marlin'"),
        (AWQ | {"version": "GEMV"}, r"AWQ, bits=4, group_size=32, version='gemv'"),
        (AWQ | {"bits": 8}, r"AWQ, bits=8"),
        (compressed(3), r"pack-quantized, num_bits=3, type='int', group_size=32"),
        (compressed(4, kind="float"), r"type='float'"),
        (compressed(format="nvfp4-pack-quantized"), r"format 'nvfp4-pack-quantized'"),
    ],
)
def test_other_bits_and_layouts_are_refused(said: dict[str, Any], why: str, tmp_path: Path) -> None:
    directory = written(LLAMA, tmp_path / "model", tiny_tensors(LLAMA), said)
    with pytest.raises(lora.CheckpointError, match=rf"{why}.*is not read\. Read are .* GPTQ .* --quantise nf4"):
        models.load(directory)


MODULE = "model.layers.0.self_attn.q_proj"
CUT = lambda tensor: tensor[:-1]  # noqa: E731
DAMAGE: dict[str, tuple[str, str, Any, str]] = {
    "no zero points": ("GPTQ", "qzeros", None, r"q_proj\.weight lacks its qzeros"),
    "no scales": ("AWQ", "scales", None, "lacks its scales"),
    "scales of fewer groups": ("AWQ", "scales", CUT, r"qzeros I32\[2, 8\], scales F16\[1, 64\], which do not fit"),
    "words of fewer outputs": ("GPTQ", "qweight", lambda t: t[:, :-1], "do not fit together"),
    "words of fewer inputs": ("GPTQ", "qweight", CUT, "g_idx I32.*do not fit together"),
    "words that are none": ("GPTQ", "qweight", lambda t: t.astype(np.float32), r"qweight F32.*do not fit together"),
    "zero points of other bits": ("GPTQ", "qzeros", lambda t: np.repeat(t, 2, 1), r"do not fit together"),
    "zero points of bits that are not read": ("GPTQ", "qzeros", lambda t: t[:, ::4], r"GPTQ of 1 bits"),
    "a group that is not there": ("GPTQ", "g_idx", lambda t: t + 1, "groups 1 to 2, and 2 scales"),
    "groups of two sizes": ("GPTQ", "g_idx", lambda t: np.where(t == t[0], t[::-1], t), "of one size"),
    "no shape": ("packed", "weight_shape", None, "lacks its weight_shape"),
    "another shape": ("packed", "weight_shape", lambda t: t * 2, r"\[128, 128\] is of .* do not fit together"),
    "zero points of fewer rows": ("packed with zero points", "weight_zero_point", CUT, "weight_zero_point I32"),
    "scales of another group size": ("packed", "weight_scale", lambda t: np.repeat(t, 2, 1), r"4 scales .* groups of \{32\}"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name: str, tmp_path: Path) -> None:
    directory, part, change, why = DAMAGE[name]
    pack, said = DIRECTORIES[directory]
    stored, _ = pack(tiny_tensors(LLAMA))
    tensor = stored.pop(f"{MODULE}.{part}")
    stored |= {} if change is None else {f"{MODULE}.{part}": change(tensor)}
    with pytest.raises(lora.CheckpointError, match=why):
        models.load(written(LLAMA, tmp_path / "model", stored, said))


@pytest.mark.parametrize(
    ("part", "why"), [("_scales", "lacks its scales"), ("_blocks", r"lacks 1 tensors .*experts\.down_proj")]
)
def test_experts_that_lack_a_part_are_named(part: str, why: str, tmp_path: Path) -> None:
    stored, _ = mxfp4(tiny_tensors(GPT_OSS))
    del stored[f"model.layers.1.mlp.experts.down_proj{part}"]
    with pytest.raises(lora.CheckpointError, match=why):
        models.load(written(GPT_OSS, tmp_path / "model", stored, MXFP4))


@pytest.mark.parametrize("block", [9, 48])
def test_inputs_that_groups_do_not_divide(block: int, tmp_path: Path) -> None:
    """What is cut off by the end of the inputs is read; AWQ does the same."""
    stored, dense = gptq(tiny_tensors(LLAMA), block=block, said=False)
    model = models.load(written(LLAMA, tmp_path / "model", stored, GPTQ | {"group_size": block}), unrolled=True)
    found = named_leaves(lora.dequantise(model.params))[0]
    for name in kernels(dense):
        np.testing.assert_array_equal(found[name.replace(".", "/")], dense[name])
    stored, _ = gptq(tiny_tensors(LLAMA), block=32, said=False)
    with pytest.raises(lora.CheckpointError, match=r"inputs in groups 0 to 3, and 2 scales"):
        models.load(written(LLAMA, tmp_path / "other", stored, GPTQ | {"group_size": 16}))
