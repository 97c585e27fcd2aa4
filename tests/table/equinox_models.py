"""Equinox modules: the module itself is the parameter tree, functions and all."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from table.registry import Draw, Model, case


def layer(name: str, make: Any, call: Any, sites: dict[str, str], *shapes: Any, **facts: Any) -> None:
    """Add a module that `call(module, *args)` applies to random arrays (or to integers, given as arrays)."""

    def build(draw: Draw) -> Model:
        module = draw.fill(eqx.filter_eval_shape(make, key=jax.random.key(0)))
        return Model(call, module, tuple(draw(*shape) if isinstance(shape, tuple) else shape for shape in shapes))

    case("equinox", sites, name, **facts)(build)


def batched(module: Any, x: Any) -> Any:
    """Modules take one example."""
    return jax.vmap(module)(x)


layer("linear", lambda key: eqx.nn.Linear(4, 3, key=key), batched, {"weight": "dense oi"}, (2, 4), affine=True)
layer(
    "linear_one_example",
    lambda key: eqx.nn.Linear(4, 3, key=key),
    lambda m, x: m(x),
    {"weight": "dense oi"},
    (4,),
    affine=True,
    variant=True,
)
layer(
    "conv2d",
    lambda key: eqx.nn.Conv2d(2, 4, (3, 2), 2, 1, key=key),
    batched,
    {"weight": "conv oiii"},
    (2, 2, 5, 6),
    affine=True,
)
layer(
    "embedding",
    lambda key: eqx.nn.Embedding(7, 4, key=key),
    batched,
    {"weight": "embedding io"},
    jnp.array([1, 6, 0]),
    affine=True,
)
layer(
    "mlp", lambda key: eqx.nn.MLP(4, 3, 5, 2, key=key), batched, {f"layers/{i}/weight": "dense oi" for i in range(3)}, (2, 4),
)  # fmt: skip
layer(
    "attention", lambda key: eqx.nn.MultiheadAttention(2, 4, key=key), lambda m, x: jax.vmap(lambda x: m(x, x, x))(x),
    {f"{name}_proj/weight": "dense oi" for name in ("query", "key", "value", "output")}, (2, 5, 4),
)  # fmt: skip


class Stack(eqx.Module):
    """Layers made by `filter_vmap`, scanned."""

    layers: eqx.nn.Linear

    def __init__(self, key: Any):
        self.layers = eqx.filter_vmap(lambda key: eqx.nn.Linear(4, 4, key=key))(jax.random.split(key, 3))

    def __call__(self, x):
        arrays, static = eqx.partition(self.layers, eqx.is_array)
        step = jax.checkpoint(lambda x, layer: (jnp.tanh(eqx.combine(layer, static)(x)), None))
        return jax.lax.scan(step, x, arrays)[0]


layer("scan_of_remat", Stack, batched, {"layers/weight": "dense boi"}, (2, 4))
layer(
    "ensemble",
    Stack,
    lambda m, x: jax.vmap(lambda layer, x: layer(x))(m.layers, x),
    {"layers/weight": "dense boi"},
    (3, 4),
)
