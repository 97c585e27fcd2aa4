"""LoraConfig, its PEFT names, and what it selects."""

import dataclasses
import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_jax.adapter.site import Site, Sites
from lora_jax.config.config import LoraConfig
from lora_jax.config.selection import select
from lora_jax.errors import ConfigError, MatchError


def site(path: str, kind: str = "dense", head: bool = False, stacked: bool = False) -> Site:
    shape = (3, 4, 4) if stacked else (4, 4)
    axes = {"in_axes": (1,), "out_axes": (2,), "batch_axes": (0,)} if stacked else {"in_axes": (0,), "out_axes": (1,)}
    return Site(path=path, shape=shape, dtype="float32", kind=kind, head=head, **axes)


def transformer() -> Sites:
    modules = [f"params/layers_{i}/{name}" for i in range(3) for name in ("attn/query", "attn/value", "mlp/up")]
    found = [site(f"{module}/kernel") for module in modules]
    found += [site("params/experts/up", "ragged"), site("params/patch/kernel", "conv")]
    found += [site("params/embed/embedding", "embedding"), site("params/head/kernel", head=True)]
    found += [site("params/subhead/kernel")]
    biases = [f"{module}/bias" for module in [*modules, "params/head", "params/patch"]]
    rest = [*biases, "params/norm/scale", "params/norm/bias"]
    return Sites(found, tuple(sorted([*(item.path for item in found), *rest])))


SITES = transformer()


def chosen(**fields) -> list[str]:
    return [item.path.removeprefix("params/") for item in select(LoraConfig(**fields), SITES).sites]


def trained(**fields) -> list[str]:
    return [path.removeprefix("params/") for path in select(LoraConfig(**fields), SITES).train]


def test_defaults_and_normal_forms():
    config = LoraConfig(targets=["b", "a", "b"], layers=np.int64(1), train="head", param_dtype=jnp.bfloat16)
    assert (config.targets, config.layers, config.train) == (("b", "a"), (1,), ("head",))
    assert config.param_dtype == "bfloat16"
    assert LoraConfig().targets == LoraConfig(targets="ALL-Linear").targets == "all-linear"
    assert LoraConfig(targets={"b", "a"}) == LoraConfig(targets=("a", "b"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 3


CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "rank": st.integers(1, 512),
        "alpha": st.floats(0.5, 512),
        "targets": st.one_of(
            st.just("all-linear"), st.just(r".*\.q"), st.lists(st.sampled_from(["q", "k.v", "o"]), min_size=1)
        ),
        "exclude": st.sampled_from([(), ("k",), "k.*"]),
        "rank_pattern": st.dictionaries(st.sampled_from(["q", "k.v"]), st.integers(1, 64)),
        "alpha_pattern": st.dictionaries(st.sampled_from(["v", "q"]), st.floats(1, 64)),
        "rslora": st.booleans(),
        "dropout": st.floats(0, 0.9),
        "init": st.sampled_from(["default", "gaussian", "orthogonal"]),
        "train": st.sampled_from([(), ("head",)]),
        "bias": st.sampled_from(["none", "all", "lora_only"]),
    },
)


@given(CONFIGS)
def test_a_config_is_hashable_and_survives_json(fields):
    config = LoraConfig(**fields)
    assert hash(config) == hash(LoraConfig(**fields))
    assert LoraConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert dataclasses.replace(config) == config


