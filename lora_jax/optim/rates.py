"""Learning rates by role (LoRA+) and by site: steps that differ in length, not in direction."""

from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import optax

from lora_jax.adapter.factors import is_traced
from lora_jax.adapter.updates import map_updates
from lora_jax.config import checks
from lora_jax.config.checks import Patterns
from lora_jax.config.selection import check_patterns
from lora_jax.optim.frozen import check_factors, has_factors, map_trained, updates_in
from lora_jax.paths import lookup

Group: TypeAlias = Literal["a", "b", "embedding", "frozen"]
"""A group of LoRA+, as `lora_plus_labels` names it."""


def lora_plus_labels(tree: Any) -> Any:
    """Label every leaf with its LoRA+ group, for `optax.partition`.

    The groups are PEFT's:

    - `"embedding"`: both factors of a look-up table;
    - `"b"`: every other B; magnitudes and whatever else an update trains beside its factors; parameters trained in
      full that have one axis or are called `bias` (stacked layers and heads give a bias more axes);
    - `"a"`: every other A, and every other parameter that trains in full or by rows;
    - `"frozen"`: what does not train, the base in a combined tree included.

    Leaves hidden by an optax mask get no label. So inside `lora_jax.optimizer` nothing is `"frozen"`.

    Args:
      tree: an `Adapter`, or any tree that contains some; also one of gradients or shapes.

    Returns:
      A tree of the same structure, with labels for leaves.

    Example:
      A base optimizer of its own for every group, where a factor (`lora_plus`) is not enough:

      >>> import jax, jax.numpy as jnp, optax, lora_jax as lora
      >>> params = {"w": jnp.ones((4, 3))}
      >>> sites = lora.find_sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 4)))
      >>> adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets="w"), params, sites)
      >>> jax.tree.leaves(lora.optim.lora_plus_labels(adapter))  # a, b, the scale, and the checksum of what is frozen
      ['a', 'b', 'frozen', 'frozen']
      >>> groups = {"a": optax.adam(1e-3), "b": optax.sgd(0.1), "embedding": optax.adam(1e-6)}
      >>> tx = lora.optimizer(optax.partition(groups, lora.optim.lora_plus_labels), adapter)
      >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, adapter), tx.init(adapter), adapter)
      >>> round(float(updates["w"].a[0, 0]), 6), round(float(updates["w"].b[0, 0]), 6)
      (-0.001, -0.1)

    References:
      Hayou et al., LoRA+: Efficient Low Rank Adaptation of Large Models, arXiv 2402.12354.
    """

    def labels(update: Any) -> Any:
        return map_trained(lambda field, leaf: _group(update, field, leaf), update, other=lambda leaf: "frozen")

    return map_updates(labels, tree, other=lambda leaf: "frozen")


def _group(update: Any, field: str, leaf: Any) -> Group:
    if not has_factors(update):
        vector = len(leaf.shape) == 1 or update.site.path.rpartition("/")[2] == "bias"
        return "b" if vector else "a"
    if field in ("a", "b") and update.site.kind == "embedding":
        return "embedding"
    return "a" if field == "a" else "b"


