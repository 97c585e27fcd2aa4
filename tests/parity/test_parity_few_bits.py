"""Directories that bitsandbytes quantised, and adapters on them: weights and logits are theirs."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import models
from lora_jax.paths import named_leaves
from lora_jax.quantised.leaf import is_quantised

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
bitsandbytes = pytest.importorskip("bitsandbytes")

TOKENS = np.arange(40)[None]
KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=257, max_position_embeddings=256,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def quantised(plain: Path, kind: str) -> Any:
    config = transformers.BitsAndBytesConfig(**KINDS[kind], bnb_4bit_compute_dtype=torch.float32)
    return transformers.AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=config, device_map="cpu", dtype=torch.float32
    )


def numbers(module: Any) -> Any:
    """What their kernel stands for, by their own dequantisation."""
    if hasattr(module.weight, "quant_state"):
        return bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    return module.weight.CB.float() * module.weight.SCB[:, None] / 127


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_theirs(kind: str, plain: Path, tmp_path: Path) -> None:
    theirs = quantised(plain, kind)
    theirs.save_pretrained(tmp_path / "model")
    model = models.load(tmp_path / "model", unrolled=True)
    small = {path: leaf for path, leaf in named_leaves(model.params)[0].items() if is_quantised(leaf)}
    assert len(small) == 14
    for path, leaf in small.items():
        module = theirs.get_submodule(path.rpartition("/")[0].replace("/", "."))
        ulp = 2 if kind == "int8" else 0
        np.testing.assert_array_max_ulp(np.asarray(leaf.dense()), numbers(module).float().numpy(), ulp)
    if kind == "nf4":
        own = named_leaves(models.load(plain, quantise="nf4", unrolled=True).params)[0]
        assert all((own[path].codes == leaf.codes).all() for path, leaf in small.items())


@pytest.mark.parametrize("kind", ["nf4", "nested"])
def test_an_adapter_trained_here_loads_on_their_model(kind: str, plain: Path, tmp_path: Path) -> None:
    theirs = quantised(plain, kind)
    theirs.save_pretrained(tmp_path / "model")
    model = models.load(tmp_path / "model")
    sites = lora.find_sites(model.apply, model.params, TOKENS)
    adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=4, targets="all-linear"), model.params, sites)
    moved = lambda leaf, trains: leaf + 0.02 if trains else leaf  # noqa: E731
    adapter = jax.tree.map(moved, adapter, lora.trainable(adapter))
    lora.peft.save(tmp_path / "adapter", adapter, sites=sites, params=model.params)
    ours = lora.adapt(model.apply)(model.params, adapter, jnp.asarray(TOKENS))
    # Their 4-bit products on CPUs round to bfloat16; so the same adapter is put on the numbers of their codes.
    dense = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    for name, module in theirs.named_modules():
        if hasattr(module, "weight") and hasattr(module.weight, "quant_state"):
            dense.get_submodule(name).weight.data = numbers(module).float()
    with torch.no_grad():
        expected = peft.PeftModel.from_pretrained(dense, tmp_path / "adapter")(torch.tensor(TOKENS)).logits
        rough = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")(torch.tensor(TOKENS)).logits
    np.testing.assert_allclose(ours, expected.numpy(), atol=3e-5)
    np.testing.assert_allclose(ours, rough.float().numpy(), atol=0.05)


def test_what_is_quantised_here_loads_there(plain: Path, tmp_path: Path) -> None:
    model = models.load(plain, quantise="nf4")
    models.save(tmp_path / "small", model, codes=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small", device_map="cpu")
    own = named_leaves(models.load(tmp_path / "small", unrolled=True).params)[0]
    count = 0
    for path, leaf in own.items():
        if is_quantised(leaf):
            module = theirs.get_submodule(path.rpartition("/")[0].replace("/", "."))
            np.testing.assert_array_equal(np.asarray(leaf.dense()), numbers(module).float().numpy())
            count += 1
    assert count == 14
    with torch.no_grad():
        logits = theirs(torch.tensor(TOKENS)).logits.float().numpy()
    np.testing.assert_allclose(model.apply(model.params, jnp.asarray(TOKENS)), logits, atol=0.05)
