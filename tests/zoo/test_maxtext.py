"""Models of MaxText as their configurations make them: scanned layers on axis 1, experts, latent attention, offloading.

Without its dependencies, which are pinned for its own image: `python -m pip install --no-deps maxtext aqtp drjax`, and
`pathwaysutils`, `tokamax`, `tiktoken`, `omegaconf` and `pydantic`.
"""

import contextlib
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from flax.linen import partitioning
from helpers import assert_close, random_adapter
from zoo_model import Model, Row, check_merged, check_quantised, check_routed, check_sites, of_nnx, positions, tokens

import lora_jax as lora
from lora_jax.adapter.site import Site
from lora_jax.io.peft import read_peft

SMALL = {
    "base_emb_dim": 16, "base_num_query_heads": 4, "base_num_kv_heads": 2, "base_mlp_dim": 24, "head_dim": 8,
    "base_num_decoder_layers": 2, "vocab_size": 32, "max_target_length": 8, "max_prefill_predict_length": 8,
    "per_device_batch_size": 2, "dtype": "float32", "attention": "dot_product", "hardware": "cpu",
    "enable_checkpointing": "false", "skip_jax_distributed_system": "true", "override_model_config": "true",
    "log_config": "false",
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "sparse_matmul": "false"}
RAGGED = EXPERTS | {"sparse_matmul": "true", "megablox": "false"}
LATENT = {
    "base_num_kv_heads": 4, "base_num_decoder_layers": 3, "first_num_dense_layers": 1, "base_moe_mlp_dim": 12,
    "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip
HEAD, TIED = ("decoder/logits_dense/kernel",), ("token_embedder/embedding",)
MIXTRAL = {"base_moe_mlp_dim": 24}
QUERY, EXPERT = "decoder/layers/self_attention/query/kernel", "decoder/layers/MoeBlock_0/wo"


def build(model_name: str, **changes: object) -> Model:
    from maxtext.configs import pyconfig
    from maxtext.models import models

    base = os.path.join(os.path.dirname(pyconfig.__file__), "base.yml")
    settings = {"run_name": "zoo", "model_name": model_name, **SMALL, **changes}
    with contextlib.redirect_stdout(None):
        config = pyconfig.initialize(["zoo", base, *(f"{name}={value}" for name, value in settings.items())])
    shape = (1,) * len(config.mesh_axes)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(shape), config.mesh_axes)

    def in_mesh(run: Any) -> Any:
        def inside(*args: Any) -> Any:
            with mesh, partitioning.axis_rules(config.logical_axis_rules):
                return run(*args)

        return inside

    make = lambda: models.Transformer(config, mesh, quant=None, rngs=nnx.Rngs(params=0, dropout=1))  # noqa: E731
    model = of_nnx(in_mesh(make), tokens(), positions(), enable_dropout=False)
    return model._replace(fn=in_mesh(model.fn))


