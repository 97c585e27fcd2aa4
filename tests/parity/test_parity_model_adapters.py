"""Adapters on models of Hugging Face directories: real PEFT computes the same with them, and a merged base does too."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("peft")

import torch
from helpers import assert_close, random_adapter
from peft import PeftModel
from torch_models import saved
from torch_side import run

import lora_jax as lora
from lora_jax.models import load

TOKENS = np.random.default_rng(0).integers(0, 97, (2, 20))
FULL = [
    ("llama", True),
    ("gemma2", False),
    ("gpt_neox", True),
    ("mixtral", True),
    ("qwen3_moe", False),
    ("gpt_oss", True),
    ("qwen3_moe mixed", True),
]
ROWS = [
    ("qwen2", False),
    ("phi3", True),
    ("gpt2", False),
    ("mixtral", False),
    ("qwen3_moe", True),
    ("gpt_oss", False),
    ("qwen3_moe mixed", False),
]


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


def adapted_alike(model: Any, theirs: Any, folder: Path) -> tuple[lora.Sites, lora.Adapter]:
    """An adapter of all products but the head, written without a map of names: PEFT computes the same with it."""
    sites = lora.find_sites(model.apply, model.params, jnp.asarray(TOKENS))
    adapter = random_adapter([site for site in sites.values() if site.kind != "embedding" and not site.head])
    lora.peft.save(folder / "adapter", adapter, sites=sites)
    ours = jax.jit(lora.adapt(model.apply))(model.params, adapter, jnp.asarray(TOKENS))
    peft = PeftModel.from_pretrained(theirs, folder / "adapter").eval()
    assert_close(np.asarray(ours), run(peft, torch.from_numpy(TOKENS)))
    return sites, adapter


@pytest.mark.parametrize(("name", "unrolled"), [*ROWS, *(pytest.param(*row, marks=pytest.mark.full) for row in FULL)])
def test_peft_computes_the_same_without_a_map_of_names(name: str, unrolled: bool, tmp_path: Path):
    theirs = saved(tmp_path / "m", name)
    model = load(tmp_path / "m", unrolled=unrolled)
    sites, adapter = adapted_alike(model, theirs, tmp_path)
    back = lora.peft.load(tmp_path / "adapter", model.params, sites)
    assert set(back) == set(adapter)
    assert_close(
        {path: each.delta() for path, each in back.items()}, {path: each.delta() for path, each in adapter.items()}
    )


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe mixed"])
def test_peft_computes_the_same_where_experts_are_fused(name: str, tmp_path: Path):
    """Routers and, beside experts, all that is called as parts of them are parameters to PEFT."""
    theirs = saved(tmp_path / "m", name, fused=True)
    model = load(tmp_path / "m")
    _, adapter = adapted_alike(model, theirs, tmp_path)
    lora.peft.merge_checkpoint(tmp_path / "m", tmp_path / "adapter", tmp_path / "merged")
    assert_close(load(tmp_path / "merged").params, lora.merge(model.params, adapter))


@pytest.mark.parametrize(
    "name", ["qwen2", "qwen3_moe", *(pytest.param(each, marks=pytest.mark.full) for each in ("gpt2", "gpt_oss"))]
)
def test_a_merged_directory_computes_the_same(name: str, tmp_path: Path):
    saved(tmp_path / "m", name)
    model = load(tmp_path / "m")
    sites = lora.find_sites(model.apply, model.params, jnp.asarray(TOKENS))
    adapter = random_adapter([site for site in sites.values() if site.kind != "embedding" and not site.head])
    lora.peft.save(tmp_path / "adapter", adapter, sites=sites)
    lora.peft.merge_checkpoint(tmp_path / "m", tmp_path / "adapter", tmp_path / "merged")
    merged = load(tmp_path / "merged").params
    assert_close(merged, lora.merge(model.params, adapter))


@pytest.mark.parametrize(
    "name", ["gemma2", *(pytest.param(each, marks=pytest.mark.full) for each in ("gpt2", "llama linear", "llama"))]
)
def test_a_table_that_is_the_head_too_is_adapted_for_both_uses(name: str, tmp_path: Path):
    theirs = saved(tmp_path / "m", name)
    model = load(tmp_path / "m")
    sites = lora.find_sites(model.apply, model.params, jnp.asarray(TOKENS))
    adapter = random_adapter([site for site in sites.values() if "embed_tokens" in site.path or "wte" in site.path])
    lora.peft.save(tmp_path / "adapter", adapter, sites=sites)
    ours = jax.jit(lora.adapt(model.apply))(model.params, adapter, jnp.asarray(TOKENS))
    peft = PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    assert_close(np.asarray(ours), run(peft, torch.from_numpy(TOKENS)))
