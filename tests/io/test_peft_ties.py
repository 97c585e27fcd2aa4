"""A table that is the output head too is one in PEFT's files, whether the program or the map of names says so."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, random_adapter
from peft_models import draw
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from lora_jax.adapter.site import Sites
from lora_jax.io.peft import Names, read_peft

PARAMS = {"embed": {"embedding": draw(9, 4)}, "lm_head": {"kernel": draw(4, 9)}}
TIED = Names(tied={"embed": "lm_head"})
TOKENS = jnp.asarray([[1, 2, 3]])


def tied(params: Any, tokens: Any) -> Any:
    return params["embed"]["embedding"][tokens] @ params["embed"]["embedding"].T


def measured(params: Any, tokens: Any) -> Any:
    """Another layer reads its logits, so that the product does not look like a head."""
    return jnp.tanh(tied(params, tokens)) @ params["gate"]["kernel"]


def twice(params: Any, tokens: Any) -> Any:
    """Two look-ups, and a head of its own."""
    table = params["embed"]["embedding"]
    return (table[tokens] + table[tokens + 1]) @ params["lm_head"]["kernel"]


def both(params: Any, tokens: Any) -> Any:
    """Two heads, one of them the table."""
    return tied(params, tokens), params["embed"]["embedding"][tokens] @ params["lm_head"]["kernel"]


def parts(fn: Any, params: Any = PARAMS) -> tuple[Sites, lora.Adapter]:
    sites = lora.find_sites(fn, params, TOKENS)
    return sites, random_adapter([sites["embed/embedding"]])


ONE = {"embed": PARAMS["embed"], "gate": {"kernel": draw(9, 2)}}


@pytest.mark.parametrize("fn", [tied, measured])
def test_the_table_is_written_for_both_uses_and_comes_back(fn: Any, tmp_path: Path) -> None:
    sites, adapter = parts(fn, ONE)
    lora.peft.save(tmp_path / "a", adapter, TIED, sites=sites)
    files = read_peft(tmp_path / "a")
    assert (sorted(files.modules), files.config["ensure_weight_tying"]) == (["embed", "lm_head"], True)
    assert_close(lora.merge(ONE, lora.peft.load(tmp_path / "a", ONE, sites, TIED)), lora.merge(ONE, adapter))


@pytest.mark.parametrize("fn", [tied, measured])
def test_a_table_that_is_trained_in_full_is_written_for_both_uses(fn: Any, tmp_path: Path) -> None:
    sites, _ = parts(fn, ONE)
    whole = lora.Adapter({"embed/embedding": lora.Replace(draw(9, 4) + 1, sites["embed/embedding"])})
    lora.peft.save(tmp_path / "a", whole, TIED, sites=sites)
    assert sorted(read_peft(tmp_path / "a").saved) == ["embed.weight", "lm_head.weight"]
    assert_close(lora.merge(ONE, lora.peft.load(tmp_path / "a", ONE, sites, TIED)), lora.merge(ONE, whole))


@pytest.mark.parametrize("fn", [tied, measured])
def test_a_file_that_adapts_one_use_is_refused(fn: Any, tmp_path: Path) -> None:
    sites, adapter = parts(fn, ONE)
    lora.peft.save(tmp_path / "a", adapter, TIED, sites=sites)
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if "lm_head" not in key}, file)
    with pytest.raises(lora.CheckpointError, match="adapts embed alone"):
        lora.peft.load(tmp_path / "a", ONE, sites, TIED)


def test_a_head_with_a_parameter_of_its_own_is_no_tie(tmp_path: Path) -> None:
    sites, adapter = parts(twice)
    lora.peft.save(tmp_path / "a", adapter, TIED, sites=sites)
    assert sorted(read_peft(tmp_path / "a").modules) == ["embed"]
    assert_close(lora.merge(PARAMS, lora.peft.load(tmp_path / "a", PARAMS, sites, TIED)), lora.merge(PARAMS, adapter))


def test_two_look_ups_that_no_map_ties_are_no_head(tmp_path: Path) -> None:
    sites, adapter = parts(twice)
    lora.peft.save(tmp_path / "a", adapter, sites=sites)
    assert sorted(read_peft(tmp_path / "a").modules) == ["embed"]


def test_a_map_that_calls_the_head_like_another_parameter_is_refused(tmp_path: Path) -> None:
    sites, adapter = parts(both)
    assert sites["embed/embedding"].head
    with pytest.raises(lora.MatchError, match="the map calls that head 'lm_head', which is the name of"):
        lora.peft.save(tmp_path / "a", adapter, TIED, sites=sites)


def test_the_program_tells_heads_that_nothing_reads() -> None:
    assert [parts(fn, ONE)[0]["embed/embedding"].head for fn in (tied, measured)] == [True, False]


def test_the_program_says_tied_and_the_map_nothing(tmp_path: Path) -> None:
    sites, adapter = parts(tied, ONE)
    with pytest.raises(lora.CheckpointError, match=r"name its head: Names\(tied="):
        lora.peft.save(tmp_path / "a", adapter, sites=sites)
    assert np.isfinite(jax.tree.leaves(adapter)[0]).all()
