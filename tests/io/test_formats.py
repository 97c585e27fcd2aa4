"""An adapter of 0.1 loads: files of every released version keep their values, their tree and their meaning.

`python tests/io/test_formats.py VERSION` writes those of a new version beside the old ones, which are never changed.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.io.own.manifest import FORMAT

GOLDEN = Path(__file__).parents[1] / "golden" / "formats"
VERSIONS = sorted(path.name for path in GOLDEN.glob("*"))
METHODS = ("lora", "dora", "lora-fa", "lora-xs", "adalora", "alora", "vera")
TOKENS = jnp.array([[1, 2, 3]])

PARAMS: dict[str, Any] = {
    "embed": {"embedding": jnp.ones((5, 4))},
    "norm": {"scale": jnp.ones(4)},
    "conv": {"kernel": jnp.ones((2, 4, 4))},
    "stack": {"kernel": jnp.ones((2, 4, 4)), "bias": jnp.zeros((2, 4))},
    **{f"by_{name}": {"kernel": jnp.ones((4, 4), jnp.bfloat16)} for name in METHODS},
}


def fn(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
    """One parameter of each kind, and one for each method."""
    x = params["embed"]["embedding"][tokens] * params["norm"]["scale"][None, None]
    x = jax.lax.conv_general_dilated(x, params["conv"]["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
    x, _ = jax.lax.scan(lambda x, p: (x @ p["kernel"] + p["bias"][None, None], None), x, params["stack"])
    for name in METHODS:
        x = x @ params[f"by_{name}"]["kernel"].astype(x.dtype)
    return x


def numbered(tree: Any) -> Any:
    """Other values in every leaf: numbers that all dtypes hold exactly."""
    leaves, structure = jax.tree.flatten(tree)
    filled = [
        (jnp.arange(leaf.size).reshape(leaf.shape) % 64 / 4 + i).astype(leaf.dtype) for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, filled)


def own() -> lora.Adapter:
    """An update of every class that the library has."""
    sites = lora.find_sites(fn, PARAMS, TOKENS)
    parts = [
        lora.LoraConfig(rank=2, targets="conv", dropout=0.1, train="norm", trainable_tokens=(1, 3)),
        lora.LoraConfig(rank=2, targets="stack", lora_bias=True),
        *(lora.LoraConfig(method=name, rank=2, targets=f"by_{name}", **extra(name)) for name in METHODS),
    ]
    updates: dict[str, Any] = {}
    for config in parts:
        updates |= lora.init(jax.random.key(0), config, PARAMS, sites)
    return numbered(lora.Adapter(updates))


def extra(method: str) -> dict[str, Any]:
    return {"alora": {"invocation_tokens": (3, 4)}, "lora": {"init": "pissa", "param_dtype": jnp.bfloat16}}.get(
        method, {}
    )


def peft() -> lora.Adapter:
    """What one file of PEFT's holds: factors, a trained parameter, and trained rows."""
    sites = lora.find_sites(fn, PARAMS, TOKENS)
    config = lora.LoraConfig(rank=2, targets=("conv", "by_lora"), train="norm", trainable_tokens=(1, 3))
    return numbered(lora.init(jax.random.key(0), config, PARAMS, sites))


def shown(adapter: lora.Adapter) -> dict[str, Any]:
    """Every leaf of the updates by its place in the tree; what else the tree has is computed from them."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(dict(adapter))
    return {
        jax.tree_util.keystr(path): [str(leaf.dtype), list(leaf.shape), np.asarray(leaf, np.float64).ravel().tolist()]
        for path, leaf in leaves
    }


@pytest.mark.parametrize("version", VERSIONS)
def test_own_format(version: str) -> None:
    loaded = lora.load(GOLDEN / version / "own", PARAMS)
    assert shown(loaded) == json.loads((GOLDEN / version / "own.json").read_text())
    assert jax.tree.structure(loaded) == jax.tree.structure(own())
    assert lora.load_config(GOLDEN / version / "own") == lora.LoraConfig(rank=2)


def test_a_fresh_process_knows_every_kind_of_update() -> None:
    code = f"import lora_jax as lora; print(len(lora.load({str(GOLDEN / '0.1' / 'own')!r})))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(shown.stdout) == len(own())


@pytest.mark.parametrize("version", VERSIONS)
def test_peft_format(version: str) -> None:
    loaded = lora.peft.load(GOLDEN / version / "peft", PARAMS, lora.find_sites(fn, PARAMS, TOKENS))
    assert shown(loaded) == json.loads((GOLDEN / version / "peft.json").read_text())
    assert jax.tree.structure(loaded) == jax.tree.structure(peft())


def test_every_kind_of_update_is_in_the_file() -> None:
    kinds = {type(update).__name__ for update in own().values()}
    known = {kind.__name__ for kind in vars(lora.methods).values() if isinstance(kind, type)} | {"LowRank", "Replace"}
    # The first is made for evaluation only, by lora.methods.precompute; tests/methods/test_parts.py saves the second.
    assert known - kinds == {"Gained", "Parts"}


def test_the_documented_format_is_the_written_one() -> None:
    page = (Path(__file__).parents[2] / "docs" / "files.md").read_text()
    assert f"Format {FORMAT}" in page


def write(version: str) -> None:
    folder = GOLDEN / version
    folder.mkdir(parents=True)
    lora.save(folder / "own", own(), config=lora.LoraConfig(rank=2), params=PARAMS)
    lora.peft.save(folder / "peft", peft(), sites=lora.find_sites(fn, PARAMS, TOKENS))
    for name, adapter in {"own": own(), "peft": peft()}.items():
        lines = [f"{json.dumps(path)}: {json.dumps(leaf)}" for path, leaf in shown(adapter).items()]
        (folder / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    write(sys.argv[1])
