"""Sizes that may be symbolic, as in programs that `jax.export` writes for any batch size."""

from typing import Any

import jax


def exceeds(one: Any, other: Any) -> bool:
    """Whether a size is known to be larger than another.

    Example:
      >>> import jax.export
      >>> (batch,) = jax.export.symbolic_shape("batch")
      >>> exceeds(3, 2), exceeds(batch + 2, batch), exceeds(batch, 8)
      (True, True, False)
    """
    try:
        return bool(one > other)
    except jax.errors.InconclusiveDimensionOperation:
        return False


def several(size: Any) -> bool:
    """Whether a size is not known to be one (or none): a symbolic one counts as many."""
    return not isinstance(size, int) or size > 1


def divides(part: Any, whole: Any) -> bool:
    """Whether a size is known to be a multiple of another."""
    try:
        return bool(whole % part == 0)
    except jax.errors.InconclusiveDimensionOperation:
        return False
