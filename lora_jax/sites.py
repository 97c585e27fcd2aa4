"""find_sites and explain: the engine run abstractly, to see how a program uses its parameters."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapter.adapter import Adapter
from lora_jax.adapter.by_path import adapter_list
from lora_jax.adapter.checksum import warn_if_moved
from lora_jax.adapter.site import Missed, Site, Sites
from lora_jax.apply import run_adapted
from lora_jax.engine import Call, Context, Log, Strategy, Use, dense, interpret, trace_call
from lora_jax.engine.lift import analyse
from lora_jax.errors import listed
from lora_jax.quantised.leaf import abstract
from lora_jax.report.report import Report
from lora_jax.report.tables import Table

_LOGGER = logging.getLogger("lora_jax")


def find_sites(fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Sites:
    """Find the parameters a function uses linearly, and the role of each of their axes.

    The function is traced with abstract values; nothing is computed and nothing about names, sizes or
    layer classes is assumed. A parameter is a site if the program multiplies by it (any axes, either
    operand), convolves with it, or looks up its rows, however it is transposed, reshaped, sliced,
    stacked or scanned over before.

    Args:
      fn: the function `fn(params, *args, **kwargs)`.
      params: its parameters: arrays or `jax.ShapeDtypeStruct`, in any tree.
      *args: example arguments. Arrays may be `jax.ShapeDtypeStruct`.
      **kwargs: likewise.

    Returns:
      A mapping from path to `Site` that prints as a table.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> params = {"embed": jnp.ones((9, 4)), "up": jnp.ones((4, 2, 8)), "norm": jnp.ones(4)}
      >>> def fn(params, tokens):
      ...     x = params["embed"][tokens] * params["norm"]
      ...     return jnp.einsum("btd,dhk->bthk", x, params["up"])
      >>> sites = lora.find_sites(fn, params, jax.ShapeDtypeStruct((2, 5), jnp.int32))
      >>> [(path, site.kind, site.in_axes, site.out_axes) for path, site in sites.items()]
      [('embed', 'embedding', (0,), (1,)), ('up', 'dense', (0,), (1, 2))]
    """
    call = trace_call(fn, params, args, kwargs)
    log = Log()
    analyse(log, call)
    ctx = Context(log, look_inside=True)

    def run(arrays: list[Any], given: list[Any]) -> list[Any]:
        inputs = [_symbolic(ctx, path, leaf) for path, leaf in zip(call.arrays, arrays, strict=True)]
        return [dense(ctx, None, out, "returned") for out in interpret(ctx, call.program, [*inputs, *given])]

    jax.eval_shape(run, [abstract(leaf) for leaf in call.arrays.values()], call.given)
    uses, every = (_linear(each) for each in (log.needed, log.uses.values()))
    found = [
        replace(_site(path, leaf, uses[path], every[path], log.facts.heads), codes=path in log.coded)
        for path, leaf in call.arrays.items()
        if path in uses
    ]
    missed = tuple(_missed(call.arrays, log, uses))
    found = [site for site in found if site.path not in {each.path for each in missed}]
    _say(missed, call.arrays)
    return Sites(found, tuple(call.arrays), missed)


def _missed(arrays: Mapping[str, Any], log: Log, uses: Mapping[str, Any]) -> Iterator[Missed]:
    """What reaches a product, a convolution or a look-up in some form, but in none of low rank."""
    ended: dict[str, str] = {}
    for use in log.needed:
        if use.route == "materialised":
            ended.setdefault(use.path, f"{use.primitive} has no low-rank form")
    for number, (path, leaf) in enumerate(arrays.items()):
        why = _lost_codes(path, leaf, number, log, uses.get(path, ()))
        lost = bool(why) or (path in ended and path not in uses)
        if lost and number in log.facts.reached:
            yield Missed(path, tuple(leaf.shape), why or ended[path], codes=path in log.coded)


def _lost_codes(path: str, leaf: Any, number: int, log: Log, uses: Iterable[Use]) -> str:
    """Why factors cannot be beside the numbers that the program makes of a parameter's codes; empty if they can."""
    narrow = path in log.coded or leaf.dtype.itemsize == 1
    if narrow and number not in log.facts.combined and any(use.equation in log.facts.scaled for use in uses):
        return (
            f"it is {leaf.dtype} and other parameters scale the product: its factors would train inside of that scale"
        )
    return ""


def _say(missed: Sequence[Missed], arrays: Mapping[str, Any]) -> None:
    """A model of which much cannot be adapted does not pass without a word."""
    lost, all_of_it = sum(prod(each.shape) for each in missed), sum(leaf.size for leaf in arrays.values())
    if 2 * lost > all_of_it:
        named = listed([f"{each.path} ({each.reason})" for each in missed])
        _LOGGER.warning("%d of %d parameters have no low-rank form in this program: %s", lost, all_of_it, named)


