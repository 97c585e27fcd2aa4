"""Platforms: for which kind of machine a program is traced."""

import jax


def accelerated() -> bool:
    """Whether programs are for a TPU or a GPU: by `jax.default_device`, if that is set, or the default backend.

    It is asked when a program is traced. To compile for another machine ahead of time, name one of its devices.
    """
    device = jax.config.jax_default_device
    return (getattr(device, "platform", device) or jax.default_backend()) in ("tpu", "gpu", "cuda", "rocm")
