"""Models of transformers that fuse projections, under PEFT, and JAX models with a parameter for each projection."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("transformers")

import jax.numpy as jnp
import numpy as np
from helpers import assert_close, random_adapter
from llama import PHI3, TOKENS, Twin, params_of, phi3
from torch_side import adapted, opened, run
from transformers import BloomConfig, FalconConfig, GPTNeoXConfig
from transformers.models.bloom.modeling_bloom import BloomAttention
from transformers.models.falcon.modeling_falcon import FalconAttention
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention

import lora_jax as lora
from lora_jax.paths import named_leaves

X = torch.from_numpy(TOKENS)
FUSED = ["qkv_proj", "gate_up_proj"]
each_layout = pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])


@each_layout
def test_the_bases_agree(scan: bool) -> None:
    assert_close(Twin(scan, phi3).run(lora.Adapter({})), run(phi3(), X))


@each_layout
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": FUSED},
        {"target_modules": "all-linear", "rank_pattern": {r"layers\.1\.mlp.*": 5}, "alpha_pattern": {"qkv_proj": 3}},
        {"target_modules": FUSED, "use_dora": True},
        {"target_modules": [*FUSED, "o_proj", "embed_tokens"], "ensure_weight_tying": True},
    ],
    ids=["fused", "patterns", "DoRA", "tied factors"],
)
def test_written_by_peft(options: dict[str, Any], scan: bool, tmp_path: Path) -> None:
    twin, model = Twin(scan, phi3), adapted(phi3(), r=2, lora_alpha=3, **options)
    model.save_pretrained(tmp_path)
    adapter = lora.peft.load(tmp_path, twin.variables, twin.sites, PHI3)
    expected = run(model, X)
    assert_close(twin.run(adapter), expected)
    assert np.abs(expected - run(phi3(), X)).max() > 0.1
    if "ensure_weight_tying" not in options:  # PEFT merges the factors of a tied table twice
        assert_close(lora.merge(twin.variables, adapter), params_of(model.merge_and_unload(), scan))


PARTS = {
    "everything": ("",), "key and up": ("key", "up"), "query, and gate of one layer": ("query", "layers_1/mlp/gate"),
}  # fmt: skip


@each_layout
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_read_by_peft(parts: tuple[str, ...], method: str, scan: bool, tmp_path: Path) -> None:
    twin = Twin(scan, phi3)
    paths = [path for path in twin.sites if any(part in path for part in parts) and "embed" not in path]
    adapter = lora.Adapter({path: random_adapter(twin.sites, rank=1 + n % 3)[path] for n, path in enumerate(paths)})
    if method == "dora":
        leaves, _ = named_leaves(twin.variables)
        adapter = lora.Adapter({path: dora(update, leaves[path]) for path, update in adapter.items()})
    lora.peft.save(tmp_path / "a", adapter, PHI3, sites=twin.sites, params=twin.variables)
    model, expected = opened(phi3(), tmp_path / "a"), twin.run(adapter)
    assert_close(run(model, X), expected)
    assert np.abs(expected - run(phi3(), X)).max() > 0.1
    assert_close(params_of(model.merge_and_unload(), scan), lora.merge(twin.variables, adapter))


def dora(update: Any, weight: Any) -> lora.methods.Dora:
    """The update with magnitudes that are not the weight's."""
    made = lora.methods.Dora.around(update, weight)
    return replace(
        made, magnitude=made.magnitude * jnp.linspace(0.5, 2, made.magnitude.size).reshape(made.magnitude.shape)
    )


# Attention that interleaves its projections: which numbers are queries, keys and values is PyTorch's own code.

NEOX = GPTNeoXConfig(hidden_size=16, num_attention_heads=4, attention_bias=False, attn_implementation="eager")
FALCON = FalconConfig(hidden_size=16, num_attention_heads=4, num_kv_heads=2, bias=False, new_decoder_architecture=True)
ATTENTION = {
    "GPT-NeoX": (lambda: GPTNeoXAttention(NEOX, 0), (4, 4), -1),
    "BLOOM": (lambda: BloomAttention(BloomConfig(hidden_size=16, n_head=4), 0), (4, 4), -1),
    "Falcon": (lambda: FalconAttention(FALCON, 0), (4, 2), -1),
    "Falcon with one key": (
        lambda: FalconAttention(FalconConfig(hidden_size=16, num_attention_heads=4, bias=False), 0), (4, 1), 1,
    ),
}  # fmt: skip


class Block(torch.nn.Module):
    """An attention alone."""

    def __init__(self, attention: Any):
        super().__init__()
        torch.manual_seed(8)
        self.attention = attention()
        for name, parameter in self.attention.named_parameters():
            parameter.data = torch.randn(parameter.shape) * (0 if name.endswith("bias") else 1)

    def kernels(self, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> Any:
        """Query, key and value kernels `[in, heads, features]`, from what the attention makes of one-hot inputs."""
        attention, x = self.attention, torch.eye(16)[:, None]
        with torch.no_grad():
            if isinstance(attention, GPTNeoXAttention):
                seen: list[Any] = []
                stop = lambda module, *qkv, **_: (seen.extend(qkv[:3]), (torch.zeros(16, 1, 4, 4), None))[1]  # noqa: E731
                monkeypatch.setattr("transformers.models.gpt_neox.modeling_gpt_neox.eager_attention_forward", stop)
                attention(x, None, position_embeddings=(torch.ones(1, 1, 4), torch.zeros(1, 1, 4)))
            else:
                split = attention._reshape if isinstance(attention, BloomAttention) else attention._split_heads
                seen = list(split(attention.query_key_value(x)))
        kernels = [each.reshape(16, -1, 4).numpy() for each in seen]
        repeats = [each.shape[1] // count for each, count in zip(kernels, (heads[0], heads[1], heads[1]), strict=True)]
        return {name: {"w": jnp.asarray(each[:, ::r])} for name, each, r in zip("qkv", kernels, repeats, strict=True)}


@pytest.mark.parametrize(("attention", "heads", "groups"), ATTENTION.values(), ids=ATTENTION)
def test_interleaved(
    attention: Any, heads: tuple[int, int], groups: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    params = Block(attention).kernels(heads, monkeypatch)
    fn = lambda params, x: [jnp.einsum("bi,ihd->bhd", x, params[name]["w"]) for name in "qkv"]  # noqa: E731
    sites = lora.find_sites(fn, params, jnp.ones((2, 16)))
    names = lora.peft.Names([lora.peft.Rule(("q/w", "k/w", "v/w"), "attention.query_key_value", interleaved=groups)])
    model = adapted(Block(attention), r=2, target_modules=["query_key_value"])
    model.save_pretrained(tmp_path / "theirs")
    merged = lora.merge(params, lora.peft.load(tmp_path / "theirs", params, sites, names))
    assert_close(merged, model.merge_and_unload().kernels(heads, monkeypatch))
    ours = random_adapter(sites)
    lora.peft.save(tmp_path / "ours", ours, names, sites=sites)
    model = opened(Block(attention), tmp_path / "ours").merge_and_unload()
    assert_close(model.kernels(heads, monkeypatch), lora.merge(params, ours))
