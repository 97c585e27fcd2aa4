"""Modules that PyTorch fuses and a JAX model does not, beyond the numbers: DoRA, biases, experts, configs, refusals."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_same, random_adapter
from peft_models import Params, nested

import lora_jax as lora
from lora_jax.adapter.site import Site, Sites
from lora_jax.io.peft import Module, Names, PeftFiles, Rule, read_peft, write_peft

PARTS = {"q": (6, 4), "k": (6, 2), "v": (6, 3)}
NAMES = Names([(tuple(f"h_{{i}}/{part}/kernel" for part in PARTS), "h.{i}.qkv"), ("h_{i}/out/kernel", "h.{i}.out")])


def draw(*shape: int) -> jax.Array:
    return jax.device_put(np.float32(np.random.default_rng(len(shape)).normal(size=shape)))


def model(params: Params, x: jax.Array) -> jax.Array:
    for index in range(2):
        layer = params[f"h_{index}"]
        q, k, v = (x @ layer[part]["kernel"] + layer[part]["bias"][None] for part in PARTS)
        mixed = jnp.concatenate([jnp.tanh(q), k * 2, v**2], axis=-1)
        x = x + mixed @ layer["out"]["kernel"]
    return x


PARAMS = nested(
    {f"h_{i}/{part}/kernel": draw(*shape) + i for i in range(2) for part, shape in {**PARTS, "out": (9, 6)}.items()}
    | {f"h_{i}/{part}/bias": draw(size) - i for i in range(2) for part, (_, size) in PARTS.items()}
)
SITES = lora.find_sites(model, PARAMS, draw(2, 6))
ONE = [SITES["h_0/q/kernel"], SITES["h_0/v/kernel"], SITES["h_1/k/kernel"]]


def ranked(sites: Any = ONE) -> lora.Adapter:
    """Factors of another rank for each."""
    return lora.Adapter({of.path: random_adapter([of], rank=rank)[of.path] for rank, of in enumerate(sites, start=1)})


def dora(adapter: lora.Adapter) -> lora.Adapter:
    """The factors with magnitudes that are not the weights'."""
    found = {}
    for path, update in adapter.items():
        _, part, _ = path.split("/")
        made = lora.methods.Dora.around(update, PARAMS[path.split("/")[0]][part]["kernel"])
        found[path] = replace(made, magnitude=made.magnitude * jnp.linspace(0.5, 2, made.magnitude.size))
    return lora.Adapter(found)


def test_parts_come_back_bit_for_bit(tmp_path: Path) -> None:
    adapter = lora.Adapter({path: replace(each, scale=jnp.float32(1.5)) for path, each in ranked().items()})
    lora.peft.save(tmp_path / "a", adapter, NAMES, sites=SITES)
    assert_same(lora.peft.load(tmp_path / "a", PARAMS, SITES, NAMES), adapter)
    files = read_peft(tmp_path / "a")
    assert files.config["target_modules"] == ["qkv"]
    assert {name: files.rank(name) for name in files.modules} == {"h.0.qkv": 3, "h.1.qkv": 3}


def test_ranks_and_scales_of_fused_modules_are_patterns(tmp_path: Path) -> None:
    adapter = ranked(SITES.values())
    lora.peft.save(tmp_path / "a", adapter, NAMES, sites=SITES)
    files = read_peft(tmp_path / "a")
    assert {name: len(module.a) for name, module in files.modules.items()} == {
        name: files.config["rank_pattern"].get(f"^{name.replace('.', chr(92) + '.')}", files.config["r"])
        for name in files.modules
    }
    assert_close(lora.merge(PARAMS, lora.peft.load(tmp_path / "a", PARAMS, SITES, NAMES)), lora.merge(PARAMS, adapter))


def test_target_modules_leave_out_other_layers(tmp_path: Path) -> None:
    lora.peft.save(tmp_path / "a", ranked(ONE[:1]), NAMES, sites=SITES)
    assert read_peft(tmp_path / "a").config["target_modules"] == ["0.qkv"]


def test_a_fresh_adapter_keeps_all_terms_of_every_part(tmp_path: Path) -> None:
    modules = {f"h.{i}.qkv": Module("linear", np.asarray(draw(2, 6)), np.zeros((9, 2), np.float32)) for i in range(2)}
    write_peft(tmp_path / "a", PeftFiles({"r": 2, "lora_alpha": 4, "target_modules": ["qkv"]}, modules))
    loaded = lora.peft.load(tmp_path / "a", PARAMS, SITES, NAMES)
    assert len(loaded) == 6 and {update.rank for update in loaded.values()} == {2}
    assert_same(loaded["h_1/k/kernel"].a, draw(2, 6))


