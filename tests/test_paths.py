"""Names of leaves, and what names, regexes and layer numbers match."""

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import lora_jax as lora
from lora_jax import paths
from lora_jax.errors import ParameterError

PARTS = st.lists(st.text("abcxyz_019", min_size=1, max_size=6), min_size=2, max_size=6)


class Triple(NamedTuple):
    query: Any
    key: Any
    value: Any


@jax.tree_util.register_dataclass
@dataclass
class Box:
    value: Any


@jax.tree_util.register_pytree_node_class
class Named:
    """Arrays with names for their axes, as Haliax has them: a node whose children have no keys."""

    def __init__(self, *arrays: Any):
        self.arrays = arrays

    def tree_flatten(self) -> tuple[tuple[Any, ...], None]:
        return self.arrays, None

    @classmethod
    def tree_unflatten(cls, _: None, arrays: tuple[Any, ...]) -> "Named":
        return cls(*arrays)


def affine(params: Any, x: jax.Array) -> jax.Array:
    layer = params["q_proj"]
    return x @ layer["weight"].arrays[0] + layer["bias"].arrays[0]


class Mlp(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs) for _ in range(2)])


def names(tree: Any) -> list[str]:
    return list(paths.named_leaves(tree)[0])


def test_paths_join_keys_indexes_and_attributes():
    tree = {"blocks": [{"w": 1}, (2, 3)], "attn": Triple(4, 5, 6)}
    assert names(tree) == ["attn/query", "attn/key", "attn/value", "blocks/0/w", "blocks/1/0", "blocks/1/1"]


def test_nnx_state_reads_like_the_module():
    _, state = nnx.split(Mlp(nnx.Rngs(0)))
    expected = [f"layers/{i}/{name}" for i in range(2) for name in ("bias", "kernel")]
    assert names(state) == names(nnx.to_pure_dict(state)) == expected


def test_partitioned_boxes_are_not_part_of_the_path():
    init = nn.with_partitioning(nn.initializers.ones, (None, "model"))
    boxed = nn.Dense(3, kernel_init=init).init(jax.random.key(0), jnp.ones((1, 2)))
    assert names(boxed) == ["params/bias", "params/kernel"]


def test_a_box_is_kept_where_its_content_would_lose_its_name():
    assert names(Box(1)) == ["value"]
    assert names({"w": {"value": 1}}) == ["w/value"]  # a dict key is a name like any other
    assert names({"a": Box(1), "b": Box(Box(2))}) == ["a", "b/value"]


def test_a_node_without_keys_around_one_array_is_a_box():
    tree = {"q_proj": {"weight": Named(1), "bias": Named(2)}, "list": [3], "pair": Named(4, 5)}
    assert names(tree) == ["list/0", "pair/0", "pair/1", "q_proj/bias", "q_proj/weight"]
    leaves, treedef = paths.named_leaves(tree)
    assert paths.rebuild(treedef, leaves)["q_proj"]["weight"].arrays == (1,)


def test_the_bias_of_a_boxed_weight_is_beside_it():
    params = {"q_proj": {"weight": Named(jnp.ones((4, 5))), "bias": Named(jnp.ones(5))}}
    sites = lora.find_sites(affine, params, jnp.ones(4))
    config = lora.LoraConfig(rank=2, targets=("q_proj",), bias="lora_only")
    assert set(lora.init(jax.random.key(0), config, params, sites)) == {"q_proj/weight", "q_proj/bias"}


def test_leaves_that_are_no_arrays_survive_the_round_trip():
    tree = {"w": np.ones(2), "f": jnp.tanh, "none": None, "spec": jax.ShapeDtypeStruct((2,), "float32")}
    leaves, treedef = paths.named_leaves(tree)
    assert {name: paths.is_array(leaf) for name, leaf in leaves.items()} == {"f": False, "spec": True, "w": True}
    assert paths.rebuild(treedef, leaves) == tree


def test_a_path_spelled_twice_is_refused():
    with pytest.raises(ParameterError, match="'a/b'"):
        names({"a/b": 1, "a": {"b": 2}})


@pytest.mark.parametrize(
    ("name", "path", "expected"),
    [
        ("query", "params/layers_0/attn/query/kernel", True),
        ("attn/query", "params/layers_0/attn/query/kernel", True),
        ("attn.query", "params/layers_0/attn/query/kernel", True),
        ("params/layers_0/attn/query", "params/layers_0/attn/query/kernel", True),
        ("query/kernel", "params/layers_0/attn/query/kernel", True),
        ("kernel", "params/layers_0/attn/query/kernel", True),
        ("w1", "experts/w1", True),
        ("q_einsum/w", "attn/q_einsum/w", True),
        ("q_proj", "model.layers.0.self_attn.q_proj.weight", True),  # a flat dict with PyTorch names
        ("attn", "params/layers_0/attn/query/kernel", False),
        ("head", "params/subhead/kernel", False),
        ("head", "params/head_2/kernel", False),
        ("ttn/query", "params/layers_0/attn/query/kernel", False),
        ("a/b/c/d", "c/d", False),
    ],
)
def test_names_match_whole_components_at_the_end(name: str, path: str, expected: bool):
    assert paths.name_hits(name, path) is expected


