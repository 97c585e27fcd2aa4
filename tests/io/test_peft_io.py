"""PEFT directories both ways: round trips of every kind of layer, strictness, tables of the base, refusals."""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_same, cast_floats, random_adapter
from peft_models import (
    CONV1D,
    EXPERTS,
    SCANNED,
    Model,
    Params,
    conv,
    draw,
    experts,
    linear,
    nested,
    net,
    net_params,
    replaced,
    scanned_net,
    stacked,
)
from safetensors.numpy import load_file, save_file
from table import CASES
from table.registry import Case

import lora_jax as lora
from lora_jax.adapter.site import Site, Sites
from lora_jax.io.peft import Module, Names, PeftFiles, Rule, read_peft, write_peft

FILES = ["adapter_config.json", "adapter_model.safetensors"]
ARRAYS = FILES[1]
TOKENS = jnp.asarray([[1, 7, 3], [0, 2, 2]])


def attention(params: Params, x: jax.Array) -> jax.Array:
    q, k, v = jnp.einsum("btd,dcnh->cbtnh", x, params["qkv"]["kernel"])
    weights = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k))
    return jnp.einsum("bnts,bsnh,nhd->btd", weights, v, params["out"]["kernel"])


def tied(params: Params, tokens: jax.Array) -> jax.Array:
    table = params["embed"]["embedding"]
    return jnp.tanh(table[tokens] @ params["up"]["kernel"]) @ table.T


def out_first_experts(params: Params, x: jax.Array) -> jax.Array:
    layer = {name: jnp.swapaxes(weight, 1, 2) for name, weight in params["layer"].items()}
    return experts({"layer": layer}, x)


FUSED = Names([Rule("qkv/kernel", ("q_proj", "k_proj", "v_proj")), Rule("out/kernel", "o_proj")])
TIED = Names(tied={"embed": "lm_head"})
NET = Model(net, net_params(), TOKENS)
TIED_NET = Model(tied, nested({"embed/embedding": draw(9, 4), "up/kernel": draw(4, 4)}), TOKENS, TIED)
UP, DOWN = "layer/gate_up_proj", "layer/down_proj"
MODELS = {
    "dense and embedding": NET,
    "Conv1D": Model(linear, nested({"layer/kernel": draw(5, 9)}), draw(2, 5), CONV1D),
    "square Conv1D": Model(linear, nested({"layer/kernel": draw(5, 5)}), draw(2, 5), CONV1D),
    "conv 1-D": Model(conv(), nested({"layer/kernel": draw(3, 4, 6), "layer/bias": draw(6)}), draw(2, 4, 9)),
    "conv 2-D": Model(conv(), nested({"layer/kernel": draw(3, 2, 4, 6), "layer/bias": draw(6)}), draw(2, 4, 8, 7)),
    "conv 3-D": Model(conv(), nested({"layer/kernel": draw(3, 2, 1, 2, 5), "layer/bias": draw(5)}), draw(2, 2, 5, 4, 3)),
    "experts": Model(experts, nested({UP: draw(3, 6, 10), DOWN: draw(3, 5, 6)}), draw(4, 6), EXPERTS),
    "experts, outputs first": Model(out_first_experts, nested({UP: draw(3, 10, 6), DOWN: draw(3, 6, 5)}), draw(4, 6), EXPERTS),
    "scanned on axes 0 and 1": Model(scanned_net, stacked(net_params()), TOKENS, SCANNED),
    "heads and fused": Model(attention, nested({"qkv/kernel": draw(6, 3, 2, 4), "out/kernel": draw(2, 4, 6)}), draw(2, 5, 6), FUSED),
    "tied": TIED_NET,
}  # fmt: skip


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_round_trip(model: Model, tmp_path: Path) -> None:
    adapter, sites = random_adapter(model.sites, rank=3, dropout=0.0), model.sites
    before = jax.tree.map(np.array, adapter)
    lora.peft.save(tmp_path / "a", adapter, model.names, sites=sites)
    loaded = lora.peft.load(tmp_path / "a", model.params, sites, model.names)
    assert_same(adapter, before)
    assert sorted(loaded) == sorted(adapter) and len(adapter) > 0
    assert_close(lora.merge(model.params, loaded), lora.merge(model.params, adapter))
    if model.names is not EXPERTS:  # PEFT has one scale for all experts: the others' are in B
        assert_same(loaded, adapter)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == FILES
    assert_same(lora.peft.load(tmp_path / "a", jax.eval_shape(lambda: model.params), sites, model.names), loaded)


