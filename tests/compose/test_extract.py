"""Adapters of a full fine-tune: nearest at every site, in memory and from checkpoints, with what is lost."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from lora_jax import svd
from lora_jax.cli import main
from lora_jax.compose.extract import Truncation
from lora_jax.io.hf.extract import extract_checkpoint
from lora_jax.io.hf.merge import merge_checkpoint

draw = np.random.default_rng(0)
BASE = {
    "table": jax.device_put(np.float32(draw.normal(size=(9, 6)))),
    "layers": {"w": jax.device_put(np.float32(draw.normal(size=(3, 6, 6)))), "norm": jnp.ones((3, 6))},
    "head": {"kernel": jax.device_put(np.float32(draw.normal(size=(6, 5)))), "bias": jnp.zeros(5)},
}
TUNED = jax.tree.map(lambda leaf: leaf + jnp.asarray(0.1 * draw.normal(size=leaf.shape), leaf.dtype), BASE)
TOKENS = jnp.array([0, 3, 6])


def fn(params: Any, tokens: jax.Array) -> jax.Array:
    body = lambda x, layer: (jnp.tanh((x * layer["norm"][None]) @ layer["w"]), None)  # noqa: E731
    return (
        jax.lax.scan(body, params["table"][tokens], params["layers"])[0] @ params["head"]["kernel"]
        + params["head"]["bias"][None]
    )


SITES = lora.find_sites(fn, BASE, TOKENS)


def test_full_rank_and_the_rest_in_full_is_the_tuned_model() -> None:
    adapter = lora.extract(BASE, TUNED, SITES, rank=9, train=("norm",), bias="all")
    assert set(adapter) == {"table", "layers/w", "layers/norm", "head/kernel", "head/bias"}
    assert_close(lora.merge(BASE, adapter), TUNED, factor=10)
    assert_close(lora.adapt(fn)(BASE, adapter, TOKENS), fn(TUNED, TOKENS), factor=10)
    report = lora.extract_report(BASE, TUNED, adapter)
    assert report.left_out == ()
    assert max(row.lost for row in report.rows) < 1e-4


def test_low_rank_is_the_nearest() -> None:
    adapter = lora.extract(BASE, TUNED, SITES, rank=2)
    for layer in range(3):
        difference = np.asarray(TUNED["layers"]["w"][layer] - BASE["layers"]["w"][layer])
        best = np.linalg.norm(np.linalg.svd(difference, compute_uv=False)[2:])
        assert np.linalg.norm(difference - adapter["layers/w"].delta()[layer]) == pytest.approx(best, rel=1e-3)
    report = lora.extract_report(BASE, TUNED, adapter)
    assert report.left_out == ("head/bias", "layers/norm")
    assert "2 parameters differ and are left out" in str(report)


@pytest.mark.parametrize("energy", [0.5, 0.9, 1.0])
def test_energy_and_error_choose_the_rank(energy: float) -> None:
    adapter = lora.extract(BASE, TUNED, SITES, energy=energy, targets=("head",))
    (row,) = (row for row in lora.extract_report(BASE, TUNED, adapter).rows if row.path == "head/kernel")
    assert row.lost**2 <= 1 - energy + 1e-5
    same = lora.extract(BASE, TUNED, SITES, error=max((1 - energy) ** 0.5, 1e-9), targets=("head",))
    assert same["head/kernel"].rank == row.rank
    if row.rank is not None and row.rank > 1:
        less = lora.extract(BASE, TUNED, SITES, rank=row.rank - 1, targets=("head",))
        fewer = lora.extract_report(BASE, TUNED, less).rows[1]
        assert fewer.lost**2 > 1 - energy


def test_large_matrices_by_their_first_triplets() -> None:
    left, right = draw.normal(size=(200, 3)), draw.normal(size=(3, 180))
    matrix = jnp.asarray(left @ right, jnp.float32)
    found = Truncation(rank=3).triplets(matrix)
    assert len(found.values) == 3
    assert_close(found.values, svd.exact(matrix, 3).values, factor=10)


def test_what_cannot_be_extracted_is_refused() -> None:
    with pytest.raises(lora.ParameterError, match="do not differ"):
        lora.extract(BASE, BASE, SITES, rank=2)
    with pytest.raises(lora.ConfigError, match="rank=, energy= or error="):
        lora.extract(BASE, TUNED, SITES)
    with pytest.raises(lora.ConfigError, match=r"energy=2 must be"):
        lora.extract(BASE, TUNED, SITES, energy=2)
    with pytest.raises(lora.ParameterError, match=r"'table' is \(9, 6\) in base and \(4, 6\) in tuned"):
        lora.extract(BASE, TUNED | {"table": jnp.ones((4, 6))}, SITES, rank=2)


NAMES = (
    "model.embed_tokens.weight",
    "model.layers.0.q_proj.weight",
    "model.layers.0.q_proj.bias",
    "model.norm.weight",
    "lm_head.weight",
)


def checkpoints(
    folder: Path, dtype: Any = np.float32, rank: int = 2
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    shapes = {name: (8,) if name.endswith(("bias", "norm.weight")) else (8, 6) for name in NAMES}
    base = {name: draw.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    change = {
        name: (draw.normal(size=(8, rank)) @ draw.normal(size=(rank, 6))) / 10
        for name in NAMES
        if len(shapes[name]) == 2
    }
    tuned = {name: (value + change.get(name, 0.1)).astype(dtype) for name, value in base.items()}
    for name, tensors in {"base": base, "tuned": tuned}.items():
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors")
    return base, tuned


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_checkpoints_and_back(tmp_path: Path, dtype: Any) -> None:
    _, tuned = checkpoints(tmp_path, dtype)
    report = extract_checkpoint(
        tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=4 if dtype == np.float32 else 6,
        train=("embed_tokens", "norm"), targets=["q_proj", "lm_head"], bias=True,
    )  # fmt: skip
    assert {row.path: row.form for row in report.rows} == {name: "full" for name in NAMES} | {
        "lm_head.weight": "low rank", "model.layers.0.q_proj.weight": "low rank",
    }  # fmt: skip
    merged = merge_checkpoint(tmp_path / "base", [tmp_path / "out"], tmp_path / "merged")
    assert set(merged.changed) == set(NAMES)
    for name, value in load_file(tmp_path / "merged" / "model.safetensors").items():
        assert_close(value.astype(np.float32), tuned[name].astype(np.float32), dtype=jnp.dtype(dtype))


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints(tmp_path)
    paths = [str(tmp_path / name) for name in ("base", "tuned", "out")]
    assert main(["extract", *paths, "--energy", "0.999"]) == 0
    said = capsys.readouterr().out
    assert "4 parameters differ and are left out" in said
    files = lora.peft.read_peft(tmp_path / "out")
    assert files.config["target_modules"] == ["q_proj"]
    assert files.modules["model.layers.0.q_proj"].a.shape == (2, 6)
    assert main(["extract", *paths]) == 2
    assert "exists already" in capsys.readouterr().err


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    base, _ = checkpoints(tmp_path)
    run = lambda **more: extract_checkpoint(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=2, **more)  # noqa: E731
    with pytest.raises(lora.MatchError, match=r"'k_proj' hits no matrix; nearest: model\.layers\.0\.q_proj"):
        run(targets=["k_proj"])
    with pytest.raises(lora.MatchError, match=r"'nrm' hits no tensor"):
        run(train=("nrm",))
    save_file(base, tmp_path / "tuned" / "model.safetensors")
    with pytest.raises(lora.CheckpointError, match="nothing to extract"):
        run()
    save_file({"x": np.ones(3)}, tmp_path / "tuned" / "model.safetensors")
    with pytest.raises(lora.CheckpointError, match=r"has no lm_head\.weight; nearest: x"):
        run()
    assert not (tmp_path / "out").exists()