def _linear(uses: Iterable[Use]) -> dict[str, list[Use]]:
    """By path, the uses that tell its inputs from its outputs."""
    found: dict[str, list[Use]] = {}
    for use in uses:
        if use.in_axes and use.out_axes:
            found.setdefault(use.path, []).append(use)
    return found


def _symbolic(ctx: Context, path: str, leaf: Any) -> Any:
    numbers = jnp.issubdtype(leaf.dtype, jnp.inexact) or path in ctx.log.coded
    return ctx.weight(path, leaf) if numbers and leaf.ndim >= 2 else leaf


def _site(path: str, leaf: Any, uses: list[Use], every: list[Use], heads: set[int]) -> Site:
    """A table that is looked up is an embedding even if it is multiplied by too; else the first use decides.

    A derivative inside of the program uses weights the other way round, and may leave nothing of the way forward: so
    the first use counts though no result depends on it.
    """
    use = next((use for use in uses if use.kind == "embedding"), every[0])
    assert use.kind is not None
    return Site(
        path=path, shape=tuple(leaf.shape), dtype=jnp.dtype(leaf.dtype).name, kind=use.kind,
        in_axes=use.in_axes, out_axes=use.out_axes, batch_axes=use.batch_axes,
        uses=len(uses), head=any(use.equation in heads for use in uses),
        channel_axis=use.channel_axis, groups=use.groups,
    )  # fmt: skip


@dataclass(frozen=True, repr=False)
class Explanation(Report):
    """How a call uses its adapted parameters; printing it shows a table.

    Attributes:
      uses: every use, in the order of the program.

    Example:
      >>> Explanation(()).flops, Explanation(()).materialised
      (0, ())
    """

    uses: tuple[Use, ...]

    @property
    def flops(self) -> int:
        """Floating-point operations the adapters add to one forward evaluation (a loop's body counted once)."""
        return sum(use.flops for use in self.uses)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays the adapters add to one forward evaluation (a loop's body counted once)."""
        return sum(use.nbytes for use in self.uses)

    @property
    def materialised(self) -> tuple[Use, ...]:
        """The uses where `W + a·b` had to be formed."""
        return tuple(use for use in self.uses if use.route == "materialised")

    def table(self) -> Table:
        """A row for every use, and totals."""
        headers = ("path", "operation", "route", "+FLOPs", "+bytes", "why")
        rows = [
            (use.path, use.primitive, use.route, f"{use.flops:,}", f"{use.nbytes:,}", use.reason) for use in self.uses
        ]
        total = ("total", "", f"{len(self.uses)} uses", f"{self.flops:,}", f"{self.nbytes:,}", "")
        return Table(headers, rows, total, words=(1, 2, 5))


def explain(
    fn: Callable[..., Any],
    params: Any,
    adapter: Adapter | Sequence[Adapter],
    *args: Any,
    strategy: Strategy = "auto",
    lora_key: Any = None,
    **kwargs: Any,
) -> Explanation:
    """Say how each adapted parameter is used by a call, what that adds, and why anything is materialised.

    Args:
      fn: the function that `adapt` gets.
      params: as in the call of the adapted function; nothing is computed.
      adapter: likewise.
      *args: likewise.
      strategy: as given to `adapt`.
      lora_key: as given to the call; dropout rules out the merged form.
      **kwargs: as in the call.

    Returns:
      An `Explanation`: its `uses`, its totals, and a table when printed.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> params = {"w": jnp.ones((4, 3))}
      >>> fn = lambda params, x: x @ params["w"] + jnp.abs(params["w"]).sum()
      >>> x = jnp.ones((2, 4))
      >>> sites = lora.find_sites(fn, params, x)
      >>> adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets="w"), params, sites)
      >>> [(use.primitive, use.route) for use in lora.explain(fn, params, adapter, x).uses]
      [('dot_general', 'merged'), ('abs', 'materialised')]
    """
    adapters = adapter_list(adapter)
    warn_if_moved(adapters)
    call = trace_call(fn, params, args, kwargs)
    log = Log()

    def run(arrays: list[Any], given: list[Any], adapters: list[Adapter]) -> Any:
        known = Call(dict(zip(call.arrays, arrays, strict=True)), given, call.program, list)
        return run_adapted(known, adapters, Context(log, strategy=strategy, look_inside=True), lora_key)

    jax.eval_shape(run, list(call.arrays.values()), call.given, adapters)
    return Explanation(tuple(log.needed))
