"""Training steps of one model: the frozen floor, full fine-tuning, and LoRA with lora_jax."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import lora_jax as lora
from benchmarks.transformer import LINEARS, Shape, Transformer, initial, next_token_loss, token_batch

OPTIMIZER = optax.adamw(2e-4)


@dataclass(frozen=True)
class Step:
    """A training step `fn(trained, moments, frozen, tokens) -> (trained, moments, loss)` and its first arguments.

    Attributes:
      name: label in the tables.
      fn: the step, not compiled.
      args: its arguments.
      repeats: whether its first two results are its next first two arguments; they are donated then.
    """

    name: str
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    repeats: bool = True

    def compile(self) -> tuple[Any, Callable[[], Any]]:
        """The compiled step, and a function that runs it once."""
        compiled = jax.jit(self.fn, donate_argnums=(0, 1) if self.repeats else ()).lower(*self.args).compile()
        state = jax.tree.map(jnp.copy, self.args[:2])

        def run() -> Any:
            nonlocal state
            *results, loss = compiled(*state, *self.args[2:])
            state = tuple(results) if self.repeats else state
            return loss, results

        return compiled, run


def descend(name: str, loss: Callable[..., Any], trained: Any, frozen: Any, tokens: Any, tx: Any = OPTIMIZER) -> Step:
    """The step that lowers `loss(trained, frozen, tokens)` by changing `trained` alone."""

    def step(trained: Any, moments: Any, frozen: Any, tokens: Any) -> tuple[Any, Any, Any]:
        value, gradients = jax.value_and_grad(loss)(trained, frozen, tokens)
        updates, moments = tx.update(gradients, moments, trained)
        return optax.apply_updates(trained, updates), moments, value

    return Step(name, step, (trained, jax.jit(tx.init)(trained), frozen, tokens))


def floor(shape: Shape, scan: bool = False) -> Step:
    """Forward, and the gradient with respect to the outputs of the first block's q, k and v; no weight gradient.

    No LoRA step can do with less: the first adapted layers need the gradient of their outputs, but nothing needs
    that of their input. In a scanned stack every block is the same program, so there it is the gradient with
    respect to the stack's input.
    """
    model, tokens = Transformer(shape, scan=scan), token_batch(shape)
    places = ["embed"] if scan else [f"layer_0/attention/{name}" for name in "qkv"]
    zeros = {place: jnp.zeros((shape.batch, shape.length, shape.width)) for place in places}

    def loss(shifts: Any, params: Any, tokens: Any) -> Any:
        def shifted(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            place, y = "/".join(context.module.path), call(*args, **kwargs)
            return y + shifts[place] if place in shifts and context.method_name == "__call__" else y

        with nn.intercept_methods(shifted):
            return next_token_loss(model.apply(params, tokens), tokens)

    def step(shifts: Any, moments: Any, params: Any, tokens: Any) -> tuple[Any, Any, Any]:
        value, gradients = jax.value_and_grad(loss)(shifts, params, tokens)
        return gradients, moments, value

    return Step("frozen floor", step, (zeros, (), initial(model, shape), tokens), repeats=False)


def full(shape: Shape, dense: Any = nn.Dense, name: str = "full fine-tuning", scan: bool = False) -> Step:
    """Every parameter trains."""
    model, tokens = Transformer(shape, dense, scan), token_batch(shape)

    def loss(params: Any, frozen: Any, tokens: Any) -> Any:
        return next_token_loss(model.apply(params, tokens), tokens)

    return descend(name, loss, initial(model, shape), (), tokens)


def lora_step(shape: Shape, rank: int, strategy: Any = "auto", scan: bool = False) -> Step:
    """The unchanged model under `lora_jax.adapt`, with all linear layers of all blocks adapted."""
    model, tokens = Transformer(shape, scan=scan), token_batch(shape)
    params, adapter = adapted_model(model, shape, rank)
    adapted = lora.adapt(model.apply, strategy=strategy)

    def loss(adapter: Any, params: Any, tokens: Any) -> Any:
        return next_token_loss(adapted(params, adapter, tokens), tokens)

    name = "lora_jax" if strategy == "auto" else f"lora_jax, {strategy}"
    return descend(name, loss, adapter, params, tokens, lora.optimizer(OPTIMIZER, adapter))


def adapted_model(model: nn.Module, shape: Shape, rank: int, seed: int = 2) -> tuple[Any, lora.Adapter]:
    """Parameters of a model, and an adapter on all linear layers of its blocks."""
    params, tokens = initial(model, shape), token_batch(shape)
    config = lora.LoraConfig(rank=rank, targets=LINEARS)
    sites = lora.find_sites(model.apply, params, tokens)
    return params, lora.init(jax.random.key(seed), config, params, sites)


def least_flops(shape: Shape, rank: int, floor_flops: float) -> float:
    """The floor, and six products of the rank for every adapted layer: two forward, four backward."""
    return floor_flops + 6 * shape.tokens * rank * sum(inner + outer for inner, outer in shape.linears())
