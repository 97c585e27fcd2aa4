"""Models in few bits: quantised as they are read, and directories that are quantised already."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import packed_directories
import pytest
from helpers import assert_close
from packed_directories import kernels
from safetensors.numpy import load_file, save_file
from tiny_models import tiny_directory

import lora_jax as lora
from lora_jax import models
from lora_jax.cli import main
from lora_jax.paths import named_leaves
from lora_jax.quantised.formats import FORMATS
from lora_jax.quantised.leaf import is_quantised

WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
TOKENS = jnp.arange(12).reshape(2, 6)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("few_bits") / "model"
    tiny_directory(path, "llama", **WIDE)
    return path


def quantised_paths(model: models.Model) -> set[str]:
    return {path.rpartition(".")[0] for path, leaf in named_leaves(model.params)[0].items() if is_quantised(leaf)}


def test_kernels_of_layers_are_quantised_as_they_are_read(directory: Path) -> None:
    plain = models.load(directory)
    model = models.load(directory, quantise="nf4")
    leaves, _ = named_leaves(model.params)
    small = {path for path, leaf in leaves.items() if is_quantised(leaf)}
    assert {path.split("/")[-2] for path in small} == {
        "q_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    whole = lora.quantise(plain.params, "nf4", where=lambda path, leaf: path in small)
    for path, leaf in named_leaves(whole)[0].items():
        assert leaf.shape == leaves[path].shape
        assert_close(lora.dequantise(leaf), lora.dequantise(leaves[path]))
    logits = model.apply(model.params, TOKENS)
    assert_close(logits, plain.apply(lora.dequantise(model.params), TOKENS))
    unrolled = models.load(directory, quantise="nf4", unrolled=True)
    assert_close(unrolled.apply(unrolled.params, TOKENS), logits)
    with pytest.raises(lora.ConfigError, match="nf4, int4, int8, fp8"):
        models.load(directory, quantise="q4")  # pyright: ignore[reportArgumentType]


def test_an_adapter_trains_beside_codes_and_is_pefts(directory: Path, tmp_path: Path) -> None:
    model = models.load(directory, quantise="int8")
    sites = lora.find_sites(model.apply, model.params, TOKENS)
    assert sites == lora.find_sites(model.apply, models.load(directory).params, TOKENS)
    adapter = lora.init(
        jax.random.key(0), lora.LoraConfig(rank=2, targets=("q_proj", "down_proj")), model.params, sites
    )
    run = lora.adapt(model.apply)
    loss = lambda adapter, params: jnp.square(run(params, adapter, TOKENS) - 1).mean()  # noqa: E731
    value, gradient = jax.jit(jax.value_and_grad(loss))(adapter, model.params)
    expected, other = jax.jit(jax.value_and_grad(loss))(adapter, lora.dequantise(model.params))
    assert_close(value, expected)
    assert_close(gradient, other)
    lora.peft.save(tmp_path / "adapter", adapter, sites=sites, params=model.params)
    assert len(lora.peft.load(tmp_path / "adapter", models.load(directory).params, sites)) == 2


def test_saving_writes_the_numbers(directory: Path, tmp_path: Path) -> None:
    model = models.load(directory, quantise="int4")
    models.save(tmp_path / "saved", model)
    again = models.load(tmp_path / "saved")
    assert_close(again.apply(again.params, TOKENS), model.apply(model.params, TOKENS))
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())


def test_on_a_mesh_codes_lie_where_the_numbers_would(directory: Path) -> None:
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"))
    model, plain = (models.load(directory, quantise=how, mesh=mesh) for how in ("nf4", None))
    for path, leaf in named_leaves(model.params)[0].items():
        assert leaf.sharding.is_equivalent_to(named_leaves(plain.params)[0][path].sharding, leaf.ndim)
    alone = models.load(directory, quantise="nf4")
    assert_close(np.asarray(jax.jit(model.apply)(model.params, TOKENS)), alone.apply(alone.params, TOKENS))


def four_bits(tensors: dict[str, Any], nested: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """As bitsandbytes stores a model, and the numbers that this stands for."""
    stored, numbers = dict(tensors), dict(tensors)
    for name in kernels(tensors):
        leaf = lora.quantise({"w": tensors[name]}, "nf4", where=("w",))["w"]
        facts: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [*leaf.shape]}
        scale = np.asarray(leaf.scale).reshape(-1)
        if nested:
            levels = np.tanh(np.linspace(-2, 2, 256, dtype=np.float32)) / np.tanh(np.float32(2))
            offset, largest = scale.mean(), np.abs(scale - scale.mean()).max()
            codes = np.abs(((scale - offset) / largest)[:, None] - levels).argmin(1).astype(np.uint8)
            stored |= {f"{name}.nested_absmax": np.asarray([largest], np.float32), f"{name}.nested_quant_map": levels}
            facts |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)}
            stored[f"{name}.absmax"], scale = codes, levels[codes] * largest + np.float32(offset)
        else:
            stored[f"{name}.absmax"] = scale
        codes = np.asarray(leaf.codes).astype(np.uint8).reshape(-1) & 15
        stored[name] = (codes[0::2] << 4 | codes[1::2])[:, None]
        stored[f"{name}.quant_map"] = _levels("nf4")
        stored[f"{name}.quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
        values = _levels("nf4")[codes.reshape(-1, 64)]
        numbers[name] = (values * scale[:, None]).reshape(leaf.shape)
    return stored, numbers


def _levels(format: str) -> np.ndarray:
    return np.asarray(FORMATS[format].levels, np.float32)


def eight_bits(tensors: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    stored, numbers = dict(tensors), dict(tensors)
    for name in kernels(tensors):
        largest = np.abs(tensors[name]).max(1)
        stored[name] = np.round(tensors[name] / largest[:, None] * 127).astype(np.int8)
        stored[name.removesuffix("weight") + "SCB"] = largest
        stored[name.removesuffix("weight") + "weight_format"] = np.uint8(0)
        numbers[name] = stored[name] * largest[:, None] / np.float32(127)
    return stored, numbers


def tiles(tensors: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Float8 with a scale for every 32 by 48 numbers, which divide no side of a kernel."""
    stored, numbers = dict(tensors), dict(tensors)
    for name in kernels(tensors):
        rows, columns = tensors[name].shape
        scale = np.random.default_rng(0).uniform(0.01, 0.02, (-(-rows // 32), -(-columns // 48))).astype(np.float32)
        whole = np.kron(scale, np.ones((32, 48), np.float32))[:rows, :columns]
        stored[name] = (tensors[name] / whole).astype(ml_dtypes.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale
        numbers[name] = stored[name].astype(np.float32) * whole
    return stored, numbers


def rows(tensors: dict[str, Any], dtype: Any, single: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    stored, numbers = dict(tensors), dict(tensors)
    for name in kernels(tensors):
        scale = np.abs(tensors[name]).max(None if single else 1, keepdims=True) / np.float32(100)
        scaled = tensors[name] / scale
        stored[name] = np.round(scaled).astype(dtype) if dtype == np.int8 else scaled.astype(dtype)
        stored[f"{name}_scale"] = scale.reshape(-1) if single else scale
        numbers[name] = stored[name].astype(np.float32) * scale
    return stored, numbers


FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
DIRECTORIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "bitsandbytes in 4 bits": (lambda t: four_bits(t, False), {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "double quantisation": (lambda t: four_bits(t, True), {"load_in_4bit": True}),
    "bitsandbytes in 8 bits": (eight_bits, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "tiles of float8": (tiles, {"quant_method": "fp8", "weight_block_size": [32, 48]}),
    "rows of float8": (lambda t: rows(t, FLOAT8, False), {"quant_method": "compressed-tensors", "format": "float-quantized"}),
    "float8 with one scale": (lambda t: rows(t, FLOAT8, True), {"quant_method": "compressed-tensors", "format": "float-quantized"}),
    "rows of int8": (lambda t: rows(t, np.int8, False), {"quant_method": "compressed-tensors", "format": "int-quantized"}),
}  # fmt: skip


def written(directory: Path, path: Path, stored: dict[str, Any], said: dict[str, Any]) -> Path:
    return packed_directories.written(json.loads((directory / "config.json").read_text()), path, stored, said)


@pytest.mark.parametrize("name", DIRECTORIES)
def test_directories_in_few_bits_are_read_as_they_are(name: str, directory: Path, tmp_path: Path) -> None:
    pack, said = DIRECTORIES[name]
    stored, numbers = pack(load_file(directory / "model.safetensors"))
    model = models.load(written(directory, tmp_path / "packed", stored, said))
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").write_text((directory / "config.json").read_text())
    save_file({each: np.ascontiguousarray(tensor) for each, tensor in numbers.items()}, plain / "model.safetensors")
    expected, _ = named_leaves(models.load(plain).params)
    found, _ = named_leaves(model.params)
    assert sum(map(is_quantised, found.values())) == 7
    for path, leaf in found.items():
        np.testing.assert_array_max_ulp(np.asarray(lora.dequantise(leaf)), np.asarray(expected[path]), 2)
    assert model.apply(model.params, TOKENS).shape == (2, 6, 61)


def test_what_is_not_read_is_named(directory: Path, tmp_path: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    for said, why in {
        "hqq": {"quant_method": "hqq", "bits": 4}, "fp8": {"quant_method": "fp8"}, "name": "quanto",
        "marlin": {"quant_method": "compressed-tensors", "format": "marlin-24"},
    }.items():  # fmt: skip
        path = written(directory, tmp_path / said, tensors, why)
        with pytest.raises(lora.CheckpointError, match=r"is not read\. Read are bitsandbytes .* --quantise nf4"):
            models.load(path)


def test_zero_points_are_refused_and_not_left_out(directory: Path, tmp_path: Path) -> None:
    pack, said = DIRECTORIES["rows of int8"]
    stored, _ = pack(load_file(directory / "model.safetensors"))
    points = {f"{name}_zero_point": np.zeros((len(stored[name]), 1), np.int8) for name in kernels(stored)}
    assert quantised_paths(models.load(written(directory, tmp_path / "symmetric", stored | points, said)))
    next(iter(points.values()))[0] = 3
    with pytest.raises(lora.CheckpointError, match=r"zero points .model\.layers"):
        models.load(written(directory, tmp_path / "shifted", stored | points, said))


def test_a_new_head_has_the_dtype_of_the_numbers(directory: Path) -> None:
    model = models.with_classes(models.load(directory, quantise="nf4", dtype=jnp.bfloat16), ["no", "yes"])
    assert model.params["score"]["weight"].dtype == jnp.bfloat16


def test_damage_and_mixtures_are_errors(directory: Path, tmp_path: Path) -> None:
    stored, _ = four_bits(load_file(directory / "model.safetensors"), True)
    said = {"quant_method": "bitsandbytes"}
    for part in ("absmax", "nested_absmax", "nested_quant_map"):
        name = next(name for name in stored if name.endswith(f".{part}"))
        lacking = {each: tensor for each, tensor in stored.items() if each != name}
        with pytest.raises(lora.CheckpointError, match="lacks the scales of model"):
            models.load(written(directory, tmp_path / part, lacking, said))
    first = "model.layers.0.mlp.up_proj.weight"
    mixed = {each: tensor for each, tensor in stored.items() if not each.startswith(first)}
    mixed[first] = load_file(directory / "model.safetensors")[first]
    path = written(directory, tmp_path / "mixed", mixed, said)
    with pytest.raises(lora.CheckpointError, match=rf"{first} is not quantised, and other layers are.*unrolled=True"):
        models.load(path)
    assert models.load(path, unrolled=True).apply(models.load(path, unrolled=True).params, TOKENS).shape == (2, 6, 61)


def test_codes_are_written_as_bitsandbytes_has_them(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small"
    assert main(["quantise", str(directory), str(out)]) == 0
    assert "numbers in nf4, " in capsys.readouterr().out
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    assert said["load_in_4bit"] and said["llm_int8_skip_modules"] == ["embed_tokens", "k_proj", "lm_head", "v_proj"]
    stored, _ = four_bits(load_file(directory / "model.safetensors"), False)
    found = load_file(out / "model.safetensors")
    small = {name.partition(".absmax")[0] for name in found if name.endswith(".absmax")}
    assert len(small) == 4 * 5
    for name in sorted(small):
        for part in ("", ".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4"):
            np.testing.assert_array_equal(found[name + part], stored[name + part])
    again, model = models.load(out), models.load(directory, quantise="nf4")
    assert_close(again.apply(again.params, TOKENS), model.apply(model.params, TOKENS))
    assert main(["quantise", str(directory), str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    tiny_directory(tmp_path / "tiny", "llama")
    assert main(["quantise", str(tmp_path / "tiny"), str(tmp_path / "other")]) == 2
    assert "nothing to quantise" in capsys.readouterr().err
    with pytest.raises(lora.ParameterError, match="is int8, and directories hold codes of nf4 and fp4 only"):
        models.save(tmp_path / "int8", models.load(directory, quantise="int8"), codes=True)