def test_experts_with_one_scale_come_back_bit_for_bit(tmp_path: Path) -> None:
    model = MODELS["experts"]
    adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=3, targets=".*"), model.params, model.sites)
    lora.peft.save(tmp_path / "a", adapter, model.names)
    assert_same(lora.peft.load(tmp_path / "a", model.params, model.sites, model.names), adapter)


def test_the_file_is_as_large_as_the_adapter(tmp_path: Path) -> None:
    params = nested({"embed_tokens/embedding": draw(512, 256), "lm_head/kernel": draw(256, 512)})
    fn = lambda p, x: p["embed_tokens"]["embedding"][x] @ p["lm_head"]["kernel"]  # noqa: E731
    sites = lora.find_sites(fn, params, TOKENS)
    lora.peft.save(tmp_path / "a", random_adapter(sites, rank=8), sites=sites, params=params)
    parameters = 2 * 8 * (512 + 256)
    assert 0 < (tmp_path / "a" / ARRAYS).stat().st_size - 4 * parameters < 1000  # names, shapes, samples of the base


def test_strided_arrays_are_written_as_they_are(tmp_path: Path) -> None:
    a, b = np.asarray(draw(6, 2)).T, np.asarray(draw(8, 4))[::2, ::2]
    assert not a.flags.c_contiguous and not b.flags.c_contiguous
    write_peft(tmp_path / "a", PeftFiles({"r": 2, "target_modules": ["q"]}, {"q": Module("linear", a, b)}))
    assert_same(read_peft(tmp_path / "a").modules["q"].arrays(), {"a": a, "b": b})


def written(path: Path, model: Model = NET, **config: Any) -> Path:
    """An adapter of all the model's sites at `path`, with fields of its config changed."""
    lora.peft.save(path, random_adapter(model.sites), model.names, sites=model.sites)
    return configured(path, **config)


def configured(path: Path, **config: Any) -> Path:
    fields = json.loads((path / FILES[0]).read_text())
    (path / FILES[0]).write_text(json.dumps(fields | config))
    return path


def rekeyed(path: Path, change: Callable[[str], str], dtype: Any = np.float32) -> Path:
    arrays = load_file(path / ARRAYS)
    save_file({change(key): value.astype(dtype) for key, value in arrays.items()}, path / ARRAYS)
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda key: key.removeprefix("base_model.model."),
        lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda key: "_orig_mod." + key,
        lambda key: re.sub(r"layers\.(\d)\.", r"layers.\1._fsdp_wrapped_module.", key),
        lambda key: re.sub(r"(lora_[AB])\.weight", r"\1.default.weight", re.sub(r"(embedding_[AB])$", r"\1.default", key)),
    ],
    ids=["bare", "compiled", "compiled outside", "FSDP", "live"],
)  # fmt: skip
def test_keys_of_wrapped_models(change: Callable[[str], str], tmp_path: Path) -> None:
    plain = lora.peft.load(written(tmp_path / "a"), NET.params, NET.sites)
    before = load_file(tmp_path / "a" / ARRAYS).keys()
    assert load_file(rekeyed(tmp_path / "a", change) / ARRAYS).keys() != before
    assert_same(lora.peft.load(tmp_path / "a", NET.params, NET.sites), plain)


