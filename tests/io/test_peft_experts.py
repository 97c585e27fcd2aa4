"""Experts in PEFT's files: one rank and scale for all of them, as transformers 5 fuses them on the way in."""

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, random_adapter

import lora_jax as lora
from lora_jax.adapter.site import Site

ROUTED = [
    Site(path="model/layers/mlp/experts/up_proj/weight", shape=(2, 3, 6, 4), dtype="float32", kind="ragged",
         in_axes=(3,), out_axes=(2,), batch_axes=(0, 1)),
    Site(path="model/layers/mlp/gate/weight", shape=(2, 3, 4), dtype="float32", kind="dense",
         in_axes=(2,), out_axes=(1,), batch_axes=(0,)),
]  # fmt: skip
DENSE = Site(path="model/layers/self_attn/q_proj/weight", shape=(2, 6, 4), dtype="float32", kind="dense",
             in_axes=(2,), out_axes=(1,), batch_axes=(0,))  # fmt: skip


@pytest.mark.parametrize("rank", [2, 3])
def test_the_config_has_the_rank_and_scale_of_experts(rank: int, tmp_path: Path):
    adapter = lora.Adapter({**random_adapter(ROUTED, rank=rank), **random_adapter([DENSE], rank=4)})
    lora.peft.save(tmp_path / "a", adapter)
    files = lora.peft.read_peft(tmp_path / "a")
    assert files.config["r"] == rank
    routed = {name for name in files.modules if "mlp" in name}
    assert len(routed) == 2 * 3 + 2
    keys = [*files.config["rank_pattern"], *files.config["alpha_pattern"]]
    assert keys and all("q_proj" in key for key in keys)
    assert {files.scale(name) for name in routed} == {files.config["lora_alpha"] / rank}
    up, own = files.modules["model.layers.1.mlp.experts.2.up_proj"], adapter[ROUTED[0].path]
    scale = np.float32(files.scale("model.layers.1.mlp.experts.2.up_proj"))
    assert_close(scale * up.b @ up.a, np.asarray(own.delta())[1, 2])


def test_experts_of_one_scale_keep_their_numbers(tmp_path: Path):
    drawn = random_adapter(ROUTED)
    alike = lora.Adapter(
        {path: replace(each, scale=jnp.full(each.scale.shape, 1.37, jnp.float32)) for path, each in drawn.items()}
    )
    lora.peft.save(tmp_path / "a", alike)
    files = lora.peft.read_peft(tmp_path / "a")
    b = files.modules["model.layers.0.mlp.experts.1.up_proj"].b
    np.testing.assert_array_equal(b, np.asarray(alike[ROUTED[0].path].b)[0, 1].T)
