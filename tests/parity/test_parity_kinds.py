"""AdaLoRA and VeRA in PEFT's own files: real PEFT computes the same on both ways."""

from dataclasses import replace
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
from peft import AdaLoraConfig, PeftConfig, VeraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file
from test_parity_training import batches, small_net
from torch_side import opened, run

import lora_jax as lora

TARGETS = ["q", "v", "up"]
STEPS = 6


def filled(model: Any) -> Any:
    """Random numbers wherever PEFT trains."""
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) / 3)
    return model


def outputs(fn: Any, params: Any, adapter: lora.Adapter, x: np.ndarray) -> np.ndarray:
    with jax.default_matmul_precision("highest"):
        return np.asarray(lora.adapt(fn)(params, adapter, jnp.asarray(x)))


def check_both_ways(model: Any, tmp_path: Path) -> None:
    """PEFT's file here, and ours of it in PEFT; the same arrays."""
    _, fn, params, sites = small_net()
    x = batches(1)[0][0]
    model.eval().save_pretrained(tmp_path / "theirs")
    adapter = lora.peft.load(tmp_path / "theirs", params, sites)
    expected = run(model, torch.from_numpy(np.asarray(x)))
    assert_close(outputs(fn, params, adapter, x), expected)
    lora.peft.save(tmp_path / "ours", adapter, sites=sites)
    again = opened(small_net()[0], tmp_path / "ours")
    assert_close(run(again, torch.from_numpy(np.asarray(x))), expected)
    for name, array in load_numpy(tmp_path / "theirs" / "adapter_model.safetensors").items():
        np.testing.assert_array_equal(load_numpy(tmp_path / "ours" / "adapter_model.safetensors")[name], array)


@pytest.mark.parametrize("steps", [0, 3, STEPS])
def test_adalora_after_steps_of_its_budget(steps: int, tmp_path: Path) -> None:
    config = AdaLoraConfig(init_r=4, target_r=1, lora_alpha=6, total_step=STEPS, target_modules=TARGETS)
    model = filled(get_peft_model(small_net()[0], config))
    model(torch.from_numpy(np.asarray(batches(1)[0][0]))).square().mean().backward()
    for step in range(1, steps + 1):
        model.base_model.update_and_allocate(step)
    check_both_ways(model, tmp_path)


@pytest.mark.parametrize("options", [{}, {"bias": "vera_only", "modules_to_save": ["head"]}])
def test_vera_with_its_projections(options: dict[str, Any], tmp_path: Path) -> None:
    config = VeraConfig(r=6, target_modules=TARGETS, projection_prng_key=5, **options)
    check_both_ways(filled(get_peft_model(small_net()[0], config)), tmp_path)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("adalora", {"rank": 4, "alpha": 7, "targets": ("q", "up")}),
        ("adalora", {"rank": 4, "targets": ("q", "up"), "rank_pattern": {"up": 2}, "train": ("head",)}),
        ("adalora", {"rank": 3, "targets": ("q",), "bias": "lora_only", "trainable_tokens": (1, 5)}),
        ("vera", {"rank": 5, "targets": ("q", "v"), "alpha": 10}),
        ("vera", {"rank": 5, "targets": ("q", "v"), "train": ("head",), "bias": "lora_only"}),
    ],
)
def test_ours_in_peft(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    base, fn, params, sites = small_net()
    config = lora.LoraConfig(method=method, **options)
    adapter = lora.init(jax.random.key(0), config, params, sites)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    moved = lambda leaf, train: leaf + jax.random.normal(next(keys), leaf.shape) / 3 if train else leaf  # noqa: E731
    adapter = jax.tree.map(moved, adapter, lora.trainable(adapter))
    if method == "adalora":
        pruned = {path: each for path, each in adapter.items() if isinstance(each, lora.methods.AdaLora)}
        path, update = next(iter(pruned.items()))
        adapter = lora.Adapter({**adapter, path: replace(update, values=update.values.at[0].set(0))})
    lora.peft.save(tmp_path / "ours", adapter, sites=sites)
    model = opened(base, tmp_path / "ours")
    assert type(model.peft_config["default"]).__name__.lower() == f"{method}config"
    x = batches(1)[0][0]
    assert_close(run(model, torch.from_numpy(np.asarray(x))), outputs(fn, params, adapter, x))


def test_projections_that_a_file_lacks_are_added_in_peft(tmp_path: Path) -> None:
    """The lines that docs/from-peft.md has."""
    config = VeraConfig(r=6, target_modules=TARGETS, save_projection=False)
    model = filled(get_peft_model(small_net()[0], config)).eval()
    model.save_pretrained(tmp_path / "without")
    _, fn, params, sites = small_net()
    with pytest.raises(lora.CheckpointError, match="save_projection=True"):
        lora.peft.load(tmp_path / "without", params, sites)

    config = PeftConfig.from_pretrained(tmp_path / "without")
    config.save_projection = True
    whole = get_peft_model(small_net()[0], config)
    drawn = {f"base_model.vera_{name}": getattr(whole.base_model, f"vera_{name}")["default"] for name in "AB"}
    set_peft_model_state_dict(whole, load_file(tmp_path / "without" / "adapter_model.safetensors") | drawn)
    whole.save_pretrained(tmp_path / "with")

    adapter = lora.peft.load(tmp_path / "with", params, sites)
    x = batches(1)[0][0]
    assert_close(outputs(fn, params, adapter, x), run(model, torch.from_numpy(np.asarray(x))))
