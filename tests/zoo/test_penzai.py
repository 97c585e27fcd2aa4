"""Transformers of penzai: named axes, parameters by label, a stack of layers."""

from typing import Any

import jax
import pytest
from zoo_model import Model, Row, check_merged, check_quantised, check_routed, check_sites, numbers, tokens

HEAD = ("transformer/lm_head.weights",)


def build(**changes: Any) -> Model:
    from penzai import pz
    from penzai.models.transformer.variants import llamalike_common as llama

    config = llama.LlamalikeTransformerConfig(
        num_kv_heads=2, query_head_multiplier=2, embedding_dim=16, projection_dim=8, mlp_hidden_dim=24,
        num_decoder_blocks=3, vocab_size=32, **{"mlp_variant": "swiglu", "tie_embedder_and_logits": False, **changes},
    )  # fmt: skip
    model, parameters = pz.unbind_params(llama.build_llamalike_transformer(config, jax.random.key(0)), freeze=True)
    params = {each.label: each.value for each in parameters}

    def fn(params: Any, ids: jax.Array) -> jax.Array:
        variables = [pz.ParameterValue(label=label, value=value, metadata={}) for label, value in params.items()]
        named, places = pz.nx.wrap(ids).tag("batch", "seq"), pz.nx.arange("seq", ids.shape[1])
        return pz.bind_variables(model, variables)(named, token_positions=places).unwrap("batch", "seq", "vocabulary")

    return Model(fn, numbers(jax.eval_shape(lambda: params)), (tokens(),))


ROWS = {
    "Llama": Row(build, 23, HEAD, {"transformer/embedder.embeddings": "embedding", "transformer/block_2/attention/output.weights": "dense"}),
    "Gemma": Row(lambda: build(tie_embedder_and_logits=True, mlp_variant="geglu_approx", final_logit_softcap=30.0), 22, ("transformer/embedder.embeddings",)),
    "Llama, stacked": Row(lambda: build(use_layer_stack=True), 9, HEAD, {"transformer/blocks/mlp/out_linear.weights": "dense"}),
}  # fmt: skip
pytestmark = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


@pytest.fixture(autouse=True)
def package() -> None:
    pytest.importorskip("penzai", exc_type=ImportError)


def test_sites(row: Row) -> None:
    check_sites(row)


def test_routed(row: Row) -> None:
    check_routed(row)


def test_adapted_is_merged(row: Row) -> None:
    check_merged(row)


def test_quantised(row: Row) -> None:
    check_quantised(row)
