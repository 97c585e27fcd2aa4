"""Whole tensors in PEFT's files: parameters trained in full, the base's tables, and tied ones."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same, random_adapter
from peft_models import (
    CONV1D,
    Model,
    Params,
    draw,
    linear,
    nested,
    replaced,
)
from safetensors.numpy import load_file
from test_peft_io import ARRAYS, MODELS, NET, TIED, TIED_NET, TOKENS, dense, written

import lora_jax as lora
from lora_jax.adapter.site import Site
from lora_jax.io.peft import Names, PeftFiles, read_peft, write_peft

# Whole tensors.


@pytest.mark.parametrize(
    ("paths", "modules", "bias", "tensors"),
    [
        (["head/kernel", "head/bias"], ["head"], "none", ["head.bias", "head.weight"]),
        (["head/kernel"], ["head"], "none", ["head.bias", "head.weight"]),
        (["layers_0/up/bias"], None, "all", ["layers.0.up.bias"]),
        (["embed/embedding", "layers_1/attn/q/bias"], ["embed"], "all", ["embed.weight", "layers.1.attn.q.bias"]),
    ],
)
def test_parameters_trained_in_full(
    paths: list[str], modules: list[str] | None, bias: str, tensors: list[str], tmp_path: Path
) -> None:
    adapter = replaced(NET, *paths)
    lora.peft.save(tmp_path / "a", adapter, sites=NET.sites, params=NET.params)
    files = read_peft(tmp_path / "a")
    assert (files.config["modules_to_save"], files.config["bias"], sorted(files.saved)) == (modules, bias, tensors)
    loaded = lora.peft.load(tmp_path / "a", NET.params, NET.sites)
    assert_same({path: loaded[path].value for path in paths}, {path: adapter[path].value for path in paths})
    assert_same(lora.merge(NET.params, loaded), lora.merge(NET.params, adapter))


def test_biases_beside_factors_are_lora_only(tmp_path: Path) -> None:
    low = random_adapter([NET.sites["layers_0/up/kernel"]])
    lora.peft.save(tmp_path / "a", lora.Adapter({**low, **replaced(NET, "layers_0/up/bias")}), sites=NET.sites)
    assert read_peft(tmp_path / "a").config["bias"] == "lora_only"
    assert "base_model.model.layers.0.up.base_layer.bias" in load_file(tmp_path / "a" / ARRAYS)


def test_a_bias_called_b_is_a_bias_in_pytorch(tmp_path: Path) -> None:
    params = nested({"linear/w": draw(3, 2), "linear/b": draw(2)})
    model = Model(lambda p, x: x @ p["linear"]["w"] + p["linear"]["b"][None], params, draw(1, 3))
    lora.peft.save(tmp_path / "a", replaced(model, "linear/b"), sites=model.sites)
    assert list(read_peft(tmp_path / "a").saved) == ["linear.bias"]
    assert list(lora.peft.load(tmp_path / "a", params, model.sites)) == ["linear/b"]


@pytest.mark.parametrize("name", ["conv 1-D", "conv 2-D", "conv 3-D"])
def test_convolutions_trained_in_full(name: str, tmp_path: Path) -> None:
    model = MODELS[name]
    adapter = replaced(model, "layer/kernel")
    lora.peft.save(tmp_path / "a", adapter, sites=model.sites, params=model.params)
    kernel = np.asarray(adapter["layer/kernel"].value)
    assert_same(read_peft(tmp_path / "a").saved["layer.weight"], kernel.transpose(-1, -2, *range(kernel.ndim - 2)))
    loaded = lora.peft.load(tmp_path / "a", model.params, model.sites)
    assert_same(loaded["layer/kernel"], adapter["layer/kernel"])


def test_whole_tensors_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    saved = {"head.weight": np.ones((5, 4), np.float32), "score.weight": np.ones((4, 5), np.float32)}
    config = {"r": 2, "modules_to_save": ["head", "score", "up"]}
    write_peft(tmp_path / "a", PeftFiles(config, {}, saved))
    adapter, unmatched = lora.peft.load(tmp_path / "a", NET.params, NET.sites, strict=False)
    wrong = "head.weight has shape (5, 4), where head/kernel needs (4, 5)"
    assert (len(adapter), unmatched) == (0, (("up",), ("score.weight",), (wrong,)))
    with pytest.raises(lora.CheckpointError, match=r"Unexpected: score.weight. Nearest to score.weight: .*\.weight"):
        lora.peft.load(tmp_path / "a", NET.params, NET.sites)


def test_several_parameters_of_a_module_need_an_order(tmp_path: Path) -> None:
    axes: dict[str, Any] = {"batch_axes": (0,), "in_axes": (1,), "out_axes": (2,)}
    up, down = (Site(path=f"moe/{n}", shape=(2, 3, 4), dtype="float32", kind="ragged", **axes) for n in ("up", "down"))
    with pytest.raises(lora.CheckpointError, match="Give names with rules in that order"):
        lora.peft.save(tmp_path / "a", random_adapter([up, down]))
    names = Names([("moe/up", "experts.up"), ("moe/down", "experts.down")])
    lora.peft.save(tmp_path / "a", random_adapter([up, down]), names)
    files = read_peft(tmp_path / "a")
    assert files.config["target_parameters"] == ["experts.down", "experts.up"]
    assert sorted(files.modules) == ["experts", "experts.base_layer"]
    lora.peft.save(tmp_path / "b", random_adapter([down]))
    assert sorted(read_peft(tmp_path / "b").modules) == ["moe"]


def test_conv1d_layers_and_experts_are_not_for_one_file(tmp_path: Path) -> None:
    moe = Site(
        path="moe/up", shape=(2, 3, 4), dtype="float32", kind="dense", batch_axes=(0,), in_axes=(1,), out_axes=(2,)
    )
    names = Names([("moe/up", "experts.up"), ("q/kernel", "q")], fan_in_fan_out=True)
    with pytest.raises(
        lora.CheckpointError, match=r"Conv1D layers \(q\) or single parameters \(experts.up\), not both"
    ):
        lora.peft.save(tmp_path / "a", random_adapter([moe, dense("q")]), names)
    lora.peft.save(tmp_path / "a", random_adapter([moe]), names)
    assert read_peft(tmp_path / "a").config["fan_in_fan_out"] is False


def test_biases_of_heads_are_flat_in_pytorch(tmp_path: Path) -> None:
    params = nested({"q/kernel": draw(3, 2, 4), "q/bias": draw(2, 4)})
    model = Model(
        lambda p, x: jnp.einsum("bd,dnh->bnh", x, p["q"]["kernel"]) + p["q"]["bias"][None], params, draw(1, 3)
    )
    adapter = lora.Adapter({**random_adapter(model.sites), **replaced(model, "q/bias")})
    lora.peft.save(tmp_path / "a", adapter, sites=model.sites)
    assert_same(read_peft(tmp_path / "a").saved["q.bias"], np.asarray(params["q"]["bias"] + 1).reshape(8))
    assert_same(lora.peft.load(tmp_path / "a", params, model.sites), adapter)


def test_numbers_without_an_axis(tmp_path: Path) -> None:
    params = nested({"up/kernel": draw(3, 2), "up/temperature": jnp.float32(0.5)})
    model = Model(lambda p, x: x @ p["up"]["kernel"] / p["up"]["temperature"], params, draw(1, 3))
    lora.peft.save(tmp_path / "a", replaced(model, "up/temperature"), sites=model.sites, params=params)
    assert load_file(tmp_path / "a" / ARRAYS)["base_model.model.up.temperature"].shape == ()
    loaded = lora.peft.load(tmp_path / "a", params, model.sites)
    assert_same(loaded["up/temperature"].value, jnp.float32(1.5))


def test_parts_of_a_module_need_the_base(tmp_path: Path) -> None:
    with pytest.raises(lora.ParameterError, match="The value of 'head/bias' is to be written too: pass params="):
        lora.peft.save(tmp_path / "a", replaced(NET, "head/kernel"), sites=NET.sites)


@pytest.mark.parametrize("other", ["subhead", "head.inner"])
def test_modules_that_peft_would_take_for_a_saved_one(other: str, tmp_path: Path) -> None:
    head = lora.Replace(draw(3, 2), dense("head"))
    adapter = lora.Adapter({**random_adapter([dense(other)]), "head/kernel": head})
    with pytest.raises(lora.CheckpointError, match=f"PEFT would take '{other}' for it too"):
        lora.peft.save(tmp_path / "a", adapter)


def test_a_head_beside_conv1d_layers_is_linear(tmp_path: Path) -> None:
    model = MODELS["square Conv1D"]
    params = {**model.params, "lm_head": {"kernel": draw(5, 5) * 2}}
    both = Model(lambda p, x: linear(p, x) @ p["lm_head"]["kernel"], params, model.x, CONV1D)
    adapter = replaced(both, "lm_head/kernel", "layer/kernel")
    lora.peft.save(tmp_path / "a", adapter, CONV1D, sites=both.sites)
    saved = read_peft(tmp_path / "a").saved
    assert_same(saved["lm_head.weight"], np.asarray(params["lm_head"]["kernel"] + 1).T)
    assert_same(saved["layer.weight"], np.asarray(params["layer"]["kernel"] + 1))
    loaded = lora.peft.load(tmp_path / "a", params, both.sites, CONV1D)
    assert_same(lora.merge(params, loaded), lora.merge(params, adapter))


# Tables of the base.

LM = Names([("embed/embedding", "embed_tokens"), ("position/embedding", "wpe"), ("head/kernel", "lm_head")])


def language_model() -> Model:
    params = nested({"embed/embedding": draw(9, 4), "position/embedding": draw(6, 4), "head/kernel": draw(4, 9)})

    def fn(p: Params, tokens: jax.Array) -> jax.Array:
        x = p["embed"]["embedding"][tokens] + p["position"]["embedding"][jnp.arange(tokens.shape[1])][None]
        return x @ p["head"]["kernel"]

    return Model(fn, params, TOKENS, LM)


@pytest.mark.parametrize(
    ("policy", "vocabulary", "tables"),
    [
        ("auto", None, False), ("auto", 9, False), ("auto", 7, True),
        (False, 7, False), (True, None, True), (True, 9, True),
    ],
)  # fmt: skip
def test_tables_of_the_base(policy: Any, vocabulary: int | None, tables: bool, tmp_path: Path) -> None:
    model, base = language_model(), tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"vocab_size": vocabulary}))
    options = {"sites": model.sites, "params": model.params, "base_model": str(base), "save_embedding_layers": policy}
    adapter = random_adapter(model.sites)
    lora.peft.save(tmp_path / "a", adapter, LM, **options)
    saved = read_peft(tmp_path / "a").saved
    assert sorted(saved) == (["embed_tokens.weight", "lm_head.weight"] if tables else [])
    if tables:
        assert_same(saved["lm_head.weight"], np.asarray(model.params["head"]["kernel"]).T)
    assert_same(lora.peft.load(tmp_path / "a", model.params, model.sites, LM), adapter)


def test_a_table_that_changed(tmp_path: Path) -> None:
    model = language_model()
    only_head = random_adapter([model.sites["head/kernel"]])
    options = {"sites": model.sites, "params": model.params, "save_embedding_layers": True}
    lora.peft.save(tmp_path / "a", only_head, LM, **options)
    table = model.params["embed"]["embedding"]
    changed = {**model.params, "embed": {"embedding": table + 1}}
    loaded = lora.peft.load(tmp_path / "a", changed, model.sites, LM)
    assert_same(loaded["embed/embedding"].value, table)
    changed = {**model.params, "head": {"kernel": table.T + 1}}
    with pytest.raises(lora.CheckpointError, match="it differs from 'head/kernel', and factors are stored for it too"):
        lora.peft.load(tmp_path / "a", changed, model.sites, LM)
    with pytest.raises(lora.CheckpointError, match="abstract parameters do not tell whether it changed"):
        lora.peft.load(tmp_path / "a", jax.eval_shape(lambda: model.params), model.sites, LM)


def test_tables_that_peft_has_no_name_for(tmp_path: Path) -> None:
    q, params = random_adapter([dense("q")]), nested({"q/kernel": draw(3, 2)})
    with pytest.raises(lora.CheckpointError, match="no table or head here has a name that PEFT knows"):
        lora.peft.save(tmp_path / "a", q, params=params, save_embedding_layers=True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not readable as JSON"),
        ("[]", "holds a list, not the object"),
        ('{"text_config": 3}', "is no config of a model"),
    ],
)
def test_the_config_of_a_base_that_is_none(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(lora.CheckpointError, match=said):
        lora.peft.save(tmp_path / "a", random_adapter([dense("q")]), base_model=str(tmp_path))


# Tied tables.


def test_tied_tables_are_written_for_both_uses(tmp_path: Path) -> None:
    files = read_peft(written(tmp_path / "a", TIED_NET))
    assert files.config["ensure_weight_tying"] is True
    assert_same(files.modules["lm_head"].a, files.modules["embed"].b.T)
    assert_same(files.modules["lm_head"].b, files.modules["embed"].a.T)
    lora.peft.save(tmp_path / "b", replaced(TIED_NET, "embed/embedding"), TIED, sites=TIED_NET.sites)
    whole = read_peft(tmp_path / "b")
    assert (whole.config["ensure_weight_tying"], whole.config["modules_to_save"]) == (True, ["embed"])
    assert_same(whole.saved["lm_head.weight"], whole.saved["embed.weight"])
    loaded = lora.peft.load(tmp_path / "b", TIED_NET.params, TIED_NET.sites, TIED)
    assert_same(loaded["embed/embedding"].value, TIED_NET.params["embed"]["embedding"] + 1)


@pytest.mark.parametrize("adapter", [random_adapter(TIED_NET.sites), replaced(TIED_NET, "embed/embedding")])
def test_tied_tables_without_a_name_for_the_head_are_refused(adapter: lora.Adapter, tmp_path: Path) -> None:
    with pytest.raises(lora.CheckpointError, match=r"name its head: Names\(tied={'embed': 'lm_head'}\)"):
        lora.peft.save(tmp_path / "a", adapter)


@pytest.mark.parametrize("lost", ["embed", "lm_head"])
def test_one_use_of_a_tied_table_is_refused(lost: str, tmp_path: Path) -> None:
    files = read_peft(written(tmp_path / "a", TIED_NET))
    modules = {name: module for name, module in files.modules.items() if name != lost}
    write_peft(tmp_path / "b", PeftFiles(files.config, modules))
    kept = "lm_head" if lost == "embed" else "embed"
    saved = {f"{kept}.weight": np.asarray(draw(9, 4))}
    write_peft(tmp_path / "c", PeftFiles({"r": 2, "modules_to_save": [kept]}, {}, saved))
    for name in "bc":
        with pytest.raises(lora.CheckpointError, match=r"one table for (both )?look-up and output head"):
            lora.peft.load(tmp_path / name, TIED_NET.params, TIED_NET.sites, TIED)
