"""Layers that `flax.linen.scan` stacks are modules of their own in PEFT's files, without a map."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, random_adapter
from peft_models import draw

import lora_jax as lora
from lora_jax.adapter.site import Site
from lora_jax.io.peft import read_peft


class Block(nn.Module):
    """A layer as `nn.scan` takes it."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return x + nn.Dense(4, name="down")(jnp.tanh(nn.Dense(6, name="up")(x))), None


class Scanned(nn.Module):
    """Three of them, stacked."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layers = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(name="layers")
        return layers(x, None)[0]


def test_scanned_linen_layers_need_no_map(tmp_path: Path) -> None:
    model, x = Scanned(), draw(2, 4)
    variables = model.init(jax.random.key(0), x)
    sites = lora.find_sites(model.apply, variables, x)
    adapter = random_adapter(sites)
    lora.peft.save(tmp_path / "a", adapter, sites=sites)
    files = read_peft(tmp_path / "a")
    assert sorted(files.modules) == sorted(f"layers.{i}.{name}" for i in range(3) for name in ("up", "down"))
    update = adapter["params/layers/up/kernel"]
    assert isinstance(update, lora.LowRank)
    for i in range(3):
        own = np.asarray(update.delta()[i]).T
        assert_close(files.delta(f"layers.{i}.up", (6, 4)), own)
    assert_close(
        lora.merge(variables, lora.peft.load(tmp_path / "a", variables, sites)), lora.merge(variables, adapter)
    )
    bias = Site(path="params/layers/up/bias", shape=(3, 6), dtype="float32", kind="full")
    with pytest.raises(lora.MatchError, match="stack of weights"):
        lora.peft.save(tmp_path / "b", lora.Adapter({bias.path: lora.Replace(draw(3, 6), bias)}), sites=sites)
