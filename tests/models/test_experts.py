"""Mixtures of experts: all as one tensor, as transformers 5 holds them, and in only some of the layers."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_same
from safetensors.numpy import load_file
from tiny_models import tiny_config, tiny_directory, tiny_tensors

from lora_jax import CheckpointError
from lora_jax.models import Model, empty_cache, load, save

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 9)))
MIXED = {"mlp_only_layers": [0], "decoder_sparse_step": 2, "num_hidden_layers": 3}
NAMES = {"mixtral": ("block_sparse_moe", "w1", "w3", "w2"), "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj")}


def fused(family: str) -> dict[str, np.ndarray]:
    """The tensors of a family with all experts of a layer in one, as transformers 5 has them in memory."""
    tensors, (mlp, gate, up, down) = tiny_tensors(tiny_config(family)), NAMES[family]
    for layer in range(4):
        old, new = f"model.layers.{layer}.{mlp}", f"model.layers.{layer}.mlp"
        gates, ups, downs = (
            np.stack([tensors.pop(f"{old}.experts.{expert}.{name}.weight") for expert in range(5)])
            for name in (gate, up, down)
        )
        tensors[f"{new}.experts.gate_up_proj"] = np.concatenate([gates, ups], 1)
        tensors[f"{new}.experts.down_proj"] = downs
        tensors[f"{new}.gate.weight"] = tensors.pop(f"{old}.gate.weight")
    return tensors


def logits(model: Model) -> jax.Array:
    return jax.jit(model.apply)(model.params, TOKENS)


@pytest.mark.parametrize("family", NAMES)
def test_fused_experts_compute_what_single_ones_do_and_are_saved_as_they_were(family: str, tmp_path: Path):
    one = load(tiny_directory(tmp_path / "m", family))
    other = load(tiny_directory(tmp_path / "n", family, fused(family)))
    assert_close(logits(other), logits(one))
    save(tmp_path / "back", other)
    assert_same(load_file(tmp_path / "back" / "model.safetensors"), fused(family))


def test_fused_experts_in_some_layers_only_are_refused(tmp_path: Path):
    tensors = fused("mixtral")
    single = tiny_tensors(tiny_config("mixtral"))
    del tensors["model.layers.1.mlp.experts.gate_up_proj"], tensors["model.layers.1.mlp.experts.down_proj"]
    tensors |= {name: each for name, each in single.items() if "layers.1.block_sparse_moe.experts" in name}
    with pytest.raises(CheckpointError, match=r"lacks 2 tensors .* model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        load(tiny_directory(tmp_path / "m", "mixtral", tensors))


def test_layers_with_and_without_experts_are_told_apart(tmp_path: Path):
    path = tiny_directory(tmp_path / "m", "qwen3_moe", **MIXED)
    model = load(path)
    layers = model.params["model"]["layers"]
    assert [*layers] == ["0", "1", "2"]
    assert {name: sorted(layer["mlp"]) for name, layer in layers.items()} == {
        "0": ["down_proj", "gate_proj", "up_proj"], "1": ["experts", "gate"], "2": ["down_proj", "gate_proj", "up_proj"],
    }  # fmt: skip
    assert layers["1"]["mlp"]["experts"]["up_proj"]["weight"].shape == (5, 12, 24)
    assert_close(logits(load(path, unrolled=True)), logits(model))


@pytest.mark.parametrize("unrolled", [False, True])
def test_such_a_model_comes_back_bit_for_bit(unrolled: bool, tmp_path: Path):
    path = tiny_directory(tmp_path / "m", "qwen3_moe", **MIXED)
    save(tmp_path / "n", load(path, unrolled=unrolled))
    assert_same(load_file(tmp_path / "n" / "model.safetensors"), load_file(path / "model.safetensors"))


def test_its_cache_continues_texts_as_if_they_were_read_at_once(tmp_path: Path):
    model = load(tiny_directory(tmp_path / "m", "qwen3_moe", **MIXED))
    run = jax.jit(model.apply)
    first, cache = run(model.params, TOKENS[:, :5], cache=empty_cache(model.config, 2, 9))
    second, _ = run(model.params, TOKENS[:, 5:], cache=cache)
    assert_close(jnp.concatenate([first, second], 1), logits(model))


def test_fused_experts_lie_on_a_mesh_as_single_ones_do(tmp_path: Path):
    sizes = {"fsdp": 2, "tensor": 2}
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=jax.devices()[:4])
    one = load(tiny_directory(tmp_path / "m", "mixtral"), mesh=mesh).params["model"]["layers"]["block_sparse_moe"]
    other = load(tiny_directory(tmp_path / "n", "mixtral", fused("mixtral")), mesh=mesh).params["model"]["layers"][
        "mlp"
    ]
    specs = {name: each["weight"].sharding.spec for name, each in one["experts"].items()}
    assert other["experts"]["gate_up_proj"].sharding.spec == specs["w1"]
    assert other["experts"]["down_proj"].sharding.spec == specs["w2"] != specs["w1"]
