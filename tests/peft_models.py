"""JAX counterparts of the models that tests/golden/make.py adapts with PEFT, and their parameters from PyTorch's."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lora
from lora_jax.adapter.site import Site, Sites
from lora_jax.io.names.names import Names, Rule

Params = dict[str, Any]


def affine(x: jax.Array, layer: Params) -> jax.Array:
    out = x @ layer["kernel"]
    return out + layer["bias"].reshape(*(1,) * (out.ndim - 1), -1) if "bias" in layer else out


def net(params: Params, tokens: jax.Array) -> jax.Array:
    x = params["embed"]["embedding"][tokens]
    for index in range(2):
        layer = params[f"layers_{index}"]
        q, v, up = layer["attn"]["q"], layer["attn"]["v"], layer["up"]
        x = x + affine(jnp.tanh(affine(x, q)) * affine(x, v), up)
    return affine(x, params["head"])


def scanned_net(params: Params, tokens: jax.Array) -> jax.Array:
    """The same, with the layers stacked: on axis 0, and for `up` on axis 1 as MaxText has them."""

    def body(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        (q, v), up = (layer["attn"][name] for name in "qv"), layer["up"]
        return x + affine(jnp.tanh(affine(x, q)) * affine(x, v), up), None

    layers = params["layers"]
    up = {"kernel": jnp.moveaxis(layers["up"]["kernel"], 1, 0), "bias": layers["up"]["bias"]}
    x, _ = jax.lax.scan(body, params["embed"]["embedding"][tokens], {"attn": layers["attn"], "up": up})
    return affine(x, params["head"])


def linear(params: Params, x: jax.Array) -> jax.Array:
    return affine(x, params["layer"])


def conv(stride: int = 1, padding: int = 0) -> Callable[..., jax.Array]:
    def run(params: Params, x: jax.Array) -> jax.Array:
        space = "DHW"[-(x.ndim - 2) :]
        kernel, count = params["layer"]["kernel"], x.ndim - 2
        names = (f"NC{space}", f"{space}IO", f"NC{space}")
        out = jax.lax.conv_general_dilated(x, kernel, (stride,) * count, [(padding, padding)] * count, dimension_numbers=names)  # fmt: skip  # noqa: E501
        return out + params["layer"]["bias"].reshape(1, -1, *(1,) * count)

    return run


def experts(params: Params, x: jax.Array) -> jax.Array:
    layer = params["layer"]
    each = jnp.broadcast_to(x, (3, *x.shape))
    gate, value = jnp.split(jnp.einsum("ebi,eio->ebo", each, layer["gate_up_proj"]), 2, axis=-1)
    return jnp.einsum("ebo,eoi->ebi", jnp.tanh(gate) * value, layer["down_proj"]).sum(0)


EXPERTS = Names([("layer/gate_up_proj", "layer.gate_up_proj"), ("layer/down_proj", "layer.down_proj")])
CONV1D = Names(fan_in_fan_out=True)
SCANNED = Names(
    [
        ("embed/embedding", "embed"),
        Rule("layers/attn/{name}/kernel", "layers.{i}.attn.{name}"),
        ("layers/up/kernel", "layers.{i}.up"),
        ("head/kernel", "head"),
    ]
)


def nested(flat: Mapping[str, Any]) -> Params:
    tree: Params = {}
    for path, value in flat.items():
        *parts, leaf = path.split("/")
        node = tree
        for part in parts:
            node = node.setdefault(part, {})
        node[leaf] = jnp.asarray(value)
    return tree


def from_torch(state: Mapping[str, np.ndarray], *, transposed: bool = False) -> Params:
    """The tree with Flax's layout and names for a PyTorch state; independent of what is tested."""
    flat = {}
    for name, value in state.items():
        path = name.replace("layers.0", "layers_0").replace("layers.1", "layers_1").replace(".", "/")
        module, _, leaf = path.rpartition("/")
        if leaf == "bias" or leaf.endswith("_proj"):
            flat[path] = value if leaf == "bias" or transposed else value.transpose(0, 2, 1)
        elif module == "embed":
            flat[f"{module}/embedding"] = value
        elif value.ndim == 2:
            flat[f"{module}/kernel"] = value if transposed else value.T
        else:
            flat[f"{module}/kernel"] = value.transpose(*range(2, value.ndim), 1, 0)
    return nested(flat)


def stacked(params: Params) -> Params:
    """The parameters of `scanned_net` for those of `net`."""
    layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), params["layers_0"], params["layers_1"])
    layers["up"]["kernel"] = jnp.moveaxis(layers["up"]["kernel"], 0, 1)
    return {"embed": params["embed"], "layers": layers, "head": params["head"]}


class Case(NamedTuple):
    """How a golden case runs in JAX."""

    fn: Callable[..., jax.Array]
    names: Names | None = None
    transposed: bool = False


CASES = {
    **{
        name: Case(net)
        for name in (
            "linear",
            "embedding",
            "patterns",
            "rslora",
            "saved",
            "bias_lora_only",
            "bias_all",
            "dora",
            "lora_bias",
            "tokens",
            "adalora",
            "adalora_pruned",
            "vera",
            "vera_bias",
            "trainable_tokens",
            "ln_tuning",
        )
    },
    "conv1d_hf": Case(linear, CONV1D, transposed=True),
    "adalora_conv1d_hf": Case(linear, CONV1D, transposed=True),
    "vera_conv1d_hf": Case(linear, CONV1D, transposed=True),
    "adalora_conv2": Case(conv()),
    "conv1": Case(conv(stride=2, padding=1)),
    "conv2": Case(conv()),
    "conv3": Case(conv()),
    "dora_conv2": Case(conv()),
    "dora_conv1d_hf": Case(linear, CONV1D, transposed=True),
    "experts": Case(experts, EXPERTS),
    "experts_transposed": Case(experts, EXPERTS, transposed=True),
}


def draw(*shape: int) -> jax.Array:
    """Different numbers everywhere, so that no transposition goes unnoticed."""
    return jax.device_put(np.float32(np.random.default_rng(len(shape)).normal(size=shape)))


class Model(NamedTuple):
    """A model to save and load adapters of."""

    fn: Callable[..., jax.Array]
    params: Params
    x: jax.Array
    names: Names | None = None

    @property
    def sites(self) -> Sites:
        return lora.find_sites(self.fn, self.params, self.x)


def replaced(model: Model, *paths: str) -> lora.Adapter:
    leaves = {path: leaf for path, leaf in flat(model.params).items() if path in paths}
    full = lambda path, leaf: Site(path=path, shape=leaf.shape, dtype="float32", kind="full")  # noqa: E731
    return lora.Adapter(
        {path: lora.Replace(leaf + 1, model.sites.get(path) or full(path, leaf)) for path, leaf in leaves.items()}
    )


def flat(tree: Params, above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, node in tree.items():
        found |= flat(node, f"{above}{name}/") if isinstance(node, dict) else {above + name: node}
    return found


def net_params() -> Params:
    """Parameters of `net`, different everywhere."""
    flat: dict[str, Any] = {"embed/embedding": draw(11, 5), "head/kernel": draw(5, 4), "head/bias": draw(4)}
    for index in range(2):
        for name, shape in {"attn/q": (5, 7), "attn/v": (5, 7), "up": (7, 5)}.items():
            flat[f"layers_{index}/{name}/kernel"] = draw(*shape) + index
            flat[f"layers_{index}/{name}/bias"] = draw(shape[1]) - index
    return nested(flat)
