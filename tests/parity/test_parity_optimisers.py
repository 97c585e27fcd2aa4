"""PEFT's own optimizers and these take the same steps from the same start with the same gradients."""

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
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer, lorafa
from peft_models import from_torch, net
from torch_side import numbers

import lora_jax as lora

RATE, DECAY, STEPS = 1e-2, 0.1, 4
LINEAR = {"target_modules": ["q", "v", "up"], "rank_pattern": {"q": 3}, "lora_alpha": 5, "use_rslora": True}
MIXED = {"target_modules": ["q", "embed"], "modules_to_save": ["head"], "bias": "lora_only"}


class Pair:
    """One adapted model in PyTorch, and its adapter here; adapters travel through PEFT's files."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        torch.manual_seed(3)
        base = Net()
        self.params = from_torch(numbers(base.state_dict()))
        self.sites = lora.find_sites(net, self.params, jnp.zeros((2, 3), jnp.int32))
        self.model = get_peft_model(base, LoraConfig(r=2, **options))
        self.folder = folder
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.randomise()

    def randomise(self) -> None:
        with torch.no_grad():
            for parameter in self.trained:
                parameter.copy_(torch.randn(parameter.shape) / 2)

    def adapter(self) -> lora.Adapter:
        self.model.save_pretrained(self.folder)
        return lora.peft.load(self.folder, self.params, self.sites)

    def gradients(self) -> lora.Adapter:
        """Random gradients for both sides: an adapter's numbers in the gradients' place, and back again."""
        values = [parameter.detach().clone() for parameter in self.trained]
        self.randomise()
        here = self.adapter()
        with torch.no_grad():
            for parameter, value in zip(self.trained, values, strict=True):
                parameter.grad = parameter.detach().clone()
                parameter.copy_(value)
        return here


def assert_same_steps(pair: Pair, theirs: torch.optim.Optimizer, tx: optax.GradientTransformation) -> lora.Adapter:
    start = adapter = pair.adapter()
    tx = lora.optimizer(tx, adapter)
    state, step = tx.init(adapter), jax.jit(tx.update)
    for _ in range(STEPS):
        updates, state = step(pair.gradients(), state, adapter)
        adapter = optax.apply_updates(adapter, updates)
        theirs.step()
        assert_close(adapter, pair.adapter())
    moved = [np.abs(one - other).max() for one, other in zip(*map(jax.tree.leaves, (start, adapter)), strict=True)]
    assert max(moved) > RATE
    return adapter


def adamw(**options: Any) -> optax.GradientTransformation:
    return optax.adamw(RATE, **{"weight_decay": 0.0, **options})


@pytest.mark.parametrize("options", [LINEAR, MIXED], ids=["linear", "table, head and biases"])
def test_lora_plus(options: dict[str, Any], tmp_path: Path) -> None:
    pair = Pair(tmp_path, options)
    theirs = create_loraplus_optimizer(
        pair.model, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=16, loraplus_lr_embedding=1e-4, eps=1e-8
    )
    assert_same_steps(pair, theirs, optax.chain(adamw(), lora.optim.lora_plus(16, embedding=1e-4 / RATE)))


def no_biases(tree: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda keys, leaf: not keys[0].key.endswith("bias"), tree)


def test_lora_plus_decays_all_but_biases(tmp_path: Path) -> None:
    pair = Pair(tmp_path, MIXED)
    theirs = create_loraplus_optimizer(
        pair.model, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=16, loraplus_lr_embedding=1e-4, loraplus_weight_decay=DECAY
    )  # fmt: skip
    base = adamw(weight_decay=DECAY, mask=no_biases)
    assert_same_steps(pair, theirs, optax.chain(base, lora.optim.lora_plus(16, embedding=1e-4 / RATE)))


def test_lora_plus_groups(tmp_path: Path) -> None:
    """The labels are the groups themselves, parameter by parameter."""
    pair = Pair(tmp_path, MIXED)
    theirs = create_loraplus_optimizer(
        pair.model, torch.optim.SGD, lr=1.0, loraplus_lr_ratio=3.0, loraplus_lr_embedding=2.0
    )
    rates = {id(parameter): group["lr"] for group in theirs.param_groups for parameter in group["params"]}
    with torch.no_grad():
        for parameter in pair.trained:
            parameter.fill_(rates[id(parameter)])
    labels = lora.optim.lora_plus_labels(pair.adapter())
    expected = {"a": 1.0, "b": 3.0, "embedding": 2.0}

    def check(label: str, leaf: jax.Array) -> None:
        assert label == "frozen" or (leaf == expected[label]).all()

    jax.tree.map(check, labels, pair.adapter())
    assert set(jax.tree.leaves(labels)) == {"a", "b", "embedding", "frozen"}


def test_lora_plus_of_theirs_counts_magnitudes_as_b() -> None:
    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["q", "embed"], use_dora=True))
    theirs = create_loraplus_optimizer(model, torch.optim.SGD, lr=1.0, loraplus_lr_ratio=3.0)
    rates = {id(parameter): group["lr"] for group in theirs.param_groups for parameter in group["params"]}
    found = {rates[id(parameter)] for name, parameter in model.named_parameters() if "magnitude" in name}
    assert found == {3.0}


@pytest.mark.parametrize("reg", [1e-2, 1.0])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_riemannian(optimizer: Any, reg: float, tmp_path: Path) -> None:
    pair = Pair(tmp_path, {**LINEAR, "modules_to_save": ["head"], "bias": "all"})
    theirs = create_riemannian_optimizer(pair.model, optimizer, lr=RATE, reg=reg, weight_decay=0.0)
    base = adamw() if optimizer is torch.optim.AdamW else optax.sgd(RATE)
    assert_same_steps(pair, theirs, optax.chain(lora.optim.riemannian(reg), base))


def test_lora_fa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Where it can, it rounds the corrected gradient to bfloat16 on the way.
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)
    pair = Pair(tmp_path, {**LINEAR, "modules_to_save": ["head"], "bias": "all"})
    start = pair.adapter()
    theirs = create_lorafa_optimizer(pair.model, r=2, lora_alpha=5, lr=RATE)
    # Theirs is added before the bias correction, optax's after it.
    theirs.param_groups[0]["eps"] = 1e-12
    end = assert_same_steps(pair, theirs, lora.optim.lora_fa(optax.adam(RATE, eps=1e-12)))
    for path, update in end.items():
        if isinstance(update, lora.LowRank):
            np.testing.assert_array_equal(update.a, start[path].a)


def test_lora_fa_of_theirs_leaves_tables_as_they_start(tmp_path: Path) -> None:
    """Why look-up tables train both factors here: from PEFT's start, where A is zero, nothing would move."""
    torch.manual_seed(0)
    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["embed", "q"]))
    theirs = create_lorafa_optimizer(model, r=2, lora_alpha=8, lr=RATE)
    before = numbers(model.state_dict())
    for _ in range(2):
        model(torch.arange(8).reshape(2, 4)).square().sum().backward()
        theirs.step()
    moved = {name for name, value in numbers(model.state_dict()).items() if (value != before[name]).any()}
    assert moved
    assert not any("embed" in name for name in moved)
