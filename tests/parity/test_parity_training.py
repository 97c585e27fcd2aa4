"""The same data, the same start and the same optimizer give the same losses in PyTorch and here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("transformers")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from golden.make import Net
from helpers import assert_close
from llama import Twin, llama
from peft import LoraConfig, PeftModel, get_peft_model
from peft_models import from_torch, net
from torch_side import numbers

import lora_jax as lora

STEPS, RATE, DECAY = 20, 1e-2, 0.1


def batches(vocabulary: int) -> np.ndarray:
    return np.random.default_rng(1).integers(vocabulary, size=(STEPS, 4, 7))


def torch_losses(model: PeftModel, tokens: np.ndarray) -> list[float]:
    """Next-token losses while training."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=DECAY)
    losses = []
    for batch in torch.from_numpy(tokens):
        out = model(batch)
        logits = getattr(out, "logits", out)[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten() % logits.shape[-1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def jax_losses(fn: Callable[..., Any], params: Any, adapter: lora.Adapter, tokens: np.ndarray) -> tuple[Any, Any]:
    adapted, tx = lora.adapt(fn), lora.optimizer(optax.adamw(RATE, weight_decay=DECAY), adapter)

    def loss(adapter: lora.Adapter, batch: jax.Array) -> jax.Array:
        logits = adapted(params, adapter, batch)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:] % logits.shape[-1]).mean()

    def step(carry: Any, batch: jax.Array) -> Any:
        adapter, state = carry
        value, gradient = jax.value_and_grad(loss)(adapter, batch)
        updates, state = tx.update(gradient, state, adapter)
        return (optax.apply_updates(adapter, updates), state), value

    with jax.default_matmul_precision("highest"):
        (adapter, _), losses = jax.jit(lambda *carry: jax.lax.scan(step, carry, jnp.asarray(tokens)))(
            adapter, tx.init(adapter)
        )
    return adapter, np.asarray(losses)


def small_net() -> tuple[Any, Any, Any, Any]:
    torch.manual_seed(5)
    base = Net()
    params = from_torch(numbers(base.state_dict()))
    return base, net, params, lora.find_sites(net, params, jnp.zeros((2, 3), jnp.int32))


def small_llama() -> tuple[Any, Any, Any, Any]:
    twin = Twin()
    return llama(), twin.fn, twin.variables, twin.sites


@pytest.mark.parametrize(
    ("models", "names", "options"),
    [
        (small_net, None, {"target_modules": ["q", "v", "up"], "modules_to_save": ["head"]}),
        (small_net, None, {"target_modules": ["q", "embed"], "use_rslora": True, "rank_pattern": {"q": 4}}),
        (small_llama, "lora_jax", {"target_modules": "all-linear", "lora_alpha": 16}),
    ],
    ids=["whole head", "rsLoRA and table", "Llama"],
)
def test_losses(models: Callable[..., Any], names: str | None, options: dict[str, Any], tmp_path: Path) -> None:
    base, fn, params, sites = models()
    model = get_peft_model(base, LoraConfig(r=2, **options))
    model.save_pretrained(tmp_path / "start")
    start = lora.peft.load(tmp_path / "start", params, sites, names)
    tokens = batches(11 if names is None else 256)
    theirs = torch_losses(model, tokens)
    ours, losses = jax_losses(fn, params, start, tokens)
    np.testing.assert_allclose(losses, theirs, rtol=1e-4)
    model.save_pretrained(tmp_path / "end")
    end = lora.peft.load(tmp_path / "end", params, sites, names)
    # Adam divides by the size of a gradient, however small: the last bits of the forward pass grow.
    assert_close(lora.merge(params, ours), lora.merge(params, end), factor=100)
    moved = [np.abs(one - other).max() for one, other in zip(*map(jax.tree.leaves, (start, end)), strict=True)]
    assert max(moved) > 0.05
