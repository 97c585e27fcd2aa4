"""Models of tunix (NNX): Gemma 2 to 4, Llama 3, Qwen 2 and 3, dense and with experts, remat, and a step of decoding."""

import dataclasses
from importlib import import_module

import jax.numpy as jnp
import pytest
from flax import nnx
from zoo_model import (
    Model,
    Row,
    causal,
    check_merged,
    check_quantised,
    check_routed,
    check_sites,
    of_nnx,
    positions,
    tokens,
)

SMALL = {"embed_dim": 16, "hidden_dim": 24, "num_heads": 4, "head_dim": 8, "num_kv_heads": 2}
TIED = ("embedder/input_embedding",)


def build(
    module: str, cls: str, config: str, vocabulary: str = "vocab_size", decode: bool = False, **changes: object
) -> Model:
    code = import_module(f"tunix.models.{module}.model")
    small = {vocabulary: 32, "num_layers": 2, **SMALL, **changes}
    full = getattr(code.ModelConfig, config)()
    if "attention_types" in small:
        small["attention_types"] = (code.AttentionType.GLOBAL,) * 2
    if "remat_config" in small:
        small["remat_config"] = code.RematConfig.BLOCK
    small = dataclasses.replace(full, **small)
    make = lambda: getattr(code, cls)(small, rngs=nnx.Rngs(params=0))  # noqa: E731
    if not decode:
        return of_nnx(make, tokens(), positions(), None, causal())
    shape = (2, 16, small.num_kv_heads, small.head_dim)
    layer = {"k": jnp.zeros(shape), "v": jnp.zeros(shape), "end_index": jnp.zeros(2, jnp.int32)}
    cache = {f"layer_{i}": layer for i in range(2)}
    return of_nnx(make, tokens(length=1), positions(length=1), cache, jnp.ones((2, 1, 16), bool))


ROWS = {
    "Gemma 2": Row(lambda: build("gemma", "Gemma", "gemma2_2b", "num_embed", attention_types=None), 13, TIED, {"layers/0/attn/kv_einsum/w": "dense"}),
    "Gemma 3": Row(lambda: build("gemma3", "Gemma3", "gemma3_270m", "num_embed", num_layers=6, param_dtype=jnp.float32), 37, TIED, {TIED[0]: "embedding"}),
    "Gemma 4 with experts": Row(
        lambda: build(
            "gemma4", "Gemma4", "gemma4_26b_a4b", "num_embed", num_layers=6, global_key_size=16, num_experts=4,
            num_experts_per_tok=2, expert_dim=12, moe_dense_hidden_dim=20, num_global_kv_heads=1,
        ),
        55, TIED, {"layers/0/moe/gating_einsum": "ragged", "layers/0/moe/linear": "ragged", "layers/5/attn/k_einsum/w": "dense"},
        routed=r"^(?!.*moe/(gating|linear))",
    ),
    "Llama 3": Row(lambda: build("llama3", "Llama3", "llama3p2_1b"), 15, TIED, {"layers/1/attn/o_proj/w": "dense"}),
    "Qwen 2": Row(lambda: build("qwen2", "Qwen2", "qwen2p5_0p5b"), 15, TIED),
    "Qwen 3": Row(lambda: build("qwen3", "Qwen3", "qwen3_0p6b"), 15, TIED),
    "Qwen 3, remat": Row(lambda: build("qwen3", "Qwen3", "qwen3_0p6b", remat_config=None), 15, TIED),
    "Qwen 3, decoding": Row(lambda: build("qwen3", "Qwen3", "qwen3_0p6b", decode=True), 15, TIED),
    "Qwen 3 with experts": Row(
        lambda: build("qwen3", "Qwen3", "qwen3_30b_a3b", num_experts=4, num_experts_per_tok=2),
        18, ("lm_head/w",), {"layers/0/mlp/down_proj": "dense", "layers/0/mlp/router/kernel": "dense"},
    ),
}  # fmt: skip
pytestmark = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


@pytest.fixture(autouse=True)
def package() -> None:
    pytest.importorskip("tunix", exc_type=ImportError)


def test_sites(row: Row) -> None:
    check_sites(row)


def test_routed(row: Row) -> None:
    check_routed(row)


def test_adapted_is_merged(row: Row) -> None:
    check_merged(row)


def test_quantised(row: Row) -> None:
    check_quantised(row)
