"""`models.load`: shards, dtypes, ties, names of older files, meshes, and directories that are refused."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_same
from safetensors.numpy import load_file, save_file
from tiny_models import tiny_config, tiny_directory, tiny_tensors

from lora_jax import CheckpointError
from lora_jax.models import load
from lora_jax.paths import named_leaves

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 9)))


def sharded(path: Path) -> Path:
    """The same tensors in two files with an index."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    parts = {f"model-{1 + place % 2:05}-of-00002.safetensors": {} for place in range(2)}
    for place, (name, value) in enumerate(tensors.items()):
        parts[list(parts)[place % 2]][name] = value
    for name, part in parts.items():
        save_file(part, path / name)
    weights = {tensor: name for name, part in parts.items() for tensor in part}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    return path


def test_parameters_are_the_tensors_by_their_names_stacked_or_not(tmp_path: Path):
    path = tiny_directory(tmp_path / "m", "qwen3_moe")
    stored = load_file(path / "model.safetensors")
    single = named_leaves(load(path, unrolled=True).params)[0]
    assert_same({name.replace("/", "."): leaf for name, leaf in single.items()}, stored)
    stacked = named_leaves(load(path).params)[0]
    experts = stacked["model/layers/mlp/experts/gate_proj/weight"]
    assert experts.shape == (4, 5, 12, 24)
    assert_same(experts[2, 3], stored["model.layers.2.mlp.experts.3.gate_proj.weight"])
    assert_same(stacked["model/layers/self_attn/q_norm/weight"][3], stored["model.layers.3.self_attn.q_norm.weight"])
    assert sum(leaf.size for leaf in stacked.values()) == sum(each.size for each in stored.values())


def test_shards_are_read_as_one(tmp_path: Path):
    whole = load(tiny_directory(tmp_path / "m", "llama")).params
    assert_same(load(sharded(tmp_path / "m")).params, whole)


@pytest.mark.parametrize("own", [np.float16, jnp.bfloat16, np.float32])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float32])
def test_dtypes(tmp_path: Path, own: Any, dtype: Any):
    tensors = {name: each.astype(own) for name, each in tiny_tensors(tiny_config("llama")).items()}
    model = load(tiny_directory(tmp_path / "m", "llama", tensors), dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype(dtype or own)}
    table = tensors["model.embed_tokens.weight"].astype(dtype or own)
    assert_same(model.params["model"]["embed_tokens"]["weight"], table)


def test_a_tied_head_may_be_stored_if_it_is_the_table(tmp_path: Path):
    tensors = tiny_tensors(tiny_config("llama", tie_word_embeddings=True))
    both = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    model = load(tiny_directory(tmp_path / "m", "llama", both, tie_word_embeddings=True))
    assert "lm_head" not in model.params
    other = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}
    with pytest.raises(CheckpointError, match=r"lm_head.weight is another table .* tie_word_embeddings"):
        load(tiny_directory(tmp_path / "n", "llama", other, tie_word_embeddings=True))


def test_names_and_buffers_of_older_files(tmp_path: Path):
    tensors = tiny_tensors(tiny_config("gpt2"))
    old = {name.removeprefix("transformer."): each for name, each in tensors.items()}
    masks = {f"h.{layer}.attn.bias": np.tri(64, dtype=np.uint8)[None, None] for layer in range(4)}
    masks |= {f"h.{layer}.attn.masked_bias": np.array(-1e4, np.float32) for layer in range(4)}
    read = load(tiny_directory(tmp_path / "old", "gpt2", old | masks)).params
    assert_same(read, load(tiny_directory(tmp_path / "new", "gpt2", tensors)).params)


def test_a_model_without_its_prefix_keeps_its_head(tmp_path: Path):
    tensors = tiny_tensors(tiny_config("llama"))
    bare = {name.removeprefix("model."): each for name, each in tensors.items()}
    buffer = {"layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    assert_same(
        load(tiny_directory(tmp_path / "a", "llama", bare | buffer)).params,
        load(tiny_directory(tmp_path / "b", "llama", tensors)).params,
    )


def changed(change: Any) -> Any:
    def make(path: Path) -> None:
        tensors = tiny_tensors(tiny_config("llama"))
        change(tensors)
        tiny_directory(path, "llama", tensors)

    return make


def with_config(**changes: Any) -> Any:
    return lambda path: tiny_directory(path, "llama", tiny_tensors(tiny_config("llama")), **changes)


KEY = "model.layers.2.self_attn.k_proj.weight"
BROKEN = {
    "missing tensor": (changed(lambda each: each.pop(KEY)), rf"lacks 1 tensors .*: {KEY}\. Nearest there: model\."),
    "missing head": (changed(lambda each: each.pop("lm_head.weight")), r"lacks 1 tensors .*: lm_head\.weight"),
    "unexpected tensor": (
        changed(lambda each: each.update({"model.layers.0.self_attn.q_proj.bias": np.ones(32, np.float32)})),
        r"holds 1 tensors that its config.json does not describe: model\.layers\.0\.self_attn\.q_proj\.bias",
    ),
    "a layer too many": (with_config(num_hidden_layers=3), r"does not describe: model\.layers\.3\."),
    "a layer too few": (with_config(num_hidden_layers=5), r"lacks 9 tensors .*: model\.layers\.4\."),
    "shape": (
        changed(lambda each: each.update({KEY: each[KEY].T.copy()})),
        rf"{KEY} has shape \(24, 16\), and config.json describes \(16, 24\)",
    ),
    "vocabulary": (with_config(vocab_size=64), r"embed_tokens.weight has shape \(61, 24\), and .* \(64, 24\)"),
    "integers": (
        changed(lambda each: each.update({KEY: each[KEY].astype(np.int8)})), rf"{KEY} holds I8; only F64, F32, F16, BF16",
    ),
    "no config": (lambda path: (with_config()(path) / "config.json").unlink(), "has no config.json"),
    "no weights": (lambda path: (with_config()(path) / "model.safetensors").unlink(), "holds no safetensors file"),
    "nothing": (lambda path: None, "is not a directory with a model"),
    "cut short": (
        lambda path: (with_config()(path) / "model.safetensors").write_bytes(
            (path / "model.safetensors").read_bytes()[:-9]
        ),
        "damaged or cut short",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(BROKEN))
def test_a_directory_that_is_not_whole_is_refused(tmp_path: Path, name: str):
    make, message = BROKEN[name]
    make(tmp_path / "m")
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "m")


def test_there_is_no_tokenizer_without_its_files(tmp_path: Path):
    assert load(tiny_directory(tmp_path / "m", "llama")).tokenizer is None


@pytest.mark.parametrize(
    "family", ["gpt2", pytest.param("llama", marks=pytest.mark.full), pytest.param("gpt_oss", marks=pytest.mark.full)]
)
def test_parameters_are_spread_over_a_mesh_as_they_are_read(tmp_path: Path, family: str):
    path = tiny_directory(tmp_path / "m", family)
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"))
    model, plain = load(path, mesh=mesh), load(path)
    assert_same(model.params, plain.params)
    parts = {
        name: leaf.addressable_shards[0].data.size / leaf.size for name, leaf in named_leaves(model.params)[0].items()
    }
    own = model.config.modules
    out = f"{own.root}/{own.layers}/{own.attention}/{own.out}/weight"
    assert parts[out] == 1 / 8, parts
    assert min(parts.values()) == 1 / 8 and parts[f"{own.root}/{own.last_norm}/weight"] == 1
    assert_close(jax.jit(model.apply)(model.params, TOKENS), plain.apply(plain.params, TOKENS), factor=2)
