"""The part of a layer after attention: an MLP, gated or plain, or a mixture of experts."""

import jax
import jax.numpy as jnp

from lora_jax.models.config import DecoderConfig, Experts
from lora_jax.models.layers import ACTIVATIONS, Params, linear
from lora_jax.models.tensors import DOWN, GATE_UP

# Rows `[rows, in]` in groups, with the weights `[groups, out, in]` of each.
_BY_ROWS = jax.lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])
_BY_COLUMNS = jax.lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), [0], [0])


def mlp(config: DecoderConfig, layer: Params, x: jax.Array) -> jax.Array:
    """`[batch, time, width]` to the same."""
    if config.experts is not None and "experts" in layer:
        return _mixture(config, config.experts, layer, x.reshape(-1, config.width)).reshape(x.shape)
    act, names = ACTIVATIONS[config.activation], config.modules
    parts = [linear(layer[name], x, transposed=config.transposed) for name in names.up]
    if config.gated:
        gate, up = parts if len(parts) == 2 else jnp.split(parts[0], 2, -1)
        inner = act(gate) * up
    else:
        inner = act(parts[0])
    return linear(layer[names.down], inner, transposed=config.transposed)


def _mixture(config: DecoderConfig, experts: Experts, layer: Params, x: jax.Array) -> jax.Array:
    """Every token through the experts chosen for it: tokens are sorted by expert, for ragged products."""
    weights, chosen = _route(experts, linear(layer[config.modules.router], x).astype(jnp.float32))
    order = jnp.argsort(chosen.reshape(-1))
    rows, expert = order // experts.chosen, chosen.reshape(-1)[order]
    sizes = jnp.bincount(expert, length=experts.count).astype(jnp.int32)
    y = _RUN[experts.stored](config, experts, layer["experts"], x[rows], sizes, expert)
    y = y * weights.reshape(-1)[order][:, None].astype(x.dtype)
    return jnp.zeros_like(x).at[rows].add(y)


def _route(experts: Experts, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weight and number of the chosen experts, `[tokens, chosen]`, from the router's logits `[tokens, experts]`."""
    if experts.weights == "chosen":
        top, chosen = jax.lax.top_k(logits, experts.chosen)
        return jax.nn.softmax(top, -1), chosen
    weights, chosen = jax.lax.top_k(jax.nn.softmax(logits, -1), experts.chosen)
    if experts.weights == "normalised":
        weights = weights / weights.sum(-1, keepdims=True)
    return weights, chosen


def _each(
    config: DecoderConfig, experts: Experts, layer: Params, x: jax.Array, sizes: jax.Array, expert: jax.Array
) -> jax.Array:
    """Rows through experts whose gate, up and down are tensors of their own, `(out, in)`."""
    names, act = config.modules, ACTIVATIONS[config.activation]

    def product(name: str, rows: jax.Array) -> jax.Array:
        weight = layer[name]["weight"] if name in layer else _stacked(layer, name, experts.count)
        return jax.lax.ragged_dot_general(rows, weight.astype(rows.dtype), sizes, _BY_ROWS)

    gate, up = (product(name, x) for name in names.up)
    return product(names.down, act(gate) * up)


def _stacked(layer: Params, name: str, count: int) -> jax.Array:
    """Experts that are parameters of their own, as one stack."""
    return jnp.stack([layer[str(index)][name]["weight"] for index in range(count)])


def _all(
    config: DecoderConfig, experts: Experts, layer: Params, x: jax.Array, sizes: jax.Array, expert: jax.Array
) -> jax.Array:
    """Rows through experts that are one tensor `[experts, out, in]`, with the gate above up."""

    def product(name: str, rows: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot_general(rows, layer[name].astype(rows.dtype), sizes, _BY_ROWS)

    gate, up = jnp.split(product(GATE_UP, x), 2, -1)
    return product(DOWN, ACTIVATIONS[config.activation](gate) * up)


def _gpt_oss(
    config: DecoderConfig, experts: Experts, layer: Params, x: jax.Array, sizes: jax.Array, expert: jax.Array
) -> jax.Array:
    """Rows through gpt-oss's experts: `(in, out)`, biases, gate and up as neighbours, clipped."""

    def product(name: str, rows: jax.Array) -> jax.Array:
        y = jax.lax.ragged_dot_general(rows, layer[name].astype(rows.dtype), sizes, _BY_COLUMNS)
        return y + layer[f"{name}_bias"].astype(rows.dtype)[expert]

    both = product(GATE_UP, x)
    gate = jnp.minimum(both[:, ::2], experts.limit)
    up = jnp.clip(both[:, 1::2], -experts.limit, experts.limit)
    return product(DOWN, (up + 1) * gate * jax.nn.sigmoid(gate * experts.sharpness))


_RUN = {"each": _each, "all": _all, "gpt-oss": _gpt_oss}
