"""Models of Hugging Face directories against transformers: logits at 1,100 positions, and greedy decoding."""

import doctest
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from helpers import assert_close
from torch_models import MODELS, saved
from torch_side import run
from transformers import AutoModelForCausalLM

from lora_jax import models
from lora_jax.models import empty_cache, load
from lora_jax.models.families import FAMILIES

LENGTH = 1100
TOKENS = np.random.default_rng(0).integers(0, 97, (1, LENGTH))
# The rest differs from these in one thing.
FULL = {"llama linear", "llama dynamic", "qwen3_moe all", "phi3 shortrope", "smollm3 windows", "gpt_neox serial"}
NAMES = [pytest.param(name, marks=pytest.mark.full) if name in FULL else name for name in MODELS if name != "arcee"]


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path):
    theirs = saved(tmp_path / "m", name)
    model = load(tmp_path / "m")
    logits = jax.jit(model.apply)(model.params, jnp.asarray(TOKENS))
    assert_close(np.asarray(logits), run(theirs, torch.from_numpy(TOKENS)), factor=0.5)


@pytest.mark.parametrize("name", ["mixtral", pytest.param("qwen3_moe mixed", marks=pytest.mark.full)])
def test_experts_may_be_fused_and_transformers_loads_them_so(name: str, tmp_path: Path):
    theirs = saved(tmp_path / "m", name, fused=True)
    model = load(tmp_path / "m")
    want = run(theirs, torch.from_numpy(TOKENS))
    assert_close(np.asarray(jax.jit(model.apply)(model.params, jnp.asarray(TOKENS))), want, factor=0.5)
    models.save(tmp_path / "n", model)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "n", attn_implementation="eager").eval()
    assert_close(run(again, torch.from_numpy(TOKENS)), want)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        ("llama yarn", {"rope_parameters": {**MODELS["llama yarn"][1]["rope_parameters"], "mscale": 1.2}}),
        *(
            (name, {"sliding_window": 90})
            for name in ("mistral", "qwen2", "mixtral", "gemma2", "gemma3_text", "phi3", "gpt_oss")
        ),
        ("gemma2", {"attn_logit_softcapping": 2.5}),
        ("gemma2", {"query_pre_attn_scalar": 18}),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}),
    ],
)
@pytest.mark.full
def test_a_difference_of_the_config_shows(name: str, change: dict[str, Any], tmp_path: Path):
    """What the test above compares is no rounding: another window, cap or rope gives other logits."""
    one, other = saved(tmp_path / "a", name), saved(tmp_path / "b", name, **change)
    apart = np.abs(run(one, torch.from_numpy(TOKENS)) - run(other, torch.from_numpy(TOKENS))).max()
    assert apart > 1e-2


@pytest.mark.parametrize(
    "name", ["qwen2", *(pytest.param(name, marks=pytest.mark.full) for name in ("gemma3_text", "gpt_oss", "gpt2"))]
)
def test_greedy_decoding_takes_the_tokens_that_transformers_takes(name: str, tmp_path: Path):
    theirs: Any = saved(tmp_path / "m", name)
    prompt, count = TOKENS[:, :40], 60
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    want = theirs.generate(
        torch.from_numpy(prompt), attention_mask=torch.ones(prompt.shape), max_new_tokens=count, **options
    )
    model = load(tmp_path / "m")
    step = jax.jit(model.apply)
    logits, cache = step(model.params, jnp.asarray(prompt), cache=empty_cache(model.config, 1, 100))
    taken = [logits[:, -1:].argmax(-1)]
    for _ in range(count - 1):
        logits, cache = step(model.params, taken[-1], cache=cache)
        taken.append(logits.argmax(-1))
    assert jnp.concatenate(taken, 1).tolist() == want[:, 40:].tolist()


@pytest.mark.parametrize(
    "name",
    ["mixtral", *(pytest.param(name, marks=pytest.mark.full) for name in ("qwen2", "gpt2", "gpt_oss", "gemma2"))],
)
def test_transformers_loads_what_is_saved(name: str, tmp_path: Path):
    saved(tmp_path / "m", name)
    model = models.load(tmp_path / "m", unrolled=name == "mixtral")
    changed = jax.tree.map(lambda leaf: leaf * 1.1, model.params)
    models.save(tmp_path / "n", model, params=changed)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "n", attn_implementation="eager").eval()
    tokens = TOKENS[:, :50]
    assert_close(np.asarray(model.apply(changed, jnp.asarray(tokens))), run(theirs, torch.from_numpy(tokens)))


def test_the_family_that_the_page_adds_is_read_as_transformers_has_it(tmp_path: Path):
    page = (Path(__file__).parents[2] / "docs" / "add-a-family.md").read_text()
    known = FAMILIES.copy()
    try:
        first = doctest.DocTestParser().get_examples(page.split("```python")[1].split("```")[0])
        exec("".join(example.source for example in first), {})
        theirs = saved(tmp_path / "m", "arcee")
        model = load(tmp_path / "m")
        assert_close(
            np.asarray(model.apply(model.params, jnp.asarray(TOKENS))),
            run(theirs, torch.from_numpy(TOKENS)),
            factor=0.5,
        )
    finally:
        FAMILIES.clear()
        FAMILIES.update(known)
