"""Rules of names: numbers of layers and experts, what contradicts itself, MaxText's, and any layout."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
from helpers import assert_same, random_adapter
from hypothesis import given
from hypothesis import strategies as st
from test_names import PATHS, QKV, _zeros, site

import lora_jax as lora
from lora_jax.adapter.site import Site, Sites
from lora_jax.io.names.known import find_names
from lora_jax.io.peft import KNOWN, Names, Rule

EXPERTS = site("moe/up", (3, 6, 8), "bio")


@pytest.mark.parametrize(
    ("names", "of"),
    [
        (Names([("moe/up", "mlp.experts.up")]), EXPERTS),
        (None, site("mlp/experts/up", (3, 6, 8), "bio", "ragged")),
        (Names([("moe/up", "layers.{i}.up")]), site("moe/up", (2, 3, 6, 8), "bbio")),
        ("tunix", site("layers/3/moe/gating_einsum", (4, 2, 8, 6), "booi", "ragged")),  # Gemma 4
    ],
)
def test_a_stack_that_no_number_counts_is_a_parameter(names: Names | str | None, of: Site) -> None:
    targets = find_names(names).targets(of)
    assert all(target.parameter for target in targets)
    assert [target.name for target in targets] in (
        ["mlp.experts.up"], ["layers.0.up", "layers.1.up"], ["model.layers.3.experts.gate_up_proj"]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("of", "names"),
    [
        (site("layers/q/w", (2, 2, 3), "bio"), ["layers.0.q", "layers.1.q"]),
        (site("params/decoder/blocks/attn/q/w", (2, 3, 2), "ibo"), ["decoder.blocks.0.attn.q", "decoder.blocks.1.attn.q", "decoder.blocks.2.attn.q"]),
        (site("h/attn_1/q/w", (1, 2, 3), "bio"), ["h.0.attn.1.q"]),
        (site("layers/w", (2, 2, 3), "bio"), None),
        (site("layers/moe/up", (2, 5, 3, 4), "bbio", "ragged"), ["layers.0.moe.up", "layers.1.moe.up"]),
        (site("layers/moe/up", (5, 3, 4), "bio", "ragged"), ["layers.moe.up"]),
        (site("layers_0/q/w", (2, 3), "io"), ["layers.0.q"]),
    ],
)  # fmt: skip
def test_stacked_layers_are_numbered_where_layers_are_named(of: Site, names: list[str] | None) -> None:
    if names is None:
        with pytest.raises(lora.MatchError, match="Say where they go"):
            Names().targets(of)
    else:
        assert [target.name for target in Names().targets(of)] == names


@pytest.mark.parametrize(
    ("names", "sites", "message"),
    [
        ([("{name}/w", "q")], [site("a/w", (2, 3), "io"), site("b/w", (2, 3), "io")], "'a/w' and 'b/w' are both .* 'q'"),
        ([("a/w", ("q", "q"))], [site("a/w", (2, 4), "io")], "'a/w' and 'a/w' are both called 'q'"),
        ([], [site("l_0/w", (2, 3), "io"), site("l/0/w", (2, 3), "io")], r"both called 'l\.0'"),
        ([("quary/w", "q")], [site("query/w", (2, 3), "io")], "No rule names 'query/w' .* nearest rules: quary/w"),
        ([], [site("w", (2, 3), "io")], "belongs to no module"),
        (
            [], [site("tower/q/w", (5, 2, 3), "bio")],
            r"stacks 5 weights, .* 'tower\.q' leaves 0 .* as in Names\(\[\('tower/q/w', 'tower\.\{i\}\.q'\)\]\)\.",
        ),
        (
            [], [site("blocks/layers/q/w", (5, 2, 3), "bio")],
            r"'blocks\.\{i\}\.layers\.q'\)\]\) or Names\(\[\('blocks/layers/q/w', 'blocks\.layers\.\{i\}\.q'\)",
        ),
        ([], [site("layers/q/w", (5, 4, 2, 3), "bbio")], r"stacks 5×4 weights, .* 'layers\.\{i\}\.\{j\}\.q'"),
        ([], [site("layers/3/q/w", (5, 2, 3), "bio")], "stacks 5 weights"),
        ([("l/w", "l.{i}.{j}")], [site("l/w", (5, 2, 3), "bio")], "leaves 2 numbers"),
        ([("l/w", "l.q")], [site("l/w", (4, 5, 2, 3), "bbio")], "stacks 4×5 weights"),
        ([("l_{i}/w", "l.{i}.q")], [site("l_x/w", (2, 3), "io")], "No rule names"),
        ([("l/w", ("q", "k"))], [site("l/w", (2, 3), "io")], "3 outputs on axis 0, which cannot be shared 1:1"),
        ([Rule("l/w", ("q", "k"), axis=1)], [site("l/w", (2, 4), "io")], "splits output axis 1, but it has 1"),
        ([Rule("l/w", "q", rotary=4)], [site("l/w", (2, 6), "io")], "rotary=4, which does not divide 6"),
        ([Rule("l/w", "q", rotary=-1)], [site("l/w", (2, 3), "io")], "rotary=3, which does not divide 3 in pairs"),
    ],
)  # fmt: skip
def test_what_cannot_be_named_is_refused(names: list[Rule], sites: list[Site], message: str, tmp_path: Path) -> None:
    with pytest.raises(lora.MatchError, match=message):
        Names(names).resolve(sites)
    with pytest.raises(lora.MatchError, match=message):
        lora.peft.save(tmp_path / "a", random_adapter(sites), Names(names))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (dict(modules=("q", "k"), shares=(1, 2, 3)), r"shares=\(1, 2, 3\) must be 2 positive"),
        (dict(modules=("q", "k"), shares=(1, 0)), "must be 2 positive"),
        (dict(modules="q", rotary=3), "rotary=3 must be even"),
        (dict(modules="q", rotary=-2), "rotary=-2 must be even"),
        (dict(modules=("q", "k"), rotary=(4,)), "must have 2 entries"),
        (dict(modules="q", rotary=0, query_scaled=(True, False)), "must have 1 entries"),
        (dict(modules=()), "names no module"),
        (dict(path=(), modules="q"), "names no path"),
        (dict(path=("q", "k"), modules=("q", "k")), "several parameters or several modules, not both"),
        (dict(path=("q", "k"), modules="qk", axis=1), "axis is for several modules"),
        (dict(path=("q", "k"), modules="qk", shares=(1,)), r"shares=\(1,\) must be 2 positive"),
        (dict(path=("q", "params/q"), modules="qk"), "names a parameter twice"),
        (dict(path=("h_{i}/q", "k"), modules="qk"), "must have the same names in braces"),
        (dict(path=("q", "k"), modules="qk", interleaved=0), "interleaved=0 is a number of groups"),
        (dict(modules="q", interleaved=2), "interleaved=2 is a number of groups .* for several paths"),
        (dict(modules="layers.{layer}.q"), "{layer} is not in the path"),
    ],
)
def test_rules_that_contradict_themselves(rule: dict[str, object], message: str) -> None:
    with pytest.raises(lora.MatchError, match=message):
        Rule(**{"path": "q/kernel", **rule})


def test_the_first_rule_that_matches_decides() -> None:
    names = Names([("layers_{i}/{name}/kernel", "h.{i}.{name}"), ("layers_0/q/kernel", "never"), ("{a}/{a}/w", "{a}")])
    assert names.module("layers_0/q/kernel") == "h.0.q"
    assert names.module("layers_0/q/bias") == "h.0.q", "a rule serves the module's other parameters"
    assert names.order("params/x/x/w") == 2
    assert Names([("params/q/kernel", "q_proj")]).module("q/kernel") == "q_proj"
    with pytest.raises(lora.MatchError, match="No rule names 'x/y/w'"):
        names.module("x/y/w")


@pytest.mark.parametrize(
    ("rule", "path"),
    [
        (Rule("qkv/kernel", QKV), "qkv/bias"),
        (Rule("layers/q/kernel", "layers.{i}.q"), "layers/q/bias"),
        (Rule("q/kernel", "q", rotary=4), "q/bias"),
        (Rule("q/kernel", "q", query_scaled=True), "q/kernel"),
        (Rule(PATHS, "qkv"), PATHS[1]),
        (Rule(PATHS, "qkv"), "attn/v/bias"),
    ],
)
def test_whole_parameters_with_other_numbers_in_pytorch_are_refused(rule: Rule, path: str, tmp_path: Path) -> None:
    bias = lora.Replace(jnp.ones(8), Site(path=path, shape=(8,), dtype="float32", kind="full"))
    with pytest.raises(lora.MatchError, match="possible for low-rank factors only"):
        lora.peft.save(tmp_path / "a", lora.Adapter({path: bias}), Names([rule]))


def test_parameters_at_the_root_are_no_siblings() -> None:
    with pytest.raises(lora.MatchError, match="No rule names 'k'"):
        Names([("q", "q_proj")]).module("k")


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Names, Site]:
    """A parameter with axes of any roles in any order, and a rule that takes it apart."""
    counted, experts = draw(st.integers(0, 2)), draw(st.booleans())
    shares = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    outs = [2 * draw(st.integers(1, 2)) for _ in range(draw(st.integers(1, 3)))]
    axis = draw(st.integers(0, len(outs) - 1))
    outs[axis] *= sum(shares)
    sizes = [("b", draw(st.integers(1, 3))) for _ in range(counted + experts)]
    sizes += [("i", draw(st.integers(1, 3))) for _ in range(draw(st.integers(1, 2)))]
    order = draw(st.permutations([*sizes, *(("o", None) for _ in outs)]))
    left = iter(outs)
    shape = tuple(next(left) if size is None else size for _, size in order)
    number = "".join("{i}.{j}."[4 * place : 4 * place + 4] for place in range(counted))
    modules = tuple(f"h.{number}m{place}" for place in range(len(shares)))
    rotary = tuple(draw(st.sampled_from([0, 2])) for _ in shares)
    rule = Rule("w/kernel", modules, axis=axis, shares=shares, rotary=rotary)
    return Names([rule]), site("w/kernel", shape, "".join(role for role, _ in order))


@given(layout=layouts())
def test_any_layout_comes_back_bit_for_bit(
    layout: tuple[Names, Site], tmp_path_factory: pytest.TempPathFactory
) -> None:
    names, of = layout
    update = random_adapter([of], rank=3)[of.path]
    if any(target.parameter for target in names.targets(of)):  # PEFT has one scale for all experts
        update = replace(update, scale=jnp.broadcast_to(update.scale[..., :1], update.scale.shape))
    folder = tmp_path_factory.mktemp("layout") / "a"
    lora.peft.save(folder, lora.Adapter({of.path: update}), names)
    assert_same(lora.peft.load(folder, _zeros(of), Sites([of]), names)[of.path], update)


@pytest.mark.parametrize(
    ("config", "known"),
    [
        ({"model_name": "llama3.1-8b", "decoder_block": "llama2", "rope_type": "default"}, "maxtext_llama3.1"),
        ({"model_name": "mine", "decoder_block": "llama2", "rope_type": "LLaMA3.1"}, "maxtext_llama3.1"),
        ({"model_name": "llama3.3-70b", "decoder_block": "llama2", "rope_type": "default"}, "maxtext_llama"),
        ({"decoder_block": "mixtral"}, "maxtext_llama"),
        ({"decoder_block": "llama2", "use_qk_norm": True}, "maxtext"),
        ({"decoder_block": "qwen3_moe"}, "maxtext"),
        ({}, "maxtext_llama"),
    ],
)
def test_maxtext_names_follow_its_configuration(config: dict[str, object], known: str) -> None:
    assert lora.peft.maxtext_names(config) == KNOWN[known] == lora.peft.maxtext_names(SimpleNamespace(**config))


def test_a_decoder_of_maxtext_without_a_map_is_refused() -> None:
    with pytest.raises(lora.MatchError, match="decoder_block='gemma3'; there are deepseek, llama2, "):
        lora.peft.maxtext_names({"decoder_block": "gemma3"})


@pytest.mark.parametrize(
    ("of", "names"),
    [
        (site("m/layers/mlp/experts/up/weight", (2, 2, 3, 4), "bboi", "ragged"),
         ["m.layers.0.mlp.experts.0.up", "m.layers.0.mlp.experts.1.up", "m.layers.1.mlp.experts.0.up", "m.layers.1.mlp.experts.1.up"]),
        (site("m/layers/3/mlp/experts/up/weight", (2, 3, 4), "boi", "ragged"), ["m.layers.3.mlp.experts.0.up", "m.layers.3.mlp.experts.1.up"]),
        (site("m/layers/3/mlp/experts/1/up/weight", (3, 4), "oi", "ragged"), ["m.layers.3.mlp.experts.1.up"]),
        (site("m/layers/mlp/experts/up_proj", (2, 2, 3, 4), "bboi", "ragged"), ["m.layers.0.mlp.experts.up_proj", "m.layers.1.mlp.experts.up_proj"]),
    ],
)  # fmt: skip
def test_experts_with_names_of_pytorch_are_numbered(of: Site, names: list[str]) -> None:
    targets = Names().targets(of)
    assert [target.name for target in targets] == names
    assert {target.parameter for target in targets} == {of.path.endswith("_proj")}