def test_copies_that_peft_writes_beside_saved_modules(tmp_path: Path) -> None:
    adapter = lora.Adapter(
        {**random_adapter([NET.sites["layers_0/up/kernel"]]), **replaced(NET, "head/kernel", "head/bias")}
    )
    lora.peft.save(tmp_path / "a", adapter, sites=NET.sites)
    arrays = load_file(configured(tmp_path / "a", bias="all") / ARRAYS)
    bias, head = arrays["base_model.model.head.bias"], "base_model.model.head"
    unused = {f"{head}.modules_to_save.bias": bias, f"{head}.original_module.bias": bias - 1}
    save_file(arrays | unused, tmp_path / "a" / ARRAYS)
    assert_same(lora.peft.load(tmp_path / "a", NET.params, NET.sites), adapter)
    save_file(arrays | {f"{head}.modules_to_save.bias": bias + 1}, tmp_path / "a" / ARRAYS)
    with pytest.raises(lora.CheckpointError, match=r"Unexpected: head.modules_to_save.bias"):
        lora.peft.load(tmp_path / "a", NET.params, NET.sites)


def test_arrays_without_a_config_need_an_alpha(tmp_path: Path) -> None:
    with_config = lora.peft.load(written(tmp_path / "a"), NET.params, NET.sites)
    (tmp_path / "a" / FILES[0]).unlink()
    for path in (tmp_path / "a", tmp_path / "a" / ARRAYS):
        with pytest.raises(lora.CheckpointError, match=r"nothing tells what the updates of .*Pass alpha="):
            lora.peft.load(path, NET.params, NET.sites)
        bare = lora.peft.load(path, NET.params, NET.sites, alpha=6)
        assert all(float(update.scale) == 6 / len(update.a) for update in bare.values())
        assert_same({path: each.a for path, each in bare.items()}, {path: each.a for path, each in with_config.items()})


def test_subfolders(tmp_path: Path) -> None:
    expected = lora.peft.load(written(tmp_path / "run" / "style"), NET.params, NET.sites)
    assert_same(lora.peft.load(tmp_path / "run", NET.params, NET.sites, subfolder="style"), expected)
    with pytest.raises(lora.CheckpointError, match=r"Its subdirectories style are adapters: .* pass subfolder='style'"):
        lora.peft.load(tmp_path / "run", NET.params, NET.sites)


def test_bfloat16_bases_have_float32_adapters(tmp_path: Path) -> None:
    params = cast_floats(NET.params, jnp.bfloat16)
    sites = lora.find_sites(net, params, TOKENS)
    lora.peft.save(tmp_path / "a", random_adapter(sites), sites=sites, params=params)
    assert {array.dtype for array in load_file(tmp_path / "a" / ARRAYS).values()} == {np.dtype(np.float32)}
    expected = lora.peft.load(tmp_path / "a", params, sites)
    assert_same(expected, random_adapter(sites))
    low = lora.peft.load(rekeyed(tmp_path / "a", str, jnp.bfloat16), params, sites)
    assert {leaf.dtype for leaf in jax.tree.leaves(low)} == {np.dtype(np.float32)}
    assert_close(low, expected, jnp.bfloat16)


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({"lora_alpha": 3}, {"q": 1.5, "up": 1.5}),
        ({"lora_alpha": None}, {"q": 4.0, "up": 4.0}),
        ({"lora_alpha": 3, "use_rslora": True}, {"q": 3 / np.sqrt(2), "up": 3 / np.sqrt(2)}),
        ({"lora_alpha": 3, "alpha_pattern": {"attn.q": 8, "q": 1, r".*\d.up": 6}}, {"q": 4.0, "up": 3.0}),
        ({"lora_alpha": 3, "alpha_pattern": {"p": 8, "attn": 8, "layers.1.q": 8}}, {"q": 1.5, "up": 1.5}),
        ({"r": 7, "rank_pattern": {"q|v|up|embed|head": 2}, "lora_alpha": 1}, {"q": 0.5, "up": 0.5}),
        ({"r": None, "lora_alpha": 1}, {"q": 0.5, "up": 0.5}),
    ],
)
def test_scales_are_those_of_peft(config: dict[str, Any], scales: dict[str, float], tmp_path: Path) -> None:
    cleared: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}}
    folder = configured(written(tmp_path / "a"), **{**cleared, **config})
    adapter = lora.peft.load(folder, NET.params, NET.sites)
    for path, module in {"layers_0/attn/q/kernel": "q", "layers_1/up/kernel": "up"}.items():
        assert np.asarray(adapter[path].scale) == np.float32(scales[module])


