"""aLoRA: which tokens an adapter acts on, training it, its files, and where it is refused."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_same, random_adapter
from hypothesis import given
from hypothesis import strategies as st
from linen_transformer import Transformer, TransformerConfig
from table.registry import Draw

import lora_jax as lora
from lora_jax.io.peft import read_peft

SEQUENCE = (7, 8)
MODEL = Transformer(TransformerConfig(layers=2, width=32, heads=2, kv_heads=1, hidden=48))
TOKENS = jnp.asarray([[1, 7, 8, 3, 7, 8, 4], [7, 8, 2, 2, 2, 2, 2], [7, 7, 1, 8, 8, 1, 7]], jnp.int32)
PARAMS = Draw("alora").fill(jax.eval_shape(MODEL.init, jax.random.key(1), TOKENS))
SITES = lora.find_sites(MODEL.apply, PARAMS, TOKENS)
CONFIG = lora.LoraConfig(method="alora", invocation_tokens=SEQUENCE)
ADAPTER = lora.Adapter(
    {path: lora.methods.ALora.after(update, SEQUENCE) for path, update in random_adapter(SITES).items()}
).without("params/embed/embedding")
IDS = np.array([[0, 0, 0, 0, 1, 1, 1], [1] * 7, [0] * 7])


def last_invocation(row: list[int], sequence: list[int]) -> list[int]:
    """Which tokens are active, by the definition."""
    starts = [i for i in range(len(row) - len(sequence) + 1) if row[i : i + len(sequence)] == sequence]
    return [int(bool(starts) and i >= starts[-1]) for i in range(len(row))]


LONGEST = 9
invoked = jax.jit(lora.methods.invoked, static_argnums=1)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=LONGEST), st.lists(st.integers(0, 2), min_size=1, max_size=3))
def test_from_the_last_invocation_on(row: list[int], sequence: list[int]) -> None:
    padded = np.array([row + [LONGEST] * (LONGEST - len(row))])  # with what is in no sequence: few shapes, few programs
    found = invoked(padded, tuple(sequence))
    assert found[0, : len(row)].tolist() == last_invocation(row, sequence)


def test_rows_shorter_than_the_sequence_invoke_nothing() -> None:
    assert not lora.methods.invoked(TOKENS[:, :1], SEQUENCE).any()


def test_slots_of_examples_and_sequences_of_adapters() -> None:
    np.testing.assert_array_equal(jax.jit(lambda tokens: lora.methods.invoked(tokens, ADAPTER))(TOKENS), IDS)
    found = lora.methods.invoked(TOKENS.astype(jnp.uint8), SEQUENCE, slot=jnp.asarray([3, 5, 4]))
    np.testing.assert_array_equal(found, IDS * np.array([[3], [5], [4]]))
    with pytest.raises(lora.ConfigError, match="empty"):
        lora.methods.invoked(TOKENS, ())
    with pytest.raises(lora.ConfigError, match="0 invocation sequences"):
        lora.methods.invoked(TOKENS, lora.Adapter({}))


def test_what_comes_before_is_the_base_and_a_cache_of_it_serves() -> None:
    """Tokens before the invocation see nothing of the adapter; those after it do; a whole active row is plain LoRA."""
    routed = jax.jit(lora.route(MODEL.apply, token_axes=1))
    found = routed(PARAMS, [ADAPTER], lora.methods.invoked(TOKENS, ADAPTER), TOKENS)
    base = jax.jit(MODEL.apply)(PARAMS, TOKENS)
    assert_close(found[0, :4], base[0, :4])
    assert_close(found[2], base[2])
    assert float(jnp.abs(found[0, 4:] - base[0, 4:]).max()) > 0.1
    plain = lora.Adapter({path: update.low_rank() for path, update in ADAPTER.items()})
    assert_close(found[1], jax.jit(lora.adapt(MODEL.apply))(PARAMS, plain, TOKENS[1:2])[0])


def test_it_trains_where_it_acts() -> None:
    """No gradient from rows without the invocation, and the loss falls."""
    routed = lora.route(MODEL.apply, token_axes=1)

    def loss(adapter: lora.Adapter, tokens: jax.Array) -> jax.Array:
        logits = routed(PARAMS, [adapter], lora.methods.invoked(tokens, SEQUENCE), tokens)
        return -jax.nn.log_softmax(logits)[:, -2, 9].mean()

    step = jax.jit(jax.value_and_grad(loss))
    _, silent = step(ADAPTER, TOKENS[2:])
    assert not any(leaf.any() for leaf in jax.tree.leaves(silent))
    adapter, losses = ADAPTER, []
    for _ in range(10):
        value, grads = step(adapter, TOKENS[:2])
        adapter = jax.tree.map(
            lambda leaf, grad, t: leaf - grad if t else leaf, adapter, grads, lora.trainable(adapter)
        )
        losses.append(float(value))
    assert losses[-1] < losses[0] - 0.2


def test_files(tmp_path: Path) -> None:
    lora.save(tmp_path / "orbax", ADAPTER, config=CONFIG)
    assert_same(lora.load(tmp_path / "orbax"), ADAPTER)
    plain = lora.init(jax.random.key(0), lora.LoraConfig(method="alora", invocation_tokens=SEQUENCE), PARAMS, SITES)
    lora.peft.save(tmp_path / "peft", plain, "lora_jax", sites=SITES)
    assert read_peft(tmp_path / "peft").config["alora_invocation_tokens"] == [7, 8]
    again = lora.peft.load(tmp_path / "peft", PARAMS, SITES, "lora_jax")
    assert all(isinstance(update, lora.methods.ALora) for update in again.values())
    assert_same(again, plain)


def test_peft_fields() -> None:
    config = lora.LoraConfig.from_peft({"r": 4, "target_modules": ["q_proj"], "alora_invocation_tokens": [5, 6]})
    assert (config.method, config.invocation_tokens) == ("alora", (5, 6))
    assert config.to_peft()["alora_invocation_tokens"] == [5, 6]


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(lora.ParameterError, match=r"acts only after its invocation tokens: run lora.route"):
        lora.adapt(MODEL.apply)(PARAMS, ADAPTER, TOKENS)
    with pytest.raises(lora.ParameterError, match="aLoRA update"):
        lora.merge(PARAMS, ADAPTER)
    with pytest.raises(lora.ParameterError, match="The adapter of slot 1 has an aLoRA update"):
        lora.route(MODEL.apply)(PARAMS, [ADAPTER], [1, 1, 1], TOKENS)
    with pytest.raises(lora.ConfigError, match='method="alora" needs the tokens'):
        lora.LoraConfig(method="alora")
    with pytest.raises(lora.ConfigError, match="no other method has any"):
        lora.LoraConfig(invocation_tokens=(1,))
    with pytest.raises(lora.ConfigError, match="token numbers"):
        lora.LoraConfig(method="alora", invocation_tokens="ab")
    with pytest.raises(lora.ParameterError, match="cannot be composed: it has an aLoRA update"):
        lora.compose([ADAPTER, ADAPTER])
    path, update = next(iter(ADAPTER.items()))
    mixed = lora.Adapter({**ADAPTER, path: update.low_rank()})
    with pytest.raises(lora.CheckpointError, match="Some updates are aLoRA and others"):
        lora.peft.save(tmp_path / "mixed", mixed, "lora_jax", sites=SITES)
    other = lora.Adapter({**ADAPTER, path: lora.methods.ALora.after(update.low_rank(), (1,))})
    with pytest.raises(lora.CheckpointError, match="different invocation tokens"):
        lora.peft.save(tmp_path / "other", other, "lora_jax", sites=SITES)
    lora.peft.save(tmp_path / "peft", ADAPTER, "lora_jax", sites=SITES)
    files = read_peft(tmp_path / "peft")
    with pytest.raises(lora.CheckpointError, match="as no delta can"):
        files.delta(next(iter(files.modules)), (32, 32))
