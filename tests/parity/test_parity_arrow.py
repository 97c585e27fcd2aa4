"""Arrow: real PEFT chooses and mixes the same adapters for every token."""

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("transformers")

import jax
import jax.numpy as jnp
import numpy as np
from helpers import assert_close
from llama import TOKENS, Twin, llama
from peft.tuners.lora.arrow import create_arrow_model
from peft.tuners.lora.config import ArrowConfig
from torch_side import adapted

import lora_jax as lora

MODULES = ["q_proj", "v_proj", "up_proj"]


def experts(folder: Path, count: int, first: int = 0) -> list[str]:
    """Directories of adapters with different numbers, whose largest singular value stands out.

    PEFT looks for the first singular vector in 15 steps that converge only then.
    """
    paths = [folder / str(i) for i in range(first, first + count)]
    for seed, path in enumerate(paths, first):
        model = adapted(llama(), task_type="CAUSAL_LM", r=3, lora_alpha=4 + 3 * seed, target_modules=MODULES)
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape) / 3)
                if "lora_A" in name:
                    parameter[0] *= 4
        model.save_pretrained(path)
    return [str(path) for path in paths]


def theirs(paths: list[str], general: list[str] | None = None, **options: Any) -> np.ndarray:
    config = ArrowConfig(**options)
    model = create_arrow_model(llama(), paths, config, general_adapter_paths=general).eval()
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(TOKENS)).logits.numpy()


def ours(twin: Twin, adapters: list[lora.Adapter], **options: Any) -> np.ndarray:
    bank = lora.AdapterBank.of(adapters)
    with jax.default_matmul_precision("highest"):
        router = lora.routers.arrow(bank, **options)
        return np.asarray(lora.route(twin.fn)(twin.variables, bank, router, jnp.asarray(TOKENS)))


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 0.5), (4, 3.0)])
def test_arrow(tmp_path: Path, scan: bool, top_k: int, temperature: float) -> None:
    paths, twin = experts(tmp_path, 4), Twin(scan)
    adapters = [lora.peft.load(path, twin.variables, twin.sites, "lora_jax") for path in paths]
    found = ours(twin, adapters, top_k=top_k, temperature=temperature)
    assert_close(found, theirs(paths, top_k=top_k, router_temperature=temperature, rng_seed=0))
    with jax.default_matmul_precision("highest"):
        plain = np.asarray(twin.fn(twin.variables, jnp.asarray(TOKENS)))
    assert np.abs(found - plain).max() > 0.1 * np.abs(plain).max()


def test_general_knowledge_is_subtracted_from_updates(tmp_path: Path) -> None:
    """PEFT subtracts the means of A and of B apart, which leaves cross terms that no adapter has learned."""
    paths, general, twin = experts(tmp_path, 2), experts(tmp_path, 2, 2), Twin()
    tasks, others = (
        [lora.peft.load(path, twin.variables, twin.sites, "lora_jax") for path in each] for each in (paths, general)
    )
    pure = [lora.compose([task, *others], [1.0, -0.5, -0.5]) for task in tasks]
    for task, left in zip(tasks, pure, strict=True):
        for path in task:
            whole, rest, *parts = (np.asarray(each[path].low_rank().delta()) for each in (task, left, *others))
            assert_close(rest, whole - (parts[0] + parts[1]) / 2)
    found = ours(twin, pure, top_k=2)
    expected = theirs(paths, general, top_k=2, use_gks=True, rng_seed=0)
    assert np.abs(found - expected).max() > 1e-2 * np.abs(expected).max()