def test_dora_needs_the_norms_of_parts_that_are_not_adapted(tmp_path: Path) -> None:
    adapter = dora(ranked())
    with pytest.raises(
        lora.ParameterError, match=r"magnitudes of its part 'h_0/k/kernel', which is not .* pass params="
    ):
        lora.peft.save(tmp_path / "a", adapter, NAMES, sites=SITES)
    with pytest.raises(lora.ParameterError, match="with arrays"):
        lora.peft.save(tmp_path / "a", adapter, NAMES, sites=SITES, params=jax.eval_shape(lambda: PARAMS))
    lora.peft.save(tmp_path / "a", adapter, NAMES, sites=SITES, params=PARAMS)
    magnitude = read_peft(tmp_path / "a").modules["h.0.qkv"].magnitude
    norms = np.linalg.norm(PARAMS["h_0"]["k"]["kernel"], axis=0)
    q, v = (np.asarray(adapter[f"h_0/{part}/kernel"].magnitude) for part in "qv")
    assert_close(magnitude, np.concatenate([q, norms, v]).astype(np.float32))
    loaded = lora.peft.load(tmp_path / "a", PARAMS, SITES, NAMES)
    assert_close(lora.merge(PARAMS, loaded), lora.merge(PARAMS, adapter))


def test_dora_on_every_part_needs_no_base(tmp_path: Path) -> None:
    sites = [SITES[f"h_0/{part}/kernel"] for part in PARTS]
    adapter = dora(ranked(sites))
    lora.peft.save(tmp_path / "a", adapter, NAMES)
    loaded = lora.peft.load(tmp_path / "a", PARAMS, SITES, NAMES)
    assert_close(lora.merge(PARAMS, loaded), lora.merge(PARAMS, adapter))


def test_dora_on_parts_that_no_site_accounts_for(tmp_path: Path) -> None:
    names = Names([Rule(("h_0/q/kernel", "h_0/k/kernel"), "qk", shares=(2, 1))])
    with pytest.raises(lora.CheckpointError, match="need all of its parameters: pass sites="):
        lora.peft.save(tmp_path / "a", dora(ranked(ONE[:1])), names, params=PARAMS)


def test_biases_on_b(tmp_path: Path) -> None:
    shifts = {
        path: lora.methods.Shift(draw(size) + 3, jnp.float32(scale), Site(path=path, shape=(size,), dtype="float32", kind="full"))
        for path, size, scale in (("h_0/v/bias", 3, 0.5), ("h_1/k/bias", 2, -2.0))
    }  # fmt: skip
    adapter = lora.Adapter({**ranked(), **shifts})
    lora.peft.save(tmp_path / "a", adapter, NAMES, sites=SITES)
    files = read_peft(tmp_path / "a")
    bias, scale = files.modules["h.0.qkv"].b_bias, np.float32(files.scale("h.0.qkv"))
    assert_close(scale * bias, np.concatenate([np.zeros(6), 0.5 * (draw(3) + 3)]).astype(np.float32))
    loaded = lora.peft.load(tmp_path / "a", PARAMS, SITES, NAMES)
    # PEFT has a bias on B for a whole module: the other parts come back with one of zeros, which trains on.
    moves = {path for path, update in loaded.items() if not path.endswith("bias") or update.value.any()}
    assert moves == set(adapter)
    assert_close(lora.merge(PARAMS, loaded), lora.merge(PARAMS, adapter))


def test_a_bias_on_b_without_factors_of_its_own_part(tmp_path: Path) -> None:
    b = np.zeros((9, 1), np.float32)
    b[:4] = 1
    bias = np.arange(9, dtype=np.float32)
    module = Module("linear", np.asarray(draw(1, 6)), b, b_bias=bias)
    write_peft(tmp_path / "a", PeftFiles({"r": 1, "target_modules": ["0.qkv"], "lora_bias": True}, {"h.0.qkv": module}))
    loaded = lora.peft.load(tmp_path / "a", PARAMS, SITES, NAMES)
    shifted = [float(loaded[f"h_0/{part}/bias"].scale) * loaded[f"h_0/{part}/bias"].value for part in PARTS]
    assert_close(np.concatenate(shifted), 8 * bias)
    lora.peft.save(tmp_path / "b", loaded, NAMES, sites=SITES)
    assert_close(read_peft(tmp_path / "b").modules["h.0.qkv"].arrays(), module.arrays())


def test_whole_tensors_of_fused_modules_are_refused(tmp_path: Path) -> None:
    saved = {
        f"h.0.{name}": np.ones(shape, np.float32) for name, shape in {"qkv.weight": (9, 6), "qkv.bias": (9,)}.items()
    }
    write_peft(tmp_path / "a", PeftFiles({"r": 2, "modules_to_save": ["0.qkv"]}, {}, saved))
    _, unmatched = lora.peft.load(tmp_path / "a", PARAMS, SITES, NAMES, strict=False)
    parts = ", ".join(f"h_0/{part}/kernel" for part in PARTS)
    why = f"is one tensor, and {parts} here, stacked, fused or with other numbers: only factors are taken apart"
    assert unmatched.mismatched == (f"h.0.qkv.bias {why}", f"h.0.qkv.weight {why}")


# Experts: a stack of weights that PyTorch keeps with both projections in one.


