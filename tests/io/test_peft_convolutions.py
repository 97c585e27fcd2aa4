"""Convolutions in PEFT's files: every layout of a kernel, groups, and what has no place there."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import assert_close, assert_same, random_adapter
from peft_models import Model, Params, draw, flat, nested, replaced

import lora_jax as lora
from lora_jax.adapter.site import Site
from lora_jax.io.peft import Module, Names, PeftFiles, read_peft, write_peft

LAYOUTS = ["HWIO", "OIHW", "OHWI", "IHWO", "HOWI"]


def laid_out(layout: str, groups: int) -> Model:
    """A convolution with 2 × `groups` input channels, 6 outputs and a window of 3 by 1."""
    sizes, numbers = {"H": 3, "W": 1, "I": 2, "O": 6}, ("NCHW", layout, "NCHW")

    def run(params: Params, x: jax.Array) -> jax.Array:
        kernel = params["layer"]["kernel"]
        out = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=numbers, feature_group_count=groups)  # fmt: skip
        return out + params["layer"]["bias"].reshape(1, -1, 1, 1)

    params = nested({"layer/kernel": draw(*(sizes[axis] for axis in layout)), "layer/bias": draw(6)})
    return Model(run, params, draw(2, 2 * groups, 8, 7))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_convolutions(layout: str, groups: int, tmp_path: Path) -> None:
    model = laid_out(layout, groups)
    site = model.sites["layer/kernel"]
    assert (site.channel_axis, site.groups) == (layout.index("I"), groups)
    adapter = random_adapter(model.sites, rank=2)
    lora.peft.save(tmp_path / "a", adapter, sites=model.sites)
    files = read_peft(tmp_path / "a")
    a, b = files.modules["layer"].a, files.modules["layer"].b
    assert (a.shape, b.shape) == ((2 * groups, 2 * groups, 3, 1), (6, 2, 1, 1))
    rows = b.reshape(groups, -1, 2)
    kernels = [files.scale("layer") * np.tensordot(rows[g], a[2 * g : 2 * g + 2], 1) for g in range(groups)]
    written = np.concatenate([kernel[:, 2 * g : 2 * g + 2] for g, kernel in enumerate(kernels)])
    delta = np.asarray(adapter["layer/kernel"].delta()).transpose([layout.index(axis) for axis in "OIHW"])
    assert_close(written.astype(np.float32), delta)
    assert not any(np.delete(kernel, np.s_[2 * g : 2 * g + 2], 1).any() for g, kernel in enumerate(kernels))
    assert_same(lora.peft.load(tmp_path / "a", model.params, model.sites), adapter)
    lora.peft.save(tmp_path / "b", replaced(model, "layer/kernel"), sites=model.sites, params=model.params)
    saved = read_peft(tmp_path / "b").saved["layer.weight"]
    assert_same(saved, np.asarray(model.params["layer"]["kernel"] + 1).transpose([layout.index(a) for a in "OIHW"]))


def test_groups_of_channels_with_factors_of_their_own(tmp_path: Path) -> None:
    model, a = laid_out("OHWI", 3), np.zeros((6, 6, 3, 1), np.float32)
    for g in range(3):
        a[2 * g : 2 * g + 2, 2 * g : 2 * g + 2] = draw(2, 2, 3, 1) + g
    module = Module("conv", a, np.asarray(draw(6, 2, 1, 1)))
    write_peft(tmp_path / "a", PeftFiles({"r": 6, "lora_alpha": 3, "target_modules": ["layer"]}, {"layer": module}))
    update = lora.peft.load(tmp_path / "a", model.params, model.sites)["layer/kernel"]
    kernels = [0.5 * np.tensordot(module.b[2 * g : 2 * g + 2, :, 0, 0], a[2 * g : 2 * g + 2], 1) for g in range(3)]
    expected = np.concatenate([kernel[:, 2 * g : 2 * g + 2] for g, kernel in enumerate(kernels)])
    assert update.rank == 6
    assert_close(np.asarray(update.delta()).transpose(0, 3, 1, 2), expected.astype(np.float32))
    a[0, 3] = 1e-3
    write_peft(tmp_path / "b", PeftFiles({"r": 6, "target_modules": ["layer"]}, {"layer": module}))
    with pytest.raises(lora.CheckpointError, match="layer is a convolution in groups: PEFT's A reads every input"):
        lora.peft.load(tmp_path / "b", model.params, model.sites)


def test_convolutions_in_groups_that_have_no_place_in_peft(tmp_path: Path) -> None:
    model = laid_out("HWIO", 3)
    update = random_adapter(model.sites)["layer/kernel"]
    with pytest.raises(lora.CheckpointError, match="PEFT has no DoRA for a convolution in groups"):
        lora.peft.save(tmp_path / "a", lora.Adapter({update.site.path: dora(update, model)}))
    with pytest.raises(lora.MatchError, match="a convolution in groups, whose outputs several modules cannot share"):
        lora.peft.save(tmp_path / "a", lora.Adapter({update.site.path: update}), Names([("layer/kernel", ("q", "k"))]))


def dora(update: Any, model: Model) -> lora.methods.Dora:
    return lora.methods.Dora.around(update, flat(model.params)[update.site.path])


def test_a_site_by_hand_tells_where_the_channels_are(tmp_path: Path) -> None:
    site = Site(path="c/w", shape=(3, 2, 4), dtype="float32", kind="conv", in_axes=(0, 1), out_axes=(2,))
    with pytest.raises(lora.CheckpointError, match="its Site does not tell which axis counts channels"):
        lora.peft.save(tmp_path / "a", random_adapter([site]))
    lora.peft.save(tmp_path / "a", random_adapter([replace(site, channel_axis=0)]))
    assert read_peft(tmp_path / "a").modules["c"].a.shape == (2, 3, 2)
    with pytest.raises(lora.ParameterError, match=r"channel_axis=2 is none of \(0, 1\)"):
        replace(site, channel_axis=2)
