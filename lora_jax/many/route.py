"""route: one call in which every example, or every token, meets an adapter of its own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapter.adapter import Adapter
from lora_jax.adapter.by_path import adapter_list
from lora_jax.engine import Call, Context, Log, evaluate_call, trace_call
from lora_jax.engine.hooks import add_at, numbered
from lora_jax.engine.routing.axes import Axes, plain
from lora_jax.engine.routing.batch_axes import BatchAxes
from lora_jax.engine.routing.router import Router
from lora_jax.engine.routing.slots import RoutedContext, RouteStrategy, Routing
from lora_jax.engine.weight import RANK, SLOT, Labelled, Term, Weight
from lora_jax.errors import ConfigError, ParameterError, nearest
from lora_jax.many.bank import AdapterBank, Slots
from lora_jax.many.ids import Arguments, check_ids
from lora_jax.paths import is_array
from lora_jax.sites import Explanation


def route(
    fn: Callable[..., Any], *, batch_axes: Any = 0, token_axes: Any = None, strategy: RouteStrategy = "auto"
) -> "RoutedFunction":
    """Make a function in which every example of a batch meets its own adapter of a bank.

    The result is what each example would give alone with its adapter. The base's products run once over the whole
    batch, and only the thin ones differ. `fn` stays as it is: where the examples run in its values is followed through
    its program from the arguments on. All of it is ordinary JAX, differentiable and compiled once, whatever the bank
    holds.

    Args:
      fn: a function `fn(params, *args, **kwargs)`, as for `lora_jax.adapt`.
      batch_axes: where the first axis of the ids runs in each positional argument after `params`: a number for all
        (that have any axes), or a tuple with a number, None (nowhere) or a tree of them per argument, as `in_axes` of
        `jax.vmap`. Keyword arguments have no such axis.
      token_axes: the same for the second axis of the ids, if they have one.
      strategy: how thin products are carried out: `"rows"` gathers the factors of each row, `"mask"` multiplies by all
        slots and keeps each row's own, `"blocks"` brings rows of the same slot together; `"auto"` chooses by shapes.

    Returns:
      `routed(params, bank, ids, *args, lora_key=None, **kwargs)`. `bank` is an `AdapterBank`, or a sequence of adapters
      that become slots 1, 2, and so on. `ids` are integers `[batch]` or `[batch, tokens]`: slots, 0 for the base; or
      floating-point weights of all slots on one more axis, `[batch, slots]` or `[batch, tokens, slots]`, of which that
      of slot 0 does nothing; or a router (`lora_jax.routers`), which finds such weights at every use of a parameter,
      for every row of its input. `lora_key=` turns the dropout of a sequence of adapters on, which must have the same
      rate; a bank has none. `routed.explain(...)` says, for the same arguments but the key, which form each use of a
      parameter takes and what it adds.

    Raises:
      ParameterError: on call: an id out of range (inside `jit`, where it cannot be seen, it is the base), a bank of
        other parameters, or a parameter that is used where examples cannot be told apart.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> params = {"w": jnp.arange(12.0).reshape(4, 3)}
      >>> fn, x = lambda params, x: jnp.tanh(x @ params["w"]), jnp.ones((3, 4)) / 9
      >>> sites = lora.find_sites(fn, params, x)
      >>> adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets="w"), params, sites)
      >>> adapters = [jax.tree.map(lambda leaf: leaf + i, adapter) for i in (0, 1)]
      >>> routed = jax.jit(lora.route(fn))
      >>> out = routed(params, adapters, jnp.array([2, 0, 1]), x)
      >>> bool(jnp.allclose(out[0], lora.adapt(fn)(params, adapters[1], x)[0]))
      True
      >>> bool(jnp.allclose(out[1], fn(params, x)[1]))
      True

    References:
      Chen et al., Punica, arXiv 2310.18547. Sheng et al., S-LoRA, arXiv 2311.03285.
    """
    if strategy not in get_args(RouteStrategy):
        raise ConfigError(f"strategy={strategy!r}; choose one of {', '.join(get_args(RouteStrategy))}")

    return RoutedFunction(fn, batch_axes, token_axes, strategy)


@dataclass(frozen=True, eq=False)
class RoutedFunction:
    """What `route` returns: call it, compile it with `jax.jit`, or have it explain itself.

    Attributes:
      fn, batch_axes, token_axes, strategy: as given to `route`.
    """

    fn: Callable[..., Any]
    batch_axes: Any
    token_axes: Any
    strategy: RouteStrategy

    def __call__(
        self,
        params: Any,
        bank: AdapterBank | Sequence[Adapter],
        ids: Any,
        *args: Any,
        lora_key: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The function's result, with each example's own adapter."""
        return self._run(
            Context(Log(), keys=() if lora_key is None else (lora_key,)), params, bank, ids, *args, **kwargs
        )

    def explain(
        self, params: Any, bank: AdapterBank | Sequence[Adapter], ids: Any, *args: Any, **kwargs: Any
    ) -> Explanation:
        """How each parameter of the bank is used by a call, in which form, and what that adds; nothing is computed.

        Arguments are those of a call; arrays may be `jax.ShapeDtypeStruct`.
        """
        log = Log()
        leaves, tree = jax.tree.flatten((params, bank, ids, args, kwargs))
        arrays = [i for i, leaf in enumerate(leaves) if is_array(leaf)]

        def run(given: list[Any]) -> None:
            known = dict(zip(arrays, given, strict=True))
            call = jax.tree.unflatten(tree, [known.get(i, leaf) for i, leaf in enumerate(leaves)])
            self._run(Context(log), *call[:3], *call[3], **call[4])

        jax.eval_shape(run, [leaves[i] for i in arrays])
        return Explanation(tuple(log.needed))

    def usage(
        self, params: Any, bank: AdapterBank | Sequence[Adapter], router: Router, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """What a router chooses in a call: by path `[*batch, slots - 1]`, the mean weight of every adapter over rows.

        Arguments are those of a call. An adapter that nothing needs has means near zero everywhere.

        Raises:
          ParameterError: as on a call, or what was given is no router.
        """
        if not isinstance(router, Router):
            raise ParameterError(f"usage is about routers (lora_jax.routers); got {type(router).__name__}")
        held = self._held(bank)
        shapes = {path: (prod(each.site.batch_shape), each.count) for path, each in held.items()}
        totals = {path: jax.new_ref(jnp.zeros(shape)) for path, shape in shapes.items()}

        def observe(path: str, maps: Any, found: Any, kept: Any) -> None:
            counted = jnp.concatenate([found, jnp.ones((*found.shape[:-1], 1))], -1)
            add_at(totals[path], maps, counted.sum(-2))

        self._run(Context(Log(), observe=observe), params, held, router, *args, **kwargs)
        found = {path: jax.freeze(total) for path, total in totals.items()}
        means = {path: each[:, :-1] / jnp.maximum(each[:, -1:], 1) for path, each in found.items()}
        return {path: mean.reshape(*held[path].site.batch_shape, -1) for path, mean in means.items()}

    def _held(self, bank: AdapterBank | Sequence[Adapter]) -> AdapterBank:
        return bank if isinstance(bank, AdapterBank) else AdapterBank.of(_runnable(bank, self.token_axes))

    def _run(self, ctx: Context, params: Any, bank: Any, ids: Any, *args: Any, **kwargs: Any) -> Any:
        """Check the bank, find the examples in the arguments, follow them through the program, evaluate it."""
        held = self._held(bank)
        rates = _dropout_rates(bank, ctx.keys)

        chosen, sizes = check_ids(ids, held, tokens=self.token_axes is not None)
        arguments = Arguments.of(args, self.batch_axes, self.token_axes, sizes)

        call = trace_call(self.fn, params, arguments.abstract(), kwargs)
        batch_axes = _follow(call, [axes for _, axes in arguments.labelled()], kwargs)
        _check_parameters(call, held)

        routing = Routing.of(chosen, sizes, held.slots - 1, batch_axes, self.strategy, held.broken)
        keys = ctx.keys if any(rates.values()) else ()
        routed = RoutedContext(ctx.log, keys=keys, observe=ctx.observe, routing=routing)
        symbolic = _symbolic(routed, held, rates, ids.keys if isinstance(ids, Router) else {})
        return evaluate_call(routed, call, [leaf for leaf, _ in arguments.labelled()], symbolic)


def _runnable(adapters: Adapter | Sequence[Adapter], token_axes: Any) -> list[Adapter]:
    """The adapters, none of which may need ids of tokens where there are none."""
    given = adapter_list(adapters)
    for slot, adapter in enumerate(given, 1):
        waiting = next((update for update in adapter.values() if update.waits), None)
        if token_axes is None and waiting is not None:
            raise ParameterError(f"The adapter of slot {slot} has {waiting.waits}")
    return given


def _check_parameters(call: Call, bank: AdapterBank) -> None:
    """Refuse parameters that the bank is not for."""
    for path, held in bank.items():
        if path not in call.arrays or np.shape(call.arrays[path]) != held.site.shape:
            has = (
                np.shape(call.arrays[path])
                if path in call.arrays
                else f"nothing; nearest: {nearest(path, call.arrays)}"
            )
            raise ParameterError(
                f"The bank adapts {path!r} of shape {held.site.shape}; these parameters have {has}. Pass the tree that "
                "the adapters were made for, at the same level (with or without 'params')"
            )


def _dropout_rates(bank: AdapterBank | Adapter | Sequence[Adapter], keys: Sequence[Any]) -> dict[str, float]:
    """The dropout of each parameter's inputs; none without a key."""
    if not keys:
        return {}
    if isinstance(bank, AdapterBank):
        raise ParameterError("A bank holds no dropout, so lora_key has no effect: give the adapters, or leave it out")
    rates: dict[str, float] = {}
    for adapter in adapter_list(bank):
        for path, update in adapter.items():
            if rates.setdefault(path, update.dropout) != update.dropout:
                raise ParameterError(
                    f"{path} has dropout {rates[path]} in one adapter and {update.dropout} in another: in one batch "
                    "the inputs of all adapters are dropped alike"
                )
    if any(isinstance(key, (tuple, list)) for key in keys):
        raise ConfigError("lora_key is one key here: the inputs of all adapters are dropped alike")
    return rates


def _follow(call: Call, labelled: Sequence[Axes], kwargs: Mapping[str, Any]) -> BatchAxes:
    """Follow the examples and tokens of the arguments through the program."""
    batch_axes = BatchAxes(keywords=tuple(name for name, value in kwargs.items() if np.ndim(value)))
    parameters = [tuple(map(plain, np.shape(leaf))) for leaf in call.arrays.values()]
    batch_axes.follow(call.program, [*parameters, *labelled])
    return batch_axes


def _symbolic(
    ctx: Context, bank: AdapterBank, rates: Mapping[str, float], keys: Mapping[str, Any]
) -> Callable[[str, Any], Any]:
    """What the program sees of each parameter: those of the bank with the factors of all slots."""

    def symbolic(path: str, leaf: Any) -> Any:
        if path not in bank:
            return leaf
        return _weight(ctx, path, leaf, bank[path], rates.get(path, 0.0), keys.get(path))

    return symbolic


def _weight(ctx: Context, path: str, base: Any, held: Slots, dropout: float, keys: Any) -> Weight:
    weight, site = ctx.weight(path, base), held.site
    batch, into, out = ([weight.axes[i] for i in axes] for axes in (site.batch_axes, site.in_axes, site.out_axes))
    a = Labelled(held.a, (*batch, SLOT, RANK, *into))
    b = Labelled(held.b, (*batch, SLOT, RANK, *out))
    gain = None if held.gain is None else Labelled(held.gain, (*batch, SLOT, *out))
    if keys is not None:
        weight = replace(weight, keys=Labelled(keys, (*batch, SLOT, *into)))
        weight = numbered(weight, site.batch_axes, site.in_axes)
    return replace(weight, terms=(Term(a, b, dropout, 0, path),), gain=gain)
