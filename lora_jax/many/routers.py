"""Routers: adapters chosen by the inputs of every product, for `lora_jax.route`."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any
from zlib import crc32

import jax
import jax.numpy as jnp

from lora_jax.adapter.adapter import Adapter
from lora_jax.adapter.by_path import adapter_list
from lora_jax.adapter.factors import Array, is_traced, times, whole, widened
from lora_jax.adapter.site import Site
from lora_jax.adapter.updates import LowRank, Update, pytree
from lora_jax.compose.factors import decomposed, significant
from lora_jax.engine.routing.router import Router as Router
from lora_jax.errors import ConfigError, ParameterError
from lora_jax.many.bank import AdapterBank, common_sites
from lora_jax.many.slots import Slots, factors, grown
from lora_jax.svd import Triplets

__all__ = ["Arrow", "Learned", "Router", "Strongest", "arrow", "components", "learned"]


@pytree("top_k")
@dataclass(frozen=True)
class Arrow(Router):
    """The router that `arrow` makes: a softmax over the adapters whose prototypes are nearest, whatever the sign.

    Attributes:
      keys: by path, `[*batch, slots - 1, *in]`: prototypes, of length one; zero where a slot changes nothing.
      temperature: what similarities are divided by.
      top_k: how many adapters a row meets.

    Example:
      >>> router = Arrow({}, temperature=jnp.float32(1), top_k=2)
      >>> router.weights(jnp.float32([[-1, 0.5, 1], [0, 0, 3]])).tolist()
      [[0.5, 0.0, 0.5], [0.0, 0.0, 1.0]]
    """

    keys: Mapping[str, Array]
    temperature: Array
    top_k: int

    def weights(self, scores: Array) -> Array:
        """A softmax over the largest absolute scores; adapters with a score of zero take no part."""
        similar = jnp.abs(scores)
        return _softmax(similar, _largest(similar, self.top_k) & (similar > 0), self.temperature)


def arrow(
    bank: AdapterBank | Adapter | Sequence[Adapter], *, top_k: int = 3, temperature: float | Array = 1.0
) -> Arrow:
    """A router for adapters that were trained apart, without any training of its own.

    The prototype of an adapter at a parameter is the input that its update lengthens most: the first right singular
    vector, computed exactly from the factors. Every row meets the adapters whose prototypes are most similar to it,
    `|x · prototype|`, with a softmax over these similarities. Slots that hold nothing for a parameter take no part in
    it, so that ranks and targets may differ; PEFT asks for equal ones, and finds prototypes by power iteration. Of DoRA
    the gains play no part in it.

    Args:
      bank: the adapters, or a bank of them. Make the router anew when they change; nothing is compiled for that.
      top_k: how many adapters a row meets; all, if there are fewer.
      temperature: what similarities are divided by.

    Raises:
      ConfigError: `top_k` or `temperature` is not positive, or not a number.

    Example:
      >>> import jax, lora_jax as lora
      >>> params, x = {"w": jnp.ones((4, 3))}, jnp.eye(4)[:2]
      >>> fn = lambda params, x: x @ params["w"]
      >>> sites = lora.find_sites(fn, params, x)
      >>> config = lora.LoraConfig(rank=2, targets="w", init="gaussian")
      >>> def trained(seed):  # as if it were
      ...     adapter = lora.init(jax.random.key(seed), config, params, sites)
      ...     return jax.tree.map(lambda leaf: leaf + 0.1, adapter)
      >>> bank = lora.AdapterBank.of([trained(seed) for seed in range(4)])
      >>> router = lora.routers.arrow(bank, top_k=2)
      >>> router.keys["w"].shape, lora.route(fn)(params, bank, router, x).shape
      ((4, 4), (2, 3))

    References:
      Ostapenko et al., arXiv 2405.11157.
    """
    sizes = jnp.finfo(jnp.float32)
    if not is_traced(temperature) and not float(sizes.tiny) <= float(temperature) <= float(sizes.max):
        raise ConfigError(f"temperature={temperature!r} must be positive, and a float32")
    given = jnp.asarray(temperature, jnp.float32)
    keys = {path: jax.lax.stop_gradient(_prototypes(held)) for path, held in _held(bank).items()}
    return Arrow(keys, given, _count(top_k))


@pytree("top_k")
@dataclass(frozen=True)
class Learned(Router):
    """The router that `learned` makes: a softmax over products with trainable keys.

    Attributes:
      keys: by path, `[*batch, slots - 1, *in]`.
      top_k: how many adapters a row meets; None for all.

    Example:
      >>> Learned({}, top_k=1).weights(jnp.float32([-3, 1, 2])).tolist()
      [0.0, 0.0, 1.0]
    """

    keys: Mapping[str, Array]
    top_k: int | None

    def weights(self, scores: Array) -> Array:
        """A softmax over the largest scores."""
        top_k = scores.shape[-1] if self.top_k is None else self.top_k
        return _softmax(scores, _largest(scores, top_k))


def learned(key: Array, bank: AdapterBank | Adapter | Sequence[Adapter], *, top_k: int | None = None) -> Learned:
    """A small router to be trained: at every parameter, one vector for each adapter.

    It is a pytree of these vectors. Differentiate a loss in it, and hand it to any optax optimizer; the adapters may
    train beside it or stay as they are. At first all adapters count nearly the same.

    Args:
      key: for the vectors, normal with a standard deviation of `0.1 / √fan_in`.
      bank: the adapters, or a bank of them. Only shapes are used: an empty slot, and one that leaves a parameter as it
        is, gets a share too, and stands for the base there. So give adapters, or a bank without empty slots.
      top_k: how many adapters a row meets, the others getting neither weight nor gradient; None for all. Its softmax
        is over those chosen, so that with `top_k=1` there is nothing to learn from.

    Raises:
      ConfigError: `top_k` is less than 2, or there is one adapter only.

    Example:
      >>> import jax, lora_jax as lora
      >>> params, x = {"w": jnp.ones((4, 3))}, jnp.eye(4)[:2]
      >>> fn = lambda params, x: x @ params["w"]
      >>> sites = lora.find_sites(fn, params, x)
      >>> adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets="w"), params, sites)
      >>> bank = lora.AdapterBank.of([jax.tree.map(lambda leaf: leaf + i, adapter) for i in (0.1, 0.2, -0.3)])
      >>> router = lora.routers.learned(jax.random.key(1), bank)
      >>> loss = lambda router: lora.route(fn)(params, bank, router, x).mean()
      >>> jax.grad(loss)(router).keys["w"].shape
      (3, 4)

    References:
      Buehler and Buehler, X-LoRA, arXiv 2402.07148. Wu et al., MoLE, arXiv 2404.13628.
    """
    held, count = _held(bank), None if top_k is None else _count(top_k)
    if count == 1 or held.slots <= 2:
        raise ConfigError(
            f"top_k={top_k!r} of {held.slots - 1} adapters: a softmax over one has no gradient; give 2 or more, or None"
        )
    return Learned({path: _drawn(key, path, each) for path, each in held.items()}, count)


@pytree("top_k")
@dataclass(frozen=True)
class Strongest(Router):
    """The router that `components` makes: those that answer an input most strongly, each in full.

    Attributes:
      keys: by path, `[*batch, slots - 1, *in]`: what gives the size of a component's answer.
      top_k: how many of them a row meets.

    Example:
      >>> Strongest({}, top_k=2).weights(jnp.float32([-3, 1, 2])).tolist()
      [1.0, 0.0, 1.0]
    """

    keys: Mapping[str, Array]
    top_k: int

    def weights(self, scores: Array) -> Array:
        """One for the largest absolute scores, zero for the others and for those that are zero."""
        return (_largest(jnp.abs(scores), self.top_k) & (scores != 0)).astype(scores.dtype)


def components(adapters: Adapter | Sequence[Adapter], *, top_k: int | None = None) -> tuple[AdapterBank, Strongest]:
    """Fuse adapters anew for every token: of all their rank-one terms those that answer its input most strongly.

    Every adapter is rewritten as `Σ_i d_i · u_i ⊗ v_i` (as by `lora_jax.canonical`), and every term gets a slot of its
    own. For an input `x` the terms with the largest `|d_i · v_iᵀx|` take part, unchanged; shapes do not depend on which
    these are. `lora_jax.compose(method="rank_one")` chooses once for all inputs instead.

    Args:
      adapters: of any ranks and targets; `lora_jax.scale` weighs them.
      top_k: how many terms an input meets at every parameter; half of all terms (of the parameter that has most) by
        default.

    Returns:
      A bank of the terms and its router, for `lora_jax.route`.

    Raises:
      ConfigError: `top_k` is not positive, or there is no adapter.
      ParameterError: an adapter holds something that is no low-rank change.

    Example:
      >>> import jax, lora_jax as lora
      >>> params, x = {"w": jnp.ones((4, 3))}, jnp.eye(4)[:2]
      >>> fn = lambda params, x: x @ params["w"]
      >>> sites = lora.find_sites(fn, params, x)
      >>> adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets="w"), params, sites)
      >>> first, second = (jax.tree.map(lambda leaf: leaf + i, adapter) for i in (0.1, -0.3))
      >>> bank, router = lora.routers.components([first, second], top_k=4)  # all of them
      >>> both = lora.adapt(fn)(params, (first, second), x)
      >>> bool(jnp.allclose(lora.route(fn)(params, bank, router, x), both, atol=1e-5))
      True
    """
    given = adapter_list(adapters)
    if not given:
        raise ConfigError("components needs at least one adapter")
    sites = common_sites(given)
    found = {path: _terms(path, [each[path] for each in given if path in each]) for path in sites}
    most = max((terms.values.shape[-1] for terms in found.values()), default=0)
    top_k = max(most // 2, 1) if top_k is None else _count(top_k)
    found = {path: _filled(terms, len(sites[path].batch_axes), most) for path, terms in found.items()}
    keys = {path: times(terms.values, terms.left) for path, terms in found.items()}
    return AdapterBank({path: _slots(sites[path], terms) for path, terms in found.items()}), Strongest(keys, top_k)


def _count(top_k: Any) -> int:
    """How many are chosen, as a number that is known while a program is traced."""
    try:
        count = operator.index(top_k)
    except TypeError:
        count = 0
    if count < 1:
        raise ConfigError(f"top_k={top_k!r} must be a positive integer")
    return count


def _held(bank: AdapterBank | Adapter | Sequence[Adapter]) -> AdapterBank:
    return bank if isinstance(bank, AdapterBank) else AdapterBank.of(adapter_list(bank))


def _largest(scores: Array, count: int) -> Array:
    """Which scores are the largest; of equal ones the first."""
    count = min(count, scores.shape[-1])
    least = jax.lax.top_k(scores, count)[0][..., -1:]
    above, equal = scores > least, scores == least
    left = count - jnp.sum(above, axis=-1, keepdims=True)
    return above | (equal & (jnp.cumsum(equal, axis=-1) <= left))


def _softmax(scores: Array, among: Array, temperature: Array | float = 1.0) -> Array:
    """Weights that add up to one over those among which is chosen; zeros where there are none."""
    powers = jnp.where(among, jnp.exp((scores - jnp.max(scores, axis=-1, keepdims=True)) / temperature), 0)
    total = jnp.sum(powers, axis=-1, keepdims=True)
    return powers / jnp.where(total > 0, total, 1)


def _prototypes(held: Slots) -> Array:
    """The first right singular vector of every slot, in the layout of its A; zeros if it holds nothing."""
    stack = prod(held.site.batch_shape) * (held.count - 1)
    a, b = (whole(widened(each)).reshape(stack, held.rank, -1) for each in (held.a, held.b))
    found = _significant(a, b)
    return jnp.where(found.values[:, :1] > 0, found.left[:, 0], 0).reshape(held.keys_shape)


_significant = jax.jit(jax.vmap(significant))


def _drawn(key: Array, path: str, held: Slots) -> Array:
    own = jax.random.fold_in(key, crc32(path.encode()))
    return 0.1 / held.site.fan_in**0.5 * jax.random.normal(own, held.keys_shape)


def _terms(path: str, updates: Sequence[Update]) -> Triplets:
    """The singular triplets of several updates of one parameter, side by side: `[*batch, terms, ...]`."""
    found = []
    for update in updates:
        if update.waits:
            raise ParameterError(f"{path!r} has {update.waits}, so its terms cannot act on every token")
        plain = factors(path, update)
        if plain.gain is not None:
            raise ParameterError(f"{path} has a gain, which is in no rank-one term: leave it out of the adapters")
        one = jnp.ones(update.site.batch_shape, jnp.float32)
        found.append(decomposed(LowRank(plain.a, plain.b, one, update.site)))
    lead = len(updates[0].site.batch_axes)
    return Triplets(*(jnp.concatenate(each, lead) for each in zip(*found, strict=True)))


def _filled(found: Triplets, lead: int, count: int) -> Triplets:
    """The triplets with zeros up to a number of terms."""
    return Triplets(*(grown(each, (*each.shape[:lead], count, *each.shape[lead + 1 :])) for each in found))


def _slots(site: Site, found: Triplets) -> Slots:
    """A slot of rank one for every term."""
    lead = len(site.batch_axes) + 1
    a, b = (jnp.expand_dims(each, lead) for each in (found.left, times(found.values, found.right)))
    return Slots(a, b, None, site)
