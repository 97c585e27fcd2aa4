"""Models of transformers under PEFT, and the same models in the layouts that the known maps are for."""

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("transformers")

import jax
import jax.numpy as jnp
import numpy as np
from families import FAMILIES, Family
from helpers import assert_close, assert_same, random_adapter
from peft_models import nested
from torch_side import adapted, opened, run
from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

import lora_jax as lora
from lora_jax.adapter.site import Site, Sites

TOKENS = np.random.default_rng(0).integers(24, size=(3, 7))
X = torch.from_numpy(TOKENS)
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def run_jax(family: Family, params: Any, *adapters: lora.Adapter) -> np.ndarray:
    with jax.default_matmul_precision("highest"):
        return np.asarray(lora.adapt(family.fn)(params, adapters, jnp.asarray(TOKENS)))


def found(family: Family, params: Any) -> Sites:
    return lora.find_sites(family.fn, params, jnp.asarray(TOKENS))


# PEFT does not tie GPT-2's table, whatever ensure_weight_tying says, so an adapter of it acts on the look-up alone.
TABLES = [(family, True) for name, family in FAMILIES.items() if name != "GPT-2"]
WRITTEN = [*((family, False) for family in FAMILIES.values()), *TABLES]


@pytest.mark.parametrize(("family", "table"), WRITTEN, ids=[f"{f.names}{' and table' * t}" for f, t in WRITTEN])
def test_written_by_peft(family: Family, table: bool, tmp_path: Path) -> None:
    params, targets = family.params(), [*family.targets, *([family.embedding] if table else [])]
    model = adapted(family.base(), r=2, lora_alpha=3, target_modules=targets, ensure_weight_tying=table)
    model.save_pretrained(tmp_path)
    adapter = lora.peft.load(tmp_path, params, found(family, params), family.names)
    expected = run(model, X)
    assert_close(run_jax(family, params), run(family.base(), X))
    assert_close(run_jax(family, params, adapter), expected, factor=2)
    assert np.abs(expected - run(family.base(), X)).max() > 0.1


@every_family
@pytest.mark.parametrize("table", [False, True], ids=["layers", "layers and table"])
def test_read_by_peft(family: Family, table: bool, tmp_path: Path) -> None:
    params = family.params()
    sites = found(family, params)
    adapter = random_adapter([site for site in sites.values() if table or site.kind != "embedding"])
    if not table and family.names == "hf_flax_gpt2":
        adapter = lora.Adapter({**adapter, **norm(params, sites)})
    lora.peft.save(tmp_path / "a", adapter, family.names, sites=sites, params=params)
    assert_close(run(opened(family.base(), tmp_path / "a"), X), run_jax(family, params, adapter), factor=2)


def norm(params: Any, sites: Sites) -> lora.Adapter:
    """The last normalisation, trained in full."""
    config = lora.LoraConfig(targets=".*/0/attn/c_attn/kernel", train=("ln_f",))
    drawn = lora.init(jax.random.key(0), config, params, sites)
    return lora.Adapter(
        {
            path: lora.Replace(each.value + 0.5, each.site)
            for path, each in drawn.items()
            if isinstance(each, lora.Replace)
        }
    )


MASKED = {
    "bert": (BertConfig, BertForMaskedLM, "cls.predictions.decoder"),
    "roberta": (RobertaConfig, RobertaForMaskedLM, "lm_head.decoder"),
}


@pytest.mark.parametrize("name", MASKED)
def test_tables_that_are_the_head_of_a_masked_model(name: str, tmp_path: Path) -> None:
    config, model, head = MASKED[name]

    def base() -> Any:
        torch.manual_seed(12)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
        return model(config(vocab_size=24, max_position_embeddings=12, initializer_range=0.3, **sizes)).eval()

    table = f"{name}/embeddings/word_embeddings/embedding"
    site = Site(
        path=table, shape=(24, 16), dtype="float32", kind="embedding", in_axes=(0,), out_axes=(1,), uses=2, head=True
    )
    adapter = random_adapter([site])
    lora.peft.save(tmp_path / "a", adapter, "hf_flax_bert")
    assert sorted(lora.peft.read_peft(tmp_path / "a").modules) == sorted(
        [table.rpartition("/")[0].replace("/", "."), head]
    )
    merged, delta = base(), torch.from_numpy(np.array(adapter[table].delta()))
    with torch.no_grad():
        getattr(merged, name).embeddings.word_embeddings.weight += delta
    assert merged.get_submodule(head).weight is getattr(merged, name).embeddings.word_embeddings.weight
    assert_close(run(opened(base(), tmp_path / "a"), X), run(merged, X))
    assert_same(
        lora.peft.load(tmp_path / "a", nested({table: np.zeros((24, 16))}), Sites([site]), "hf_flax_bert"), adapter
    )
