"""Learning rates by role and by site: PEFT's groups, lengths of single steps, strict patterns."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, assert_same
from optim_cases import full, low_rank, mixed, noise, run

import lora_jax as lora
from lora_jax.adapter.adapter import Adapter, leaves_by_name
from lora_jax.errors import ConfigError, MatchError, ParameterError

GROUPS = {
    "dense/kernel": {"a": "a", "b": "b", "scale": "frozen"},
    "heads/w": {"a": "a", "b": "b", "scale": "frozen"},
    "conv/kernel": {"a": "a", "b": "b", "scale": "frozen"},
    "scan/w": {"a": "a", "b": "b", "scale": "frozen"},
    "moe/w": {"a": "a", "b": "b", "scale": "frozen"},
    "table/embedding": {"a": "embedding", "b": "embedding", "scale": "frozen"},
    "dora/kernel": {
        "a": "a",
        "b": "b",
        "scale": "frozen",
        "magnitude": "b",
        "base_squares": "frozen",
        "strength": "frozen",
    },
    "half/kernel": {"a": "frozen", "b": "b", "scale": "frozen"},
    "head/kernel": {"value": "a"},
    "head/bias": {"value": "b"},
    "scan/bias": {"value": "b"},
    "norm/scale": {"value": "b"},
    "tokens/embedding": {"value": "a"},
}
RATES = {"a": 1.0, "b": 8.0, "embedding": 0.25, "frozen": 0.0}


def named(adapter: Any) -> dict[str, dict[str, Any]]:
    return {path: dict(leaves_by_name(update)) for path, update in adapter.items()}


def expected_rates(gradients: Any) -> Any:
    """The gradients times the rate of each leaf's group, from the table above."""
    entries, treedef = jax.tree_util.tree_flatten_with_path(gradients)
    # The checksum of what is frozen is frozen itself.
    groups = ["frozen" if len(keys) == 1 else GROUPS[keys[0].key][keys[1].name] for keys, _ in entries]
    scaled = [leaf * RATES[group] for group, (_, leaf) in zip(groups, entries, strict=True)]
    return jax.tree.unflatten(treedef, scaled)


def test_labels() -> None:
    assert named(lora.optim.lora_plus_labels(mixed())) == GROUPS
    tree = {"params": {"w": jnp.ones(3)}, "lora": jax.eval_shape(mixed)}
    labels = lora.optim.lora_plus_labels(tree)
    assert labels["params"] == {"w": "frozen"}
    assert named(labels["lora"]) == GROUPS
    assert jax.tree.structure(labels) == jax.tree.structure(tree)


def test_matrix_outside_any_product_is_no_vector() -> None:
    labels: Any = lora.optim.lora_plus_labels(Adapter({"pos": full("pos", 7, 4), "a/biased": full("a/biased", 7, 4)}))
    assert named(labels) == {"pos": {"value": "a"}, "a/biased": {"value": "a"}}


@pytest.mark.parametrize(
    ("combined", "jit"),
    [(False, False), (False, True), (True, True)],
    ids=["adapter-eager", "adapter-jit", "combined-jit"],
)
def test_lora_plus_scales_by_group(combined: bool, jit: bool) -> None:
    adapter = mixed()
    gradients = noise(adapter)
    base = {"w": jnp.ones((6, 5), jnp.bfloat16), "ids": jnp.arange(3)}
    tree, grads = ({"p": base, "l": adapter}, {"p": base, "l": gradients}) if combined else (adapter, gradients)
    tx = lora.optimizer(lora.optim.lora_plus(8.0, embedding=0.25), tree)
    result = (jax.jit(tx.update) if jit else tx.update)(grads, tx.init(tree), tree)[0]
    assert_same(result["l"] if combined else result, jax.jit(expected_rates)(gradients))
    assert jax.tree.leaves(tx.init(tree)) == []


def test_bare_it_leaves_alone_what_does_not_train() -> None:
    tree = {"params": {"w": jnp.ones(3)}, "lora": mixed()}
    gradients = noise(tree)
    result = run(lora.optim.lora_plus(), gradients, tree)
    assert_same(result["params"], gradients["params"])
    assert_same(result["lora"]["dense/kernel"].scale, gradients["lora"]["dense/kernel"].scale)
    assert_same(result["lora"]["half/kernel"].a, gradients["lora"]["half/kernel"].a)


