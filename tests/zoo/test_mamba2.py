"""Mamba 2 of mamba2-jax (NNX), which returns its states beside its logits; its depthwise kernels are no products."""

import pytest
from flax import nnx
from zoo_model import (
    NORMS_AND_BIASES,
    Model,
    Row,
    check_merged,
    check_quantised,
    check_routed,
    check_sites,
    of_nnx,
    tokens,
)


def build() -> Model:
    from mamba2_jax import modeling

    config = modeling.Mamba2Config(
        vocab_size=32, hidden_size=16, state_size=8, num_hidden_layers=2, head_dim=8, expand=2, chunk_size=4
    )
    return of_nnx(lambda: modeling.Mamba2ForCausalLM(config, rngs=nnx.Rngs(0)), tokens())


ROW = Row(build, 5, ("backbone/embedder/embedding",), plain=rf"{NORMS_AND_BIASES}|conv1d/conv/kernel$")


@pytest.fixture(autouse=True)
def package() -> None:
    pytest.importorskip("mamba2_jax", exc_type=ImportError)


def test_sites() -> None:
    check_sites(ROW)


def test_routed() -> None:
    check_routed(ROW)


def test_adapted_is_merged() -> None:
    check_merged(ROW)


def test_quantised() -> None:
    check_quantised(ROW)
