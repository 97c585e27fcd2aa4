"""Adapt an unchanged Flax NNX model: split it, adapt the function, train, merge back into a module.

Expected output, in a few seconds on a CPU: the site table, a falling loss, and a difference below 1e-5 between the
adapted function and the merged module.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import lora_jax as lora
from lora_jax.nnx import functional


class Classifier(nnx.Module):
    """A small convolutional classifier; nothing in it knows of adapters."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(1, 8, (3, 3), strides=2, rngs=rngs)
        self.hidden = nnx.Linear(8 * 8 * 8, 32, rngs=rngs)
        self.out = nnx.Linear(32, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.conv(x))
        return self.out(nnx.relu(self.hidden(x.reshape(x.shape[0], -1))))


def main(steps: int = 30, rank: int = 4, learning_rate: float = 3e-3) -> float:
    """Train adapters on a fixed batch; returns the final loss."""
    model = Classifier(nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(1), (16, 16, 16, 1))
    labels = jnp.arange(16) % 4

    fn, params = functional(model)
    sites = lora.find_sites(fn, params, images)
    print(sites)
    config = lora.LoraConfig(rank=rank, targets=("conv", "hidden"), train="out")
    adapter = lora.init(jax.random.key(2), config, params, sites)
    print(lora.trainable_line(adapter, params))

    adapted = lora.adapt(fn)
    tx = lora.optimizer(optax.adam(learning_rate), adapter)
    opt_state = tx.init(adapter)

    @jax.jit
    def step(adapter: lora.Adapter, opt_state: optax.OptState) -> tuple[lora.Adapter, optax.OptState, jax.Array]:
        def loss_fn(adapter: lora.Adapter) -> jax.Array:
            logits = adapted(params, adapter, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss, grads = jax.value_and_grad(loss_fn)(adapter)
        updates, opt_state = tx.update(grads, opt_state, adapter)
        return optax.apply_updates(adapter, updates), opt_state, loss

    for i in range(steps):
        adapter, opt_state, loss = step(adapter, opt_state)
        if i % 10 == 0 or i == steps - 1:
            print(f"step {i:3d}  loss {float(loss):.4f}")

    nnx.update(model, lora.merge(params, adapter))
    difference = float(jnp.abs(model(images) - adapted(params, adapter, images)).max())
    print(f"merged module against adapted function: {difference:.1e}")
    assert difference < 1e-5
    return float(loss)


if __name__ == "__main__":
    main()
