"""Models of KerasHub on its JAX backend, called without state: language models, encoders, vision, speech."""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from zoo_model import (
    NORMS_AND_BIASES,
    Model,
    Row,
    check_merged,
    check_quantised,
    check_routed,
    check_sites,
    numbers,
    pixels,
    tokens,
)

os.environ.setdefault("KERAS_BACKEND", "jax")
SMALL = {"vocabulary_size": 32, "num_layers": 2, "hidden_dim": 16, "intermediate_dim": 24}
HEADS = {"num_heads": 2, "max_sequence_length": 16}
GROUPED = {"num_query_heads": 4, "num_key_value_heads": 2}
POSITIONS = rf"{NORMS_AND_BIASES}|position_embedding/embeddings$|class_token$"
IDS = {"token_ids": tokens(), "padding_mask": jnp.ones((2, 8), jnp.int32)}


def build(make: Callable[[Any], Any], inputs: Any) -> Model:
    import keras_hub

    model = make(keras_hub.models)
    paths = [variable.path for variable in model.trainable_variables]
    rest = [variable.value for variable in model.non_trainable_variables]
    params = {variable.path: variable.value for variable in model.trainable_variables}

    def fn(params: Any, inputs: Any) -> Any:
        return model.stateless_call([params[path] for path in paths], rest, inputs, training=False)[0]

    return Model(fn, numbers(jax.eval_shape(lambda: params)), (inputs,))


ROWS = {
    "GPT-2": Row(
        lambda: build(lambda m: m.GPT2CausalLM(m.GPT2Backbone(**SMALL, **HEADS), preprocessor=None), IDS),
        13, ("token_embedding/embeddings",), {"token_embedding/embeddings": "embedding"}, POSITIONS,
    ),
    "Llama 3": Row(
        lambda: build(lambda m: m.Llama3CausalLM(m.Llama3Backbone(**SMALL, **GROUPED), preprocessor=None), IDS),
        16, ("token_embedding/reverse_embeddings",),
    ),
    "Gemma": Row(
        lambda: build(lambda m: m.GemmaCausalLM(m.GemmaBackbone(**SMALL | {"intermediate_dim": 48}, num_query_heads=4, num_key_value_heads=1, head_dim=4), preprocessor=None), IDS),
        15, ("token_embedding/embeddings",), {"decoder_block_0/attention/query/kernel": "dense"},
    ),
    "Mixtral": Row(
        lambda: build(lambda m: m.MixtralCausalLM(m.MixtralBackbone(**SMALL, **GROUPED, num_experts=4, top_k=2), preprocessor=None), IDS),
        18, ("token_embedding/reverse_embeddings",),
    ),
    "BERT": Row(
        lambda: build(lambda m: m.BertTextClassifier(m.BertBackbone(**SMALL, **HEADS), num_classes=3, preprocessor=None), IDS | {"segment_ids": jnp.zeros((2, 8), jnp.int32)}),
        16, ("logits/kernel",), {"segment_embedding/embeddings": "embedding"}, POSITIONS,
    ),
    "Whisper": Row(
        lambda: build(
            lambda m: m.WhisperBackbone(**SMALL | {"num_layers": 1}, num_heads=2, num_mels=8, max_encoder_sequence_length=8, max_decoder_sequence_length=8),
            {"encoder_features": pixels(2, 8, 8), "decoder_token_ids": tokens(), "decoder_padding_mask": jnp.ones((2, 8), jnp.int32)},
        ),
        19, (), {"encoder_token_embedding_conv_layer_1/kernel": "conv"}, POSITIONS,
    ),
    "ViT": Row(
        lambda: build(lambda m: m.ViTImageClassifier(m.ViTBackbone(image_shape=(16, 16, 3), patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=24), num_classes=3, preprocessor=None), pixels(2, 16, 16, 3)),
        15, ("predictions/kernel",), {"vit_patching_and_embedding/patch_embedding/kernel": "conv"}, POSITIONS,
    ),
}  # fmt: skip
pytestmark = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


@pytest.fixture(autouse=True)
def package() -> None:
    pytest.importorskip("keras_hub", exc_type=ImportError)


def test_sites(row: Row) -> None:
    check_sites(row)


def test_routed(row: Row) -> None:
    check_routed(row)


def test_adapted_is_merged(row: Row) -> None:
    check_merged(row)


def test_quantised(row: Row) -> None:
    check_quantised(row)
