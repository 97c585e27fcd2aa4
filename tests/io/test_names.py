"""Names and layouts: every rule is checked on numbers, against PyTorch's weight written out by hand."""

from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from helpers import assert_close, random_adapter
from peft_models import nested

import lora_jax as lora
from lora_jax.adapter.site import Kind, Site, Sites
from lora_jax.io.names.known import find_names
from lora_jax.io.peft import KNOWN, Module, Names, PeftFiles, Rule, read_peft, write_peft

Weights = dict[str, np.ndarray]


def site(path: str, shape: tuple[int, ...], roles: str, kind: Kind = "dense") -> Site:
    """A site from one letter per axis: `i` for in, `o` for out, `b` for stacked."""
    into, out, batch = (tuple(axis for axis, role in enumerate(roles) if role == letter) for letter in "iob")
    return Site(path=path, shape=shape, dtype="float32", kind=kind, in_axes=into, out_axes=out, batch_axes=batch)


class Row(NamedTuple):
    """A parameter under a map, and PyTorch's weights `(out, in)` (tables `(vocabulary, features)`) for its value."""

    names: Names | str | None
    site: Site
    torch: Callable[[np.ndarray], Weights]


def one(name: str, rows: int) -> Callable[[np.ndarray], Weights]:
    """A kernel that has its `rows` inputs first."""
    return lambda w: {name: w.reshape(rows, -1).T}


def halves(w: np.ndarray, size: int) -> np.ndarray:
    """Rows of PyTorch's weight whose heads rotate neighbours, put in the order in which PyTorch's rotate halves."""
    order = [*range(0, size, 2), *range(1, size, 2)]
    return np.concatenate([w[start : start + size][order] for start in range(0, len(w), size)])


LLAMA = "model.layers.{}.self_attn.{}_proj"
BERT = "bert.encoder.layer.1.attention.self.query"
QKV = ("q", "k", "v")
DEEPSEEK = lora.peft.maxtext_names({"decoder_block": "deepseek", "first_num_dense_layers": 2})


def to_huggingface(kernel: np.ndarray, scaled: bool = False, adjust_rope: bool = False) -> np.ndarray:
    """A kernel `[in, heads, width]` as MaxText's checkpoint conversion writes it, hook by hook."""
    if scaled:  # scale_query_layer
        kernel = kernel * np.sqrt(kernel.shape[-1])
    if adjust_rope:
        kernel = np.concatenate((kernel[..., ::2], kernel[..., 1::2]), axis=kernel.ndim - 1)
    return kernel.reshape(len(kernel), -1).transpose()  # reshape_kernel