def test_ranks_and_scales_of_their_own_are_written_as_patterns(tmp_path: Path) -> None:
    sites = NET.sites
    adapter = lora.Adapter({path: random_adapter(sites, rank=rank)[path] for rank, path in enumerate(sites, start=1)})
    lora.peft.save(tmp_path / "a", adapter, sites=sites)
    files = read_peft(tmp_path / "a")
    assert len(files.config["rank_pattern"]) == len(files.config["alpha_pattern"]) == len(sites) - 1
    assert_same(lora.peft.load(tmp_path / "a", NET.params, sites), adapter)


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    files = read_peft(written(tmp_path / "a"))
    odd = Module("linear", np.ones((2, 5), np.float32), np.ones((6, 2), np.float32))
    modules = {**files.modules, "layers.0.attn.k": odd, "layers.1.attn.q": odd}
    del modules["layers.0.up"], modules["layers.1.up"]
    write_peft(tmp_path / "b", PeftFiles(files.config, modules))
    with pytest.raises(lora.CheckpointError) as error:
        lora.peft.load(tmp_path / "b", NET.params, NET.sites)
    listed = str(error.value).splitlines()
    assert listed[1].startswith("Unexpected: layers.0.attn.k. Nearest to layers.0.attn.k: layers.0.attn.")
    assert listed[2] == "Missing, although its config names them: layers.0.up; layers.1.up."
    wanted = "layers.1.attn.q has A (2, 5) and B (6, 2), where layers_1/attn/q/kernel needs (2, 5) and (7, 2)"
    assert listed[3] == f"Shaped differently: {wanted}."
    adapter, unmatched = lora.peft.load(tmp_path / "b", NET.params, NET.sites, strict=False)
    assert unmatched == (("layers.0.up", "layers.1.up"), ("layers.0.attn.k",), (wanted,))
    kept = [
        "embed/embedding",
        "head/kernel",
        "layers_0/attn/q/kernel",
        "layers_0/attn/v/kernel",
        "layers_1/attn/v/kernel",
    ]
    assert list(adapter) == kept


def test_what_was_left_out_on_purpose_is_not_missing(tmp_path: Path) -> None:
    files = read_peft(written(tmp_path / "a"))
    modules = {name: module for name, module in files.modules.items() if ".1." not in name}
    write_peft(tmp_path / "b", PeftFiles({**files.config, "exclude_modules": r".*\.1\..*"}, modules))
    write_peft(tmp_path / "c", PeftFiles({**files.config, "layers_to_transform": [0]}, modules))
    assert len(lora.peft.load(tmp_path / "b", NET.params, NET.sites)) == len(modules) == 5
    assert len(lora.peft.load(tmp_path / "c", NET.params, NET.sites)) == 5


def test_the_wrong_map_says_which_sites_have_no_name(tmp_path: Path) -> None:
    with pytest.raises(lora.CheckpointError, match=r"8 sites have no PyTorch name, e.g. .* No rule names"):
        lora.peft.load(written(tmp_path / "a"), NET.params, NET.sites, "gemma")


# Target modules.

TRICKY = ("q", "x.q", "layers.0.q", "layers.1.q", "layers.10.q", "layers.1.seq", "up", "up.0")


def dense(module: str) -> Site:
    path = f"{module.replace('.', '/')}/kernel"
    return Site(path=path, shape=(3, 2), dtype="float32", kind="dense", in_axes=(0,), out_axes=(1,))