def test_one_step_of_adamw_is_that_of_parameter_groups() -> None:
    """AdamW with PEFT's four groups, written out: the decay of a group is multiplied with its rate."""
    adapter, rate, decay = mixed(), 1e-2, 0.1
    gradients = noise(adapter)
    base = optax.adamw(rate, weight_decay=decay)
    tx = lora.optimizer(optax.chain(base, lora.optim.lora_plus(8.0, embedding=0.25)), adapter)
    new = optax.apply_updates(adapter, run(tx, gradients, adapter))

    def stepped(p: Any, g: Any, group: str) -> Any:
        p, g, rates = np.asarray(p, np.float64), np.asarray(g, np.float64), RATES[group] * rate
        return (p * (1 - rates * decay) - rates * g / (np.abs(g) + 1e-8)).astype(np.float32)

    for path, fields in GROUPS.items():
        for field, group in fields.items():
            start, gradient, end = (getattr(tree[path], field) for tree in (adapter, gradients, new))
            assert_close(end, stepped(start, gradient, group))


def test_partition_by_label_is_the_same_as_factors() -> None:
    adapter = mixed()
    groups = {name: optax.adam(1e-2 * RATES[name]) for name in ("a", "b", "embedding")}
    parted = lora.optimizer(optax.partition(groups, lora.optim.lora_plus_labels), adapter)
    scaled = lora.optimizer(optax.chain(optax.adam(1e-2), lora.optim.lora_plus(8.0, embedding=0.25)), adapter)
    gradients = noise(adapter)
    assert_close(run(parted, gradients, adapter), run(scaled, gradients, adapter))
    bare = optax.partition({**groups, "frozen": optax.set_to_zero()}, lora.optim.lora_plus_labels)
    assert_close(run(bare, gradients, adapter), run(scaled, gradients, adapter))
    trained = sum(leaf.size for leaf in jax.tree.leaves(scaled.init(adapter)))
    counters = 2  # three groups count steps for themselves
    assert sum(leaf.size for leaf in jax.tree.leaves(bare.init(adapter))) == trained + counters


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_steps_keep_their_dtype(dtype: str) -> None:
    adapter = jax.tree.map(lambda leaf: leaf.astype(dtype), low_rank())
    injected = optax.inject_hyperparams(lora.optim.lora_plus, hyperparam_dtype=jnp.float32)(ratio=2.0, embedding=1.0)
    for tx in (lora.optim.lora_plus(jnp.float32(3.0)), lora.optim.rate_pattern({".*": 0.3}), injected):
        assert {leaf.dtype for leaf in jax.tree.leaves(run(tx, noise(adapter), adapter))} == {jnp.dtype(dtype)}


def test_ratio_can_be_injected_and_changed_without_compiling() -> None:
    adapter = low_rank()
    tx = lora.optimizer(optax.inject_hyperparams(lora.optim.lora_plus)(ratio=2.0, embedding=1.0), adapter)
    gradients, state = noise(adapter), tx.init(adapter)
    step = jax.jit(tx.update)
    for ratio in (2.0, 5.0):
        optax.tree.get(state, "hyperparams")["ratio"] = jnp.float32(ratio)
        result: Any = step(gradients, state, adapter)[0]
        assert_same(result["dense/kernel"].b, gradients["dense/kernel"].b * jnp.float32(ratio))
        assert_same(result["dense/kernel"].a, gradients["dense/kernel"].a)
    assert step._cache_size() == 1


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan"), "16", None, True])
def test_ratio_is_positive(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"ratio=.* must be a positive number"):
        lora.optim.lora_plus(value)
    with pytest.raises(ConfigError, match=r"embedding=.* must be a positive number"):
        lora.optim.lora_plus(embedding=value)


def test_lora_plus_without_factors_is_refused() -> None:
    whole = Adapter({"head/bias": full("head/bias", 5)})
    with pytest.raises(ParameterError, match="lora_plus finds no low-rank factors in a tree of type Adapter"):
        run(lora.optim.lora_plus(), whole, whole)
    with pytest.raises(ParameterError, match="in a tree of type dict"):
        run(lora.optim.lora_plus(), {"w": jnp.ones(3)}, {"w": jnp.ones(3)})