@given(CONFIGS)
def test_to_peft_and_back_scales_every_site_alike(fields):
    config = LoraConfig(**fields)
    written = json.loads(json.dumps(config.to_peft()))
    back = LoraConfig.from_peft(written)
    for path in ("layers_0/q/kernel", "layers_0/k/v/kernel", "v/kernel", "o/kernel"):
        assert (back.rank_for(path), back.scale_for(path)) == (config.rank_for(path), config.scale_for(path))
    resolved = {"alpha": back.alpha, "alpha_pattern": back.alpha_pattern}
    assert back == dataclasses.replace(config, **resolved)
    assert back.to_peft() == written


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank=0 must be a positive integer"),
        ({"rank": 2.5}, "rank=2.5"),
        ({"rank": True}, "rank=True"),
        ({"alpha": 0}, "alpha=0"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"alpha": "8"}, "alpha='8'"),
        ({"dropout": 1.0}, "dropout=1.0 must be a probability"),
        ({"dropout": -0.1}, "dropout"),
        ({"targets": ()}, "targets is empty"),
        ({"targets": ""}, "targets is empty"),
        ({"targets": ("query", 3)}, "3 is not a name"),
        ({"targets": ("attn//query",)}, "'attn//query' is not a name"),
        ({"targets": ".*(query"}, "not a regular expression"),
        ({"exclude": "["}, "exclude.*not a regular expression"),
        ({"layers": -1, "targets": ("q",)}, "layers=-1"),
        ({"layers": ()}, "layers is empty"),
        ({"layers": 1, "targets": ".*query"}, "regex"),
        ({"layers_pattern": "h"}, "without layers"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\]=0"),
        ({"rank_pattern": {"(": 1}}, "not a regular expression"),
        ({"rank_pattern": "query"}, "must map regexes to numbers"),
        ({"alpha_pattern": {"q": -1}}, "alpha_pattern"),
        ({"rslora": "yes"}, "rslora='yes'"),
        ({"init": "kaiming"}, "choose one of: .*default.*gaussian.*orthogonal"),
        ({"init": None}, "init=None"),
        ({"bias": "some"}, "'lora_only'"),
        ({"train": ("",)}, "train"),
        ({"param_dtype": "int32"}, "floating-point"),
        ({"param_dtype": None}, "floating-point"),
        ({"param_dtype": "float33"}, "floating-point"),
    ],
)
def test_bad_fields_are_refused_at_once(fields, message):
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**fields)


def test_rank_alpha_and_scale_by_path():
    config = LoraConfig(rank=8, rank_pattern={"layers_0/q": 4, "q": 16}, alpha_pattern={"k": 3})
    assert [config.rank_for(f"{module}/kernel") for module in ("layers_0/q", "layers_1/q", "v")] == [4, 16, 8]
    assert [config.scale_for(f"{module}/kernel") for module in ("layers_0/q", "q", "k")] == [2.0, 2.0, 3 / 8]
    assert LoraConfig(rank=16, alpha=8, rslora=True).scale_for("w") == 2.0
    assert LoraConfig(rank=16, alpha=8).scale_for("w") == 0.5


def test_from_peft_honours_the_defaults_of_peft():
    config = LoraConfig.from_peft({"target_modules": ["q_proj"], "r": 32, "task_type": "CAUSAL_LM", "use_dora": False})
    assert (config.rank, config.alpha, config.scale_for("q_proj/w")) == (32, 8.0, 0.25)
    full = {
        "peft_type": "LORA", "target_modules": ["q"], "layers_to_transform": [1, 2], "layers_pattern": "h",
        "modules_to_save": ["lm_head"], "bias": "lora_only", "init_lora_weights": "gaussian", "use_rslora": True,
        "lora_dropout": 0.1, "exclude_modules": "x.*", "loftq_config": {}, "megatron_core": "megatron.core",
        "qalora_group_size": 16, "fan_in_fan_out": True, "inference_mode": True, "rank_pattern": {}, "lora_bias": False,
    }  # fmt: skip
    expected = LoraConfig(
        alpha=8, targets=("q",), layers=(1, 2), layers_pattern=("h",), train=("lm_head",), bias="lora_only",
        init="gaussian", rslora=True, dropout=0.1, exclude="x.*",
    )  # fmt: skip
    assert LoraConfig.from_peft(full) == expected


