"""Tiny random models of transformers, and the same models as other JAX code bases lay them out."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from peft_models import nested
from torch_side import numbers
from transformers import GemmaConfig, GemmaForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

Params = dict[str, Any]
State = Mapping[str, np.ndarray]
LAYERS, WIDTH, HEADS, HEAD = 2, 16, 2, 8


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale.reshape(1, 1, -1)


def layer_norm(x: jax.Array, layer: Params) -> jax.Array:
    centred = x - x.mean(-1, keepdims=True)
    normal = centred * jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + 1e-5)
    return normal * layer["scale"].reshape(1, 1, -1) + layer["bias"].reshape(1, 1, -1)


def rotary(x: jax.Array, neighbours: bool = False) -> jax.Array:
    """Rotate features 0 and 1, 2 and 3 if `neighbours`, else feature i of the first half and i of the second."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] * (10_000.0 ** (-jnp.arange(half) / half))[None]
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    low, high = (x[..., ::2], x[..., 1::2]) if neighbours else (x[..., :half], x[..., half:])
    turned = low * cos - high * sin, high * cos + low * sin
    return jnp.stack(turned, -1).reshape(x.shape) if neighbours else jnp.concatenate(turned, -1)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> jax.Array:
    """Causal attention of `[batch, time, heads, features]`."""
    k, v = (jnp.repeat(each, q.shape[2] // each.shape[2], 2) for each in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * scale
    seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))[None, None]
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)), v)


def gpt2(params: Params, tokens: jax.Array) -> jax.Array:
    """GPT-2 with the names and layout of transformers' Flax class: kernels are `(out, in)`."""
    body = params["transformer"]
    table = body["wte"]["embedding"]
    x = table[tokens] + body["wpe"]["embedding"][jnp.arange(tokens.shape[1])][None]

    def conv(x: jax.Array, layer: Params) -> jax.Array:
        return x @ layer["kernel"].T + layer["bias"].reshape(1, 1, -1)

    for index in range(LAYERS):
        layer = body["h"][str(index)]
        q, k, v = jnp.split(conv(layer_norm(x, layer["ln_1"]), layer["attn"]["c_attn"]), 3, -1)
        q, k, v = (each.reshape(*x.shape[:2], HEADS, HEAD) for each in (q, k, v))
        x = x + conv(attend(q, k, v, HEAD**-0.5).reshape(x.shape), layer["attn"]["c_proj"])
        hidden = jax.nn.gelu(conv(layer_norm(x, layer["ln_2"]), layer["mlp"]["c_fc"]))
        x = x + conv(hidden, layer["mlp"]["c_proj"])
    return layer_norm(x, body["ln_f"]) @ table.T


def gpt2_params(state: State) -> Params:
    flat = {}
    for name, value in state.items():
        module, _, leaf = name.replace(".", "/").rpartition("/")
        if module != "lm_head":
            kind = "embedding" if module.endswith(("wte", "wpe")) else "kernel" if value.ndim == 2 else "scale"
            flat[f"{module}/{leaf if leaf == 'bias' else kind}"] = value.T if kind == "kernel" else value
    return nested(flat)


def gemma(params: Params, tokens: jax.Array) -> jax.Array:
    """Gemma as the gemma package has it: einsum kernels, key and value in one, gate and up in one."""
    table = params["embedder"]["input_embedding"]
    x = table[tokens] * WIDTH**0.5
    for index in range(LAYERS):
        layer = params[f"layer_{index}"]
        y = rms_norm(x, 1 + layer["pre_attention_norm"]["scale"])
        q = jnp.einsum("btd,ndh->btnh", y, layer["attn"]["q_einsum"]["w"])
        k, v = jnp.einsum("bsd,ckdh->cbskh", y, layer["attn"]["kv_einsum"]["w"])
        mixed = attend(rotary(q), rotary(k), v, HEAD**-0.5)
        x = x + jnp.einsum("btnh,nhd->btd", mixed, layer["attn"]["attn_vec_einsum"]["w"])
        y = rms_norm(x, 1 + layer["pre_ffw_norm"]["scale"])
        gate, up = jnp.einsum("btd,cfd->cbtf", y, layer["mlp"]["gating_einsum"])
        x = x + (jax.nn.gelu(gate) * up) @ layer["mlp"]["linear"]
    return rms_norm(x, 1 + params["final_norm"]["scale"]) @ table.T


def gemma_params(state: State) -> Params:
    flat = {
        "embedder/input_embedding": state["model.embed_tokens.weight"],
        "final_norm/scale": state["model.norm.weight"],
    }
    for index in range(LAYERS):
        part = {name: state[f"model.layers.{index}.{name}.weight"] for name in PARTS}
        heads = {name: part[f"self_attn.{name}_proj"].reshape(-1, HEAD, WIDTH).transpose(0, 2, 1) for name in "qkv"}
        layer = {
            "pre_attention_norm/scale": part["input_layernorm"], "pre_ffw_norm/scale": part["post_attention_layernorm"],
            "attn/q_einsum/w": heads["q"], "attn/kv_einsum/w": np.stack([heads["k"], heads["v"]]),
            "attn/attn_vec_einsum/w": part["self_attn.o_proj"].T.reshape(HEADS, HEAD, WIDTH),
            "mlp/gating_einsum": np.stack([part["mlp.gate_proj"], part["mlp.up_proj"]]),
            "mlp/linear": part["mlp.down_proj"].T,
        }  # fmt: skip
        flat |= {f"layer_{index}/{path}": value for path, value in layer.items()}
    return nested(flat)


