"""Collecting over batches: one compiled step that adds a batch to the statistics of every site, or to its gradient."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding

from lora_jax.adapter.factors import is_traced
from lora_jax.adapter.site import Site
from lora_jax.capture.captured import Gradient, Statistic
from lora_jax.capture.statistics import Moments, Sketch
from lora_jax.dtypes import promoted
from lora_jax.engine import Context, Log, interpret, trace_call
from lora_jax.engine.hooks import numbered
from lora_jax.engine.lift import analyse, followed
from lora_jax.errors import ConfigError, ParameterError, listed
from lora_jax.paths import is_array, named_leaves, rebuild
from lora_jax.quantised.leaf import dense_of

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


def explicit_mesh(given: Any) -> AbstractContextManager[Any]:
    """Enter the mesh with explicit axes that arrays are on, so that sums begin there too; nothing if there is none."""
    known = [leaf for leaf in jax.tree.leaves(given) if isinstance(leaf, jax.Array) and not is_traced(leaf)]
    meshes = [leaf.sharding.mesh for leaf in known if isinstance(leaf.sharding, NamedSharding)]
    found = next((mesh for mesh in meshes if isinstance(mesh, Mesh) and AxisType.Explicit in mesh.axis_types), None)
    entered = not jax.sharding.get_abstract_mesh().empty
    return nullcontext() if found is None or entered else jax.set_mesh(found)


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

        def observe(path: str, maps: Any, tokens: Any, kept: Any) -> None:
            seen.add(path)
            refs[path].add(maps, tokens, kept)

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

    analyse(ctx.log, call)
    leaves = [followed(ctx, path, symbolic(path, leaf)) for path, leaf in call.arrays.items()]
    interpret(ctx, call.program, [*leaves, *call.given])


def _check_seen(sites: Sequence[Site], seen: set[str], log: Log) -> None:
    missed = [site for site in sites if site.path not in seen]
    if not missed:
        return
    path = missed[0].path
    why = "as it is a look-up table" if missed[0].kind == "embedding" else "in a form that shows its input"
    reasons = [use.reason for use in log.needed if use.path == path and use.reason]
    raise ParameterError(
        f"No input of {listed([site.path for site in missed])} was seen: the program uses {path!r} "
        f"{why if not reasons else f'where {reasons[0]}'}. Leave it out with exclude="
    )


def mean_gradients(
    fn: Callable[..., Any], params: Any, rounds: Iterable[Iterable[tuple[Any, ...]]], paths: Sequence[str]
) -> dict[str, Statistic]:
    """The mean over batches of the gradient by each of the parameters; nothing else is differentiated."""
    leaves, _ = named_leaves(params)
    step, count = gradient_step(fn, paths), 0
    # Sums are where their parameters are.
    total = {p: jnp.zeros(leaves[p].shape, device=getattr(leaves[p], "sharding", None)) for p in paths}
    for batches in rounds:
        for batch in batches:
            total, count = step(total, *split((params, batch))), count + 1
    return {path: Gradient(value / count, jnp.float32(count)) for path, value in total.items()}


def gradient_step(fn: Callable[..., Any], paths: Sequence[str]) -> Callable[..., Any]:
    """A compiled function that adds the gradient of a batch to a sum, in place."""

    def loss(chosen: dict[str, Any], params: Any, batch: tuple[Any, ...]) -> Any:
        leaves, treedef = named_leaves(params)
        value = fn(rebuild(treedef, {path: chosen.get(path, dense_of(leaf)) for path, leaf in leaves.items()}), *batch)
        if jnp.shape(value) != () or not jnp.issubdtype(promoted(value), jnp.floating):
            raise ParameterError(
                f"The function returns {jax.tree.map(jnp.shape, value)}, and a gradient is that of a scalar loss: "
                "capture a function of (params, *batch) that returns one"
            )
        return value

    @partial(jax.jit, static_argnames="rest", donate_argnames="total")
    def step(total: dict[str, Any], arrays: list[Any], rest: tuple[Any, ...]) -> dict[str, Any]:
        params, batch = joined(arrays, rest)
        leaves, _ = named_leaves(params)
        found = jax.grad(loss)({path: dense_of(leaves[path]) for path in paths}, params, batch)
        return {path: total[path] + grad.astype(jnp.float32) for path, grad in found.items()}

    return step


def open_batches(
    batches: Iterable[Any], passes: int, title: str | bool
) -> tuple[tuple[Any, ...], Iterator[Iterator[tuple[Any, ...]]]]:
    """The first batch, and for every pass an iterator over all of them.

    Args:
      batches: the caller's batches.
      passes: how often to go through them.
      title: of a progress bar; False for none.
    """
    stream = iter(batches)
    if passes < 1 or (passes > 1 and stream is batches):
        raise ConfigError(f"passes={passes} needs a collection of batches, such as a list, and at least one pass")
    first = next(stream, None)
    if first is None:
        raise ConfigError("batches is empty: give at least one tuple of arguments")
    total = len(batches) if isinstance(batches, Sized) else None

    def rounds() -> Iterator[Iterator[tuple[Any, ...]]]:
        for number in range(passes):
            source = iter(batches) if number else chain([first], stream)
            yield map(_arguments, _with_bar(source, str(title), total) if title else source)

    return _arguments(first), rounds()


def _with_bar(source: Iterator[Any], title: str, total: int | None) -> Iterable[Any]:
    from rich.progress import track  # Not needed before there is a bar.

    return track(source, description=title, total=total)


def _arguments(batch: Any) -> tuple[Any, ...]:
    return batch if isinstance(batch, tuple) else (batch,)


def split(tree: Any) -> tuple[list[Any], tuple[Any, ...]]:
    """The arrays of a tree, and the rest of it as a hashable value, for `jax.jit`; `joined` is the inverse."""
    leaves, treedef = jax.tree.flatten(tree)
    return [leaf for leaf in leaves if is_array(leaf)], (
        treedef,
        *(None if is_array(leaf) else leaf for leaf in leaves),
    )


def joined(arrays: list[Any], rest: tuple[Any, ...]) -> Any:
    """The tree that was `split`."""
    given, (treedef, *others) = iter(arrays), rest
    return jax.tree.unflatten(treedef, [next(given) if leaf is None else leaf for leaf in others])