def hit(wanted: str | list[str], modules: Iterable[str]) -> set[str]:
    """PEFT's matcher, written out again."""
    if isinstance(wanted, str):
        return {name for name in modules if re.fullmatch(wanted, name)}
    return {name for name in modules if any(name == each or name.endswith(f".{each}") for each in wanted)}


@pytest.mark.parametrize("count", range(1, len(TRICKY) + 1))
def test_target_modules_hit_what_is_adapted_and_nothing_else(count: int, tmp_path: Path) -> None:
    sites = Sites([dense(name) for name in TRICKY])
    known = {".".join(name.split(".")[:end]) for name in TRICKY for end in (1, 2, 3)}
    for place, chosen in enumerate(combinations(TRICKY, count)):
        adapter = random_adapter([dense(name) for name in chosen])
        lora.peft.save(tmp_path / str(place), adapter, sites=sites)
        assert hit(read_peft(tmp_path / str(place)).config["target_modules"], known) == {*chosen}


def test_target_modules_are_full_names_where_not_every_module_is_known(tmp_path: Path) -> None:
    sites = Sites([dense("a.q"), dense("b.q")])
    lora.peft.save(tmp_path / "a", random_adapter([dense("a.q")]))
    lora.peft.save(tmp_path / "b", random_adapter([dense("a.q")]), Names([("a/q/kernel", "a.q")]), sites=sites)
    for name in "ab":
        assert read_peft(tmp_path / name).config["target_modules"] == ["a.q"]