@given(PARTS, PARTS)
def test_a_name_hits_exactly_the_suffixes_of_the_module_and_of_the_parameter(parts: list[str], other: list[str]):
    path = "/".join(parts)
    suffixes = {tuple(whole[i:]) for whole in (parts, parts[:-1]) for i in range(len(whole))}
    assert all(paths.name_hits(joint.join(suffix), path) for suffix in suffixes for joint in "/.")
    assert paths.name_hits("/".join(other), path) == (tuple(other) in suffixes)


@given(PARTS, st.integers(1, 5), st.data())
def test_a_part_of_a_component_never_hits(parts: list[str], cut: int, data: st.DataObject):
    word = data.draw(st.sampled_from(parts))[cut:]
    if word and word not in parts[-2:]:
        assert not paths.name_hits(word, "/".join(parts))
    if word and word not in parts:
        assert not paths.inside(word, "/".join(parts))


@given(PARTS, st.data())
def test_inside_holds_for_every_run_of_components(parts: list[str], data: st.DataObject):
    start = data.draw(st.integers(0, len(parts) - 1))
    stop = data.draw(st.integers(start + 1, len(parts)))
    assert paths.inside("/".join(parts[start:stop]), "/".join(parts))


@pytest.mark.parametrize(
    ("regex", "expected"),
    [
        (r".*\.(query|value)", True),
        (r".*/(query|value)/kernel", True),
        (r"layers_\d+/attn/query", True),
        (r"layers_\d+\.attn\.query", True),
        (r"params/.*query", True),
        ("query", False),
        (r"attn/query", False),
        (r".*quer", False),
    ],
)
def test_a_regex_matches_a_whole_path(regex: str, expected: bool):
    assert paths.regex_hits(regex, "params/layers_0/attn/query/kernel") is expected


@given(PARTS)
def test_every_spelling_is_a_regex_that_hits(parts: list[str]):
    path = "/".join(parts)
    assert all(paths.regex_hits(re.escape(form), path) for form in paths.spellings(path))


@pytest.mark.parametrize(
    ("path", "patterns", "expected"),
    [
        ("params/layers_12/attn/query/kernel", (), 12),
        ("layers/3/attn/kernel", (), 3),
        ("model.layers.3.self_attn.q_proj.weight", (), 3),
        ("Block_2/Dense_0/kernel", (), 2),
        ("dense/kernel_0", (), None),
        ("dense/kernel", (), None),
        ("conv1d/kernel", (), None),
        ("encoder_0/block_3/mlp/kernel", ("block",), 3),
        ("encoder_0/block/3/mlp/kernel", ("block",), 3),
        ("encoder_0/block3/mlp/kernel", ("block",), 3),
        ("encoder_0/superblock_3/mlp/kernel", ("block",), None),
        ("encoder_0/block_3/expert_1/kernel", ("h", "encoder_0/block"), 3),
    ],
)
def test_layer_numbers(path: str, patterns: tuple[str, ...], expected: int | None):
    assert paths.layer_number(path, patterns) == expected


@pytest.mark.parametrize(
    ("key", "path", "expected"),
    [
        ("query", "params/layers_0/query/kernel", True),
        ("layers_0.query", "params/layers_0/query/kernel", True),
        ("layers_0/query", "params/layers_0/query/kernel", True),
        (r"layers_\d/(query|key)", "params/layers_0/query/kernel", True),
        ("^layers_0.query", "params/layers_0/query/kernel", True),
        ("query/kernel", "params/layers_0/query/kernel", True),
        ("uery", "params/layers_0/query/kernel", False),
        ("layers_0", "params/layers_0/query/kernel", False),
        ("1/query", "layers/11/query/kernel", False),
    ],
)
def test_pattern_keys_match_at_component_boundaries(key: str, path: str, expected: bool):
    assert paths.pattern_hits(key, path) is expected


def test_the_first_pattern_wins_not_the_most_specific():
    assert paths.lookup([("query", 2), ("layers_1/query", 4)], "layers_1/query/kernel") == ("query", 2)
    assert paths.lookup([("key", 2)], "layers_1/query/kernel") is None