# Tied heads are multiplied in bfloat16, whatever `dtype` says.
ROWS = {
    "Llama 2": Row(lambda: build("llama2-7b"), 9, HEAD, {QUERY: "dense", "token_embedder/embedding": "embedding"}),
    "Llama 2, unscanned": Row(lambda: build("llama2-7b", scan_layers="false"), 16, HEAD, {"decoder/layers_1/mlp/wo/kernel": "dense"}),
    "Llama 2, full remat": Row(lambda: build("llama2-7b", remat_policy="full"), 9, HEAD),
    "Llama 2, inputs offloaded": Row(lambda: build("llama2-7b", remat_policy="custom", decoder_layer_input="offload"), 9, HEAD),
    "Llama 3.1": Row(lambda: build("llama3.1-8b"), 9, HEAD),
    "Mistral": Row(lambda: build("mistral-7b"), 9, HEAD),
    "Qwen 3": Row(lambda: build("qwen3-0.6b"), 8, TIED, dtype="bfloat16"),
    "Gemma 2": Row(lambda: build("gemma2-2b"), 15, TIED, {"decoder/layers/mlp_local/wo/kernel": "dense"}, dtype="bfloat16"),
    "Gemma 3": Row(lambda: build("gemma3-4b", base_num_decoder_layers=6, use_multimodal="false"), 43, TIED, dtype="bfloat16"),
    "OLMo 3": Row(lambda: build("olmo3-7b", base_num_decoder_layers=4), 30, HEAD),
    "Mixtral, every expert": Row(lambda: build("mixtral-8x7b", **MIXTRAL, **EXPERTS), 10, HEAD, {EXPERT: "dense"}),
    "Mixtral, capacity": Row(lambda: build("mixtral-8x7b", **MIXTRAL, **EXPERTS, capacity_factor=1.0), 10, HEAD, {EXPERT: "dense"}),
    "Mixtral, ragged": Row(lambda: build("mixtral-8x7b", **MIXTRAL, **RAGGED), 10, HEAD, {EXPERT: "ragged"}, routed=r"^(?!.*MoeBlock_0/w)"),
    "Qwen 3 with experts": Row(lambda: build("qwen3-30b-a3b", base_moe_mlp_dim=12, **EXPERTS), 10, HEAD),
    "DeepSeek 2": Row(lambda: build("deepseek2-16b", **LATENT, **EXPERTS), 20, HEAD, {"decoder/moe_layers/self_attention/wkv_b/kernel": "dense"}),
    "DeepSeek 2, ragged": Row(lambda: build("deepseek2-16b", **LATENT, **RAGGED), 20, HEAD, routed=r"^(?!.*MoeBlock_0/w)"),
    "DeepSeek 3": Row(
        lambda: build("deepseek3-671b", **LATENT, **EXPERTS, q_lora_rank=8, n_routing_groups=1, topk_routing_group=1), 22, HEAD
    ),
    "Llama 2, from the host": Row(lambda: build("llama2-7b", parameter_memory_host_offload="true"), 9, HEAD),
    "Llama 2, one-hot": Row(lambda: build("llama2-7b", use_iota_embed="true"), 9, HEAD, {TIED[0]: "embedding"}),
    "GPT-3": Row(lambda: build("gpt3-52k", base_num_kv_heads=4), 6, TIED, {"decoder/position_embedder/embedding": "embedding"}, dtype="bfloat16"),
    "gpt-oss": Row(lambda: build("gpt-oss-20b", **EXPERTS), 18, HEAD, plain=r"(norm|bias|scale|sinks)(/|$)"),
    "Llama 4": Row(
        lambda: build("llama4-17b-16e", base_num_decoder_layers=4, base_moe_mlp_dim=12, use_multimodal="false", **EXPERTS | {"num_experts_per_tok": 1}), 46, HEAD
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def package() -> None:
    pytest.importorskip("maxtext.models.models", exc_type=ImportError)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_sites(row: Row) -> None:
    check_sites(row)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_adapted_is_merged(row: Row) -> None:
    check_merged(row)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_quantised(row: Row) -> None:
    check_quantised(row)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_routed(row: Row) -> None:
    check_routed(row)


@pytest.mark.parametrize(
    ("model_name", "decoder_block", "known"),
    [
        ("llama3.1-8b", "llama2", "maxtext_llama3.1"),
        ("mixtral-8x7b", "mixtral", "maxtext_llama"),
        ("qwen3-8b", "qwen3", "maxtext"),
    ],
)
@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_names_are_those_of_its_conversion(
    model_name: str, decoder_block: str, known: str, part: str, tmp_path: Path
) -> None:
    conversion = pytest.importorskip("maxtext.checkpoint_conversion.utils.param_mapping", exc_type=ImportError)
    assert lora.peft.maxtext_names(dict(model_name=model_name, decoder_block=decoder_block)) == lora.peft.KNOWN[known]
    path = f"decoder/layers_0/self_attention/{part}/kernel"
    site = Site(path=path, shape=(6, 2, 4), dtype="float32", kind="dense", in_axes=(0,), out_axes=(1, 2))
    adapter = random_adapter([site])
    lora.peft.save(tmp_path / "a", adapter, known)
    ours = read_peft(tmp_path / "a").delta(f"model.layers.0.self_attn.{part[0]}_proj", (8, 6))
    sizes = {"num_hidden_layers": 1, "hidden_size": 6, "head_dim": 4}
    theirs = np.asarray(adapter[path].delta())
    hooks = conversion.HOOK_FNS[model_name](sizes, SimpleNamespace(head_dim=4, num_experts=2), saving_to_hf=True)
    hook = hooks[f"params-{path.replace('/', '-')}"]
    for each in hook if isinstance(hook, list) else [hook]:
        theirs = np.asarray(each(theirs, (8, 6)))
    assert_close(ours, theirs)
