"""The shared table: every model, under every transformation, must be equal to its merged model."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    TOLERANCE,
    assert_close,
    assert_gradients_close,
    assert_same,
    cast_floats,
    differ,
    merged_model,
)

import lora_jax as lora
from table import CASES, Case
from table.registry import roles

Call = Callable[[Any, Any, Any], Any]
"""A model as a function of base, adapter and inputs, all of them floating-point arrays."""

quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""Compiles faster than `jax.jit`, which `test_jit` uses, so that optimised programs are compared too."""


def rows(*conditions: Callable[[Case], Any]) -> Any:
    """Parametrize a test over the rows that meet the conditions."""
    chosen = [case for case in CASES if all(condition(case) for condition in conditions)]
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case.id)


def full(case: Case) -> bool:
    """Whether a row differs from others in more than its geometry."""
    return not case.variant


def model(case: Case) -> bool:
    """Whether a row is not a variant of another model, or of the same one with LoRA."""
    return case.method == "lora" or not case.variant


def floats(tree: Any) -> tuple[list[jax.Array], Callable[[Any], Any]]:
    """The floating-point arrays of a tree, and a function that puts others in their places."""
    leaves, treedef = jax.tree.flatten(tree)
    here = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)]

    def rebuild(values: Any) -> Any:
        given = dict(zip(here, values, strict=True))
        return jax.tree.unflatten(treedef, [given.get(i, leaf) for i, leaf in enumerate(leaves)])

    return [leaves[i] for i in here], rebuild


def arrays(tree: Any) -> list[jax.Array]:
    """The arrays of a result that may hold other things."""
    return [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]


def call_of(case: Case, fn: Callable[..., Any], **options: Any) -> Call:
    """`fn(params, adapter, *args)` as a function of floating-point arrays: of the base, the adapter, and the inputs."""
    _, base = floats(case.model.params)
    _, inputs = floats(case.model.args)
    return lambda b, adapter, x: arrays(fn(base(b), adapter, *inputs(x), **options))


def adapted(case: Case, strategy: Any = "auto", **options: Any) -> Call:
    """The adapted model of a case."""
    return call_of(case, lora.adapt(case.model.fn, strategy=strategy), **options)


def loss(call: Call) -> Call:
    """A scalar that depends on every output, on each in another way; and the outputs."""

    def total(*args: Any) -> Any:
        outputs = call(*args)
        return sum(map(weighed, outputs)), outputs

    return total


def weighed(out: jax.Array) -> Any:
    """A scalar that depends on every element in another way."""
    if not jnp.issubdtype(out.dtype, jnp.floating):
        return 0.0
    return jnp.vdot(out.astype(jnp.float32), jnp.cos(jnp.arange(1.0, out.size + 1)).reshape(out.shape))


class Given(NamedTuple):
    """What a call takes, with other values in each lane."""

    base: Any
    adapter: lora.Adapter
    inputs: Any


def given(case: Case, adapter_lane: int = 0, input_lane: int = 0) -> Given:
    """Values for a call."""
    lanes = np.float32([1, 1.5])
    adapter = jax.tree.map(lambda leaf: np.asarray(leaf) * lanes[adapter_lane], case.adapter)
    inputs = [np.asarray(leaf) * lanes[input_lane] for leaf in floats(case.model.args)[0]]
    return Given(floats(case.model.params)[0], adapter, inputs)


