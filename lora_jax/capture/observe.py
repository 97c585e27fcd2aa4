"""Running a function with hooks at the selected sites: one compiled step that adds a batch to the statistics."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import jax

from lora_jax.adapter.site import Site
from lora_jax.capture.batches import joined, split
from lora_jax.capture.captured import Statistic
from lora_jax.capture.statistics import Moments, Sketch
from lora_jax.engine import Context, Log, interpret, trace_call
from lora_jax.engine.hooks import numbered
from lora_jax.errors import ParameterError, listed

_COLLECTED = {"inputs": Moments, "components": Sketch}


def observed(
    fn: Callable[..., Any],
    params: Any,
    rounds: Iterable[Iterable[tuple[Any, ...]]],
    what: str,
    sites: Sequence[Site],
    components: Mapping[str, int],
    mask: Callable[..., Any] | None,
    seed: int,
) -> dict[str, Statistic]:
    """The statistics of the inputs of every site; see `lora_jax.capture`."""
    step = observing_step(fn, sites, mask)
    state: Any = None
    for batches in rounds:
        again = None if state is None else {path: each.again() for path, each in state.items()}
        state = again or zeros(what, sites, components, seed)
        for batch in batches:
            state = step(state, *split((params, batch)))
    return {site.path: _finished(state[site.path], site, components[site.path]) for site in sites}


def zeros(what: str, sites: Sequence[Site], components: Mapping[str, int], seed: int) -> dict[str, Any]:
    """What is collected before the first batch: by path, with one axis for the whole stack of a site."""
    start, key = _COLLECTED[what].zero, jax.random.key(seed)
    return {site.path: start(site, prod(site.batch_shape), components[site.path], key) for site in sites}


def _finished(state: Moments | Sketch, site: Site, components: int) -> Statistic:
    """The statistic with the stacked axes of its site."""
    found = _finish(state, components)
    return jax.tree.map(lambda leaf: leaf.reshape(*site.batch_shape, *leaf.shape[1:]), found)


@partial(jax.jit, static_argnames="components")
def _finish(state: Moments | Sketch, components: int) -> Statistic:
    return jax.vmap(lambda each: each.finish(components))(state)


def observing_step(
    fn: Callable[..., Any], sites: Sequence[Site], mask: Callable[..., Any] | None
) -> Callable[..., Any]:
    """A compiled function `(state, arrays, rest)` that adds a batch to the statistics, in place."""

    @partial(jax.jit, static_argnames="rest", donate_argnames="state")
    def step(state: dict[str, Any], arrays: list[Any], rest: tuple[Any, ...]) -> dict[str, Any]:
        params, batch = joined(arrays, rest)
        refs = jax.tree.map(jax.new_ref, state)
        seen: set[str] = set()

        def observe(path: str, entry: Any, tokens: Any, kept: Any) -> None:
            seen.add(path)
            refs[path].add(entry, tokens, kept)

        log = Log()
        _run(fn, params, batch, sites, Context(log, observe=observe, mask=mask and mask(*batch)))
        _check_seen(sites, seen, log)
        return jax.tree.map(jax.freeze, refs)

    return step


def _run(fn: Callable[..., Any], params: Any, batch: tuple[Any, ...], sites: Sequence[Site], ctx: Context) -> None:
    """Run the program for what it shows the observer; its results are dropped."""
    call, known = trace_call(fn, params, batch, {}), {site.path: site for site in sites}

    def symbolic(path: str, leaf: Any) -> Any:
        if path not in known:
            return leaf
        return numbered(ctx.weight(path, leaf), known[path].batch_axes, known[path].in_axes)

    interpret(ctx, call.program, [*(symbolic(path, leaf) for path, leaf in call.arrays.items()), *call.given])


def _check_seen(sites: Sequence[Site], seen: set[str], log: Log) -> None:
    missed = [site for site in sites if site.path not in seen]
    if not missed:
        return
    path = missed[0].path
    why = "as it is a look-up table" if missed[0].kind == "embedding" else "in a form that shows its input"
    reasons = [use.reason for use in log.uses.values() if use.path == path and use.reason]
    raise ParameterError(
        f"No input of {listed([site.path for site in missed])} was seen: the program uses {path!r} "
        f"{why if not reasons else f'where {reasons[0]}'}. Leave it out with exclude="
    )