HALVED = dict.fromkeys(["dense/kernel", "conv/kernel", "half/kernel", "head/kernel"], 0.5)
PATTERNS: list[tuple[Any, dict[str, float]]] = [
    ({"dense": 0.5}, {"dense/kernel": 0.5}),
    ({"dense/kernel": 0.5, "head.bias": 3.0}, {"dense/kernel": 0.5, "head/bias": 3.0}),
    ([("dora", 2.0), (".*/kernel", 0.5)], {"dora/kernel": 2.0, **HALVED}),
    ({"scan": 4}, {"scan/w": 4.0, "scan/bias": 4.0}),
]


@pytest.mark.parametrize(("patterns", "rates"), PATTERNS, ids=str)
def test_rate_pattern(patterns: Any, rates: dict[str, float]) -> None:
    adapter = mixed()
    gradients = noise(adapter)
    tx = lora.optimizer(lora.optim.rate_pattern(patterns), adapter)
    result: Any = run(tx, gradients, adapter)
    plain: Any = run(lora.optimizer(optax.identity(), adapter), gradients, adapter)
    for path in adapter:
        desired = jax.tree.map(lambda leaf, path=path: np.asarray(leaf) * np.float32(rates.get(path, 1.0)), plain[path])
        assert_same(result[path], desired)


def test_rate_pattern_on_a_combined_tree_of_two_adapters() -> None:
    tree = {"params": {"dense": {"kernel": jnp.ones(3)}}, "one": low_rank(), "two": mixed()}
    gradients: Any = noise(tree)
    result: Any = run(lora.optim.rate_pattern({"dense": 0.5, "norm": 2.0}), gradients, tree)
    assert_same(result["params"], gradients["params"])
    for name in ("one", "two"):
        assert_same(result[name]["dense/kernel"].b, 0.5 * gradients[name]["dense/kernel"].b)
        assert_same(result[name]["dense/kernel"].scale, gradients[name]["dense/kernel"].scale)
    assert_same(result["two"]["norm/scale"].value, 2 * gradients["two"]["norm/scale"].value)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"dens": 0.5}, r"rate_pattern: 'dens' matches none of the 6 adapted parameters\. Nearest: dense/kernel"),
        ({"dense": 0.5, "ense": 1.0}, "'ense' matches none"),
        ([(".*", 0.5), ("dense", 0.1)], "'dense' never applies: earlier keys match all it does. Put it before them"),
    ],
)
def test_unused_pattern_is_refused(patterns: Any, message: str) -> None:
    adapter = low_rank()
    tx = lora.optimizer(lora.optim.rate_pattern(patterns), adapter)
    with pytest.raises(MatchError, match=message):
        tx.update(adapter, tx.init(adapter), adapter)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"(": 0.5}, "rate_pattern: '.' is not a regular expression"),
        ({"dense": 0}, r"rate_pattern\['dense'\]=0 must be a positive number"),
        ({"dense": "fast"}, "must be a positive number"),
        (3, "must map regexes to numbers"),
    ],
)
def test_bad_pattern_is_refused(patterns: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lora.optim.rate_pattern(patterns)


def test_everything_together_follows_a_schedule() -> None:
    """Preconditioned, by role and by site, under a schedule and a clip: each step is the product of its rates."""
    adapter = low_rank()
    schedule: Callable[[Any], Any] = optax.linear_schedule(1.0, 0.0, 4)
    tx = lora.optimizer(
        optax.chain(
            lora.optim.riemannian(),
            optax.sgd(schedule),
            lora.optim.lora_plus(8.0),
            lora.optim.rate_pattern({"dense": 0.5}),
        ),
        adapter,
    )
    gradients, state = noise(adapter), tx.init(adapter)
    divided: Any = run(lora.optim.riemannian(), gradients, adapter)
    for count in range(4):
        updates, state = jax.jit(tx.update)(gradients, state, adapter)
        assert_close(updates["dense/kernel"].b, -4.0 * (1 - count / 4) * divided["dense/kernel"].b)
        assert_close(updates["scan/w"].a, -(1 - count / 4) * divided["scan/w"].a)
