"""What PEFT's TRAINABLE_TOKENS and LN_TUNING compute, the merged checkpoint computes, and PEFT what is written here."""

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

import jax
import jax.numpy as jnp
from helpers import assert_close, assert_same
from safetensors.torch import load_file, save_file
from torch import nn
from torch_side import adapted, numbers, opened, run

import lora_jax as lora
from lora_jax.io.peft import merge_checkpoint
from lora_jax.jsonfile import read_object


class Model(nn.Module):
    """A table, two norms of which one has no bias, and a linear layer between."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.up = nn.Embedding(11, 6), nn.LayerNorm(6), nn.Linear(6, 6)
        self.last = nn.LayerNorm(6, bias=False)

    def forward(self, x: Any) -> Any:
        return self.last(torch.tanh(self.up(self.norm(self.embed(x)))))


@pytest.mark.parametrize(
    "options",
    [
        {"config": peft.TrainableTokensConfig, "target_modules": ["embed"], "token_indices": [7, 2]},
        {"config": peft.TrainableTokensConfig, "target_modules": "emb.*", "token_indices": [3]},
        {"config": peft.LNTuningConfig, "target_modules": ["norm", "last"]},
        {"config": peft.LNTuningConfig, "target_modules": ["up"], "modules_to_save": ["norm"]},
    ],
    ids=["tokens", "tokens by a regex", "norms", "a layer and a saved norm"],
)
def test_a_merged_checkpoint_computes_the_same(options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Model()
    (tmp_path / "base").mkdir()
    save_file(base.state_dict(), tmp_path / "base" / "model.safetensors")
    model = adapted(base, **options)
    x = torch.randint(0, 11, (2, 9))
    want = run(model, x)
    model.save_pretrained(str(tmp_path / "given"))
    merge_checkpoint(tmp_path / "base", tmp_path / "given", tmp_path / "out")
    again = Model()
    again.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    assert_close(run(again, x), want)


def model(params: Any, tokens: Any) -> Any:
    """`Model` in JAX."""

    def normed(x: Any, layer: Any) -> Any:
        x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
        bias = layer["bias"][None, None] if "bias" in layer else 0
        return x * layer["scale"][None, None] + bias

    x = normed(params["embed"]["embedding"][tokens], params["norm"])
    return normed(jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"][None, None]), params["last"])


def twin() -> tuple[Model, Any, lora.Sites]:
    torch.manual_seed(0)
    base = Model()
    state = numbers(base.state_dict())
    params = {
        "embed": {"embedding": jnp.asarray(state["embed.weight"])},
        "norm": {"scale": jnp.asarray(state["norm.weight"]), "bias": jnp.asarray(state["norm.bias"])},
        "up": {"kernel": jnp.asarray(state["up.weight"].T), "bias": jnp.asarray(state["up.bias"])},
        "last": {"scale": jnp.asarray(state["last.weight"])},
    }
    return base, params, lora.find_sites(model, params, jnp.zeros((2, 3), jnp.int32))


def moved(config: lora.LoraConfig, params: Any, sites: lora.Sites) -> lora.Adapter:
    """What a config trains beside factors, with other numbers in it."""
    started = lora.init(jax.random.key(0), config, params, sites)
    adapter = lora.Adapter({path: each for path, each in started.items() if not isinstance(each, lora.LowRank)})
    keys = iter(jax.random.split(jax.random.key(1), 100))
    change = lambda leaf, train: leaf + jax.random.normal(next(keys), leaf.shape) / 3 if train else leaf  # noqa: E731
    return jax.tree.map(change, adapter, lora.trainable(adapter))


@pytest.mark.parametrize(
    ("options", "written"),
    [
        ({"trainable_tokens": (7, 2)}, {"peft_type": "TRAINABLE_TOKENS", "target_modules": ["embed"]}),
        ({"train": ("norm", "last")}, {"peft_type": "LN_TUNING", "target_modules": ["last", "norm"]}),
        ({"train": ("norm/scale", "last")}, {"peft_type": "LN_TUNING", "target_modules": ["last", "norm"]}),
        ({"train": ("norm", "up"), "targets": ("embed",)}, {"target_modules": ["norm"], "modules_to_save": ["up"]}),
        ({"train": ("norm", "embed")}, {"target_modules": ["norm"], "modules_to_save": ["embed"]}),
        (
            {"train": ("up",), "targets": ("embed",)},
            {"peft_type": "LN_TUNING", "target_modules": ["up"], "modules_to_save": None},
        ),
        ({"train": ("embed",)}, {"peft_type": "LN_TUNING", "target_modules": ["embed"]}),
    ],
    ids=str,
)
def test_what_has_no_factors_in_peft(options: dict[str, Any], written: dict[str, Any], tmp_path: Path) -> None:
    base, params, sites = twin()
    adapter = moved(lora.LoraConfig(**{"targets": ("up",)} | options), params, sites)
    lora.peft.save(tmp_path / "ours", adapter, sites=sites, params=params)
    config = read_object(tmp_path / "ours" / "adapter_config.json") or {}
    assert {field: config.get(field) for field in written} == written
    x = torch.randint(0, 11, (2, 9))
    want = lora.adapt(model)(params, adapter, jnp.asarray(x.numpy()))
    assert_close(run(opened(base, tmp_path / "ours"), x), want)
    back = lora.peft.load(tmp_path / "ours", params, sites)
    assert_same({path: back[path] for path in adapter}, dict(adapter))
    assert lora.peft.portability(tmp_path / "ours").rows[-1].verdict == "reads"


def test_another_base_is_known_without_factors_too(tmp_path: Path) -> None:
    _, params, sites = twin()
    adapter = moved(lora.LoraConfig(targets=("up",), train=("norm",)), params, sites)
    lora.peft.save(tmp_path / "ours", adapter, sites=sites, params=params)
    with pytest.raises(lora.CheckpointError, match="another base"):
        lora.peft.load(tmp_path / "ours", jax.tree.map(lambda leaf: leaf + 0.01, params), sites)