@pytest.mark.parametrize(
    "field",
    [
        {"loftq_config": {"loftq_bits": 4}}, {"target_parameters": ["w"]}, {"init_lora_weights": "eva"},
        {"init_lora_weights": False}, {"peft_type": "IA3"}, {"layer_replication": [[0, 2]]}, {"use_a_later": 1},
        {"later_config": {"a": 1}}, {"output_scaling": 2},
        {"target_modules": None},
    ],
)  # fmt: skip
def test_from_peft_refuses_what_it_would_not_honour(field):
    with pytest.raises(ConfigError, match=next(iter(field))):
        LoraConfig.from_peft({"target_modules": ["q"], **field})


def test_from_peft_reads_what_peft_reads():
    assert LoraConfig.from_peft({"target_modules": ["q"], "use_rslora": 1, "init_lora_weights": True}).rslora is True
    with pytest.warns(UserWarning, match="'trained_by': nothing of PEFT's is called so"):
        assert LoraConfig.from_peft({"target_modules": ["q"], "trained_by": "me"}).targets == ("q",)


@pytest.mark.parametrize(
    "fields",
    [
        [], None, {"r": 10**400}, {"r": "8"}, {"r": True}, {"r": -1}, {"lora_alpha": 10**400}, {"lora_alpha": 1e39},
        {"lora_alpha": float("nan")}, {"lora_dropout": 10**400}, {"target_modules": 5}, {"target_modules": [[]]},
        {"target_modules": {"q": 1}, "rank_pattern": 5}, {"rank_pattern": [5]}, {"alpha_pattern": {"q": {}}},
        {"layers_to_transform": "a"}, {"layers_to_transform": {}, "layers_pattern": 3}, {"bias": ["all"]},
        {"modules_to_save": 3}, {"trainable_token_indices": {"a": "b"}}, {"trainable_token_indices": [[1]]},
        {"alora_invocation_tokens": 3}, {"init_lora_weights": {}}, {"use_rslora": "yes"}, {"use_a": {5: 5}},
        {"peft_type": []}, {"exclude_modules": [5]}, {"exclude_modules": "("}, {"lora_bias": 2},
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*taken for a note")
def test_from_peft_of_anything_else_is_an_error_of_ours(fields):
    given = {"target_modules": ["q"], **fields} if isinstance(fields, dict) else fields
    with pytest.raises(ConfigError):
        LoraConfig.from_peft(given)


def test_to_peft_refuses_what_peft_has_not():
    with pytest.raises(ConfigError, match="layers_to_transform"):
        LoraConfig(layers=1).to_peft()


def test_all_linear_leaves_out_heads_tables_and_convolutions():
    expected = {f"layers_{i}/{name}/kernel" for i in range(3) for name in ("attn/query", "attn/value", "mlp/up")}
    assert set(chosen()) == expected | {"experts/up", "subhead/kernel"}
    assert chosen(targets=("head", "embed", "patch")) == ["patch/kernel", "embed/embedding", "head/kernel"]


def test_names_and_regexes_select():
    assert chosen(targets=("layers_1/attn/query", "head")) == ["layers_1/attn/query/kernel", "head/kernel"]
    assert chosen(targets=r".*_0\.attn\.(query|value)") == ["layers_0/attn/query/kernel", "layers_0/attn/value/kernel"]
    assert chosen(targets=("query",), exclude=("layers_1/attn/query",), layers=[0, 1]) == ["layers_0/attn/query/kernel"]
    assert chosen(targets=("query",), exclude=r".*_[12]\..*") == ["layers_0/attn/query/kernel"]
    assert chosen(layers=2, layers_pattern="layers", targets=("up", "query"))[0] == "layers_2/attn/query/kernel"


def test_a_full_name_does_not_bypass_layers():
    assert chosen(targets=("layers_1/attn/query", "value"), layers=0) == ["layers_0/attn/value/kernel"]


def test_train_and_bias():
    assert trained(train=("head",)) == ["head/bias", "head/kernel"]
    assert trained(train=("head/kernel", "norm")) == ["head/kernel", "norm/bias", "norm/scale"]
    assert trained(targets=("query",), bias="lora_only") == [f"layers_{i}/attn/query/bias" for i in range(3)]
    assert len(trained(bias="all")) == 12
    assert chosen(targets=("query", "value"), train=("layers_0", "layers_1/attn")) == [
        "layers_2/attn/query/kernel",
        "layers_2/attn/value/kernel",
    ]


def test_haiku_biases_are_biases():
    sites = Sites([site("linear/w")], ("linear/w", "linear/b", "other/b"))
    assert select(LoraConfig(targets=("linear",), bias="all"), sites).train == ("linear/b",)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": ("query", "valeu")}, r"'valeu' hits none of the 14 sites.*attn/value.*find_sites"),
        ({"targets": ("ead",)}, "'ead' hits none"),
        ({"targets": ("attn",)}, r"module above 6 parameters .*\(\.\*/\)\?attn/\.\*"),
        ({"targets": ("query|value",)}, "looks like a regex"),
        ({"targets": "query"}, "One string is a regex; for a name: .'query',"),
        ({"targets": ".*valeu.*"}, "must match a whole path. Nearest: "),
        ({"targets": ("norm",)}, "does not use linearly .*norm/bias.*train="),
        ({"targets": ("query",), "exclude": ("valeu",)}, "exclude: 'valeu' hits no parameter.*attn/value"),
        ({"targets": ("query",), "exclude": "value"}, "exclude: 'value'"),
        ({"targets": ("query",), "exclude": ("query",)}, "Nothing is left to adapt: all 3"),
        ({"targets": ("query",), "train": ("hed",)}, "train: 'hed' hits no parameter. Nearest: .*head"),
        ({"targets": ("query",), "layers": (1, 7)}, r"in layer 7; .* \[0, 1, 2\]"),
        ({"targets": ("query",), "layers": 1, "layers_pattern": ("h",)}, "no number follows 'h'"),
        ({"targets": ("query",), "rank_pattern": {"valeu": 2}}, "rank_pattern: 'valeu' matches none"),
        ({"targets": ("query",), "rank_pattern": {"value": 2}}, "rank_pattern: 'value' matches none of the 3"),
        ({"targets": ("query",), "alpha_pattern": {"query": 2, "layers_0.*": 3}}, "'layers_0.*' never applies"),
        ({"targets": ("embed",), "bias": "lora_only"}, "bias='lora_only' hits nothing"),
    ],
)
def test_whatever_hits_nothing_is_an_error(fields, message):
    with pytest.raises(MatchError, match=message):
        chosen(**fields)