ROWS = {
    "identity": Row(None, site("params/layers_1/attn_2/query/kernel", (6, 2, 4), "ioo"), one("layers.1.attn.2.query", 6)),
    "identity keeps inner numbers": Row(None, site("fc_1_in/kernel", (6, 4), "io"), one("fc_1_in", 6)),
    "heads in": Row(None, site("out/kernel", (2, 4, 6), "iio"), one("out", 8)),
    "PyTorch's layout": Row(None, site("layers/0/weight", (4, 6), "oi"), lambda w: {"layers.0": w}),
    "input in the middle": Row(None, site("q/w", (2, 6, 4), "oio"), lambda w: {"q": w.transpose(0, 2, 1).reshape(8, 6)}),
    "table": Row(None, site("wte/embedding", (9, 4), "io", "embedding"), lambda w: {"wte": w}),
    "unstacked on axis 0": Row(
        Names([("layers/{name}/kernel", "h.{i}.{name}")]), site("params/layers/q/kernel", (3, 6, 4), "bio"),
        lambda w: {f"h.{i}.q": w[i].T for i in range(3)},
    ),
    "unstacked on axis 1": Row(
        Names([("layers/q/kernel", "h.{i}.q")]), site("layers/q/kernel", (6, 3, 2, 4), "iboo"),
        lambda w: {f"h.{i}.q": w[:, i].reshape(6, 8).T for i in range(3)},
    ),
    "unstacked twice": Row(
        Names([("layers/q/kernel", "h.{i}.{j}.q")]), site("layers/q/kernel", (2, 3, 6, 4), "bbio"),
        lambda w: {f"h.{i}.{j}.q": w[i, j].T for i in range(2) for j in range(3)},
    ),
    "unstacked in a numbered block": Row(
        Names([("block_{i}/q/kernel", "h.{i}.{j}.q")]), site("block_7/q/kernel", (2, 6, 4), "bio"),
        lambda w: {f"h.7.{j}.q": w[j].T for j in range(2)},
    ),
    "fused": Row(
        Names([("gate_up/kernel", ("gate", "up"))]), site("gate_up/kernel", (6, 8), "io"),
        lambda w: {"gate": w[:, :4].T, "up": w[:, 4:].T},
    ),
    "fused in unequal shares": Row(
        Names([Rule("qkv/kernel", QKV, shares=(4, 1, 1))]), site("qkv/kernel", (6, 6, 2), "ioo"),
        lambda w: {"q": w[:, :4].reshape(6, 8).T, "k": w[:, 4].T, "v": w[:, 5].T},
    ),
    "fused on the second output axis": Row(
        Names([Rule("qkv/kernel", QKV, axis=1)]), site("qkv/kernel", (6, 2, 3, 4), "iooo"),
        lambda w: {name: w[:, :, n].reshape(6, 8).T for n, name in enumerate(QKV)},
    ),
    "fused and stacked": Row(
        Names([("h/qkv/kernel", tuple(f"h.{{i}}.{name}" for name in QKV))]), site("h/qkv/kernel", (6, 2, 9), "ibo"),
        lambda w: {f"h.{i}.{name}": w[:, i, 3 * n : 3 * n + 3].T for n, name in enumerate(QKV) for i in range(2)},
    ),
    "rotary": Row(
        Names([Rule("q/kernel", "q_proj", rotary=4)]), site("q/kernel", (6, 12), "io"),
        lambda w: {"q_proj": halves(w.T, 4)},
    ),
    "rotary of the last axis": Row(
        Names([Rule("q/kernel", "q_proj", rotary=-1)]), site("q/kernel", (6, 3, 4), "ioo"),
        lambda w: {"q_proj": halves(w.reshape(6, 12).T, 4)},
    ),
    "rotary but for the values": Row(
        Names([Rule("qkv/kernel", QKV, rotary=(4, 4, 0))]), site("qkv/kernel", (6, 3, 2, 4), "iooo"),
        lambda w: {n: (halves if n != "v" else lambda w, _: w)(w[:, k].reshape(6, 8).T, 4) for k, n in enumerate(QKV)},
    ),
    "scaled query": Row(
        Names([Rule("q/kernel", "q", query_scaled=True)]), site("q/kernel", (6, 3, 5), "ioo"),
        lambda w: {"q": w.reshape(6, 15).T * np.sqrt(5)},
    ),
    "lora_jax unrolled": Row("lora_jax", site("params/layers_1/attn/key/kernel", (6, 2, 4), "ioo"), one(LLAMA.format(1, "k"), 6)),
    "lora_jax scanned": Row(
        "lora_jax", site("params/layers/attn/out/kernel", (2, 3, 4, 6), "biio"),
        lambda w: {LLAMA.format(i, "o"): w[i].reshape(12, 6).T for i in range(2)},
    ),
    "HF Llama": Row("hf_flax", site("params/model/layers/0/mlp/up_proj/kernel", (6, 8), "io"), one("model.layers.0.mlp.up_proj", 6)),
    "HF Gemma": Row("hf_flax_gemma", site("model/layers/0/mlp/up_proj/kernel", (6, 8), "io"), one("model.layers.0.mlp.up_proj", 6)),
    "HF BERT": Row("hf_flax", site("bert/encoder/layer/1/attention/self/query/kernel", (6, 8), "io"), one(BERT, 6)),
    "HF masked BERT": Row("hf_flax_bert", site("bert/encoder/layer/1/attention/self/query/kernel", (6, 8), "io"), one(BERT, 6)),
    "HF T5": Row("hf_flax", site("encoder/block/0/layer/0/SelfAttention/q/kernel", (6, 8), "io"), one("encoder.block.0.layer.0.SelfAttention.q", 6)),
    "KerasHub": Row("keras_hub_llama", site("transformer_layer_0/self_attention/query/kernel", (6, 2, 4), "ioo"), one("model.layers.0.self_attn.q_proj", 6)),
    "HF GPT-2": Row("hf_flax_gpt2", site("transformer/h/0/attn/c_attn/kernel", (12, 4), "oi"), lambda w: {"transformer.h.0.attn.c_attn": w}),
    "tunix Llama": Row("tunix", site("layers/1/attn/o_proj/w", (3, 4, 6), "iio"), one(LLAMA.format(1, "o"), 12)),
    "tunix feed-forward": Row("tunix", site("layers/1/mlp/down_proj/kernel", (8, 6), "io"), one("model.layers.1.mlp.down_proj", 8)),
    "tunix head": Row("tunix", site("lm_head/w", (6, 9), "io"), one("lm_head", 6)),
    "tunix table": Row("tunix", site("embedder/input_embedding", (9, 6), "io", "embedding"), lambda w: {"model.embed_tokens": w}),
    "tunix Gemma": Row(
        "tunix", site("layers/0/attn/kv_einsum/w", (2, 1, 6, 4), "ooio"),
        lambda w: {LLAMA.format(0, n): w[k, 0].T for k, n in enumerate("kv")},
    ),
    "gemma multi-head": Row(
        "gemma", site("params/layer_1/attn/qkv_einsum/w", (3, 2, 6, 4), "ooio"),
        lambda w: {LLAMA.format(1, n): w[k].transpose(0, 2, 1).reshape(8, 6) for k, n in enumerate(QKV)},
    ),
    "gemma attention": Row("gemma", site("layer_1/attn/attn_vec_einsum/w", (2, 4, 6), "iio"), one(LLAMA.format(1, "o"), 8)),
    "gemma gate": Row(
        "gemma", site("layer_0/mlp/gating_einsum", (2, 8, 6), "ooi"),
        lambda w: {"model.layers.0.mlp.gate_proj": w[0], "model.layers.0.mlp.up_proj": w[1]},
    ),
    "gemma down": Row("gemma", site("layer_0/mlp/linear", (8, 6), "io"), one("model.layers.0.mlp.down_proj", 8)),
    "MaxText": Row(
        "maxtext", site("params/decoder/layers/self_attention/query/kernel", (6, 3, 2, 4), "iboo"),
        lambda w: {LLAMA.format(i, "q"): to_huggingface(w[:, i]) for i in range(3)},
    ),
    "MaxText unrolled": Row("maxtext", site("decoder/layers_2/mlp/wi_0/kernel", (6, 8), "io"), one("model.layers.2.mlp.gate_proj", 6)),
    "MaxText Llama query": Row(
        "maxtext_llama", site("decoder/layers/self_attention/query/kernel", (6, 3, 2, 4), "iboo"),
        lambda w: {LLAMA.format(i, "q"): to_huggingface(w[:, i], scaled=True) for i in range(3)},
    ),
    "MaxText Llama key": Row(
        "maxtext_llama", site("decoder/layers/self_attention/key/kernel", (6, 3, 1, 4), "iboo"),
        lambda w: {LLAMA.format(i, "k"): to_huggingface(w[:, i]) for i in range(3)},
    ),
    "MaxText Llama out": Row(
        "maxtext_llama", site("decoder/layers/self_attention/out/kernel", (2, 3, 4, 6), "ibio"),
        lambda w: {LLAMA.format(i, "o"): w[:, i].reshape(8, 6).T for i in range(3)},
    ),
    "MaxText Llama 3.1 query": Row(
        "maxtext_llama3.1", site("decoder/layers/self_attention/query/kernel", (6, 3, 2, 4), "iboo"),
        lambda w: {LLAMA.format(i, "q"): to_huggingface(w[:, i], scaled=True, adjust_rope=True) for i in range(3)},
    ),
    "MaxText Llama 3.1 key": Row(
        "maxtext_llama3.1", site("decoder/layers_1/self_attention/key/kernel", (6, 1, 4), "ioo"),
        lambda w: {LLAMA.format(1, "k"): to_huggingface(w, adjust_rope=True)},
    ),
    "MaxText Mixtral": Row(
        "maxtext_llama", site("decoder/layers/MoeBlock_0/wi_1", (2, 3, 6, 8), "bbio", "ragged"),
        lambda w: {f"model.layers.{i}.block_sparse_moe.experts.{e}.w3": w[e, i].T for e in range(2) for i in range(3)},
    ),
    "MaxText Qwen3-MoE": Row(
        "maxtext", site("decoder/layers_1/moe_block/wo", (2, 8, 6), "bio", "ragged"),
        lambda w: {f"model.layers.1.mlp.experts.{e}.down_proj": w[e].T for e in range(2)},
    ),
    "MaxText DeepSeek": Row(
        DEEPSEEK, site("decoder/moe_layers/DeepSeekMoeBlock_0/MoeBlock_0/wi_0", (2, 3, 6, 8), "bbio", "ragged"),
        lambda w: {f"model.layers.{i + 2}.mlp.experts.{e}.gate_proj": w[e, i].T for e in range(2) for i in range(3)},
    ),
    "MaxText DeepSeek attention": Row(
        DEEPSEEK, site("decoder/moe_layers_1/self_attention/wkv_b/kernel", (6, 2, 4), "ioo"), one("model.layers.3.self_attn.kv_b_proj", 6)
    ),
    "MaxText DeepSeek dense": Row(
        DEEPSEEK, site("decoder/dense_layers/mlp/wo/kernel", (8, 2, 6), "ibo"),
        lambda w: {f"model.layers.{i}.mlp.down_proj": w[:, i].T for i in range(2)},
    ),
    "tunix Qwen3-MoE": Row(
        "tunix", site("layers/1/mlp/down_proj", (2, 8, 6), "bio"),
        lambda w: {f"model.layers.1.mlp.experts.{e}.down_proj": w[e].T for e in range(2)},
    ),
    "tunix Qwen3-MoE router": Row("tunix", site("layers/1/mlp/router/kernel", (6, 2), "io"), one("model.layers.1.mlp.gate", 6)),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_written_for_pytorch(row: Row, tmp_path: Path) -> None:
    adapter = random_adapter([row.site])
    lora.peft.save(tmp_path / "a", adapter, row.names)
    files = read_peft(tmp_path / "a")
    written = {name: files.scale(name) * _product(module) for name, module in files.modules.items()}
    expected = row.torch(np.asarray(adapter[row.site.path].delta()))
    assert_close({k: written[k].astype(np.float32) for k in sorted(written)}, _sorted(expected))


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_read_from_pytorch(row: Row, tmp_path: Path) -> None:
    shapes = {name: value.shape for name, value in row.torch(np.zeros(row.site.shape, np.float32)).items()}
    files = _random_files(shapes, table=row.site.kind == "embedding")
    write_peft(tmp_path / "a", files)
    adapter = lora.peft.load(tmp_path / "a", _zeros(row.site), Sites([row.site]), row.names)
    expected = {name: np.float32(files.scale(name)) * _product(module) for name, module in files.modules.items()}
    assert_close(_sorted(row.torch(np.asarray(adapter[row.site.path].delta()))), _sorted(expected))


def _product(module: Module) -> np.ndarray:
    return (module.b @ module.a).T if module.kind == "embedding" else module.b @ module.a


def _sorted(weights: Weights) -> Weights:
    return {name: weights[name].astype(np.float32) for name in sorted(weights)}


def _zeros(*sites: Site) -> dict[str, object]:
    return nested({of.path: np.zeros(of.shape, np.float32) for of in sites})


def _random_files(shapes: dict[str, tuple[int, ...]], table: bool) -> PeftFiles:
    """Factors of other ranks, alphas and values for every module."""
    draw = np.random.default_rng(0)
    normal = lambda *shape: draw.normal(size=shape).astype(np.float32)  # noqa: E731
    modules = {}
    for rank, (name, (out, into)) in enumerate(shapes.items(), start=1):
        out, into = (into, out) if table else (out, into)
        modules[name] = Module("embedding" if table else "linear", normal(rank, into), normal(out, rank))
    patterns = {f"^{name}$": 1 + place for place, name in enumerate(shapes)}
    alphas = {name: 2 / alpha for name, alpha in patterns.items()}
    config = {"r": 1, "rank_pattern": patterns, "alpha_pattern": alphas, "target_modules": sorted(shapes)}
    return PeftFiles(config, modules)


def test_every_known_map_is_in_the_table() -> None:
    assert {row.names for row in ROWS.values() if isinstance(row.names, str)} == KNOWN.keys()
    assert find_names(None) == Names() and find_names(KNOWN["gemma"]) is KNOWN["gemma"]
    with pytest.raises(lora.MatchError, match=r"'llama' is not a known map; there are gemma, "):
        find_names("llama")


def test_known_maps_name_whole_parameters() -> None:
    norms = {
        "hf_flax_bert": ("params/cls/predictions/bias", "cls.predictions"),
        "lora_jax": ("params/layers_3/mlp_norm/scale", "model.layers.3.post_attention_layernorm"),
        "hf_flax_gemma": ("model/layers/3/input_layernorm/scale", "model.layers.3.input_layernorm"),
        "hf_flax_gpt2": ("transformer/h/3/ln_1/bias", "transformer.h.3.ln_1"),
        "tunix": ("layers/3/attn/q_proj/bias", "model.layers.3.self_attn.q_proj"),
        "gemma": ("embedder/input_embedding", "model.embed_tokens"),
        "keras_hub_llama": ("token_embedding/reverse_embeddings", "lm_head"),
        "maxtext": ("params/decoder/layers_3/pre_self_attention_layer_norm/scale", "model.layers.3.input_layernorm"),
    }
    assert (
        find_names("tunix").module("layers/3/post_attention_layernorm/w") == "model.layers.3.post_attention_layernorm"
    )
    assert find_names("tunix").module("layers/3/attn/q_norm/w") == "model.layers.3.self_attn.q_norm"
    assert {known: find_names(known).module(path) for known, (path, _) in norms.items()} == {
        known: module for known, (_, module) in norms.items()
    }


# Modules that PyTorch fuses: parameters by path on one side, weights by module on the other.


class Fused(NamedTuple):
    """Parameters that are one module in PyTorch, and its weights `(out, in)` for their values, in order."""

    names: Names
    sites: tuple[Site, ...]
    torch: Callable[..., Weights]


def out_in(w: np.ndarray, rows: int = 6) -> np.ndarray:
    return w.reshape(rows, -1).T


def interleaved(groups: int, *weights: np.ndarray) -> np.ndarray:
    """Rows of several weights, a group of each at a time."""
    return np.concatenate(
        [np.concatenate([w.reshape(groups, -1, w.shape[-1])[g] for w in weights]) for g in range(groups)]
    )


PATHS = ("attn/q/kernel", "attn/k/kernel", "attn/v/kernel")
GQA = (site(PATHS[0], (6, 4, 2), "ioo"), site(PATHS[1], (6, 2, 2), "ioo"), site(PATHS[2], (6, 2, 2), "ioo"))
STACKED = tuple(site(f"params/h/{n}/w", shape, "ibo") for n, shape in {"gate": (6, 3, 5), "up": (6, 3, 2)}.items())
FUSED = {
    "unequal": Fused(Names([(PATHS, "attn.qkv")]), GQA, lambda *w: {"attn.qkv": np.concatenate([*map(out_in, w)])}),
    "other layouts of each": Fused(
        Names([(("m/q", "m/k"), "qk")]), (site("m/q", (2, 6, 4), "oio"), site("m/k", (3, 3, 2), "ioi")),
        lambda q, k: {"qk": np.concatenate([q.transpose(0, 2, 1).reshape(8, 6), k.transpose(1, 0, 2).reshape(3, 6)])},
    ),
    "stacked": Fused(
        Names([(("h/gate/w", "h/up/w"), "h.{i}.gate_up")]), STACKED,
        lambda g, u: {f"h.{i}.gate_up": np.concatenate([g[:, i].T, u[:, i].T]) for i in range(3)},
    ),
    "rotary but for the values": Fused(
        Names([Rule(PATHS, "qkv", rotary=(4, -1, 0))]),
        (site(PATHS[0], (6, 8), "io"), site(PATHS[1], (6, 1, 4), "ioo"), site(PATHS[2], (6, 4), "io")),
        lambda q, k, v: {"qkv": np.concatenate([halves(out_in(q), 4), halves(out_in(k), 4), out_in(v)])},
    ),
    "scaled query": Fused(
        Names([Rule(PATHS, "qkv", query_scaled=(True, False, False))]), GQA,
        lambda q, k, v: {"qkv": np.concatenate([out_in(q) * np.sqrt(2), out_in(k), out_in(v)])},
    ),
    "interleaved by heads": Fused(
        Names([Rule(PATHS, "qkv", interleaved=-1)]), GQA,
        lambda *w: {"qkv": interleaved(2, *map(out_in, w))},
    ),
    "interleaved by number": Fused(
        Names([Rule(PATHS[1:], "kv", interleaved=4)]), GQA[1:], lambda *w: {"kv": interleaved(4, *map(out_in, w))},
    ),
}  # fmt: skip


def fused_weights(row: Fused, adapter: lora.Adapter) -> Weights:
    values = [np.asarray(adapter[of.path].delta()) if of.path in adapter else np.zeros(of.shape) for of in row.sites]
    return _sorted(row.torch(*values))


def own_adapter(sites: Sequence[Site]) -> lora.Adapter:
    """Factors of another rank for each."""
    found = [random_adapter([of], seed=rank, rank=rank) for rank, of in enumerate(sites, start=1)]
    return lora.Adapter({path: update for each in found for path, update in each.items()})


@pytest.mark.parametrize("row", FUSED.values(), ids=FUSED)
def test_fused_modules_are_written_and_come_back(row: Fused, tmp_path: Path) -> None:
    complete, params = own_adapter(row.sites), _zeros(*row.sites)
    for count in range(1, len(row.sites) + 1):
        for place, chosen in enumerate(combinations(row.sites, count)):
            adapter = lora.Adapter({of.path: complete[of.path] for of in chosen})
            folder = tmp_path / f"{count}-{place}"
            lora.peft.save(folder, adapter, row.names, sites=Sites(row.sites))
            files = read_peft(folder)
            written = {name: np.float32(files.scale(name)) * _product(module) for name, module in files.modules.items()}
            assert_close(_sorted(written), fused_weights(row, adapter))
            assert {len(module.a) for module in files.modules.values()} == {sum(each.rank for each in adapter.values())}
            loaded = lora.peft.load(folder, params, Sites(row.sites), row.names)
            assert {path: each.rank for path, each in loaded.items()} == {p: each.rank for p, each in adapter.items()}
            deltas = ({path: each.delta() for path, each in found.items()} for found in (loaded, adapter))
            assert_close(*deltas)


@pytest.mark.parametrize("row", FUSED.values(), ids=FUSED)
def test_fused_modules_are_read_and_go_back(row: Fused, tmp_path: Path) -> None:
    shapes = {name: value.shape for name, value in row.torch(*(np.zeros(of.shape) for of in row.sites)).items()}
    files = _random_files(shapes, table=False)
    write_peft(tmp_path / "a", files)
    adapter = lora.peft.load(tmp_path / "a", _zeros(*row.sites), Sites(row.sites), row.names)
    expected = {name: np.float32(files.scale(name)) * _product(module) for name, module in files.modules.items()}
    assert sorted(adapter) == sorted(of.path for of in row.sites)
    assert_close(fused_weights(row, adapter), _sorted(expected))
    lora.peft.save(tmp_path / "b", adapter, row.names, sites=Sites(row.sites))
    again = read_peft(tmp_path / "b")
    assert {name: len(module.a) for name, module in again.modules.items()} == {
        name: len(module.a) for name, module in files.modules.items()
    }, "parts with the same A share their ranks"
    back = {name: np.float32(again.scale(name)) * _product(module) for name, module in again.modules.items()}
    assert_close(_sorted(back), _sorted(expected))
