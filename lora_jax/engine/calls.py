"""Call: one call of the user's function, traced to a program of its parameters alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from lora_jax.engine import jaxprs
from lora_jax.engine.jaxprs import Program
from lora_jax.paths import is_array, named_leaves, rebuild


@dataclass(frozen=True)
class Call:
    """A traced call.

    Attributes:
      arrays: the parameters that are arrays, by path, in the order of the program's inputs.
      given: abstract arguments, which follow the parameters among the program's inputs.
      program: the program; everything else the call closes over is a constant of it.
      result: rebuilds the function's result from the program's outputs.
    """

    arrays: Mapping[str, Any]
    given: list[jax.ShapeDtypeStruct]
    program: Program
    result: Callable[[list[Any]], Any]


def trace_call(fn: Callable[..., Any], params: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Trace `fn(params, *args, **kwargs)`; arguments and results may be anything, arrays or not."""
    leaves, treedef = named_leaves(params)
    arrays = {path: leaf for path, leaf in leaves.items() if is_array(leaf)}
    inputs, structure = jax.tree.flatten((args, kwargs))
    given = [leaf for leaf in inputs if isinstance(leaf, jax.ShapeDtypeStruct)]
    outputs: list[Any] = []

    def run(values: list[Any], abstract: list[Any]) -> list[Any]:
        known, rest = dict(zip(arrays, values, strict=True)), iter(abstract)
        full = rebuild(treedef, {path: known.get(path, leaf) for path, leaf in leaves.items()})
        call = (args, kwargs)
        if given:
            filled = [next(rest) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf for leaf in inputs]
            call = jax.tree.unflatten(structure, filled)
        results, shape = jax.tree.flatten(fn(full, *call[0], **call[1]))
        # Strings, numbers and the like go to the caller as they are.
        outputs[:] = [shape, [None if isinstance(leaf, jax.Array) else leaf for leaf in results]]
        return [leaf for leaf in results if isinstance(leaf, jax.Array)]

    program, _ = jaxprs.trace(run, list(arrays.values()), given)

    def result(values: list[Any]) -> Any:
        shape, leaves = outputs
        rest = iter(values)
        return jax.tree.unflatten(shape, [next(rest) if leaf is None else leaf for leaf in leaves])

    return Call(arrays, given, program, result)
