"""Adapters for the tests of optimizers: every shape of factors, and kinds of updates that only look like LowRank."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers import random_adapter

from lora_jax.adapter.adapter import Adapter
from lora_jax.adapter.site import Site
from lora_jax.adapter.updates import LowRank, Replace, pytree
from lora_jax.methods import Dora, Rows

SITES = [
    Site(path="dense/kernel", shape=(6, 5), dtype="float32", kind="dense", in_axes=(0,), out_axes=(1,)),
    Site(path="heads/w", shape=(6, 2, 4), dtype="float32", kind="dense", in_axes=(0,), out_axes=(1, 2)),
    Site(path="conv/kernel", shape=(3, 2, 4, 7), dtype="float32", kind="conv", in_axes=(0, 1, 2), out_axes=(3,)),
    Site(path="scan/w", shape=(4, 3, 5), dtype="float32", kind="dense", in_axes=(0,), out_axes=(2,), batch_axes=(1,)),
    Site(path="moe/w", shape=(2, 3, 4, 6), dtype="int8", kind="ragged", in_axes=(3,), out_axes=(2,), batch_axes=(0, 1)),
    Site(path="table/embedding", shape=(11, 4), dtype="float32", kind="embedding", in_axes=(0,), out_axes=(1,)),
]  # fmt: skip


@pytree("site", "dropout", "frozen")
@dataclass(frozen=True)
class Half(LowRank):
    """Factors of which one does not train."""

    frozen: str = "a"

    def trains(self) -> "Half":
        return replace(super().trains(), a=self.frozen != "a", b=self.frozen != "b")


def full(path: str, *shape: int, like: Site | None = None) -> Replace:
    site = like or Site(path=path, shape=shape, dtype="float32", kind="full")
    value = np.random.default_rng(len(path)).normal(size=site.shape)
    return Replace(jax.device_put(np.float32(value)), replace(site, path=path))


def low_rank(seed: int = 0, rank: int = 2) -> Adapter:
    return random_adapter(SITES, seed, rank)


def mixed(seed: int = 0) -> Adapter:
    """Low-rank factors of every shape beside every other kind of update."""
    factors = low_rank(seed)
    one = factors["dense/kernel"]
    assert isinstance(one, LowRank)
    fields = {"a": one.a, "b": one.b, "scale": one.scale, "site": one.site}
    table = replace(SITES[-1], path="tokens/embedding")
    return Adapter({
        **factors,
        "dora/kernel": Dora.around(replace(one, site=replace(one.site, path="dora/kernel")), jnp.ones((6, 5))),
        "half/kernel": Half(**fields | {"site": replace(one.site, path="half/kernel")}),
        "head/kernel": full("head/kernel", like=SITES[0]),
        "head/bias": full("head/bias", 5),
        "scan/bias": full("scan/bias", 3, 5),
        "norm/scale": full("norm/scale", 5),
        "tokens/embedding": Rows(jnp.ones((2, 4)), table, (3, 5)),
    })  # fmt: skip


def noise(tree: Any, seed: int = 1) -> Any:
    """Gradients for a tree: random numbers in the dtype of each leaf."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jax.device_put(np.asarray(draw.normal(size=leaf.shape), leaf.dtype)), tree)


@partial(jax.jit, static_argnums=0)
def run(tx: optax.GradientTransformation, gradients: Any, tree: Any) -> Any:
    """The first updates of an optimizer."""
    return tx.update(gradients, tx.init(tree), tree)[0]
