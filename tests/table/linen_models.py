"""Flax linen modules."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from table.registry import Draw, Model, case

linen = partial(case, "linen")


def layer(name: str, module: nn.Module, sites: dict[str, str], *shapes: tuple[int, ...], **facts: Any) -> None:
    """Add a module applied to random arrays (or to integers, given as arrays)."""

    def build(draw: Draw) -> Model:
        args = tuple(draw(*shape) if isinstance(shape, tuple) else shape for shape in shapes)
        return Model(module.apply, draw.fill(jax.eval_shape(module.init, jax.random.key(0), *args)), args)

    linen({f"params/{path}": roles for path, roles in sites.items()}, name, **facts)(build)


affine = partial(layer, affine=True)
affine("dense", nn.Dense(3), {"kernel": "dense io"}, (2, 5, 4))
affine("dense_general", nn.DenseGeneral((2, 3), axis=(-2, -1)), {"kernel": "dense iioo"}, (2, 5, 3, 4))
affine("dense_general_batched", nn.DenseGeneral(3, axis=-1, batch_dims=(0,)), {"kernel": "dense bio"}, (2, 5, 4))
affine("einsum", nn.Einsum((2, 4, 3), "btd,ndh->btnh"), {"kernel": "dense oio"}, (2, 5, 4))
affine("embed", nn.Embed(7, 4), {"embedding": "embedding io"}, jnp.array([[1, 6, 0]]))
layer(
    "attention", nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6),
    {"query/kernel": "dense ioo", "key/kernel": "dense ioo", "value/kernel": "dense ioo", "out/kernel": "dense iio"}, (2, 5, 4), (2, 3, 4),
)  # fmt: skip

for padding in ("SAME", "VALID", "CIRCULAR", "REFLECT", "CAUSAL", 1, [(0, 2)]):
    affine(
        f"conv1d_{str(padding).lower()}",
        nn.Conv(3, (3,), padding=padding),
        {"kernel": "conv iio"},
        (2, 7, 2),
        variant=True,
    )
affine("conv2d_circular", nn.Conv(4, (3, 2), 2, "CIRCULAR", kernel_dilation=2), {"kernel": "conv iiio"}, (2, 5, 6, 2))
affine(
    "conv2d_reflect_grouped",
    nn.Conv(4, (3, 2), feature_group_count=2, padding="REFLECT"),
    {"kernel": "conv iiio"},
    (2, 5, 6, 4),
    variant=True,
)
affine("conv3d", nn.Conv(3, (2, 2, 2), strides=(1, 2, 1)), {"kernel": "conv iiiio"}, (1, 3, 4, 3, 2), variant=True)
affine("conv_without_batch", nn.Conv(3, (3,)), {"kernel": "conv iio"}, (7, 2), variant=True)
affine(
    "conv_input_dilation",
    nn.Conv(3, (3,), padding=1, input_dilation=2),
    {"kernel": "conv iio"},
    (2, 7, 2),
    variant=True,
)
affine("conv_transpose", nn.ConvTranspose(3, (3, 2), (2, 1)), {"kernel": "conv iiio"}, (2, 5, 6, 2))
affine(
    "conv_transpose_kernel",
    nn.ConvTranspose(3, (3,), (2,), "CIRCULAR", transpose_kernel=True),
    {"kernel": "conv ioi"},
    (2, 5, 2),
    variant=True,
)
affine("conv_local", nn.ConvLocal(3, (3,)), {"kernel": "dense bio"}, (2, 7, 2))


class Tied(nn.Module):
    """A language model in four lines: look-up, block, tied output."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(7, 4)
        return embed.attend(embed(tokens) + jnp.tanh(nn.Dense(4)(embed(tokens))))


layer(
    "tied_attend",
    Tied(),
    {"Embed_0/embedding": "embedding io", "Dense_0/kernel": "dense io"},
    jnp.array([[1, 6, 0], [3, 3, 2]]),
)


class TwoOfOneShape(nn.Module):
    """Two parameters of equal shape, and an activation of that shape too."""

    @nn.compact
    def __call__(self, x):
        a, b = (self.param(name, nn.initializers.normal(), (4, 4)) for name in "ab")
        return jnp.tanh(x @ a) @ b @ (x @ x)


layer("two_of_one_shape", TwoOfOneShape(), {"a": "dense io", "b": "dense io"}, (4, 4))


class Setup(nn.Module):
    """Modules made in setup, one of them shared."""

    def setup(self):
        self.shared, self.last = nn.Dense(4), nn.Dense(3, use_bias=False)

    def __call__(self, x):
        return self.last(self.shared(jnp.tanh(self.shared(x))))


layer("setup_and_shared", Setup(), {"shared/kernel": "dense io", "last/kernel": "dense io"}, (2, 4))


class Block(nn.Module):
    """A residual block with attention, to be scanned."""

    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.RMSNorm()(x))
        return x + nn.Dense(4, use_bias=False)(nn.silu(nn.Dense(5)(nn.LayerNorm()(x)))), None


class Stack(nn.Module):
    """Scanned blocks."""

    block: Any = Block
    axis: int = 0

    @nn.compact
    def __call__(self, x):
        return nn.scan(self.block, {"params": self.axis}, split_rngs={"params": True}, length=3)(name="layers")(
            x, None
        )[0]


def block_sites(insert: Any) -> dict[str, str]:
    """What a scanned `Block` holds."""
    attention = {name: "ioo" for name in ("query", "key", "value")} | {"out": "iio"}
    paths = {f"MultiHeadDotProductAttention_0/{name}": roles for name, roles in attention.items()}
    paths |= {"Dense_0": "io", "Dense_1": "io"}
    return {f"layers/{path}/kernel": f"dense {insert(roles)}" for path, roles in paths.items()}


layer("scan", Stack(), block_sites(lambda roles: "b" + roles), (2, 3, 4))
layer("scan_axis_1", Stack(axis=1), block_sites(lambda roles: roles[:1] + "b" + roles[1:]), (2, 3, 4))
layer(
    "scan_of_remat", Stack(block=nn.remat(Block, policy=jax.checkpoint_policies.checkpoint_dots, prevent_cse=False)),
    block_sites(lambda roles: "b" + roles), (2, 3, 4),
)  # fmt: skip
layer("remat", nn.remat(nn.Dense)(3), {"kernel": "dense io"}, (2, 4))
layer("jit", nn.jit(nn.Dense)(3), {"kernel": "dense io"}, (2, 4))
layer(
    "vmapped_experts", nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})(3), {"kernel": "dense bio"}, (2, 5, 4),
)  # fmt: skip
layer("recurrent", nn.RNN(nn.SimpleCell(3)), {"cell/i/kernel": "dense io", "cell/h/kernel": "dense io"}, (2, 5, 4))
layer(
    "mlp_with_batch_norm", nn.Sequential([nn.Dense(5), nn.BatchNorm(use_running_average=True, epsilon=9.0), nn.relu, nn.Dense(3)]),
    {"layers_0/kernel": "dense io", "layers_3/kernel": "dense io"}, (2, 4),
)  # fmt: skip