def test_errors_for_programs_without_candidates():
    with pytest.raises(MatchError, match="leaves out output heads"):
        select(LoraConfig(), Sites([site("head/kernel", head=True)]))
    with pytest.raises(MatchError, match="share a path and cannot be told apart"):
        select(LoraConfig(layers=1), Sites([site("layers/attn/kernel", stacked=True)]))
    with pytest.raises(MatchError, match="none of the 0 sites"):
        select(LoraConfig(targets=("q",)), Sites([]))


@given(st.sets(st.sampled_from(["query", "value", "up", "layers_1/mlp/up", "experts/up"]), min_size=1))
def test_names_select_the_union_of_what_each_selects(names):
    each = {path for name in names for path in chosen(targets=(name,))}
    assert set(chosen(targets=names)) == each


LINEN = Sites(
    [site("params/fc/kernel"), site("batch_stats/spectral/fc/kernel/u")],
    (
        "params/fc/kernel", "params/fc/bias", "params/norm/scale", "params/norm/bias", "batch_stats/norm/mean",
        "batch_stats/spectral/fc/kernel/u", "router_state/gate/bias",
    ),
)  # fmt: skip
"""Collections of a linen model beside its parameters."""


def test_state_beside_the_parameters_is_left_out() -> None:
    chosen = select(LoraConfig(bias="all", train=("norm",)), LINEN)
    assert [each.path for each in chosen.sites] == ["params/fc/kernel"]
    assert chosen.train == ("params/fc/bias", "params/norm/scale", "params/norm/bias")
    assert [each.path for each in select(LoraConfig(targets=("kernel", "fc")), LINEN).sites] == ["params/fc/kernel"]
    assert select(LoraConfig(exclude=("u",)), LINEN).sites == chosen.sites


