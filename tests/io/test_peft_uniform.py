"""One rank and one scale for all modules of a PEFT file, and every module does what it did."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import GOLDEN, assert_close, assert_same, random_adapter
from peft_models import CASES, from_torch
from safetensors.numpy import load_file

import lora_jax as lora
from lora_jax.adapter.updates import LowRank
from lora_jax.errors import CheckpointError
from lora_jax.io.peft import Module, PeftFiles, read_peft, write_peft
from lora_jax.io.peft.uniform import can_be_uniform, uniform

NAMES = sorted(folder.parent.name for folder in GOLDEN.glob("*/expected.safetensors"))
VERA = [name for name in NAMES if name.startswith("vera")]
EXPERTS = [name for name in NAMES if name.startswith("experts")]
ONE = [name for name in NAMES if name not in (*VERA, *EXPERTS, "adalora_conv2")]


def draw(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(dtype)


def linear(rank: int, dtype: Any = np.float32, **vectors: np.ndarray) -> Module:
    return Module("linear", draw(rank, 6, dtype=dtype), draw(5, rank, dtype=dtype), **vectors)


def check_uniform(files: PeftFiles) -> None:
    """What a server that knows one scale, and the rank of the arrays, makes of the files is what they say."""
    config = files.config
    assert not any(config.get(field) for field in ("rank_pattern", "alpha_pattern", "use_rslora"))
    if not files.modules:  # PEFT has types of its own for what is trained without factors, and no scale in them.
        assert "lora_alpha" not in config
        return
    assert (config["peft_type"], isinstance(config["lora_alpha"], int)) == ("LORA", True)
    for name in files.modules:
        assert files.rank(name) == config["r"]
        assert files.scale(name) == config["lora_alpha"] / config["r"]


@pytest.mark.parametrize("name", ONE)
def test_what_peft_wrote_does_the_same(name: str, tmp_path: Path) -> None:
    write_peft(tmp_path / "a", uniform(read_peft(GOLDEN / name)))
    check_uniform(read_peft(tmp_path / "a"))
    case, expected = CASES[name], load_file(GOLDEN / name / "expected.safetensors")
    base, merged = (
        from_torch({k.removeprefix(p): v for k, v in expected.items() if k.startswith(p)}, transposed=case.transposed)
        for p in ("base.", "merged.")
    )
    sites = lora.find_sites(case.fn, base, jnp.asarray(expected["x"]))
    assert_close(lora.merge(base, lora.peft.load(tmp_path / "a", base, sites, case.names)), merged)


@pytest.mark.parametrize("name", [*VERA, *EXPERTS])
def test_files_that_do_not_tell_sizes_are_refused_unless_they_are_uniform(name: str) -> None:
    files = read_peft(GOLDEN / name)
    if can_be_uniform(files):
        assert name in EXPERTS and uniform(files) is files
        return
    with pytest.raises(CheckpointError, match="uniform=True"):
        uniform(files)


@pytest.mark.parametrize("name", ["linear", "embedding", "conv2", "dora", "adalora_pruned", "vera", *EXPERTS])
def test_saved_from_a_model(name: str, tmp_path: Path) -> None:
    case, expected = CASES[name], load_file(GOLDEN / name / "expected.safetensors")
    state = {k.removeprefix("base."): v for k, v in expected.items() if k.startswith("base.")}
    base = from_torch(state, transposed=case.transposed)
    sites = lora.find_sites(case.fn, base, jnp.asarray(expected["x"]))
    adapter = lora.peft.load(GOLDEN / name, base, sites, case.names)
    ranks = iter(range(5, 50))
    mixed = lora.Adapter({path: wider(each, next(ranks)) for path, each in adapter.items()})
    lora.peft.save(tmp_path / "a", mixed, case.names, sites=sites, params=base, uniform=True)
    again = lora.peft.load(tmp_path / "a", base, sites, case.names)
    assert_close(lora.merge(base, again), lora.merge(base, mixed))
    if name not in EXPERTS:
        check_uniform(read_peft(tmp_path / "a"))
    config = read_peft(tmp_path / "a").config
    assert (config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == ({}, {}, False)


def wider(update: Any, rank: int) -> Any:
    """Plain factors with terms and a scale of their own; other updates as they are."""
    if type(update) is not LowRank:
        return update
    site = update.site
    found = random_adapter([site], seed=rank, rank=rank)[site.path]
    assert isinstance(found, LowRank)
    return replace(found, scale=jnp.full(site.batch_shape, 1 / rank, jnp.float32))


def test_the_most_frequent_scale_keeps_its_numbers() -> None:
    modules = {name: linear(4, ml_dtypes.bfloat16) for name in ("q", "k", "v")}
    files = PeftFiles({"r": 4, "lora_alpha": 8, "alpha_pattern": {"v": 12}, "target_modules": ".*"}, modules)
    made = uniform(files)
    assert (made.config["r"], made.config["lora_alpha"], made.config["target_modules"]) == (4, 8, ["k", "q", "v"])
    assert_same([made.modules[n].b for n in "qk"], [modules[n].b for n in "qk"])
    assert_same(made.modules["v"].b, modules["v"].b.astype(np.float32) * np.float32(1.5))
    assert_same(made.modules["v"].a, modules["v"].a)
    check_uniform(made)


@pytest.mark.parametrize("factor", [2.0, 0.5, -4.0])
def test_folding_a_power_of_two_is_exact_and_others_round_once(factor: float) -> None:
    modules = {"q": linear(2), "k": linear(2), "v": linear(2)}
    files = PeftFiles({"r": 2, "lora_alpha": 2, "alpha_pattern": {"v": 2 * factor}, "target_modules": ["q"]}, modules)
    assert_same(uniform(files).modules["v"].b, modules["v"].b * np.float32(factor))


def test_rslora_and_a_scale_that_no_integer_gives() -> None:
    files = PeftFiles({"r": 8, "lora_alpha": 16, "use_rslora": True, "target_modules": ["q"]}, {"q": linear(8)})
    made = uniform(files)
    assert (made.config["lora_alpha"], made.config["r"]) == (8, 8)
    assert_close(made.delta("q", (5, 6)), files.delta("q", (5, 6)))
    check_uniform(made)


def test_the_bias_on_b_is_folded_too() -> None:
    modules = {name: linear(2, b_bias=draw(5)) for name in ("q", "k", "v")}
    config = {"r": 2, "lora_alpha": 2, "alpha_pattern": {"v": 6}, "target_modules": ["q"], "lora_bias": True}
    made = uniform(PeftFiles(config, modules))
    bias = modules["v"].b_bias
    assert bias is not None
    assert_same(made.modules["v"].b_bias, bias * np.float32(3))


@pytest.mark.parametrize(("groups", "rank"), [((3, 1), 3), ((2, 3), 6), ((1, 1), 5)])
def test_convolutions_in_groups_share_a_rank_that_all_groups_divide(groups: tuple[int, int], rank: int) -> None:
    modules = {
        f"conv{i}": Module("conv", draw(count * own, 6, 3), draw(6, own, 1))
        for i, (count, own) in enumerate(zip(groups, (1, 5 if groups == (1, 1) else 2), strict=True))
    }
    patterns = {name: len(module.a) for name, module in modules.items()}
    config = {"r": 1, "lora_alpha": 1, "rank_pattern": patterns, "alpha_pattern": patterns, "target_modules": ["x"]}
    made = uniform(PeftFiles(config, modules))
    assert made.config["r"] == rank
    for name, count in zip(modules, groups, strict=True):
        assert_close(by_group(made.modules[name], count), by_group(modules[name], count))


def by_group(module: Module, groups: int) -> np.ndarray:
    a, b = module.a.reshape(groups, -1, *module.a.shape[1:]), module.b.reshape(groups, len(module.b) // groups, -1)
    return np.einsum("gri...,gor->goi...", a, b)


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (["model.score"], ["score"]), (["classifier"], ["classifier"]), (["model.norm"], ["model.norm"]),
        (["a.score", "b.score"], ["a.score", "b.score"]), ([], None),
    ],
)  # fmt: skip
def test_heads_of_classifiers_get_the_names_that_servers_know(wanted: list[str], found: Any) -> None:
    saved = {f"{name}.weight": draw(2, 6) for name in wanted}
    files = PeftFiles({"r": 2, "lora_alpha": 2, "modules_to_save": wanted, "target_modules": ["q"]}, {"q": linear(2)})
    assert uniform(replace(files, saved=saved)).config["modules_to_save"] == found


def test_a_scale_that_overflows_is_refused_when_it_is_written(tmp_path: Path) -> None:
    modules = {"q": linear(1), "k": linear(1), "v": replace(linear(1), b=np.full((5, 1), 3e38, np.float32))}
    config = {"r": 1, "lora_alpha": 1, "alpha_pattern": {"v": 4}, "target_modules": ["q"]}
    with pytest.raises(CheckpointError, match="infinity"):
        write_peft(tmp_path / "a", uniform(PeftFiles(config, modules)))


def test_a_module_that_is_switched_off_stays_off() -> None:
    files = PeftFiles({"r": 2, "lora_alpha": 4, "alpha_pattern": {"k": 0}}, {"q": linear(2), "k": linear(2)})
    made = uniform(files)
    assert made.config["lora_alpha"] == 4
    assert not made.modules["k"].b.any()


def test_an_adapter_whose_scales_are_all_zero(tmp_path: Path) -> None:
    params = {"q": {"kernel": jnp.ones((4, 3))}}
    sites = lora.find_sites(lambda p, x: x @ p["q"]["kernel"], params, jnp.ones((2, 4)))
    adapter = lora.scale(lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets="q"), params, sites), 0.0)
    lora.peft.save(tmp_path / "a", adapter, uniform=True)
    assert_same(lora.merge(params, lora.peft.load(tmp_path / "a", params, sites)), params)
