"""AdaLoRA and VeRA in PEFT's own files: round trips, what goes where, fused and stacked parameters, refusals."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import GOLDEN, assert_close, assert_same, differ, random_adapter
from peft_models import (
    CONV1D,
    SCANNED,
    Model,
    conv,
    draw,
    linear,
    nested,
    net,
    net_params,
    scanned_net,
    stacked,
)
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from lora_jax.adapter.site import Site
from lora_jax.adapter.updates import LowRank
from lora_jax.cli import main
from lora_jax.io.inspect import inspect
from lora_jax.io.peft import Module, Names, PeftFiles, Rule, read_peft, write_peft
from lora_jax.methods import AdaLora, Vera

CONFIG, ARRAYS = "adapter_config.json", "adapter_model.safetensors"
TOKENS = jnp.asarray([[1, 7, 3], [0, 2, 2]])


NET = Model(net, net_params(), TOKENS)
SCAN = Model(scanned_net, stacked(NET.params), TOKENS, SCANNED)
ADAPTED = [path for path in NET.sites if path.startswith("layers_")]


def valued(update: LowRank, *values: float) -> AdaLora:
    """The factors with values between them, the same for every weight of a stack."""
    given = jnp.broadcast_to(jnp.asarray(values, jnp.float32), (*update.site.batch_shape, update.rank))
    return AdaLora(update.a, update.b, update.scale, update.site, update.dropout, values=given)


def adaptive(model: Model, *paths: str, values: tuple[float, ...] = (0.5, -2.0, 1.5), **options: Any) -> lora.Adapter:
    found = random_adapter([model.sites[path] for path in paths], rank=len(values), **options)
    return lora.Adapter({path: valued(update, *values) for path, update in found.items()})


def start(method: str, model: Model = NET, **options: Any) -> lora.Adapter:
    """An adapter of the method at its start, its vectors with numbers in them."""
    config = lora.LoraConfig(method=method, **{"rank": 4, "targets": ("q", "v"), **options})
    adapter = lora.init(jax.random.key(0), config, model.params, model.sites)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    moved = lambda leaf, train: leaf + jax.random.normal(next(keys), leaf.shape) if train else leaf  # noqa: E731
    return jax.tree.map(moved, adapter, lora.trainable(adapter))


def loaded(folder: Path, model: Model) -> lora.Adapter:
    return lora.peft.load(folder, model.params, model.sites, model.names)


def there_and_back(folder: Path, adapter: lora.Adapter, model: Model) -> lora.Adapter:
    lora.peft.save(folder, adapter, model.names, sites=model.sites)
    return loaded(folder, model)


def same_model(model: Model, one: lora.Adapter, other: lora.Adapter) -> None:
    assert_close(lora.merge(model.params, one), lora.merge(model.params, other))


def rewritten(folder: Path, change: Callable[[dict[str, Any], dict[str, np.ndarray]], None], name: str) -> Path:
    """A golden adapter with another config and other arrays."""
    config, arrays = json.loads((GOLDEN / name / CONFIG).read_text()), load_file(GOLDEN / name / ARRAYS)
    change(config, arrays)
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(arrays, folder / ARRAYS)
    return folder


# AdaLoRA.


def test_adalora_comes_back_bit_for_bit(tmp_path: Path) -> None:
    adapter = start("adalora", alpha=7, dropout=0.25)
    assert_same(there_and_back(tmp_path / "a", adapter, NET), adapter)
    config = read_peft(tmp_path / "a").config
    assert (config["peft_type"], config["init_r"], config["rank_pattern"]) == ("ADALORA", 4, None)
    assert np.float32(config["lora_alpha"] / (4 + 1e-5)) == np.float32(7 / 4)
    assert (config["lora_dropout"], config["total_step"] > 0) == (0.25, True)


def test_a_start_keeps_its_terms_although_no_value_has_moved(tmp_path: Path) -> None:
    config = lora.LoraConfig(method="adalora", rank=4, targets=("q", "up"))
    adapter = lora.init(jax.random.key(0), config, NET.params, NET.sites)
    assert_same(there_and_back(tmp_path / "a", adapter, NET), adapter)


def test_pruned_terms_are_left_out_and_come_back_as_zeros(tmp_path: Path) -> None:
    q, up = "layers_0/attn/q/kernel", "layers_1/up/kernel"
    adapter = lora.Adapter({**adaptive(NET, q, values=(0, 2, 0, 1)), **adaptive(NET, up, values=(1, 2, 3, 0))})
    adapter = lora.Adapter({path: replace(each, scale=jnp.float32(2)) for path, each in adapter.items()})
    again = there_and_back(tmp_path / "a", adapter, NET)
    files = read_peft(tmp_path / "a")
    assert files.config["rank_pattern"] == {
        "layers.0.attn.q.lora_E": [False, True, False, True],
        "layers.1.up.lora_E": [True, True, True, False],
    }
    assert {name: files.rank(name) for name in files.modules} == {"layers.0.attn.q": 2, "layers.1.up": 3}
    assert (files.config["init_r"], files.config["target_r"]) == (4, 2)
    assert_same(again[q].values, adapter[q].values)
    assert_same((again[q].a[1], again[q].b[3]), (adapter[q].a[1], adapter[q].b[3]))
    assert not again[q].a[0].any() and not again[q].b[2].any()
    same_model(NET, again, adapter)


def test_one_rank_and_one_scale_for_modules_that_differ(tmp_path: Path) -> None:
    scales = {path: jnp.float32(scale) for path, scale in zip(ADAPTED, (2, -3, 0.5, 0, 1, 1), strict=True)}
    made = [adaptive(NET, path, values=(0.5, -2.0, 1.5)[: 1 + n % 3]) for n, path in enumerate(ADAPTED)]
    adapter = lora.Adapter(
        {path: replace(each[path], scale=scales[path]) for each, path in zip(made, scales, strict=True)}
    )
    again = there_and_back(tmp_path / "a", adapter, NET)
    config = read_peft(tmp_path / "a").config
    assert (config["init_r"], np.float32(config["lora_alpha"] / (3 + 1e-5))) == (3, 3)
    same_model(NET, again, adapter)
    nothing = lora.scale(adapter, 0.0)
    same_model(NET, there_and_back(tmp_path / "b", nothing, NET), nothing)


def test_adalora_in_stacked_layers(tmp_path: Path) -> None:
    path = "layers/attn/q/kernel"
    update = adaptive(SCAN, path)[path]
    pruned = replace(update, values=update.values.at[0, 1].set(0), scale=jnp.full(2, 1.5))
    again = there_and_back(tmp_path / "a", lora.Adapter({path: pruned}), SCAN)
    files = read_peft(tmp_path / "a")
    assert {name: files.rank(name) for name in files.modules} == {"layers.0.attn.q": 2, "layers.1.attn.q": 3}
    assert_same(again[path].values, pruned.values)
    same_model(SCAN, again, lora.Adapter({path: pruned}))
    modules = {"layers.1.attn.q": files.modules["layers.1.attn.q"]}
    write_peft(tmp_path / "one", PeftFiles({**files.config, "layers_to_transform": [1]}, modules))
    half = loaded(tmp_path / "one", SCAN)
    assert not half[path].delta()[0].any()
    lora.peft.save(tmp_path / "again", half, SCANNED, sites=SCAN.sites)
    assert read_peft(tmp_path / "again").modules.keys() == modules.keys()


def test_adalora_trains_on_from_the_file_of_another_run(tmp_path: Path) -> None:
    """What PEFT pruned stays pruned, and the rest trains."""
    golden = load_file(GOLDEN / "adalora_pruned" / "expected.safetensors")
    adapter = loaded(GOLDEN / "adalora_pruned", NET).without("head/kernel", "head/bias")
    tx = lora.optimizer(optax.sgd(0.1), adapter)
    loss = lambda adapter: jnp.square(lora.adapt(net)(NET.params, adapter, jnp.asarray(golden["x"]))).sum()  # noqa: E731
    updates, _ = tx.update(jax.grad(loss)(adapter), tx.init(adapter), adapter)
    moved = optax.apply_updates(adapter, updates)
    for path, update in adapter.items():
        assert_same(moved[path].active, update.active)
    assert differ(moved, adapter)


CONV2 = Model(conv(), {"layer": {"kernel": draw(3, 2, 4, 6), "bias": draw(6)}}, draw(2, 4, 8, 7))


def test_adalora_on_a_convolution_is_flat(tmp_path: Path) -> None:
    adapter = adaptive(CONV2, "layer/kernel")
    assert_same(there_and_back(tmp_path / "a", adapter, CONV2), adapter)
    assert read_peft(tmp_path / "a").modules["layer"].a.shape == (3, 24)


# Fused on one side only.

FUSED = nested({"qkv/kernel": draw(5, 9), "up/kernel": draw(9, 5)})
QKV = Names([Rule("qkv/kernel", ("q", "k", "v"), shares=(4, 2, 3)), ("up/kernel", "up")])
OURS = Model(lambda p, x: jnp.tanh(x @ p["qkv"]["kernel"]) @ p["up"]["kernel"], FUSED, draw(2, 5), QKV)

APART = nested({"q/kernel": draw(5, 4), "k/kernel": draw(5, 2), "v/kernel": draw(5, 3) + 1})
THEIRS = Model(
    lambda p, x: jnp.concatenate([jnp.tanh(x @ p[part]["kernel"]) for part in "qkv"], -1),
    APART,
    draw(2, 5),
    Names([(("q/kernel", "k/kernel", "v/kernel"), "qkv")]),
)


def vera_files(sizes: dict[str, int], rank: int = 3, inputs: int = 5) -> PeftFiles:
    a, b = np.asarray(draw(rank, inputs)), np.asarray(draw(max(sizes.values()), rank))
    modules = {
        name: Module("linear", a, b, values=np.asarray(draw(rank)) + n, outputs=np.asarray(draw(size)) - n)
        for n, (name, size) in enumerate(sizes.items())
    }
    return PeftFiles({"peft_type": "VERA", "r": rank, "target_modules": list(sizes)}, modules)


def torch_delta(files: PeftFiles, name: str, inputs: int) -> np.ndarray:
    """What PEFT adds to a weight, in its layout."""
    module = files.modules[name]
    assert module.values is not None and module.outputs is not None
    b = module.outputs[:, None] * module.b[: len(module.outputs)]
    return b @ (module.values[:, None] * module.a[:, :inputs])


def test_adalora_of_parts_that_one_parameter_has(tmp_path: Path) -> None:
    adapter = adaptive(OURS, "qkv/kernel")
    again = there_and_back(tmp_path / "a", adapter, OURS)
    assert sorted(read_peft(tmp_path / "a").modules) == ["k", "q", "v"]
    same_model(OURS, again, adapter)
    same_model(OURS, there_and_back(tmp_path / "b", again, OURS), adapter)


def test_adalora_of_parameters_that_are_one_module(tmp_path: Path) -> None:
    parts = [adaptive(THEIRS, f"{part}/kernel", values=values) for part, values in (("q", (1, 2)), ("v", (3, 0)))]
    adapter = lora.Adapter({**parts[0], **parts[1]})
    again = there_and_back(tmp_path / "a", adapter, THEIRS)
    assert read_peft(tmp_path / "a").rank("qkv") == 3
    same_model(THEIRS, again, adapter)


def test_vera_of_parts_that_one_parameter_has(tmp_path: Path) -> None:
    files = vera_files({"q": 4, "k": 2, "v": 3})
    write_peft(tmp_path / "a", files)
    adapter = loaded(tmp_path / "a", OURS)
    merged = lora.merge(FUSED, adapter)["qkv"]["kernel"] - FUSED["qkv"]["kernel"]
    assert_close(np.asarray(merged).T, np.concatenate([torch_delta(files, name, 5) for name in "qkv"]))
    lora.peft.save(tmp_path / "b", adapter, QKV, sites=OURS.sites)
    assert_same(load_file(tmp_path / "b" / ARRAYS), load_file(tmp_path / "a" / ARRAYS))


def test_vera_of_parameters_that_are_one_module(tmp_path: Path) -> None:
    files = vera_files({"qkv": 9})
    write_peft(tmp_path / "a", files)
    adapter = loaded(tmp_path / "a", THEIRS)
    merged = lora.merge(APART, adapter)
    deltas = [merged[part]["kernel"] - APART[part]["kernel"] for part in "qkv"]
    assert_close(np.concatenate(deltas, 1).T, torch_delta(files, "qkv", 5))
    lora.peft.save(tmp_path / "b", adapter, THEIRS.names, sites=THEIRS.sites)
    assert_same(load_file(tmp_path / "b" / ARRAYS), load_file(tmp_path / "a" / ARRAYS))


def test_layers_of_which_a_vera_file_has_other_parts(tmp_path: Path) -> None:
    names = Names([Rule("qkv/kernel", ("h.{i}.q", "h.{i}.v"), shares=(4, 5))])
    params = nested({"qkv/kernel": draw(2, 5, 9)})
    run = lambda p, x: jax.lax.scan(lambda x, w: (x, x @ w), x, p["qkv"]["kernel"])[1]  # noqa: E731
    write_peft(tmp_path / "a", vera_files({"h.0.q": 4, "h.1.v": 5}))
    with pytest.raises(lora.CheckpointError, match="adapts other parts of some layers of 'qkv/kernel'"):
        loaded(tmp_path / "a", Model(run, params, draw(2, 5), names))


# VeRA.


def test_a_drawn_vera_whose_sites_have_one_shape(tmp_path: Path) -> None:
    adapter = start("vera", seed=7, alpha=4, dropout=0.5)
    again = there_and_back(tmp_path / "a", adapter, NET)
    files = read_peft(tmp_path / "a")
    assert {name: files.config[name] for name in ("peft_type", "r", "vera_dropout", "projection_prng_key")} == {
        "peft_type": "VERA", "r": 4, "vera_dropout": 0.5, "projection_prng_key": 7,
    }  # fmt: skip
    assert not {field for field in files.config if field.startswith("lora")}
    for path, update in adapter.items():
        given = again[path]
        assert_same((given.d, given.b, given.seed, given.dropout), (update.d, update.b, 7, 0.5))
        assert_same((given.given_a, given.given_b), update.projections())
    same_model(NET, again, adapter)


def test_a_vera_that_is_no_slice_of_one_pair_is_plain_lora(tmp_path: Path) -> None:
    for name, model, targets in (("net", NET, ("q", "up")), ("conv", CONV2, ("layer",))):
        adapter = start("vera", model, targets=targets)
        again = there_and_back(tmp_path / name, adapter, model)
        assert read_peft(tmp_path / name).config["peft_type"] == "LORA"
        same_model(model, again, adapter)


def test_what_peft_has_no_vera_for_makes_plain_lora(tmp_path: Path) -> None:
    for n, options in enumerate(({"lora_bias": True}, {"trainable_tokens": (1, 2)})):
        adapter = start("vera", **options)
        again = there_and_back(tmp_path / str(n), adapter, NET)
        assert read_peft(tmp_path / str(n)).config["peft_type"] == "LORA"
        same_model(NET, again, adapter)


def test_a_vera_with_experts_or_a_tied_table_is_plain_lora(tmp_path: Path) -> None:
    model, _ = experts_case()
    adapter = start("vera", model, targets=("up",))
    same_model(model, there_and_back(tmp_path / "a", adapter, model), adapter)
    assert read_peft(tmp_path / "a").config["peft_type"] == "LORA"
    params = nested({"embed/embedding": draw(9, 4), "q/kernel": draw(4, 4)})
    run = lambda p, x: (p["embed"]["embedding"][x] @ p["q"]["kernel"]) @ p["embed"]["embedding"].T  # noqa: E731
    tied = Model(run, params, TOKENS, Names(tied={"embed": "lm_head"}))
    adapter = start("vera", tied, targets=("q",), train=("embed",))
    same_model(tied, there_and_back(tmp_path / "b", adapter, tied), adapter)
    assert read_peft(tmp_path / "b").config["peft_type"] == "LORA"


def test_biases_and_whole_modules_beside_vera(tmp_path: Path) -> None:
    adapter = start("vera", bias="lora_only", train=("head",))
    assert_close(lora.merge(NET.params, there_and_back(tmp_path / "a", adapter, NET)), lora.merge(NET.params, adapter))
    config = read_peft(tmp_path / "a").config
    assert (config["peft_type"], config["bias"], config["modules_to_save"]) == ("VERA", "vera_only", ["head"])


def test_vera_in_stacked_layers(tmp_path: Path) -> None:
    adapter = start("vera", SCAN)
    again = there_and_back(tmp_path / "a", adapter, SCAN)
    assert again["layers/attn/q/kernel"].given_a.shape == (4, 5)
    assert_same(again["layers/attn/q/kernel"].d, adapter["layers/attn/q/kernel"].d)
    same_model(SCAN, again, adapter)
    files = read_peft(tmp_path / "a")
    modules = {name: module for name, module in files.modules.items() if "1" in name}
    write_peft(tmp_path / "one", PeftFiles({**files.config, "layers_to_transform": [1]}, modules))
    half = loaded(tmp_path / "one", SCAN)
    lora.peft.save(tmp_path / "again", half, SCANNED, sites=SCAN.sites)
    assert_same(load_file(tmp_path / "again" / ARRAYS), load_file(tmp_path / "one" / ARRAYS))


def test_a_scaled_vera_carries_its_scale_in_the_outputs(tmp_path: Path) -> None:
    adapter = lora.scale(loaded(GOLDEN / "vera", NET), 0.3)
    again = there_and_back(tmp_path / "a", adapter, NET)
    assert read_peft(tmp_path / "a").config["peft_type"] == "VERA"
    same_model(NET, again, adapter)


def test_given_projections_do_not_train_and_are_kept(tmp_path: Path) -> None:
    adapter = loaded(GOLDEN / "vera", NET)
    path = "layers_0/up/kernel"
    assert lora.summary(adapter).trainable == sum(update.d.size + update.b.size for update in adapter.values())
    loss = lambda adapter: jnp.square(lora.adapt(net)(NET.params, adapter, TOKENS)).sum()  # noqa: E731
    tx = lora.optimizer(optax.adam(0.1), adapter)
    updates, _ = tx.update(jax.grad(loss)(adapter), tx.init(adapter), adapter)
    moved = optax.apply_updates(adapter, updates)
    assert_same(moved[path].projections(), adapter[path].projections())
    assert differ(moved[path].d, adapter[path].d) and differ(moved[path].b, adapter[path].b)
    lora.save(tmp_path / "own", moved)
    assert_same(lora.load(tmp_path / "own"), moved)
    before, after = (read_peft(GOLDEN / "vera"), there_and_back(tmp_path / "a", moved, NET))
    assert_same(after, moved)
    assert_same(read_peft(tmp_path / "a").modules["layers.0.up"].a, before.modules["layers.0.up"].a)


# Which kind of file.


def test_trimmed_factors_are_plain_lora(tmp_path: Path) -> None:
    adapter = loaded(GOLDEN / "adalora_pruned", NET)
    again = there_and_back(tmp_path / "a", lora.methods.trim(adapter), NET)
    assert (read_peft(tmp_path / "a").config["peft_type"], len(again)) == ("LORA", len(adapter))
    assert_close(lora.merge(NET.params, again), lora.merge(NET.params, adapter))


def experts_case() -> tuple[Model, lora.Adapter]:
    names = Names([("layer/up", "layer.up")])
    params = nested({"layer/up": draw(3, 4, 5)})
    model = Model(lambda p, x: jnp.einsum("ebi,eio->ebo", x, p["layer"]["up"]), params, draw(3, 2, 4), names)
    return model, adaptive(model, "layer/up")


def conv_case(count: int) -> tuple[Model, lora.Adapter]:
    kernel = draw(*(3,) * count, 4, 6)
    model = Model(conv(), {"layer": {"kernel": kernel, "bias": draw(6)}}, draw(2, 4, *(8,) * count))
    return model, adaptive(model, "layer/kernel")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: (NET, adaptive(NET, "embed/embedding")), "'embed/embedding' is of kind 'embedding'"),
        (lambda: conv_case(1), "'layer/kernel' is a convolution along 1 axes"),
        (lambda: conv_case(3), "'layer/kernel' is a convolution along 3 axes"),
        (experts_case, "'layer/up' is a stack of experts"),
        (lambda: (NET, start("adalora", lora_bias=True)), "'layers_0/attn/q/bias' is a bias on B"),
        (
            lambda: (NET, lora.Adapter({**adaptive(NET, ADAPTED[0]), **random_adapter([NET.sites[ADAPTED[1]]])})),
            "Some updates are AdaLoRA and others .* are not",
        ),
    ],
)
def test_what_peft_has_no_adalora_for_is_refused(
    build: Callable[[], tuple[Model, lora.Adapter]], message: str, tmp_path: Path
) -> None:
    model, adapter = build()
    with pytest.raises(lora.CheckpointError, match=message) as error:
        lora.peft.save(tmp_path / "a", adapter, model.names, sites=model.sites)
    assert "lora.methods.trim(adapter)" in str(error.value)
    assert not list(tmp_path.iterdir())
    trimmed = lora.methods.trim(adapter)
    assert_close(
        lora.merge(model.params, there_and_back(tmp_path / "a", trimmed, model)), lora.merge(model.params, adapter)
    )


@pytest.mark.parametrize("name", ["adalora_pruned", "vera"])
def test_convert_and_inspect(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    like, own, back = (str(tmp_path / each) for each in ("like", "own", "back"))
    config = lora.LoraConfig(rank=2, targets=("q", "v", "up"), train=("head",))
    lora.save(like, lora.init(jax.random.key(0), config, NET.params, NET.sites), params=NET.params)
    assert main(["convert", str(GOLDEN / name), own, "--like", like]) == 0
    assert main(["convert", own, back]) == 0
    assert_same(load_file(Path(back) / ARRAYS), load_file(GOLDEN / name / ARRAYS))
    said = capsys.readouterr().out
    assert {"adalora_pruned": "AdaLoRA", "vera": "VeRA"}[name] in said
    found = inspect(GOLDEN / name)
    assert found.nbytes == sum(array.nbytes for array in load_file(GOLDEN / name / ARRAYS).values())


# Refusals.


def without_projections(config: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    config["save_projection"] = False
    del arrays["base_model.vera_A"], arrays["base_model.vera_B"]


def set_config(**fields: Any) -> Callable[[dict[str, Any], dict[str, np.ndarray]], None]:
    return lambda config, arrays: config.update(fields)


def set_array(key: str, value: np.ndarray | None) -> Callable[[dict[str, Any], dict[str, np.ndarray]], None]:
    def change(config: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        arrays.pop(key, None)
        arrays.update({} if value is None else {key: value})

    return change


UP = "base_model.model.layers.0.up."
ONES = np.ones


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("vera", without_projections, r"vera_A is missing .*save_projection=True; docs/from-peft.md"),
        ("vera", set_array(f"{UP}vera_lambda_d", None), "layers.0.up.vera_lambda_d is missing"),
        ("vera", set_array(f"{UP}vera_lambda_d", ONES(3)), r"vera_lambda_d of shape \(3,\) does not fit rank 4"),
        ("vera", set_array(f"{UP}vera_lambda_b", ONES(9)), r"vera_lambda_b of shape \(9,\) does not fit vera_B with 7"),
        ("vera", set_array(f"{UP}vera_lambda_b", ONES(3)), r"layers.0.up has A \(4, 7\) and B \(3, 4\), where"),
        ("vera", set_array("base_model.vera_A", ONES((3, 7))), r"vera_A of shape \(3, 7\) does not fit vera_B"),
        ("vera", set_array("base_model.vera_A", ONES((4, 6))), r"A \(4, 6\) and B \(5, 4\), where layers_0/up/kernel"),
        ("vera", set_array(f"{UP}lora_A.weight", ONES((4, 7))), "lora_A.weight is no key of .* peft_type='VERA'"),
        ("vera", set_config(r=5), "has rank 4, but adapter_config.json says 5"),
        ("vera", set_config(projection_prng_key="x"), "projection_prng_key='x' must be an integer"),
        ("vera", set_config(use_new=1), "use_new=1 is nothing this version knows"),
        ("linear", set_array(f"{UP}lora_E", ONES((3, 1))), "lora_E is no key of an adapter of peft_type='LORA'"),
        ("adalora", set_config(lora_alpha=0), "lora_alpha=0 must be positive"),
        ("adalora", set_config(rank_pattern={"layers.0.up.lora_E": [True] * 3}), "has 3 entries, but init_r is 4"),
        ("adalora", set_config(rank_pattern={"layers.0.up.lora_E": 3}), "must be a list of true and false"),
        (
            "adalora",
            set_config(rank_pattern={"layers.0.up.lora_E": [True, True, True, False]}),
            "has rank 4, but adapter_config.json says 3",
        ),
        ("adalora", set_config(init_r=5), "has rank 4, but adapter_config.json says 5"),
        ("adalora", set_array(f"{UP}lora_E", None), "layers.0.up.lora_E is missing"),
        ("adalora", set_array(f"{UP}lora_E", ONES((3, 1))), r"lora_E of shape \(3,\) does not fit rank 4"),
        ("adalora", set_array(f"{UP}lora_E", ONES((4, 2))), r"lora_E of shape \(4, 2\) does not fit rank 4"),
        ("adalora", set_array(f"{UP}lora_A", ONES((4, 7, 1))), "they must share the rank"),
        ("adalora", set_array(f"{UP}lora_A", ONES(0)), "so it holds nothing"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused(name: str, change: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(lora.CheckpointError, match=message):
        loaded(rewritten(tmp_path / "a", change, name), NET)


def test_arrays_without_their_config_are_refused(tmp_path: Path) -> None:
    for name in ("adalora", "vera"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ARRAYS).write_bytes((GOLDEN / name / ARRAYS).read_bytes())
        with pytest.raises(lora.CheckpointError, match=r"which adapter_config.json says .or LORA, if it is missing"):
            loaded(tmp_path / name, NET)


def test_keys_of_a_live_model(tmp_path: Path) -> None:
    """With the adapter's name in them, and of projections with or without the wrapper's."""
    for name in ("adalora", "vera"):

        def alive(config: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
            for key in list(arrays):
                arrays[f"{key.removeprefix('base_model.model.').removeprefix('base_model.')}.default"] = arrays.pop(key)

        assert_same(loaded(rewritten(tmp_path / name, alive, name), NET), loaded(GOLDEN / name, NET))


def test_conv1d_layers_and_update_types() -> None:
    model = Model(linear, {"layer": {"kernel": draw(5, 9), "bias": draw(9)}}, draw(2, 5), CONV1D)
    kinds = {name: type(loaded(GOLDEN / f"{name}_conv1d_hf", model)["layer/kernel"]) for name in ("adalora", "vera")}
    assert kinds == {"adalora": AdaLora, "vera": Vera}
    assert isinstance(loaded(GOLDEN / "adalora_conv2", CONV2)["layer/kernel"].site, Site)