# Refusals.


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"init_lora_weights": "pissa_niter_16"}, "changes the base's weights .* path_initial_model_for_weight_conver"),
        ({"init_lora_weights": "olora"}, "changes the base's weights"),
        ({"init_lora_weights": "corda"}, "changes the base's weights"),
        ({"init_lora_weights": "lora_ga"}, "changes the base's weights"),
        ({"init_lora_weights": "loftq"}, "changes the base's weights"),
        ({"init_lora_weights": "newest"}, "'newest' is unknown"),
        ({"peft_type": "LOHA"}, "peft_type='LOHA' cannot be read; possible: LORA, ADALORA, VERA"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "the model repeats layers that share weights"),
        ({"use_qalora": True}, "QALoRA averages groups"),
        ({"use_bdlora": {"target_modules_bd_a": ["q"]}}, "BD-LoRA stores block-diagonal factors packed"),
        ({"kasa_config": {"beta": 1}}, "KaSA truncates"),
        ({"use_something_new": True}, "use_something_new=True is nothing this version knows"),
    ],
)
def test_configs_that_mean_something_else_are_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(lora.CheckpointError, match=message):
        lora.peft.load(written(tmp_path / "a", **config), NET.params, NET.sites)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("layers.0.up.lora_magnitude_vector", "layers.0.up has a vector of 4 numbers .* which does not fit .* with 5"),
        ("layers.0.up.lora_B.bias", "layers.0.up has a vector of 4 numbers .* which does not fit .* with 5"),
        ("embed.token_adapter.trainable_tokens_delta", r"trained rows of shape \(4,\), and trainable_token_indices"),
        ("layers.0.up.lora_diag", "belongs to KaSA"),
        ("layers.0.up.lora_E", "lora_E is no key of an adapter of peft_type='LORA'"),
        ("layers.0.up.lora_C.weight", "neither factors nor anything its config asks for"),
        ("attn.base_layer.out_proj.lora_A.weight", "torch.nn.MultiheadAttention"),
    ],
)
def test_arrays_that_no_update_holds_are_refused(key: str, message: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a", trainable_token_indices=[1, 2])
    arrays = load_file(path / ARRAYS)
    save_file(arrays | {f"base_model.model.{key}": np.ones(4, np.float32)}, path / ARRAYS)
    with pytest.raises(lora.CheckpointError, match=message):
        lora.peft.load(path, NET.params, NET.sites)


def test_pickles_are_refused_with_the_way_to_convert_them(tmp_path: Path) -> None:
    for name in ("adapter_model.bin", "other.pt"):
        (tmp_path / name).write_bytes(b"\x80\x02")
    for path in (tmp_path, tmp_path / "adapter_model.bin", tmp_path / "other.pt"):
        with pytest.raises(lora.CheckpointError, match=r"is a pickle.*Convert it once.*weights_only=True"):
            lora.peft.load(path, NET.params, NET.sites)


def test_what_peft_has_no_place_for_is_refused(tmp_path: Path) -> None:
    low = random_adapter([dense("q"), dense("k")])
    mixed = lora.Adapter({**low, **random_adapter([dense("k")], dropout=0.1)})
    with pytest.raises(lora.CheckpointError, match=r"different dropout rates \(\[0.0, 0.1\]\)"):
        lora.peft.save(tmp_path / "a", mixed)
    full = Site(path="q/kernel", shape=(3, 2), dtype="float32", kind="full")
    with pytest.raises(lora.CheckpointError, match="so its layout in PyTorch is unknown"):
        lora.peft.save(tmp_path / "a", lora.Adapter({"q/kernel": lora.Replace(draw(3, 2), full)}))
    diverged = jax.tree.map(lambda leaf: leaf * jnp.nan, low)
    for broken in (diverged, lora.scale(low, jnp.inf)):
        with pytest.raises(lora.CheckpointError, match="so nothing is written"):
            lora.peft.save(tmp_path / "a", broken)
    with pytest.raises(lora.CheckpointError, match="the adapter is empty"):
        lora.peft.save(tmp_path / "a", lora.Adapter({}))
    with pytest.raises(lora.ParameterError, match="'k/kernel', which these parameters do not have"):
        lora.peft.save(tmp_path / "a", low, params=nested({"q/kernel": draw(3, 2)}))
    assert not list(tmp_path.iterdir())


def test_dropout_is_kept(tmp_path: Path) -> None:
    lora.peft.save(tmp_path / "a", random_adapter(NET.sites, dropout=0.25), sites=NET.sites)
    assert {each.dropout for each in lora.peft.load(tmp_path / "a", NET.params, NET.sites).values()} == {0.25}


# Every layer of the shared table.


NOT_IN_PEFT = (
    "conv_transpose", "conv_transpose_kernel", "conv2d_fractional", "conv_input_dilation", "batch_grouped_conv",
)  # fmt: skip


def named(sites: Sites) -> Names:
    """A name of its own for each parameter, and a number in it for each stacked axis."""
    numbers = {0: "", 1: ".{i}", 2: ".{i}.{j}", 3: ".{i}.{j}"}
    return Names([(path, f"m{n}{numbers[len(site.batch_axes)]}.p") for n, (path, site) in enumerate(sites.items())])


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.method == "lora" or not case.variant], ids=lambda case: case.id
)
def test_every_layer_comes_back(case: Case, tmp_path: Path) -> None:
    adapter = case.adapter
    tied = {f"m{n}.p": f"head{n}" for n in range(len(adapter))}
    names = replace(named(case.targets), tied=tied)
    if case.name in NOT_IN_PEFT:
        with pytest.raises(lora.CheckpointError, match="is a transposed convolution, which PEFT does not adapt"):
            lora.peft.save(tmp_path / "a", adapter, names, sites=case.targets)
        return
    lora.peft.save(tmp_path / "a", adapter, names, sites=case.targets)
    loaded = lora.peft.load(tmp_path / "a", case.model.params, case.targets, names)
    if any(len(site.batch_axes) > 2 for site in case.targets.values()):  # experts have one scale in PEFT
        adapter, loaded = ({path: each.delta() for path, each in found.items()} for found in (adapter, loaded))
        assert_close(loaded, adapter)
    elif case.method not in ("lora", "dora"):  # PEFT's files have plain factors that do the same
        merged = [lora.merge(case.model.params, each) for each in (loaded, adapter)]
        assert_close(*merged)
    else:
        assert_same(loaded, adapter)


# Modules that hold modules.


