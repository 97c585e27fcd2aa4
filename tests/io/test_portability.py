"""Who reads an adapter: what each program does with each feature, and that an export leaves nothing to misread."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import GOLDEN

import lora_jax as lora
from lora_jax.io.peft import Module, PeftFiles, read_peft, write_peft
from lora_jax.io.peft.files import TOKEN_ROWS
from lora_jax.io.peft.portability import row
from lora_jax.io.peft.servers import FEATURES, KNOWN, SERVERS
from lora_jax.io.peft.uniform import can_be_uniform, uniform

NAMES = sorted(folder.parent.name for folder in GOLDEN.glob("*/expected.safetensors"))


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def linear(rank: int = 2, **vectors: Any) -> Module:
    return Module("linear", ones(rank, 4), ones(3, rank), **vectors)


def files(module: Module | None = None, saved: dict[str, np.ndarray] | None = None, **config: Any) -> PeftFiles:
    fields = {"r": 2, "lora_alpha": 4, "target_modules": ["q"], **config}
    return PeftFiles(fields, {"q": module or linear(), "k": linear()}, saved or {})


# What vllm, sglang, llama.cpp, mlx and peft do: r(eads), m(isreads), x (refuses).
CASES: dict[str, tuple[PeftFiles, str]] = {
    "plain": (files(), "rrrrr"),
    "patterns that say nothing else": (files(rank_pattern={"q": 2}, alpha_pattern={"^k": 4}), "rrrrr"),
    "one alpha and two ranks": (files(linear(4), rank_pattern={"q": 4}), "mmrrr"),
    "two alphas": (files(alpha_pattern={"q": 2}), "mmmrr"),
    "one scale at two ranks": (files(linear(4), rank_pattern={"q": 4}, alpha_pattern={"q": 8}), "rrmrr"),
    "rsLoRA": (files(use_rslora=True), "rmmrr"),
    "DoRA": (files(linear(magnitude=ones(3)), use_dora=True), "xxxrr"),
    "bias on B": (files(linear(b_bias=ones(3)), lora_bias=True), "xmxxr"),
    "aLoRA": (files(alora_invocation_tokens=[1, 2]), "xmrmr"),
    "a module": (files(saved={"norm.weight": ones(4)}, modules_to_save=["norm"]), "xmxxr"),
    "a head": (files(saved={"score.weight": ones(4, 4)}, modules_to_save=["score"]), "rmxxr"),
    "a bias": (files(saved={"q.bias": ones(3)}, bias="lora_only"), "xmxxr"),
    "rows": (files(saved={f"wte{TOKEN_ROWS}": ones(1, 4)}, trainable_token_indices={"wte": [1]}), "xmxxr"),
    "a table": (files(saved={"wte.weight": ones(9, 4)}), "mmxxr"),
    "a table beside factors": (files(saved={"q.weight": ones(3, 4)}), "rrrrr"),
    "a convolution": (files(Module("conv", ones(2, 4, 3), ones(3, 2, 1))), "xxxxr"),
    "a table of look-ups": (files(Module("embedding", ones(2, 9), ones(4, 2))), "rrrrr"),
    "experts": (files(Module("parameter", ones(6, 4), ones(3, 6))), "rxxxr"),
    "rank 1024": (files(linear(1024), rank_pattern={"q": 1024}, alpha_pattern={"q": 2048}), "xrmrr"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_programs_do_with_a_feature(name: str) -> None:
    found, want = CASES[name]
    codes = {"reads": "r", "misreads": "m", "refuses": "x"}
    got = "".join(codes[row(found, server, form=False).verdict] for server in SERVERS)
    assert got == want


def test_every_feature_is_known_of_and_has_a_reason() -> None:
    assert FEATURES.keys() == KNOWN.keys()
    assert {server for known in KNOWN.values() for server in known} <= {*SERVERS}
    assert row(files(alpha_pattern={"q": 2}), "llama.cpp").reasons == (
        "q: it takes lora_alpha / own rank for every scale: lora-jax export makes them one",
    )


@pytest.mark.parametrize(("rank", "said"), [(16, ()), (17, ("rank 17 needs --max-lora-rank 32",))])
def test_a_rank_that_vllm_has_to_be_told(rank: int, said: tuple[str, ...]) -> None:
    adapter = PeftFiles({"r": rank, "lora_alpha": 4}, {"q": linear(rank)})
    assert row(adapter, "vllm") == replace(row(adapter, "vllm"), verdict="reads", reasons=said)


@pytest.mark.parametrize("name", NAMES)
def test_after_an_export_no_scale_is_misread(name: str) -> None:
    given = read_peft(GOLDEN / name)
    if can_be_uniform(given):
        made = uniform(given)
        for feature in ("type", "own_scale", "scale", "patterns"):
            assert FEATURES[feature](made) is None


@pytest.mark.parametrize("name", ["trainable_tokens", "ln_tuning"])
def test_peft_reads_its_types_without_factors_as_they_are(name: str, tmp_path: Path) -> None:
    found = {each.server: each.verdict for each in lora.peft.portability(GOLDEN / name).rows}
    assert found == {"vllm": "refuses", "sglang": "refuses", "llama.cpp": "refuses", "mlx": "refuses", "peft": "reads"}
    write_peft(tmp_path / "a", read_peft(GOLDEN / name))
    assert lora.peft.portability(tmp_path / "a") == lora.peft.portability(GOLDEN / name)


def test_a_table_of_who_reads_an_adapter_on_disk(tmp_path: Path) -> None:
    write_peft(tmp_path / "a", files(use_rslora=True))
    found = lora.peft.portability(tmp_path / "a")
    assert [each.server for each in found.rows] == [*SERVERS]
    assert "lora_alpha / own rank" in repr(found)
    assert found.as_dict()["rows"][0] == {"server": "vllm", "verdict": "reads", "reasons": []}
