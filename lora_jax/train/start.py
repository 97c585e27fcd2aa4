"""Where an adapter starts that is not read from disk: drawn, or from the first batches."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax

import lora_jax as lora
from lora_jax.adapter.registry import find_init
from lora_jax.errors import ConfigError, LoraError
from lora_jax.io.peft.save import peft_files

_CAPTURED = {"inputs": "inputs", "components": "components", "gradient": "gradient"}


def fresh(
    key: jax.Array,
    config: lora.LoraConfig,
    params: Any,
    sites: lora.Sites,
    captured: lora.Captured | None = None,
) -> lora.Adapter:
    """A new adapter, spread over the devices as the parameters are.

    Raises:
      MatchError: the config selects nothing.
    """
    start = partial(lora.init, config=config, sites=sites, captured=captured)
    spread = any(isinstance(leaf.sharding, jax.sharding.NamedSharding) for leaf in jax.tree.leaves(params))
    draw: Any = lambda key, params: start(key, params=params)  # noqa: E731
    if not spread:
        return jax.jit(draw)(key, params)
    places = lora.adapter_sharding(jax.eval_shape(draw, key, params), params)
    return jax.jit(draw, out_shardings=places)(key, params)


def needed(config: lora.LoraConfig) -> str | None:
    """What an initialiser needs of the data, as `lora_jax.capture` calls it; None for most.

    >>> needed(lora.LoraConfig(init="eva")), needed(lora.LoraConfig())
    ('components', None)
    """
    reads = find_init(config.init).reads
    return next((what for name, what in _CAPTURED.items() if name in reads), None)


def captured_from(
    objective: Callable[[Any, Any], Any] | None,
    config: lora.LoraConfig,
    params: Any,
    batches: Iterable[Any],
    what: Any,
) -> lora.Captured:
    """What an initialiser starts from, of the first batches.

    Args:
      objective: `(params, batch) -> score`; its mean loss is what gradients are of.
      config: the adapter's.
      params: of the model.
      batches: some.
      what: of `needed`.

    Raises:
      ConfigError: the task has no such loss.
    """
    if objective is None:
        raise ConfigError(f"init={config.init!r} starts from the loss of one model, and this task compares two")

    def mean(params: Any, batch: Any) -> Any:
        score = objective(params, batch)
        return score.loss / score.number

    return lora.capture(mean, params, [(batch,) for batch in batches], what, config=config)


def check_exportable(adapter: lora.Adapter, sites: lora.Sites, params: Any) -> None:
    """Refuse, before anything is trained, what PEFT's format cannot hold.

    Raises:
      LoraError: says what PEFT has no place for.
    """
    try:
        peft_files(adapter, sites=sites, params=params)
    except LoraError as error:
        raise type(error)(f"the adapter would not be one of PEFT's: {error}") from error
