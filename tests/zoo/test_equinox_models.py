"""Models in Equinox: eqx-zoo's decoders and encoder, equimo's vision models, ESM-2 with its layers stacked."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import equinox as eqx
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

DECODER = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "rope_scaling": None,
}  # fmt: skip
ENCODER = {
    "architecture": "BertModel", "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 24, "max_position_embeddings": 16, "type_vocab_size": 2, "layer_norm_eps": 1e-6,
}  # fmt: skip
VISION = rf"{NORMS_AND_BIASES}|global_pos_embed/weight$|(cls|reg)_tokens?$"


def split(make: Callable[[jax.Array], Any], call: Callable[..., Any], *args: Any, batch_axes: Any = 0) -> Model:
    """Arrays of a model as parameters, the rest of it as part of the function."""
    model = eqx.filter_eval_shape(make, jax.random.key(0))
    params, static = eqx.partition(model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    fn = lambda params, *args: call(eqx.combine(params, static), *args)  # noqa: E731
    return Model(fn, numbers(params), args, batch_axes)


def decoder(architecture: str, tied: bool, **changes: Any) -> Model:
    zoo = pytest.importorskip("eqx_zoo", exc_type=ImportError)
    settings = {"attention_bias": False, "qk_norm": False, **DECODER, **changes}
    config = zoo.Config(architecture=architecture, tie_word_embeddings=tied, **settings)
    return split(lambda key: zoo.CausalLM(config, key=key), lambda model, ids: jax.vmap(model)(ids)[0], tokens())


def encoder() -> Model:
    zoo = pytest.importorskip("eqx_zoo", exc_type=ImportError)
    make = lambda key: zoo.Encoder(zoo.EncoderConfig(**ENCODER), key=key)  # noqa: E731
    return split(make, lambda model, *args: jax.vmap(model)(*args), tokens(), jnp.ones((2, 8), jnp.int32))


def vision(module: str, cls: str, size: int, **settings: Any) -> Model:
    pytest.importorskip("equimo", exc_type=ImportError)
    make = lambda key: getattr(import_module(f"equimo.vision.models.{module}"), cls)(**settings, key=key)  # noqa: E731

    def call(model: Any, images: jax.Array, key: jax.Array) -> jax.Array:
        return jax.vmap(lambda image: model(image, key=key, inference=True))(images)

    return split(make, call, pixels(2, 3, size, size), jax.random.key(0), batch_axes=(0, None))


def protein() -> Model:
    esm = pytest.importorskip("esm2quinox", exc_type=ImportError)
    make = lambda key: esm.ESM2(num_layers=2, embed_size=16, num_heads=2, token_dropout=False, key=key)  # noqa: E731
    return split(make, lambda model, ids: jax.vmap(lambda one: model(one).logits)(ids), tokens())


def state_space(cls: str) -> Model:
    models = pytest.importorskip("discretax.models", exc_type=ImportError)
    from discretax.encoder import LinearEncoder
    from discretax.heads import ClassificationHead

    def layers(key: jax.Array) -> Any:
        first = LinearEncoder(in_features=3, out_features=16, key=key)
        middle = getattr(models, cls)(hidden_dim=16, num_blocks=2, key=key)
        return eqx.nn.Sequential([first, middle, ClassificationHead(in_features=16, out_features=5, key=key)])

    model, state = eqx.nn.make_with_state(layers)(jax.random.key(0))
    params, static = eqx.partition(eqx.nn.inference_mode(model), eqx.is_inexact_array)

    def fn(params: Any, x: jax.Array) -> jax.Array:
        return jax.vmap(lambda one: eqx.combine(params, static)(one, state, key=jax.random.key(0))[0])(x)

    return Model(fn, params, (pixels(2, 8, 3),))


ROWS = {
    "Llama": Row(lambda: decoder("LlamaForCausalLM", False), 16, ("lm_head/weight",), {"model/embed_tokens/weight": "embedding"}),
    "Qwen 2, tied": Row(lambda: decoder("Qwen2ForCausalLM", True, attention_bias=True), 15, ("model/embed_tokens/weight",)),
    "BERT": Row(encoder, 15, (), {"embeddings/position_embeddings/weight": "embedding"}),
    "ViT": Row(
        lambda: vision("vit", "VisionTransformer", 16, img_size=16, in_channels=3, dim=16, patch_size=8, num_heads=2, depths=[2], num_classes=3),
        10, ("head/weight",), {"patch_embed/proj/weight": "conv"}, VISION,
    ),
    "ConvNeXt": Row(
        lambda: vision("convnext", "ConvNeXt", 32, in_channels=3, dims=[8, 16, 16, 16], depths=[1, 1, 1, 1], num_classes=3),
        17, ("head/weight",), {"blocks/0/blocks/0/dwconv/weight": "conv"}, VISION,
    ),
    "S5": Row(lambda: state_space("S5"), 10, ("layers/2/linear/weight",), plain=rf"{NORMS_AND_BIASES}|log_step$"),
    "LRU": Row(lambda: state_space("LRU"), 14, ("layers/2/linear/weight",)),
    "LinOSS": Row(lambda: state_space("LinOSS"), 10, ("layers/2/linear/weight",)),
    "ESM-2": Row(protein, 8, ("logit_head/linear2/weight",), {"layers/attn/query_proj/weight": "dense"}),
}  # fmt: skip


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
