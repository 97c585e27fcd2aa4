"""The recipes of docs/recipes.md for trainers and models of others: their code, run as it stands there."""

import doctest
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_close
from zoo_model import causal, numbers, positions, tokens

import lora_jax as lora

os.environ.setdefault("KERAS_BACKEND", "jax")
PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def shown(title: str) -> dict[str, Any]:
    """The names that the examples of a section leave behind, with those of the page's beginning."""
    text, found = PAGE.partition("\n## ")[0] + section(title), {}
    for example in doctest.DocTestParser().get_examples(text):
        exec(example.source, found)
    return found


def run(title: str, names: dict[str, Any]) -> dict[str, Any]:
    """The names after the block of code of a section."""
    exec(re.search(r"```python\n(.*?)```", section(title), re.DOTALL)[1], names)
    return names


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the recipes write."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_tunix(folder: Path) -> None:
    code = pytest.importorskip("tunix.models.qwen2.model", exc_type=ImportError)
    sizes = dict(vocab_size=32, num_layers=2, embed_dim=16, hidden_dim=24, num_heads=4, head_dim=8, num_kv_heads=2)
    config = code.ModelConfig(**sizes, rope_theta=10000, norm_eps=1e-6, use_tied_embedding=True)
    model = nnx.eval_shape(lambda: code.Qwen2(config, rngs=nnx.Rngs(params=0)))
    nnx.update(model, numbers(nnx.state(model)))
    given = {"model": model, "tokens": tokens(), "positions": positions(), "mask": causal()}
    before = jax.tree.map(np.array, nnx.state(model))
    names = run("Tunix", shown("NNX") | given)
    adapter = names["adapted"].lora.get_value()
    assert len(adapter) == 6 and all(np.asarray(update.b).any() for update in adapter.values())
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, nnx.state(model)))
    modules = lora.peft.read_peft(folder / "adapter").modules
    assert "model.layers.1.self_attn.v_proj" in modules and len(modules) == 6


def test_keras_hub(folder: Path) -> None:
    models = pytest.importorskip("keras_hub.models", exc_type=ImportError)
    sizes = dict(vocabulary_size=32, num_layers=2, hidden_dim=16, intermediate_dim=24)
    backbone = models.Llama3Backbone(**sizes, num_query_heads=4, num_key_value_heads=2)
    model = models.Llama3CausalLM(backbone, preprocessor=None)
    inputs = {"token_ids": tokens(), "padding_mask": jnp.ones((2, 8), jnp.int32)}
    for variable, value in zip(model.trainable_variables, start(model), strict=True):
        variable.assign(value)
    names = run("KerasHub", {"model": model, "inputs": inputs, **imports()})
    assert names["losses"][-1] < 0.8 * names["losses"][0]
    adapted = lora.adapt(names["fn"])(names["params"], names["adapter"], inputs)
    assert_close(np.asarray(model(inputs)), np.asarray(adapted), factor=10.0)
    path = "transformer_layer_1/self_attention/query/kernel"
    theirs = np.asarray(names["adapter"][path].delta()).reshape(16, 16).T  # as KerasHub reads PyTorch's weight, back
    written = lora.peft.read_peft(folder / "adapter").delta("model.layers.1.self_attn.q_proj", (16, 16))
    assert_close(written, theirs)


def start(model: Any) -> list[Any]:
    """Values for the variables of a model."""
    return numbers([jax.ShapeDtypeStruct(each.shape, jnp.float32) for each in model.trainable_variables])


def imports() -> dict[str, Any]:
    """What the page imports first."""
    found: dict[str, Any] = {}
    exec("import jax, jax.numpy as jnp, optax, lora_jax as lora", found)
    return found
