"""What `lora_jax.capture` collected at a site, checked against the site."""

from collections.abc import Mapping
from typing import Any

import jax

from lora_jax.adapter.registry import Data
from lora_jax.adapter.site import Site
from lora_jax.capture.captured import Captured
from lora_jax.errors import ParameterError, nearest


def captured_data(captured: Mapping[str, Any] | None, what: Data, init: str, site: Site) -> Any:
    """The statistic of a site that an initialiser reads.

    Raises:
      ParameterError: nothing was captured, something else, elsewhere, or for another shape.
    """
    call = f'captured = lora_jax.capture(fn, params, batches, "{what}", config=config)'
    if not isinstance(captured, Captured) or captured.what != what:
        given = f"captured {captured.what}" if isinstance(captured, Captured) else f"captured={captured!r}"
        raise ParameterError(
            f"init={init!r} starts from captured {what}, not from {given}: {call}, then init(..., captured)"
        )
    if site.path not in captured:
        raise ParameterError(
            f"{what} of {site.path!r} were not captured (nearest: {nearest(site.path, captured)}): capture with this "
            f"config, {call}"
        )
    found = captured[site.path]
    value, lead, wanted = _form(found, what, site)
    if value.shape != (*lead, *wanted):
        raise ParameterError(
            f"{what} of {site.path!r} have shape {value.shape} where this model needs {(*lead, *wanted)}: they were "
            "captured with another one"
        )
    return found.mean if what == "gradient" else found


def _form(found: Any, what: Data, site: Site) -> tuple[jax.Array, tuple[int, ...], tuple[int, ...]]:
    """The array that shows what a statistic was captured for, and the shape it must have."""
    if what == "gradient":
        return found.mean, (), site.shape
    if what == "inputs":
        return found.second, site.batch_shape, (site.fan_in, site.fan_in)
    return found.vectors, site.batch_shape, (found.vectors.shape[-2], site.fan_in)