def lora_plus(ratio: Any = 16.0, *, embedding: Any = 1.0) -> optax.GradientTransformation:
    """LoRA+: let B learn `ratio` times as fast as A.

    Multiplies the steps of the groups `"b"` and `"embedding"` of `lora_plus_labels`; so it goes *after* the base
    optimizer (before one that normalises gradients, as Adam does, it would do nothing). Schedules and decoupled weight
    decay are those of the base optimizer and are multiplied too, as in PyTorch's parameter groups. It keeps no state.

    Differs from PEFT in that `embedding` is a factor of the learning rate, where `loraplus_lr_embedding` is a
    rate, 1e-6 by default: `embedding=1e-6 / learning_rate` does the same. PEFT leaves biases out of weight decay; here
    that is for the base optimizer to say, as in `optax.adamw(..., mask=...)`.

    Args:
      ratio: what to multiply the steps of B with; the paper recommends 16 with a learning rate for A somewhat smaller
        than is usual for LoRA. A positive number, or a scalar array, so that `optax.inject_hyperparams` can hold it.
      embedding: what to multiply the steps of both factors of look-up tables with; likewise.

    Returns:
      An optax transformation for adapters and for trees that hold some. What does not train is left as it is.

    Raises:
      ConfigError: `ratio` or `embedding` is not a positive number.
      ParameterError: in `update`, the tree holds no low-rank factors.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lora_jax as lora
      >>> params = {"w": jnp.ones((4, 3))}
      >>> sites = lora.find_sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 4)))
      >>> adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets="w"), params, sites)
      >>> tx = lora.optimizer(optax.chain(optax.adam(1e-3), lora.optim.lora_plus(ratio=16)), adapter)
      >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, adapter), tx.init(adapter), adapter)
      >>> round(float(updates["w"].a[0, 0]), 6), round(float(updates["w"].b[0, 0]), 6)
      (-0.001, -0.016)

    References:
      Hayou et al., LoRA+: Efficient Low Rank Adaptation of Large Models, arXiv 2402.12354.
    """
    factors = {"b": _positive("ratio", ratio), "embedding": _positive("embedding", embedding)}

    def scaled(updates: Any, params: Any) -> Any:
        check_factors("lora_plus", updates)
        return jax.tree.map(
            lambda group, leaf: _times(leaf, factors[group]) if group in factors else leaf,
            lora_plus_labels(updates),
            updates,
        )

    return optax.stateless(scaled)


def rate_pattern(patterns: Patterns) -> optax.GradientTransformation:
    """Learning rates by site: multiply the steps of every site by the factor of the first pattern that matches it.

    Patterns match as those of `rank_pattern` do: a regex from a component boundary to the end of the name of
    the module or the parameter, the first in order decides, and a site without a match keeps its rate. It goes *after*
    the base optimizer and keeps no state. All that trains at a site is multiplied: factors, magnitudes, and
    parameters trained in full.

    Differs from PEFT, which has no such thing: there it takes parameter groups written by hand.

    Args:
      patterns: factors by regex, as a mapping or as pairs; positive numbers.

    Returns:
      An optax transformation for adapters and for trees that hold some.

    Raises:
      ConfigError: a key is not a regex, or a factor not a positive number.
      MatchError: in `update`, a pattern applies to nothing; the message names the nearest paths.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lora_jax as lora
      >>> params = {"layers_0": {"w": jnp.ones((4, 4))}, "layers_1": {"w": jnp.ones((4, 4))}}
      >>> fn = lambda p, x: x @ p["layers_0"]["w"] @ p["layers_1"]["w"]
      >>> sites = lora.find_sites(fn, params, jnp.ones((2, 4)))
      >>> adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets=("w",)), params, sites)
      >>> tx = lora.optimizer(optax.chain(optax.sgd(0.1), lora.optim.rate_pattern({"layers_0/w": 0.5})), adapter)
      >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, adapter), tx.init(adapter), adapter)
      >>> [round(float(update.b[0, 0]), 6) for update in updates.values()]
      [-0.05, -0.1]
    """
    rates = checks.patterns("rate_pattern", patterns, checks.positive)

    def scaled(updates: Any, params: Any) -> Any:
        check_patterns("rate_pattern", rates, [update.site.path for update in updates_in(updates)])
        return map_updates(at_its_rate, updates, other=lambda leaf: leaf)

    def at_its_rate(update: Any) -> Any:
        found = lookup(rates, update.site.path)
        return map_trained(lambda field, leaf: _times(leaf, found[1]), update) if found else update

    return optax.stateless(scaled)


def _positive(name: str, value: Any) -> Any:
    """The value checked, if it has one: inside `jit`, `optax.inject_hyperparams` gives tracers."""
    return value if is_traced(value) else checks.positive(name, value)


def _times(leaf: Any, factor: Any) -> jax.Array:
    """The product in the dtype of the leaf, which an array for a factor would otherwise widen."""
    return leaf * jnp.asarray(factor, leaf.dtype)
