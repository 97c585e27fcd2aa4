"""Preconditioning: the gradient of one factor is divided by the Gram matrix of the other, `rank × rank`.

A step of the factors moves `W + s·AB`, and how far depends on how large the other factor is. Dividing by its Gram
matrix takes that away. Both transformations here need the values of the factors, and of leaves that a mask hides, such
as a frozen A or the scale: `lora_jax.optimizer` keeps the whole tree for them.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.scipy.linalg import cho_solve

from lora_jax.adapter.factors import over, widened
from lora_jax.adapter.updates import is_update, map_updates
from lora_jax.config.checks import positive
from lora_jax.engine.meshes import explicit
from lora_jax.errors import ParameterError
from lora_jax.optim.frozen import check_factors, has_factors, is_masked, map_trained, unmasked

OTHER = {"a": "b", "b": "a"}


def riemannian(reg: float = 1e-2) -> optax.GradientTransformationExtraArgs:
    """Riemannian preconditioning: steps that do not depend on how `A·B` is split into its factors.

    With `a` as `[rank, in]` and `b` as `[rank, out]`, for every layer and expert of a stack on its own,

        gA <- (b·bᵀ + reg·I)⁻¹ · gA        gB <- (a·aᵀ + reg·I)⁻¹ · gB

    It goes *before* the base optimizer (scaled gradient descent with `optax.sgd`, scaled AdamW with `optax.adamw`) and
    keeps no state. The solves are in float32 and give finite descent directions for factors of any rank; the
    result has the dtype of the gradient. A factor that does not train is left alone and still preconditions the other.

    Differs from PEFT, which preconditions linear layers whose factors both train; here convolutions, look-up tables and
    experts too. Magnitudes and parameters trained in full are left alone in both.

    Args:
      reg: what is added to the diagonal, positive. While `b` is zero, `gA` is multiplied by `1 / reg`.

    Returns:
      An optax transformation for gradients of adapters and of trees that hold some; `update` needs `params`.

    Raises:
      ConfigError: `reg` is not a positive number.
      ParameterError: in `update`, without `params`, for a tree without factors, or where a mask hides a factor.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lora_jax as lora
      >>> params = {"w": jnp.ones((4, 3))}
      >>> sites = lora.find_sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 4)))
      >>> adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets="w"), params, sites)
      >>> tx = lora.optimizer(optax.chain(lora.optim.riemannian(reg=0.01), optax.sgd(1.0)), adapter)
      >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, adapter), tx.init(adapter), adapter)
      >>> round(float(updates["w"].a[0, 0]))  # b is zero: 1 / reg
      -100

    References:
      Zhang and Pilanci, Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models, arXiv 2402.02347.
    """
    damping = positive("reg", reg)

    def divided(gradient: Any, update: Any) -> Any:
        def by_the_other(field: str, leaf: Any) -> Any:
            if field not in OTHER:
                return leaf
            other = _visible("riemannian", update, OTHER[field])
            return divide(leaf, other, damping, len(update.site.batch_axes)).astype(leaf.dtype)

        return map_trained(by_the_other, gradient)

    return _per_update("riemannian", divided)


def lora_fa(tx: optax.GradientTransformation, *, eps: float = 1e-8) -> optax.GradientTransformationExtraArgs:
    """LoRA-FA: hold A, and train B by the gradient that moves the weight closest to its own full gradient.

    With `a` as `[rank, in]`, `b` as `[rank, out]` and scale `s`, for every layer and expert of a stack on its own,

        gB <- (1/s²) · (a·aᵀ + eps·I)⁻¹ · gB        A stays

    and `tx` gets the result. A has no optimizer state, and when the step is compiled as a whole, its gradient and
    what was kept of the forward pass for it are not computed. The solves are in float32; the result has the
    dtype of the gradient. A site of scale 0, which B cannot change, gets a gradient of zero.

    Whatever else trains is trained by `tx` as it is: parameters in full, magnitudes, and both factors of a look-up
    table or of an update whose B is frozen, as there A is what must learn.

    Differs from PEFT, which brings an AdamW of its own, rounds the product to bfloat16 where it can, and never
    trains a look-up table, as the A that it holds there is zero.

    Args:
      tx: the optimizer of B and of what else trains.
      eps: what is added to the diagonal, positive.

    Returns:
      An optax transformation for gradients of adapters and of trees that hold some; `update` needs `params`.

    Raises:
      ConfigError: `eps` is not a positive number.
      ParameterError: in `update`, without `params`, for a tree without factors, or where a mask hides A or the scale.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lora_jax as lora
      >>> params = {"w": jnp.ones((4, 3))}
      >>> sites = lora.find_sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 4)))
      >>> adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets="w"), params, sites)
      >>> tx = lora.optimizer(lora.optim.lora_fa(optax.adam(0.1)), adapter)
      >>> state = tx.init(adapter)
      >>> sum(leaf.size for leaf in jax.tree.leaves(state))  # a count, and two moments of b alone
      13
      >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, adapter), state, adapter)
      >>> float(abs(updates["w"].a).max()), bool((updates["w"].b != 0).all())
      (0.0, True)

    References:
      Zhang et al., LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning,
      arXiv 2308.03303.
    """
    damping = positive("eps", eps)

    def corrected(gradient: Any, update: Any) -> Any:
        if not _holds_a(update) or is_masked(gradient.b):
            return gradient
        a, scale = (_visible("lora_fa", update, field) for field in ("a", "scale"))
        unscale = over(_reciprocal(scale), gradient.b)
        # Once before and once after: the gradient is proportional to the scale, whose square may underflow.
        b = divide(widened(gradient.b) * unscale, a, damping, len(update.site.batch_axes)) * unscale
        return replace(gradient, b=b.astype(gradient.b.dtype))

    held = optax.partition({"trains": tx, "held": optax.set_to_zero()}, _held)
    return optax.chain(_per_update("lora_fa", corrected), held)


def _holds_a(update: Any) -> bool:
    return has_factors(update) and update.trains().b and update.site.kind != "embedding"


def _held(tree: Any) -> Any:
    def labels(update: Any) -> Any:
        held = "a" if _holds_a(update) else None
        return map_trained(lambda field, leaf: "held" if field == held else "trains", update, lambda leaf: "held")

    return map_updates(labels, tree, other=lambda leaf: "held")


def _per_update(name: str, fn: Callable[[Any, Any], Any]) -> optax.GradientTransformationExtraArgs:
    """Change each gradient of an update that has factors by `fn(gradient, update)`."""

    def changed(gradient: Any, update: Any) -> Any:
        return fn(gradient, update) if has_factors(gradient) else gradient

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        check_factors(name, updates)
        values = unmasked(params)
        if values is None:
            raise ParameterError(
                f"{name} reads the values of the factors: call tx.update(gradients, state, params), where params is "
                "the adapter or the tree that holds it."
            )
        return jax.tree.map(changed, updates, values, is_leaf=lambda node: is_update(node) or is_masked(node)), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _visible(name: str, update: Any, field: str) -> jax.Array:
    leaf = getattr(update, field)
    if is_masked(leaf):
        raise ParameterError(
            f"{name} needs {field!r} of {update.site.path!r}, but an optax mask hides it. Put {name} outside of that "
            "mask, or mask with lora_jax.optimizer, which hands the whole tree through."
        )
    return leaf


def _reciprocal(scale: jax.Array) -> jax.Array:
    """`1/s`, and 0 for a scale of 0 or one too small to have a finite reciprocal."""
    usable = abs(scale) >= jnp.finfo(scale.dtype).tiny
    return jnp.where(usable, 1 / jnp.where(usable, scale, 1), 0)


def divide(gradient: jax.Array, factor: jax.Array, damping: float, stacked: int) -> jax.Array:
    """Apply `(f·fᵀ + damping·I)⁻¹` to a gradient along the rank axis, for each entry of the stacked axes.

    Args:
      gradient: `[*batch, rank, *any]`.
      factor: `[*batch, rank, *other]`.
      damping: what is added to the diagonal, positive.
      stacked: the number of axes in `*batch`.

    Returns:
      An array shaped and placed as `gradient`, in float32 (or wider).

    Example:
      >>> print(divide(jnp.ones((2, 3)), 2 * jnp.eye(2), damping=4.0, stacked=0).round(3))
      [[0.125 0.125 0.125]
       [0.125 0.125 0.125]]
    """
    where = explicit(gradient)
    solve: Any = partial(_divided, damping=damping, stacked=stacked)
    if where is not None:  # How the small products and solves are spread over the mesh is left to the compiler.
        solve = jax.sharding.auto_axes(out_sharding=where)(solve)
    return solve(gradient, factor)


def _divided(gradient: jax.Array, factor: jax.Array, damping: float, stacked: int) -> jax.Array:
    gradient, factor = widened(gradient), widened(factor)
    batch, rank, column = list(range(stacked)), stacked, max(gradient.ndim, factor.ndim)
    summed, kept = (list(range(stacked + 1, array.ndim)) for array in (factor, gradient))
    exact = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    gram = exact(factor, [*batch, rank, *summed], factor, [*batch, column, *summed], [*batch, rank, column])
    inverse = _inverse(gram, damping)
    return exact(inverse, [*batch, rank, column], gradient, [*batch, column, *kept], [*batch, rank, *kept])


def _inverse(gram: jax.Array, damping: float) -> jax.Array:
    """The damped inverse of positive semi-definite matrices `[*batch, rank, rank]`."""
    rank, diagonal = gram.shape[-1], jnp.diagonal(gram, axis1=-2, axis2=-1)
    identity = jnp.broadcast_to(jnp.eye(rank, dtype=gram.dtype), gram.shape)
    noise = 16 * rank * jnp.finfo(gram.dtype).eps * diagonal
    exact = jnp.linalg.cholesky(gram + damping * identity)
    floored = jnp.linalg.cholesky(gram + jnp.maximum(damping, noise)[..., None] * identity)
    # Rounding makes a singular matrix slightly indefinite, or leaves a pivot that is nothing but rounding.
    sound = (jnp.diagonal(exact, axis1=-2, axis2=-1) ** 2 > noise).all(-1)[..., None, None]
    return cho_solve((jnp.where(sound, exact, floored), True), identity)
