"""Methods and initialisers that PEFT has: the same start, the same function, the same steps."""

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
import optax
from helpers import assert_close
from peft import AdaLoraConfig, LoraConfig, VeraConfig, get_peft_model
from test_parity_training import batches, jax_losses, small_net, torch_losses
from torch import nn

import lora_jax as lora
from lora_jax.paths import named_leaves

KEY = jax.random.key(0)
TARGETS = ("q", "v", "up")


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True, "target_modules": ["q", "v", "up"]},
        {"use_dora": True, "target_modules": ["embed", "up"], "use_rslora": True, "rank_pattern": {"up": 4}},
        {"lora_bias": True, "target_modules": ["q", "up"]},
        {"target_modules": ["q"], "trainable_token_indices": {"embed": [3, 8, 1]}},
    ],
    ids=["DoRA", "DoRA of a table", "a bias on B", "tokens"],
)
def test_losses(options: dict[str, Any], tmp_path: Path) -> None:
    base, fn, params, sites = small_net()
    model = get_peft_model(base, LoraConfig(r=2, **options))
    model.save_pretrained(tmp_path / "start")
    start = lora.peft.load(tmp_path / "start", params, sites)
    theirs = torch_losses(model, batches(11))
    ours, losses = jax_losses(fn, params, start, batches(11))
    np.testing.assert_allclose(losses, theirs, rtol=1e-4)
    model.save_pretrained(tmp_path / "end")
    # Adam divides by the size of a gradient, however small: the last bits of the forward pass grow.
    end = lora.peft.load(tmp_path / "end", params, sites)
    assert_close(lora.merge(params, ours), lora.merge(params, end), factor=100)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_away_from_zero(init: str, rslora: bool) -> None:
    """PEFT trains on a residual base, here the start is taken off: the same losses."""
    base, fn, params, sites = small_net()
    config = lora.LoraConfig(rank=2, alpha=3, init=init, rslora=rslora, targets=TARGETS)
    adapter = lora.init(KEY, config, params, sites)
    peft = LoraConfig(**{**config.to_peft(), "target_modules": list(TARGETS), "layers_pattern": None})
    model = get_peft_model(base, peft)
    rest = named_leaves(lora.absorb(params, adapter)[0])[0]
    for path, update in adapter.items():
        name = path.removesuffix("/kernel").replace("layers_", "layers.").replace("/", ".")
        module = model.get_submodule(f"base_model.model.{name}")
        theirs = module.get_delta_weight("default").detach().numpy().T
        assert_close(np.asarray(update.scale * update.a.T @ update.b), theirs, factor=20)
        assert_close(np.asarray(rest[path]), module.get_base_layer().weight.detach().numpy().T, factor=20)
    _, losses = jax_losses(fn, params, adapter, batches(11))
    np.testing.assert_allclose(losses, torch_losses(model, batches(11)), rtol=1e-4)


class One(nn.Module):
    """A linear layer with a name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5, bias=False)

    def forward(self, x: Any) -> Any:
        return self.layer(x)


X = np.random.default_rng(0).normal(size=(16, 6)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(16, 5)).astype(np.float32)
"""Inputs and targets of the single layer."""


def one(**fields: Any) -> tuple[Any, Any, Any, lora.Adapter]:
    torch.manual_seed(3)
    base = One()
    params = {"layer": {"kernel": jnp.asarray(base.layer.weight.detach().numpy().T.copy())}}
    fn = lambda params, x: x @ params["layer"]["kernel"]  # noqa: E731
    sites = lora.find_sites(fn, params, jnp.asarray(X))
    return base, fn, params, lora.init(KEY, lora.LoraConfig(targets=("layer",), **fields), params, sites)


def test_vera() -> None:
    """With our projections in PEFT's model: the same function, and the same gradient."""
    base, fn, params, adapter = one(method="vera", rank=4, alpha=4)
    model = get_peft_model(base, VeraConfig(r=4, target_modules=["layer"]))
    ours = jnp.asarray(np.random.default_rng(2).normal(size=5), jnp.float32)
    update = replace(adapter["layer/kernel"], b=ours)
    projections = replace(update, d=jnp.ones(4), b=jnp.ones(5)).low_rank()
    layer = model.base_model.model.layer
    layer.vera_A["default"] = torch.from_numpy(np.array(projections.a))
    layer.vera_B["default"] = torch.from_numpy(np.array(projections.b).T.copy())
    layer.vera_lambda_b["default"].data = torch.from_numpy(np.array(ours))
    assert_close(np.asarray(update.d), layer.vera_lambda_d["default"].detach().numpy())
    out = model(torch.from_numpy(X))
    loss = lambda update: jnp.square(lora.adapt(fn)(params, lora.Adapter({"layer/kernel": update}), X)).sum()  # noqa: E731
    assert_close(np.asarray(lora.adapt(fn)(params, lora.Adapter({"layer/kernel": update}), X)), out.detach().numpy())
    out.square().sum().backward()
    gradient = jax.grad(loss)(update)
    assert_close(np.asarray(gradient.b), layer.vera_lambda_b["default"].grad.numpy())
    assert_close(np.asarray(gradient.d), layer.vera_lambda_d["default"].grad.numpy())


def test_adalora() -> None:
    """Importance, budget, pruned values and the penalty, step by step."""
    steps, options = 12, {"tinit": 2, "tfinal": 3, "deltaT": 2}
    base, fn, params, adapter = one(method="adalora", rank=4, alpha=4)
    config = AdaLoraConfig(init_r=4, target_r=2, lora_alpha=4, total_step=steps, target_modules=["layer"], **options)
    model = get_peft_model(base, config)
    layer, update = model.base_model.model.layer, adapter["layer/kernel"]
    values = np.float32([0.3, -0.2, 0.5, 0.1])
    layer.lora_A["default"].data = torch.from_numpy(np.array(update.a))
    layer.lora_B["default"].data = torch.from_numpy(np.array(update.b).T.copy())
    layer.lora_E["default"].data = torch.from_numpy(values[:, None].copy())
    layer.ranknum["default"].data -= 1e-5  # PEFT adds as much to the rank that it divides by
    adapter = lora.Adapter({"layer/kernel": replace(update, values=jnp.asarray(values))})
    inner = lora.optim.adalora(optax.adam(0.05), target_rank=2, total_steps=steps, warmup=2, final=3, every=2)
    tx, state = lora.optimizer(inner, adapter), None

    def loss(adapter: lora.Adapter) -> Any:
        return jnp.square(lora.adapt(fn)(params, adapter, X) - Y).mean() + 0.5 * lora.optim.orthogonality(adapter)

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, state = torch.optim.Adam(trained, lr=0.05), tx.init(adapter)
    for step in range(1, steps + 1):
        out = (model(torch.from_numpy(X)) - torch.from_numpy(Y)).square().mean()
        penalty = [torch.norm(p @ p.T - torch.eye(4)) for p in (layer.lora_A["default"], layer.lora_B["default"].T)]
        total = out + 0.5 * sum(penalty) / 2
        np.testing.assert_allclose(float(loss(adapter)), total.item(), rtol=1e-4)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        updates, state = tx.update(jax.grad(loss)(adapter), state, adapter)
        adapter = optax.apply_updates(adapter, updates)
        theirs = layer.lora_E["default"].detach().numpy()[:, 0]
        assert_close(np.asarray(adapter["layer/kernel"].values), theirs, factor=20)
    assert (theirs != 0).sum() == 2