def stack(one: Any, other: Any) -> Any:
    """Two trees in one."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), one, other)


class Reference:
    """The merged model of a case: outputs, and gradients with respect to base, adapter and inputs."""

    def __init__(self, case: Case):
        self.case, self.results = case, {}
        call = call_of(case, merged_model(case.model.fn))
        gradient = jax.value_and_grad(loss(call), argnums=(0, 1, 2), has_aux=True)
        self.run = quick_jit(gradient if case.reverse else lambda *args: ((0, call(*args)), None))

    def __call__(self, adapter_lane: int = 0, input_lane: int = 0) -> tuple[Any, Any]:
        lanes = (adapter_lane, input_lane)
        if lanes not in self.results:
            (_, outputs), gradients = self.run(*given(self.case, *lanes))
            self.results[lanes] = (outputs, gradients)
        return self.results[lanes]

    @property
    def outputs(self) -> Any:
        """Outputs for the first lane."""
        return self()[0]


reference = cache(Reference)


@rows(lambda case: case.reverse)
def test_gradient(case):
    call = jax.value_and_grad(loss(adapted(case)), argnums=(0, 1, 2), has_aux=True)
    (_, outputs), gradients = quick_jit(call)(*given(case))
    assert_close(outputs, reference(case).outputs)
    assert_gradients_close(gradients, reference(case)()[1])
    assert not any(np.asarray(leaf).any() for leaf in gradients[0]), "the base received a gradient"


@rows(lambda case: case.method == "lora")
def test_sites(case):
    assert {path: roles(site) for path, site in case.found.items()} == case.sites
    values, rebuild = floats(case.model)
    fn, params, args = rebuild([jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in values])
    assert dict(lora.find_sites(fn, params, *args)) == dict(case.found)


@rows(model)
def test_routes(case):
    fn, params, args = case.model
    explained = lora.explain(fn, params, case.adapter, *args)
    assert {use.path for use in explained.materialised} == set(case.materialised)
    assert all(use.reason for use in explained.materialised)


@rows(model)
def test_jit(case):
    """One program serves every adapter: trained, swapped, or scaled to nothing."""
    fn, _params, _args = case.model
    traces = []

    def counted(*args: Any) -> Any:
        traces.append(1)
        return fn(*args)

    base, adapter, inputs = given(case)
    run = jax.jit(call_of(case, lora.adapt(counted)))
    assert_close(run(base, adapter, inputs), reference(case).outputs)
    assert_close(run(*given(case, adapter_lane=1)), reference(case)(adapter_lane=1)[0])
    plain = jax.jit(call_of(case, lambda params, *args: fn(params, *args[1:])))(base, adapter, inputs)
    assert_close(run(base, lora.scale(adapter, 0.0), inputs), plain)
    # JAX 0.12 itself traces a function twice where there is a pallas_call in it.
    assert len(traces) == 1 or "pallas" in case.name, "a swapped adapter or another scale was traced again"


# These three use what Flax and JAX themselves do not evaluate without compiling.
@rows(lambda case: not case.id.startswith(("nnx-scan", "plain-ragged_experts")))
def test_identity_at_the_start(case):
    """Bit for bit, operation by operation: XLA may fuse and sum two compiled programs in different orders."""
    params, args = case.model.params, case.model.args
    narrow = case.but(params=cast_floats(params, jnp.bfloat16), args=cast_floats(args, jnp.bfloat16))
    for each in (case, narrow) if full(case) else (case,):
        base, inputs = floats(each.model.params)[0], floats(each.model.args)[0]
        with jax.disable_jit():
            run = adapted(each, "factored")
            plain = call_of(each, lambda params, *args: case.model.fn(params, *args[1:]))(base, None, inputs)
            for start in each.starts:
                assert_same(run(base, start, inputs), plain)


@rows(full)
def test_eager(case):
    fn, params, args = case.model
    outputs = lora.adapt(fn)(params, given(case).adapter, *args)
    assert_close(arrays(outputs), reference(case).outputs)
    others = [
        [leaf for leaf in jax.tree.leaves(tree) if not isinstance(leaf, jax.Array)]
        for tree in (outputs, fn(params, *args))
    ]
    assert others[0] == others[1]


@rows(full, lambda case: case.reverse)
def test_remat(case):
    call = jax.grad(loss(jax.checkpoint(adapted(case, "factored"))), argnums=(1, 2), has_aux=True)
    assert_gradients_close(quick_jit(call)(*given(case))[0], reference(case)()[1][1:])


# JAX has no forward mode for a custom_vjp.
@rows(full, lambda case: case.reverse and "custom_vjp" not in case.name)
def test_forward_mode(case):
    primals = tuple(given(case))
    tangents = jax.tree.map(np.cos, primals)
    change = quick_jit(lambda *args: jax.jvp(loss(adapted(case)), args, tangents, has_aux=True)[1])(*primals)
    pairs = zip(jax.tree.leaves(reference(case)()[1]), jax.tree.leaves(tangents), strict=True)
    products = np.concatenate([np.ravel(np.asarray(g) * t) for g, t in pairs])
    error = abs(change - products.sum())
    assert error <= TOLERANCE["float32"] * np.abs(products).sum()


# JAX does not batch ragged_dot over its weights.
@rows(full, lambda case: "ragged" not in case.name)
def test_vmap(case):
    call = jax.vmap(adapted(case), in_axes=(None, 0, 0))
    outputs = quick_jit(call)(given(case).base, *stack(given(case)[1:], given(case, 1, 1)[1:]))
    assert_close(outputs, stack(reference(case)()[0], reference(case)(1, 1)[0]))


@rows(full, lambda case: case.reverse)
def test_joined(case):
    """Factors appended to the operands: value, gradients, and the products of tangents with both."""
    call = jax.value_and_grad(loss(adapted(case, "joined")), argnums=(1, 2), has_aux=True)
    (_, outputs), gradients = quick_jit(call)(*given(case))
    assert_close(outputs, reference(case).outputs)
    assert_gradients_close(gradients, reference(case)()[1][1:])


@rows(full)
def test_scan(case):
    base, adapter, inputs = given(case)
    step = lambda b, adapter, x: (None, adapted(case, "factored")(b, adapter, x))  # noqa: E731
    loop = quick_jit(lambda b, adapter, xs: jax.lax.scan(lambda _, x: step(b, adapter, x), None, xs, length=2)[1])
    outputs = loop(base, adapter, stack(inputs, given(case, 0, 1).inputs))
    assert_close(outputs, stack(reference(case)()[0], reference(case)(0, 1)[0]))


# A derivative taken inside the program loses too many digits in bfloat16 to be compared, and a loop may end elsewhere.
@rows(full, lambda case: case.name not in ("gradient_inside", "loops_that_end_apart"))
def test_bfloat16_base_under_a_float32_adapter(case):
    fn, params, args = case.model
    narrow = case.but(params=cast_floats(params, jnp.bfloat16), args=cast_floats(args, jnp.bfloat16))
    base, adapter, inputs = floats(narrow.model.params)[0], case.adapter, floats(narrow.model.args)[0]
    outputs = quick_jit(adapted(narrow))(base, adapter, inputs)
    # The same model on the same numbers without any rounding: a merged one would round its weights.
    exact = quick_jit(call_of(narrow, merged_model(fn)))(*cast_floats((base, adapter, inputs), jnp.float32))
    assert_close(cast_floats(outputs, jnp.float32), cast_floats(exact, jnp.float32), jnp.bfloat16)
    plain = arrays(fn(narrow.model.params, *narrow.model.args))
    assert [out.dtype for out in outputs] == [out.dtype for out in plain]


@rows(full, lambda case: case.drops)
def test_dropout(case):
    base, adapter, inputs = jax.tree.map(jnp.asarray, given(case))
    # None where it would do nothing, of which the engine warns.
    rates = {path: 0.0 if path in case.materialised else 0.5 for path in adapter}
    dropping = lora.Adapter({path: replace(update, dropout=rates[path]) for path, update in adapter.items()})
    program = lambda adapter, key: str(jax.make_jaxpr(adapted(case, lora_key=key))(base, adapter, inputs))  # noqa: E731
    assert program(dropping, None) == program(adapter, None) == program(adapter, jax.random.key(0))
    run = lambda key: adapted(case, lora_key=key)(base, dropping, inputs)  # noqa: E731
    first, again, other = (quick_jit(run)(jax.random.key(seed)) for seed in (0, 0, 1))
    assert_same(first, again)
    assert differ(first, other)
    assert differ(first, reference(case).outputs)
    if case.affine:
        samples = quick_jit(partial(jax.lax.map, run))(jax.random.split(jax.random.key(2), 400))
        for sample, expected in zip(map(np.asarray, samples), reference(case).outputs, strict=True):
            assert (np.abs(sample.mean(0) - expected) <= 5 * sample.std(0) / 20 + 1e-5).all()