def maxtext(params: Params, tokens: jax.Array) -> jax.Array:
    """Llama as MaxText has it: layers on axis 1, neighbours rotate, the scale of the attention is in the query."""

    def block(x: jax.Array, layer: Params) -> tuple[jax.Array, None]:
        attention = layer["self_attention"]
        y = rms_norm(x, layer["pre_self_attention_layer_norm"]["scale"])
        q, k, v = (jnp.einsum("btd,dnh->btnh", y, attention[name]["kernel"]) for name in ("query", "key", "value"))
        mixed = attend(rotary(q, neighbours=True), rotary(k, neighbours=True), v, 1.0)
        x = x + jnp.einsum("btnh,nhd->btd", mixed, attention["out"]["kernel"])
        y = rms_norm(x, layer["post_self_attention_layer_norm"]["scale"])
        mlp = {name: layer["mlp"][name]["kernel"] for name in ("wi_0", "wi_1", "wo")}
        return x + (jax.nn.silu(y @ mlp["wi_0"]) * (y @ mlp["wi_1"])) @ mlp["wo"], None

    decoder = params["decoder"]
    layers = jax.tree.map(lambda weight: jnp.moveaxis(weight, 1, 0), decoder["layers"])
    x, _ = jax.lax.scan(block, params["token_embedder"]["embedding"][tokens], layers)
    return rms_norm(x, decoder["decoder_norm"]["scale"]) @ decoder["logits_dense"]["kernel"]


def maxtext_params(state: State) -> Params:
    flat = {
        "token_embedder/embedding": state["model.embed_tokens.weight"],
        "decoder/decoder_norm/scale": state["model.norm.weight"],
        "decoder/logits_dense/kernel": state["lm_head.weight"].T,
    }

    def layer(index: int) -> Params:
        part = {name: state[f"model.layers.{index}.{name}.weight"].T for name in PARTS}
        q, k, v = (part[f"self_attn.{name}_proj"].reshape(WIDTH, -1, HEAD) for name in "qkv")
        q, k = (each.reshape(WIDTH, -1, 2, HEAD // 2).swapaxes(2, 3).reshape(each.shape) for each in (q, k))
        return {
            "pre_self_attention_layer_norm/scale": part["input_layernorm"],
            "post_self_attention_layer_norm/scale": part["post_attention_layernorm"],
            "self_attention/query/kernel": q / np.float32(HEAD**0.5), "self_attention/key/kernel": k,
            "self_attention/value/kernel": v,
            "self_attention/out/kernel": part["self_attn.o_proj"].reshape(-1, HEAD, WIDTH),
            "mlp/wi_0/kernel": part["mlp.gate_proj"], "mlp/wi_1/kernel": part["mlp.up_proj"],
            "mlp/wo/kernel": part["mlp.down_proj"],
        }  # fmt: skip

    layers = [layer(index) for index in range(LAYERS)]
    return nested(flat | {f"decoder/layers/{path}": np.stack([each[path] for each in layers], 1) for path in layers[0]})


PARTS = (
    "input_layernorm", "post_attention_layernorm", *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)  # fmt: skip
SIZES: dict[str, Any] = {
    "vocab_size": 24, "hidden_size": WIDTH, "intermediate_size": 20, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": 1, "head_dim": HEAD, "rms_norm_eps": 1e-6,
    "initializer_range": 0.3, "attn_implementation": "eager",
}  # fmt: skip
GPT2: dict[str, Any] = {
    "vocab_size": 24, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 12,
    "initializer_range": 0.3, "attn_implementation": "eager",
}  # fmt: skip


class Family(NamedTuple):
    """A model on both sides, and the name of the map between them."""

    torch_model: Callable[[], Any]
    fn: Callable[..., jax.Array]
    convert: Callable[[State], Params]
    names: str
    targets: tuple[str, ...]
    embedding: str

    def base(self) -> Any:
        """PyTorch's model; the same at every call."""
        torch.manual_seed(11)
        return self.torch_model().eval()

    def params(self) -> Params:
        """Its parameters in JAX."""
        return self.convert(numbers(self.base().state_dict()))


_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FAMILIES = {
    "GPT-2": Family(lambda: GPT2LMHeadModel(GPT2Config(**GPT2)), gpt2, gpt2_params, "hf_flax_gpt2", ("c_attn", "c_proj", "c_fc"), "wte"),
    "Gemma": Family(lambda: GemmaForCausalLM(GemmaConfig(**SIZES)), gemma, gemma_params, "gemma", _LLAMA, "embed_tokens"),
    "MaxText": Family(lambda: LlamaForCausalLM(LlamaConfig(**SIZES)), maxtext, maxtext_params, "maxtext_llama3.1", _LLAMA, "embed_tokens"),
}  # fmt: skip
