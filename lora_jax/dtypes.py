"""Dtypes: the one that holds what several hold, whatever promotion JAX has been told to allow in programs."""

from typing import Any

import jax
import jax.numpy as jnp


def promoted(*of: Any) -> Any:
    """The dtype that arrays (or dtypes) have in common, also under `jax_numpy_dtype_promotion="strict"`.

    Example:
      >>> promoted(jnp.bfloat16, jnp.ones(2))
      dtype('float32')
    """
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*of)
