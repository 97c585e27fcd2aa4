"""`config.json`: both dialects, every family's particulars, and what is refused instead of misread."""

import math
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from tiny_models import LLAMA3, OF_FAMILY, ROPE, YARN, tiny_config

from lora_jax import CheckpointError
from lora_jax.models import DecoderConfig
from lora_jax.models.read_config import decoder_config


def read(family: str, **changes: Any) -> DecoderConfig:
    return decoder_config("config.json", tiny_config(family, **changes))


@pytest.mark.parametrize("family", list(OF_FAMILY))
def test_a_config_can_be_hashed(family: str):
    assert hash(read(family)) == hash(read(family))
    assert read(family) != read(family, vocab_size=62)


@pytest.mark.parametrize(
    ("family", "four", "five"),
    [
        ("llama", {"rope_theta": 700.0, "rope_scaling": {**LLAMA3, "rope_theta": None}}, {"rope_parameters": LLAMA3}),
        ("llama", {"rope_theta": 700.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
         {"rope_parameters": {"rope_type": "linear", "rope_theta": 700.0, "factor": 4.0}}),
        ("qwen3", {"rope_theta": 700, "rope_scaling": {**YARN, "type": "yarn", "rope_type": None}}, {"rope_parameters": YARN}),
        ("gemma3_text", {"rope_theta": 700.0, "rope_local_base_freq": 70.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
         {"rope_parameters": {"full_attention": {"rope_type": "linear", "rope_theta": 700.0, "factor": 8.0},
                              "sliding_attention": {"rope_type": "default", "rope_theta": 70.0}}}),
        ("gpt_neox", {"rotary_emb_base": 700, "rotary_pct": 0.25}, {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.25}}),
        ("phi3", {"rope_theta": 700.0, "partial_rotary_factor": 0.5}, {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}),
    ],
)  # fmt: skip
def test_files_of_transformers_4_and_5_say_the_same(family: str, four: dict[str, Any], five: dict[str, Any]):
    four = {**{name: None for name in OF_FAMILY[family] if "rope" in name or "rot" in name}, **four}
    five = {"rotary_pct": None, "partial_rotary_factor": None, **five}
    assert read(family, **four) == read(family, **five)


def test_ropes_follow_the_published_formulas():
    inverse = np.asarray(read("llama", rope_parameters=ROPE).ropes[0].inverse)
    np.testing.assert_allclose(inverse, 700.0 ** -(np.arange(4) / 4), rtol=1e-6)
    linear = read("llama", rope_parameters={**ROPE, "rope_type": "linear", "factor": 4}).ropes[0]
    np.testing.assert_allclose(linear.inverse, inverse / 4, rtol=1e-6)
    scaled = np.asarray(read("llama").ropes[0].inverse)
    assert scaled[0] == pytest.approx(inverse[0])  # a wavelength of 6.3, below 32 / 4
    assert scaled[-1] == pytest.approx(inverse[-1] / 4)  # one above 32
    yarn = read("qwen3")
    assert yarn.ropes[0].factor == pytest.approx(0.1 * math.log(4) + 1)
    of_all = read("qwen3", rope_parameters={**YARN, "mscale": 2.0, "mscale_all_dim": 0.5}).ropes[0]
    assert of_all.factor == pytest.approx((0.2 * math.log(4) + 1) / (0.05 * math.log(4) + 1))


def test_ropes_that_depend_on_the_length_know_where():
    dynamic = read("llama", rope_parameters={**ROPE, "rope_type": "dynamic", "factor": 4.0}).ropes[0]
    assert dynamic.frequencies(512) == dynamic.inverse
    with pytest.raises(CheckpointError, match="at most 512"):
        dynamic.frequencies(513)
    factors = {"short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0]}
    long = read(
        "phi3", rope_parameters={**ROPE, "rope_type": "longrope", **factors}, original_max_position_embeddings=32
    )
    short, beyond = long.ropes[0].frequencies(32), long.ropes[0].frequencies(33)
    assert np.divide(short, beyond).tolist() == pytest.approx([3.0, 2.0])
    assert long.ropes[0].factor == pytest.approx(math.sqrt(1 + math.log(16) / math.log(32)))


@pytest.mark.parametrize(
    ("family", "changes", "windows"),
    [
        ("llama", {}, (0, 0, 0, 0)),
        ("mistral", {}, (5, 5, 5, 5)),
        ("qwen2", {}, (0, 0, 5, 5)),
        ("qwen2", {"use_sliding_window": False}, (0, 0, 0, 0)),
        ("qwen2", {"layer_types": ["sliding_attention", *["full_attention"] * 3]}, (5, 0, 0, 0)),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 5}, (5, 5, 5, 5)),
        ("qwen3_moe", {"sliding_window": 5}, (0, 0, 0, 0)),
        ("mixtral", {}, (5, 5, 5, 5)),
        ("gemma", {}, (0, 0, 0, 0)),
        ("gemma2", {}, (5, 0, 5, 0)),
        ("gemma3_text", {}, (5, 5, 0, 5)),
        ("gemma3_text", {"sliding_window_pattern": None}, (5, 5, 5, 5)),
        ("phi3", {}, (5, 5, 5, 5)),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 5}, (0, 5, 0, 5)),
        ("gpt_oss", {}, (5, 0, 5, 0)),
    ],
)  # fmt: skip
def test_windows(family: str, changes: dict[str, Any], windows: tuple[int, ...]):
    assert read(family, **changes).windows == windows