def expert_site(name: str, out: int) -> Site:
    return Site(
        path=f"moe/{name}", shape=(3, 6, out), dtype="float32", kind="dense",
        batch_axes=(0,), in_axes=(1,), out_axes=(2,),
    )  # fmt: skip


MOE = [expert_site("gate", 5), expert_site("up", 4)]
MOE_NAMES = Names([(("moe/gate", "moe/up"), "experts.gate_up_proj")])
MOE_PARAMS = nested({of.path: np.zeros(of.shape, np.float32) for of in MOE})


@pytest.mark.parametrize("count", [1, 2])
def test_experts(count: int, tmp_path: Path) -> None:
    adapter = ranked(MOE[:count])
    lora.peft.save(tmp_path / "a", adapter, MOE_NAMES, sites=Sites(MOE))
    files = read_peft(tmp_path / "a")
    assert files.config["target_parameters"] == ["experts.gate_up_proj"]
    written = files.delta("experts", (3, 9, 6), parameter="experts.gate_up_proj", transposed=False)
    deltas = [np.asarray(adapter[of.path].delta()) if of.path in adapter else np.zeros(of.shape) for of in MOE]
    assert_close(written, np.concatenate(deltas, axis=2).transpose(0, 2, 1).astype(np.float32))
    loaded = lora.peft.load(tmp_path / "a", MOE_PARAMS, Sites(MOE), MOE_NAMES)
    assert {path: each.rank for path, each in loaded.items()} == {path: each.rank for path, each in adapter.items()}
    assert_close(lora.merge(MOE_PARAMS, loaded), lora.merge(MOE_PARAMS, adapter))


# Sizes.


def dense(path: str, into: int, out: int, **other: Any) -> Site:
    facts = {"dtype": "float32", "kind": "dense", "in_axes": (0,), "out_axes": (1,), **other}
    return Site(path=path, shape=(into, out), **facts)


def test_shares_stand_in_for_sites_that_are_not_given(tmp_path: Path) -> None:
    plain, told = (Names([Rule(("q", "k", "v"), "m.qkv", shares=shares)]) for shares in ((), (4, 1, 1)))
    adapter = random_adapter([dense("k", 6, 2)])
    with pytest.raises(lora.MatchError, match=r"'k' shares a module of PyTorch with 'q', whose size .* Pass sites="):
        lora.peft.save(tmp_path / "a", adapter, plain)
    lora.peft.save(tmp_path / "a", adapter, told)
    b = read_peft(tmp_path / "a").modules["m.qkv"].b
    assert b.shape == (12, 2) and b[8:10].all() and not b[:8].any() and not b[10:].any()
    params = {"k": jnp.ones((6, 2))}
    with pytest.raises(
        lora.CheckpointError, match=r"m.qkv has 12 outputs, and only 2 of them are those of sites \(k\)"
    ):
        lora.peft.load(tmp_path / "a", params, Sites([dense("k", 6, 2)]), told)


@pytest.mark.parametrize(
    ("rules", "sites", "message"),
    [
        ([Rule(("q", "k"), "qk", shares=(2, 1))], [dense("q", 6, 4), dense("k", 6, 4)], r"shares=\(2, 1\), but 'q' has 4, 'k' has 4"),
        ([Rule(("q", "k"), "qk", shares=(3, 2))], [dense("q", 6, 4)], r"shares=\(3, 2\), but 'q' has 4 outputs"),
        ([Rule(("q", "k"), "qk", interleaved=3)], [dense("q", 6, 3), dense("k", 6, 4)], r"3 groups, which do not divide \[3, 4\]"),
        ([Rule(("q", "k"), "qk", interleaved=-1, shares=(1, 1))], [dense("q", 6, 4)], "with 'k', whose size is not known"),
        ([(("q", "k"), "qk")], [dense("q", 6, 4), dense("k", 5, 4)], "cannot be one module of PyTorch: fan_in is 5 and 6"),
        ([(("q", "k"), "qk")], [dense("q", 6, 4), dense("k", 6, 4, kind="embedding")], "'k' is embedding, and only linear"),
        ([("q", "qk"), ("k", "qk")], [dense("q", 6, 4), dense("k", 6, 4)], r"'k' and 'q' are both called 'qk'.* Rule\(\(path, path\), module\)"),
        ([(("q", "k"), "m"), ("v", "m")], [dense(n, 6, 4) for n in "qkv"], "'k' and 'v' are both called 'm'"),
        ([(("{a}/q", "{a}/k"), "m")], [dense(f"{a}/{n}", 6, 4) for a in "xy" for n in "qk"], "'x/k' and 'y/k' are both"),
    ],
)  # fmt: skip
def test_what_cannot_be_one_module_is_refused(rules: Any, sites: list[Site], message: str, tmp_path: Path) -> None:
    with pytest.raises(lora.MatchError, match=message):
        lora.peft.save(tmp_path / "a", random_adapter(sites), Names(rules))
    assert not list(tmp_path.iterdir())