@pytest.mark.parametrize(
    "fields",
    [{"train": ("batch_stats",)}, {"train": ("norm/mean",)}, {"targets": ("u",)}, {"targets": ".*/u"}],
    ids=str,
)
def test_state_that_is_asked_for_is_refused_by_name(fields: dict) -> None:
    (field,) = fields
    with pytest.raises(MatchError, match=rf"^{field}: .* hits only state .*\(batch_stats/.*docs/state\.md"):
        select(LoraConfig(**fields), LINEN)


def test_state_of_nested_models_and_trees_without_collections() -> None:
    paths = ("a/params/fc/kernel", "a/cache/fc/bias", "b/fc/kernel", "b/cache/bias")
    chosen = select(
        LoraConfig(targets=("fc",), bias="all"), Sites([site("a/params/fc/kernel"), site("b/fc/kernel")], paths)
    )
    assert [each.path for each in chosen.sites] == ["a/params/fc/kernel", "b/fc/kernel"]
    assert chosen.train == ("b/cache/bias",)


def expert_site(
    path: str, shape: tuple[int, ...], into: tuple[int, ...], out: tuple[int, ...], stack: tuple[int, ...] = ()
) -> Site:
    return Site(path=path, shape=shape, dtype="float32", kind="dense", in_axes=into, out_axes=out, batch_axes=stack)


MOE = Sites([
    expert_site("moe/up", (3, 4, 8), (1,), (0, 2)),
    expert_site("moe/down", (3, 8, 4), (0, 1), (2,)),
    expert_site("scanned/up", (2, 3, 4, 8), (2,), (1, 3), (0,)),
    expert_site("scanned/down", (2, 3, 8, 4), (2,), (3,), (0, 1)),
    expert_site("attn/query", (4, 2, 8), (0,), (1, 2)),
    expert_site("attn/out", (2, 8, 4), (0, 1), (2,)),
    expert_site("alone/w", (5, 4, 8), (1,), (0, 2)),
])  # fmt: skip
"""Experts that go on in another weight of their module, in two layouts; heads stored last; and one weight alone."""


@pytest.mark.parametrize(
    ("experts", "stacks"),
    [
        ("shared", {"scanned/up": (0,), "scanned/down": (0, 1)}),
        ("own", {"moe/up": (0,), "moe/down": (0,), "scanned/up": (0, 1), "scanned/down": (0, 1)}),
        (("up", "alone/w"), {"moe/up": (0,), "scanned/up": (0, 1), "scanned/down": (0, 1), "alone/w": (0,)}),
    ],
    ids=str,
)
def test_experts_of_their_own(experts: Any, stacks: dict[str, tuple[int, ...]]) -> None:
    chosen = select(LoraConfig(experts=experts), MOE).sites
    assert {each.path: each.batch_axes for each in chosen if each.batch_axes} == stacks


def test_experts_are_checked() -> None:
    with pytest.raises(ConfigError, match="experts='mine' must be"):
        LoraConfig(experts="mine")
    with pytest.raises(ConfigError, match="beside init='eva'"):
        LoraConfig(experts="own", init="eva")
    with pytest.raises(MatchError, match=r"experts: 'qery' hits no stack of experts; nearest: attn/query"):
        select(LoraConfig(experts=("qery",)), MOE)
    assert LoraConfig(**dataclasses.asdict(LoraConfig(experts=["up"]))) == LoraConfig(experts=("up",))