def roberta_head(params: Params, x: jax.Array) -> jax.Array:
    head = params["classifier"]
    return jnp.tanh(x @ params["dense"]["kernel"] @ head["dense"]["kernel"]) @ head["out_proj"]["kernel"]


HEAD = Model(
    roberta_head,
    nested(
        {"dense/kernel": draw(4, 4), "classifier/dense/kernel": draw(4, 4), "classifier/out_proj/kernel": draw(4, 3)}
    ),
    draw(2, 4),
    Names(literal=True),
)


def test_modules_that_hold_modules_are_saved_by_their_own_name(tmp_path: Path) -> None:
    """As RoBERTa's classifier, which PEFT knows by that name only; factors of another `dense` are not inside it."""
    whole = replaced(HEAD, "classifier/dense/kernel", "classifier/out_proj/kernel")
    config = lora.LoraConfig(rank=2, targets=("dense",), exclude=("classifier/dense",))
    factors = lora.init(jax.random.key(0), config, HEAD.params, HEAD.sites)
    adapter = lora.Adapter({**whole, **factors})
    lora.peft.save(tmp_path / "a", adapter, HEAD.names, sites=HEAD.sites, params=HEAD.params)
    files = read_peft(tmp_path / "a")
    assert (files.config["modules_to_save"], files.config["target_modules"]) == (["classifier"], ["dense"])
    assert sorted(files.saved) == ["classifier.dense.weight", "classifier.out_proj.weight"]
    assert_same(lora.peft.load(tmp_path / "a", HEAD.params, HEAD.sites, HEAD.names), adapter)
    # One of them alone is not the classifier.
    lora.peft.save(tmp_path / "b", adapter.without("classifier/dense/kernel"), HEAD.names, sites=HEAD.sites)
    assert read_peft(tmp_path / "b").config["modules_to_save"] == ["classifier.out_proj"]


@pytest.mark.parametrize(
    ("kept", "missing"), [((), "classifier"), (("classifier.dense.weight",), r"classifier\.out_proj")]
)
def test_what_a_saved_module_lacks_is_missing(kept: tuple[str, ...], missing: str, tmp_path: Path) -> None:
    saved = {"classifier.dense.weight": draw(4, 4)}
    config = {"r": 2, "target_modules": ["nothing"], "modules_to_save": ["classifier", "score"]}
    modules = {"dense": Module("linear", draw(2, 4), draw(4, 2))}
    write_peft(tmp_path / "a", PeftFiles(config, modules, {name: saved[name] for name in kept}))
    with pytest.raises(lora.CheckpointError, match=rf"Missing, although its config names them: {missing}\."):
        lora.peft.load(tmp_path / "a", HEAD.params, HEAD.sites, HEAD.names)


def test_another_base_of_the_same_shapes(tmp_path: Path) -> None:
    params = {"up": {"kernel": jax.random.normal(jax.random.key(0), (4, 6))}, "norm": jnp.ones(6)}
    sites = lora.find_sites(lambda p, x: x @ p["up"]["kernel"] * p["norm"][None], params, jnp.ones((2, 4)))
    adapter = random_adapter(sites.values())
    lora.peft.save(tmp_path / "lora", adapter, sites=sites, params=params)
    assert_same(dict(lora.peft.load(tmp_path / "lora", params, sites)), dict(adapter))
    other = params | {"norm": jnp.full(6, 2.0)}
    for wrong, message in ((other, "another base of the same shapes"), (lora.merge(params, adapter), "merged into")):
        with pytest.raises(lora.CheckpointError, match=message):
            lora.peft.load(tmp_path / "lora", wrong, sites)
        lora.peft.load(tmp_path / "lora", wrong, sites, base="any")
    lora.peft.load(tmp_path / "lora", jax.eval_shape(lambda: params), sites)
    lora.peft.load(tmp_path / "lora", jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params), sites)
    file = tmp_path / "lora" / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"lora_jax.base": '{"up": "x"}'})
    with pytest.raises(lora.CheckpointError, match="no JSON object of numbers"):
        lora.peft.load(tmp_path / "lora", params, sites)