def test_a_field_that_is_null_is_not_one_that_is_missing():
    values = tiny_config("mistral")
    assert decoder_config("config.json", {**values, "sliding_window": None}).windows == (0, 0, 0, 0)
    del values["sliding_window"]
    assert decoder_config("config.json", values).windows == (4096,) * 4
    gemma = tiny_config("gemma2")
    assert decoder_config("config.json", {**gemma, "final_logit_softcapping": None}).logit_cap == 0
    del gemma["final_logit_softcapping"]
    assert decoder_config("config.json", gemma).logit_cap == 30


def test_families_have_their_particulars():
    assert read("gemma", hidden_act="gelu").activation == "gelu_pytorch_tanh"
    assert read("gemma", hidden_act="gelu", hidden_activation="relu").activation == "relu"
    assert read("gpt_neox", hidden_act="gelu").activation == "gelu"
    assert read("gemma2", query_pre_attn_scalar=16).scale == 0.25
    assert read("gpt2", scale_attn_weights=False).scale == 1.0
    assert read("llama", attention_bias=True).biases == {"qkv", "out"}
    assert read("llama", mlp_bias=True).biases == {"mlp"}
    assert read("smollm3").rope_of == (0, -1, 0, -1)
    assert read("smollm3", no_rope_layers=[0, 1, 1, 0]).rope_of == (-1, 0, 0, -1)
    assert read("gpt_neox", use_parallel_residual=False).residual == "before"
    assert (read("gemma").tied, read("llama").tied, read("gpt2").tied) == (True, False, True)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"model_type": "lama"}, "'lama' is not known; there are llama, mistral"),
    ("llama", {"model_type": None}, "None is not known"),
    ("llama", {"hidden_act": "mish"}, "hidden_act='mish' is not known here; there are silu, "),
    ("llama", {"rope_parameters": {"rope_type": "spiral"}}, "rope_type='spiral' is not known here; there are default, "),
    ("llama", {"rope_parameters": {**ROPE, "mrope_section": [1, 1]}}, "rope_parameters.mrope_section=.* not understood"),
    ("llama", {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor=None must be a positive number"),
    ("llama", {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is not supported"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
    ("llama", {"rope_theta": -1.0, "rope_parameters": None}, "rope_theta=-1.0 must be"),
    ("llama", {"sliding_window": 8}, "sliding_window=8 is not supported: this family has no windows"),
    ("llama", {"layer_types": ["sliding_attention"] * 4}, "which this family does not tell apart"),
    ("gemma2", {"layer_types": ["full_attention"] * 3}, "layer_types=.* for each of 4 layers"),
    ("gemma2", {"layer_types": ["full_attention"] * 3 + ["chunked_attention"]}, "layer_types=.* for each of 4 layers"),
    ("mistral", {"sliding_window": -1}, "sliding_window=-1 must be a positive whole number"),
    ("qwen2", {"attention_bias": True}, "attention_bias=True may change the logits"),
    ("llama", {"clip_qkv": 4.0}, "clip_qkv=4.0 may change the logits and is not understood here"),
    ("llama", {"residual_multiplier": 0.2}, "residual_multiplier=0.2 may change"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True is not supported"),
    ("qwen3_moe", {"mlp_only_layers": [4]}, r"mlp_only_layers=\[4\] must be numbers of the 4 layers"),
    ("qwen3_moe", {"mlp_only_layers": 1}, "mlp_only_layers=1 must be numbers"),
    ("qwen3_moe", {"decoder_sparse_step": 5}, r"decoder_sparse_step=5 and mlp_only_layers=\[\] leave no layer with experts"),
    ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok=9 is more than the 5 experts"),
    ("mixtral", {"num_local_experts": None}, "num_local_experts=None must be the number of experts"),
    ("llama", {"hidden_size": None}, "hidden_size=None must be a positive whole number"),
    ("llama", {"hidden_size": "24"}, "hidden_size='24' must be a positive whole number"),
    ("llama", {"num_hidden_layers": True}, "num_hidden_layers=True must be a positive whole number"),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads=3 must divide num_attention_heads=4"),
    ("llama", {"hidden_size": 26, "head_dim": None}, "must be a multiple of num_attention_heads=4"),
    ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes' must be true or false"),
    ("llama", {"rms_norm_eps": 0.0}, "rms_norm_eps=0.0 must be a positive number"),
    ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers=.* for each of 4 layers"),
    ("phi3", {"partial_rotary_factor": 0.4}, "rotates 3 features, which must be even"),
    ("phi3", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "a list of 2 numbers"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED)
def test_what_is_not_understood_is_refused(family: str, changes: dict[str, Any], message: str):
    with pytest.raises(CheckpointError, match=f"config.json: .*{message}"):
        read(family, **changes)


def test_what_changes_nothing_is_let_through():
    harmless = {
        "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16", "transformers_version": "4.40.0", "pretraining_tp": 1,
        "attention_dropout": 0.1, "bos_token_id": 1, "use_cache": True, "_name_or_path": "x", "initializer_range": 0.02,
        "rope_interleaved": False, "is_llama_config": True, "transformers.js_config": {"dtype": "q4"}, "clip_qkv": [],
    }  # fmt: skip
    assert read("llama", **harmless) == read("llama")


ODD = ["x", "", [], [1], [[]], {}, {"a": 1}, -1, 0, 2.5, True, None, math.nan, math.inf]
FIELDS = (
    "layer_types", "rope_scaling", "rope_parameters", "rope_theta", "attn_logit_softcapping", "final_logit_softcapping",
    "query_pre_attn_scalar", "max_window_layers", "sliding_window", "sliding_window_pattern", "no_rope_layers",
    "partial_rotary_factor", "rotary_pct", "hidden_act", "hidden_activation", "activation_function", "num_experts",
    "num_local_experts", "swiglu_limit", "original_max_position_embeddings", "rope_local_base_freq", "rms_norm_eps",
    "quantization_config", "tie_word_embeddings", "n_inner", "mlp_only_layers", "scale_attn_weights", "architectures",
)  # fmt: skip


def understood_or_refused(values: dict[str, Any]) -> None:
    with suppress(CheckpointError):
        hash(decoder_config("config.json", values))


@pytest.mark.parametrize("family", list(OF_FAMILY))
def test_odd_values_are_understood_or_refused(family: str):
    values = tiny_config(family)
    for name in {*values, *FIELDS}:
        for odd in ODD:
            understood_or_refused({**values, name: odd})


@pytest.mark.parametrize("kind", ["default", "linear", "dynamic", "llama3", "yarn", "longrope"])
def test_odd_ropes_are_understood_or_refused(kind: str):
    rope = {**LLAMA3, "short_factor": [1.0] * 4, "long_factor": [1.0] * 4, "rope_type": kind}
    rope = {
        name: value for name, value in rope.items() if kind == "longrope" or "_factor" not in name or kind == "llama3"
    }
    for name in {
        *rope,
        "type",
        "mscale",
        "mscale_all_dim",
        "attention_factor",
        "beta_fast",
        "truncate",
        "full_attention",
    }:
        for odd in ODD:
            understood_or_refused(tiny_config("llama", rope_parameters={**rope, name: odd}))
