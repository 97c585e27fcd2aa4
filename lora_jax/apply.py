"""adapt: run an unchanged function as though its adapted parameters were `W + Σ scale·a·b`, without forming the sum."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, wraps
from typing import Any, get_args

import jax

from lora_jax.adapter.adapter import Adapter
from lora_jax.adapter.by_path import NumberedUpdate, adapter_list, updates_by_path
from lora_jax.adapter.updates import combined, held
from lora_jax.engine import Call, Context, Log, Strategy, evaluate_call, trace_call
from lora_jax.engine.dropout import dropout_keys
from lora_jax.engine.lift import frozen
from lora_jax.engine.weight import RANK, Labelled, Term, Weight
from lora_jax.errors import ConfigError
from lora_jax.quantised.leaf import dense_of, has_quantised


def adapt(fn: Callable[..., Any], *, strategy: Strategy = "auto") -> Callable[..., Any]:
    """Make a function that takes adapters beside its parameters.

    `fn` stays as it is: nothing is wrapped, patched or registered. Each call traces it and runs the
    program with every adapted parameter held as `W + scale·a·b`, a sum that is not formed where the
    program uses the parameter linearly. All of it is ordinary JAX, so the result works under `jit`,
    `grad`, `vmap`, `scan`, `remat` and on sharded arrays. Put it under `jax.jit`.

    Args:
      fn: a function `fn(params, *args, **kwargs)`: a Flax `model.apply`, an NNX model split into
        functions, a Haiku `apply`, or any other. The parameters are a tree; the arguments are anything.
      strategy: how products are carried out: `"factored"` as `x·W + (x·a)·b`, `"merged"` as
        `x·(W + ab)` with factored gradients, `"joined"` as `[x, x·a]·[W; b]` where factors can be appended,
        `"auto"` whichever takes fewer operations and bytes for the shapes (merged only in float32 and without
        dropout, joined only on TPUs and GPUs). None ever forms a gradient of the weight's size.

    Returns:
      `adapted(params, adapter, *args, lora_key=None, **kwargs)`. `adapter` is an `Adapter`, or a tuple of
      them, which add up; an empty tuple is the base model. `lora_key` turns the adapters' dropout on, each
      with a mask of its own; without it the call is deterministic. A tuple of keys has one for each adapter:
      None leaves that adapter without dropout, equal keys give equal masks. The base receives no gradient:
      what trains is in the adapter.

    Raises:
      ParameterError: on call, if an adapter names a parameter that is missing or shaped differently.
      ConfigError: on call, if `lora_key` has another number of keys than there are adapters.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> params = {"w": jnp.arange(12.0).reshape(4, 3)}
      >>> fn = lambda params, x: jnp.tanh(x @ params["w"])
      >>> x = jnp.ones((2, 4))
      >>> sites = lora.find_sites(fn, params, x)
      >>> adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets="w"), params, sites)
      >>> adapted = jax.jit(lora.adapt(fn))
      >>> bool((adapted(params, adapter, x) == fn(params, x)).all())  # B is zero: the base
      True

    References:
      Hu et al., LoRA, arXiv 2106.09685. Cherniuk et al., RunLoRA, arXiv 2312.03415 (choosing the form).
    """
    if strategy not in get_args(Strategy):
        raise ConfigError(f"strategy={strategy!r}; choose one of {', '.join(get_args(Strategy))}")

    @wraps(fn)
    def adapted(
        params: Any, adapter: Adapter | Sequence[Adapter], *args: Any, lora_key: Any = None, **kwargs: Any
    ) -> Any:
        adapters = adapter_list(adapter)
        if not adapters and not has_quantised(params):
            return fn(jax.tree.map(frozen, params), *args, **kwargs)
        call = trace_call(fn, params, args, kwargs)
        return run_adapted(call, adapters, Context(Log(), strategy=strategy), lora_key)

    return adapted


def on_any_base(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which takes quantised parameters as well: those are dequantised where it uses them.

    `adapt` gives it plain ones; on plain ones it is `fn`, with all gradients.
    """

    @wraps(fn)
    def call(params: Any, *args: Any, **kwargs: Any) -> Any:
        run = partial(adapt(fn), params, ()) if has_quantised(params) else partial(fn, params)
        return run(*args, **kwargs)

    return call


def run_adapted(call: Call, adapters: Sequence[Adapter], ctx: Context, lora_key: Any) -> Any:
    """Evaluate a traced call with its adapted parameters symbolic; `lora_key` is as given to the adapted function."""
    ctx = replace(ctx, keys=dropout_keys(lora_key, adapters))
    updates = updates_by_path(adapters, call.arrays)
    symbolic = lambda path, leaf: _weight(ctx, path, leaf, updates[path]) if path in updates else leaf  # noqa: E731
    return evaluate_call(ctx, call, call.given, symbolic)


def _weight(ctx: Context, path: str, leaf: Any, numbered: list[NumberedUpdate]) -> Weight | Any:
    """The parameter with all its updates, symbolic unless they leave it an ordinary array."""
    updates = [held(update) for _, update in numbered]
    given = dense_of(leaf) if any(update.reads_base for update in updates) else leaf
    base, gain, changes = combined(given, updates)
    if gain is None and not any(change.factors for change in changes):
        return base
    weight, site = ctx.weight(path, leaf if base is given else base), numbered[0].update.site
    batch, into, out = ([weight.axes[i] for i in axes] for axes in (site.batch_axes, site.in_axes, site.out_axes))
    terms = tuple(
        Term(Labelled(a, (*batch, RANK, *into)), Labelled(b, (*batch, RANK, *out)), update.dropout, number, path)
        for (number, update), change in zip(numbered, changes, strict=True)
        for a, b in change.factors
    )
    return replace(weight, terms=terms, gain=None if gain is None else Labelled(gain, (*batch, *out)))
