"""find_sites and explain: the engine run abstractly, to see how a program uses its parameters."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapter.adapter import Adapter
from lora_jax.adapter.by_path import adapter_list
from lora_jax.adapter.checksum import warn_if_moved
from lora_jax.adapter.site import Site, Sites
from lora_jax.apply import run_adapted
from lora_jax.engine import Call, Context, Log, Strategy, Use, dense, interpret, trace_call
from lora_jax.engine.heads import head_equations
from lora_jax.report.report import Report
from lora_jax.report.tables import Table


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
    ctx = Context(log, look_inside=True)

    def run(arrays: list[Any], given: list[Any]) -> list[Any]:
        inputs = [_symbolic(ctx, path, leaf) for path, leaf in zip(call.arrays, arrays, strict=True)]
        return [dense(ctx, None, out, "returned") for out in interpret(ctx, call.program, [*inputs, *given])]

    jax.eval_shape(run, list(call.arrays.values()), call.given)
    heads = head_equations(call.program, len(call.arrays))
    uses: dict[str, list[Use]] = {}
    for use in log.uses.values():
        if use.in_axes and use.out_axes:
            uses.setdefault(use.path, []).append(use)
    found = [_site(path, leaf, uses[path], heads) for path, leaf in call.arrays.items() if path in uses]
    return Sites(found, tuple(call.arrays))


def _symbolic(ctx: Context, path: str, leaf: Any) -> Any:
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    return ctx.weight(path, leaf) if floating and leaf.ndim >= 2 else leaf


def _site(path: str, leaf: Any, uses: list[Use], heads: set[int]) -> Site:
    """A table that is looked up is an embedding even if it is multiplied by too; else the first use decides."""
    use = next((use for use in uses if use.kind == "embedding"), uses[0])
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
    return Explanation(tuple(log.uses.values()))
