"""Rules of your own: what a custom kernel computes, so that its weight needs not be formed."""

from collections.abc import Callable
from typing import Any, TypeVar

from lora_jax.engine.declared import declare, parsed

__all__ = ["linear"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def linear(spec: str) -> Callable[[_Function], _Function]:
    """Declare that a function, such as a Pallas kernel or one with a custom gradient, is a product with a kernel.

    What is inside such a function is opaque: without a declaration it gets the formed `W + s·A·B`, right but as large
    as the kernel, and no dropout. With it, the function runs on the frozen kernel, and the low-rank terms beside it, as
    with any product: `find_sites` finds the kernel, `explain` says `factored`, `route` gives every example its own
    adapter. The function and its gradient stay as they are.

    The declaration is trusted. Under `jax.vmap`, which makes another function of it, it does not hold, and the kernel
    is formed; give the function the batch as leading axes instead.

    Args:
      spec: the product, as of `jax.numpy.einsum`, of the input and the kernel: `"...k,kn->...n"`, or
        `"emk,ekn->emn"` for experts. Every axis is in two of input, kernel and result, or in all three.

    Returns:
      A decorator for a function `fn(input, kernel, *others, **static)`: the first two arguments are the operands, other
      arrays follow by position, and what is hashable and no array is given by keyword.

    Raises:
      ConfigError: the specification is none of a product of two operands.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> @jax.custom_vjp
      ... def matmul(x, kernel):
      ...     return x @ kernel
      >>> matmul.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))
      >>> declared = lora.rules.linear("...k,kn->...n")(matmul)
      >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
      >>> fn = lambda params, x: declared(x, params["w"])
      >>> sites = lora.find_sites(fn, params, x)
      >>> adapter = lora.init(jax.random.key(0), lora.LoraConfig(targets="w"), params, sites)
      >>> [use.route for use in lora.explain(fn, params, adapter, x).uses]
      ['factored']
    """
    letters = parsed(spec)

    def decorate(fn: _Function) -> _Function:
        return declare(fn, letters)  # type: ignore[return-value]

    return decorate
