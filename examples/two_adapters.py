"""One base, two adapters: train the second on top of the first, then mix them without recompiling.

Expected output, in a few seconds on a CPU: the loss of the base and of both adapters, and the number of times the mixed
function was compiled while six different mixtures went through it.
"""

import jax
import jax.numpy as jnp
import optax

import lora_jax as lora


def forward(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """A plain two-layer network."""
    return jnp.tanh(x @ params["up"]) @ params["down"]


def main(steps: int = 60) -> int:
    """Train two adapters one after the other; returns the number of compilations of the mixture."""
    keys = iter(jax.random.split(jax.random.key(0), 8))
    params = {"up": jax.random.normal(next(keys), (16, 64)) / 4, "down": jax.random.normal(next(keys), (64, 8)) / 8}
    x, y = jax.random.normal(next(keys), (32, 16)), jax.random.normal(next(keys), (32, 8))

    sites = lora.find_sites(forward, params, x)
    config = lora.LoraConfig(rank=4, targets=("up", "down"))
    adapted = lora.adapt(forward)

    def loss(adapters: tuple[lora.Adapter, ...]) -> jax.Array:
        return jnp.mean((adapted(params, adapters, x) - y) ** 2)

    def train(adapter: lora.Adapter, below: tuple[lora.Adapter, ...]) -> lora.Adapter:
        tx = lora.optimizer(optax.adam(3e-3), adapter)
        state = tx.init(adapter)

        @jax.jit
        def step(adapter: lora.Adapter, state: optax.OptState) -> tuple[lora.Adapter, optax.OptState]:
            grads = jax.grad(lambda new: loss((*below, new)))(adapter)
            updates, state = tx.update(grads, state, adapter)
            return optax.apply_updates(adapter, updates), state

        for _ in range(steps):
            adapter, state = step(adapter, state)
        return adapter

    first = train(lora.init(next(keys), config, params, sites), ())
    second = train(lora.init(next(keys), config, params, sites), (first,))
    print(f"base {loss(()):.4f}   first {loss((first,)):.4f}   first + second {loss((first, second)):.4f}")

    compilations = 0

    @jax.jit
    def mixed(first: lora.Adapter, second: lora.Adapter) -> jax.Array:
        nonlocal compilations
        compilations += 1
        return loss((first, second))

    for weight in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        print(f"weight {weight:.1f}  loss {mixed(first, lora.scale(second, weight)):.4f}")
    print(f"compiled {compilations} time(s)")
    return compilations


if __name__ == "__main__":
    main()
