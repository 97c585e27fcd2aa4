"""Analysis against dense decompositions in NumPy, what must hold of any adapter or weight, tables, pictures, errors."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import GOLDEN, cast_floats, random_adapter
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lora_jax as lora
from lora_jax.adapter.factors import matrices
from lora_jax.adapter.site import Site
from lora_jax.adapter.updates import exact_sum
from lora_jax.analysis import intruders, overlap, rounding, spectra
from lora_jax.cli import main
from lora_jax.io.inspect import read_factors
from lora_jax.methods import Rows, Shift, precompute

EXPERTS: dict[str, Any] = {"in_axes": (2,), "out_axes": (3,), "batch_axes": (0, 1)}
SITES = (
    Site(path="dense", shape=(12, 10), dtype="float32", kind="dense", in_axes=(0,), out_axes=(1,)),
    Site(path="heads", shape=(2, 9, 4), dtype="float32", kind="dense", in_axes=(1,), out_axes=(0, 2)),
    Site(path="conv", shape=(3, 3, 7), dtype="float32", kind="conv", in_axes=(0, 1), out_axes=(2,), channel_axis=1),
    Site(path="table", shape=(15, 8), dtype="float32", kind="embedding", in_axes=(0,), out_axes=(1,)),
    Site(path="layers", shape=(9, 3, 7), dtype="float32", kind="dense", in_axes=(2,), out_axes=(0,), batch_axes=(1,)),
    Site(path="experts", shape=(2, 3, 8, 9), dtype="float32", kind="ragged", **EXPERTS),
)
BIAS = Site(path="bias", shape=(10,), dtype="float32", kind="full")


def weights(sites: Sequence[Site] = SITES, seed: int = 0) -> dict[str, jax.Array]:
    draw = np.random.default_rng(seed)
    return {site.path: jax.device_put(draw.normal(size=site.shape).astype(np.float32)) for site in sites}


def dense(site: Site, value: Any) -> np.ndarray:
    """Every linear map of a stack, `[weights, fan_in, fan_out]`."""
    return np.asarray(matrices(site, jnp.asarray(value)), np.float64)


def near(actual: Any, desired: Any, tolerance: float = 1e-5) -> None:
    desired = np.asarray(desired, np.float64)
    np.testing.assert_allclose(actual, desired, rtol=0, atol=tolerance * max(np.abs(desired).max(initial=0), 1e-30))


def one_site(fan_in: int = 24, fan_out: int = 16) -> Site:
    return replace(SITES[0], shape=(fan_in, fan_out))


def of_factors(a: Any, b: Any, scale: float = 1.0) -> lora.Adapter:
    """An adapter of one parameter, of factors `[rank, in]` and `[rank, out]`."""
    a, b = (jnp.asarray(np.asarray(each, np.float32)) for each in (a, b))
    return lora.Adapter({"dense": lora.LowRank(a, b, jnp.float32(scale), one_site(a.shape[1], b.shape[1]))})


# Spectra.


def test_spectra_are_those_of_the_dense_update() -> None:
    params, adapter = weights(), random_adapter(SITES, rank=3)
    rows = spectra(adapter, params).rows
    assert [row.name for row in rows[-3:]] == ["layers[1]", "layers[2]", "table"]
    assert len({row.name for row in rows}) == len(rows) == 4 + 3 + 6
    for site in SITES:
        found = [row for row in rows if row.path == site.path]
        deltas, bases = dense(site, adapter[site.path].delta()), dense(site, params[site.path])
        for row, delta, base in zip(found, deltas, bases, strict=True):
            values = np.linalg.svd(delta, compute_uv=False)
            near(row.values, values[:3])
            near(row.norm, np.linalg.norm(delta))
            near(row.spectral, values[0])
            near(row.relative, np.linalg.norm(delta) / np.linalg.norm(base))
            shares = values[:3] / values[:3].sum()
            near(row.effective_rank, np.exp(-(shares * np.log(shares)).sum()), 1e-4)
            near(row.stable_rank, (values**2).sum() / values[0] ** 2)
            assert row.rank == 3


METHODS: dict[str, dict[str, Any]] = {
    "lora": {}, "rslora": {"rslora": True}, "pissa": {"init": "pissa"}, "dora": {"method": "dora"},
    "adalora": {"method": "adalora"}, "vera": {"method": "vera"}, "lora-xs": {"method": "lora-xs"},
    "lora-fa": {"method": "lora-fa"}, "dora of pissa": {"method": "dora", "init": "pissa"},
}  # fmt: skip


def trained(params: Any, fields: dict[str, Any], moved: float = 0.1) -> lora.Adapter:
    sites = lora.find_sites(lambda params, x: x @ params["dense"], params, jnp.ones((2, 12)))
    adapter = lora.init(jax.random.key(1), lora.LoraConfig(rank=2, targets="dense", **fields), params, sites)
    keys = iter(jax.random.split(jax.random.key(2), 20))
    move = lambda leaf, train: leaf + moved * jax.random.normal(next(keys), leaf.shape) if train else leaf  # noqa: E731
    return jax.tree.map(move, adapter, lora.trainable(adapter))


@pytest.mark.parametrize("name", METHODS)
def test_every_method(name: str) -> None:
    params = weights(SITES[:1])
    adapter = trained(params, METHODS[name])
    (row,) = spectra(adapter, params).rows
    change = np.asarray(exact_sum(params["dense"], [adapter["dense"]]) - params["dense"], np.float64)
    near(row.relative, np.linalg.norm(change) / np.linalg.norm(params["dense"]), 1e-4)
    inner: Any = adapter["dense"].low_rank()
    values = np.linalg.svd(np.asarray(inner.delta(), np.float64), compute_uv=False)
    near(row.values, values[: len(row.values)], 1e-4)
    assert row.note == ("inside DoRA's norm" if "dora" in name else "")
    if "dora" in name:
        (fixed,) = spectra(precompute(params, adapter), params).rows
        near(fixed.relative, row.relative, 1e-4)
        assert fixed.note == "beside a gain"
    else:
        near(values, np.linalg.svd(change, compute_uv=False), 1e-4)


@pytest.mark.parametrize("fields", [{}, {"init": "pissa"}, {"init": "olora"}], ids=str)
def test_at_the_start_there_is_nothing(fields: dict[str, Any]) -> None:
    """The factors of PiSSA and OLoRA cancel their own start; what rounding leaves is no direction."""
    params = weights(SITES[:1])
    (row,) = spectra(trained(params, fields, moved=0.0), params).rows
    assert (row.rank, row.effective_rank, row.stable_rank, row.norm, row.relative) == (0, 0, 0, 0, 0)


def test_effective_rank_of_equal_values_is_the_rank() -> None:
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(24, 24)))[0]
    (row,) = spectra(of_factors(basis[:5], 3 * np.eye(16)[:5], 0.5)).rows
    near(row.values, [1.5] * 5)
    near([row.effective_rank, row.stable_rank], [5, 5])
    (row,) = spectra(of_factors(np.stack([basis[0], 2 * basis[0]]), np.eye(16)[[3, 3]])).rows
    assert (row.rank, len(row.values)) == (1, 2)
    near(row.effective_rank, 1)


def test_what_has_no_factors_has_a_row_that_says_so() -> None:
    params = weights() | {"bias": jnp.ones(10)}
    adapter = lora.Adapter({
        **random_adapter(SITES[:1]),
        "bias": Shift(jnp.full(10, 0.5), jnp.float32(2), BIAS),
        "heads": lora.Replace(params["heads"] * 1.5, SITES[1]),
        "table": Rows(params["table"][jnp.asarray([3, 5])] + 1, SITES[3], (3, 5)),
    })  # fmt: skip
    report = spectra(adapter, params)
    notes = {row.path: row.note for row in report.rows}
    assert notes == {
        "bias": "added to a bias", "dense": "", "heads": "trained in full", "table": "rows trained in full",
    }  # fmt: skip
    sizes = {row.path: row.relative for row in report.rows}
    near(sizes["bias"], 1.0)
    near(sizes["heads"], 0.5)
    near(sizes["table"], 4 / np.linalg.norm(params["table"]))
    assert all(row.values is None and row.rank is None for row in report.rows if row.note)
    assert "trained in full" in str(report)


def test_factors_in_bfloat16() -> None:
    adapter = cast_floats(random_adapter(SITES[4:5]), jnp.bfloat16)
    deltas = dense(SITES[4], cast_floats(adapter, jnp.float32)["layers"].delta())
    for row, delta in zip(spectra(adapter, cast_floats(weights(), jnp.bfloat16)).rows, deltas, strict=True):
        near(row.values, np.linalg.svd(delta, compute_uv=False)[:2], 1e-5)
    assert all(row.input_overlap > 0.9999 for row in overlap(adapter, adapter).rows)


def test_on_a_mesh_with_explicit_axes() -> None:
    adapter = random_adapter(SITES[4:5])
    mesh = jax.make_mesh((3,), ("x",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:3])
    a = jax.device_put(adapter["layers"].a, NamedSharding(mesh, PartitionSpec("x")))
    rest = jax.device_put(adapter, NamedSharding(mesh, PartitionSpec()))
    spread = lora.Adapter({"layers": replace(rest["layers"], a=a)})
    for one, other in zip(spectra(adapter).rows, spectra(spread).rows, strict=True):
        near(one.values, other.values)


def test_stacked_adapters_are_refused() -> None:
    adapter = random_adapter(SITES[:1])
    with pytest.raises(lora.ParameterError, match="unstack"):
        spectra(lora.Adapter.stack([adapter, adapter]))
    with pytest.raises(lora.ParameterError, match="do not have"):
        spectra(adapter, {"other": jnp.ones(3)})


# Overlap.


def test_overlap_is_that_of_the_dense_updates() -> None:
    one, other = random_adapter(SITES, 0, 3), random_adapter(SITES, 1, 2)
    rows = overlap(one, other).rows
    assert len(rows) == 4 + 3 + 6
    for site in SITES:
        found = [row for row in rows if row.path == site.path]
        deltas = (dense(site, adapter[site.path].delta()) for adapter in (one, other))
        for row, mine, theirs in zip(found, *deltas, strict=True):
            (left, _, right), (inputs, _, outputs) = np.linalg.svd(mine), np.linalg.svd(theirs)
            for i in range(1, 4):
                for j in range(1, 3):
                    read, written = left[:, :i].T @ inputs[:, :j], right[:i] @ outputs[:j].T
                    near(row.inputs[i - 1, j - 1], np.square(read).sum() / min(i, j), 1e-4)
                    near(row.outputs[i - 1, j - 1], np.square(written).sum() / min(i, j), 1e-4)
            near(row.cosine, (mine * theirs).sum() / np.linalg.norm(mine) / np.linalg.norm(theirs), 1e-4)
            opposed = mine * theirs < 0
            near(row.opposed, opposed.mean())
            shares = [(each**2)[opposed].sum() / (each**2).sum() for each in (mine, theirs)]
            near(row.opposed_energy, sum(shares) / 2, 1e-4)
            assert row.chance == (3 / site.fan_in, 3 / site.fan_out)


def test_overlap_with_itself_and_with_what_is_orthogonal() -> None:
    adapter = random_adapter(SITES[4:])
    for row in overlap(adapter, lora.scale(adapter, 3.0)).rows:
        near([row.input_overlap, row.output_overlap, row.cosine], [1, 1, 1])
        assert (row.opposed, row.opposed_energy) == (0, 0)
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(24, 24)))[0]
    first, second = of_factors(basis[:2], np.eye(16)[:2]), of_factors(basis[2:5], np.eye(16)[2:5])
    (row,) = overlap(first, second).rows
    near([row.input_overlap + 1, row.output_overlap + 1, row.cosine + 1], [1, 1, 1])
    assert row.inputs.shape == (2, 3)
    assert row.opposed == row.opposed_energy == 0, "no entry is changed by both"
    (row,) = overlap(first, of_factors(basis[:1], np.eye(16)[5:6])).rows
    near([row.input_overlap, row.output_overlap + 1, row.cosine + 1], [1, 1, 1])


def test_overlap_says_what_it_leaves_out() -> None:
    one = lora.Adapter({**random_adapter(SITES[:2]), "bias": Shift(jnp.ones(10), jnp.float32(1), BIAS)})
    other = lora.Adapter({**random_adapter(SITES[1:3]), "bias": Shift(jnp.ones(10), jnp.float32(1), BIAS)})
    report = overlap(one, other)
    assert report.left_out == {"bias": "added to a bias", "conv": "in the second only", "dense": "in the first only"}
    assert "Left out: bias (added to a bias); conv" in str(report)
    with pytest.raises(lora.ParameterError, match="no parameter with factors in common: the first adapts dense"):
        overlap(random_adapter(SITES[:1]), random_adapter(SITES[1:2]))
    with pytest.raises(lora.ParameterError, match="different models"):
        overlap(random_adapter(SITES[:1]), of_factors(np.ones((2, 5)), np.ones((2, 4))))


def test_overlap_with_nothing(tmp_path: Path) -> None:
    zero = of_factors(np.ones((2, 24)), np.zeros((2, 16)))
    report = overlap(zero, of_factors(np.ones((1, 24)), np.ones((1, 16))))
    (row,) = report.rows
    assert (row.input_overlap, row.cosine, row.opposed, row.inputs.shape) == (None, None, None, (0, 1))
    assert "0 × 1" in str(report)
    with pytest.raises(lora.ParameterError, match="nothing to draw"):
        report.plot(tmp_path / "x.png")


# Intruders.


def test_a_planted_intruder_is_found() -> None:
    """Strong, and across W's directions; along one of them or weak it is none."""
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(48, 48)))[0]
    outputs = np.linalg.qr(np.random.default_rng(1).normal(size=(48, 48)))[0]
    params = {"dense": jnp.asarray((basis * np.linspace(10, 1, 48) @ outputs.T).astype(np.float32))}
    across = outputs.sum(1)[None] / np.sqrt(48)
    planted = intruders(params, of_factors(50 * basis.T[:1], across)).rows[0]
    assert planted.numbers == (0,)
    assert len(planted.similarity) == 10
    along = of_factors(50 * basis.T[7:8], outputs.T[7:8])
    assert intruders(params, along).count == 0
    assert intruders(params, along).rows[0].values[0] > 50
    assert intruders(params, of_factors(0.1 * basis.T[:1], across)).count == 0
    assert intruders(params, lora.scale(along, 0.0)).rows[0].similarity.min() > 0.9999
    assert intruders(params, along, threshold=1.0, top=3).rows[0].similarity.shape == (3,)


def test_intruders_are_those_of_dense_decompositions() -> None:
    sites = (SITES[2], SITES[4], SITES[5])
    params, adapter = weights(sites), random_adapter(sites, rank=2)
    rows = intruders(params, adapter, threshold=0.8, top=4).rows
    assert len(rows) == 1 + 3 + 6
    for site in sites:
        found = [row for row in rows if row.path == site.path]
        before, change = dense(site, params[site.path]), dense(site, adapter[site.path].delta())
        for row, base, delta in zip(found, before, change, strict=True):
            _, base_values, known = np.linalg.svd(base, full_matrices=False)
            _, values, new = np.linalg.svd(base + delta, full_matrices=False)
            near(row.similarity, np.abs(new[:4] @ known.T).max(1), 1e-3)
            near(row.values, values[:4])
            near(row.base_values, base_values[:4])
            assert row.numbers == tuple(i for i in range(4) if row.similarity[i] < 0.8)


def test_intruders_of_what_is_no_low_rank_update() -> None:
    params = weights(SITES[:2]) | {"bias": jnp.ones(10)}
    whole = lora.Replace(params["heads"] + 1, SITES[1])
    report = intruders(params, lora.Adapter({"bias": lora.Replace(jnp.ones(10), BIAS), "heads": whole}))
    assert report.left_out == {"bias": "no linear map"}
    assert [row.path for row in report.rows] == ["heads"]
    fields = {"method": "alora", "invocation_tokens": (1, 2)}
    plain, waiting = (intruders(params, trained(params, each)).rows[0] for each in ({}, fields))
    near(waiting.similarity, plain.similarity)


@pytest.mark.parametrize("options", [{"threshold": 0.0}, {"threshold": 1.5}, {"top": 0}])
def test_intruders_refuse_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(lora.ConfigError, match="must be above 0"):
        intruders(weights(SITES[:1]), random_adapter(SITES[:1]), **options)


# Tables and pictures.


def report(name: str) -> Any:
    params, one, other = weights(), random_adapter(SITES, 0, 3), random_adapter(SITES, 1, 2)
    made = {
        "spectra": lambda: spectra(one), "spectra of a base": lambda: spectra(one, params),
        "overlap": lambda: overlap(one, other), "intruders": lambda: intruders(params, one),
        "rounding": lambda: rounding(params, SITES[:2]), "rounding of zeros": lambda: rounding(jnp.zeros((4, 4))),
        "spectra of nothing": lambda: spectra(lora.scale(one, 0.0)),
    }  # fmt: skip
    return made[name]()


@pytest.mark.parametrize("name", ["spectra", "spectra of a base", "overlap", "intruders", "rounding", "rounding of zeros", "spectra of nothing"])  # fmt: skip  # noqa: E501
def test_reports_print_and_draw(name: str, tmp_path: Path) -> None:
    found = report(name)
    assert all(row.name in str(found) for row in found.rows)
    assert len(found.summary().rows) == len({row.path for row in found.rows})
    found.plot(tmp_path / "picture", "a [title]")
    data = (tmp_path / "picture").read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    assert width > 1000 and height > 500 and len(data) > 20_000


def test_many_layers_are_lines_of_one_table(tmp_path: Path) -> None:
    named = [replace(SITES[0], path=f"params/layers_{i}/{name}/kernel") for i in range(40) for name in ("up", "down")]
    found = spectra(random_adapter(named))
    assert len(found.summary().rows) == 2
    assert {(row.group, row.position) for row in found.rows} >= {("params/layers_*/up/kernel", (39,))}
    found.plot(tmp_path / "many.png")
    names = [replace(SITES[0], path=f"module_{chr(97 + i)}/w") for i in range(15)]
    spectra(random_adapter(names)).plot(tmp_path / "names.png")
    with pytest.raises(lora.ParameterError, match="nothing to draw"):
        spectra(lora.Adapter({})).plot(tmp_path / "none.png")


def test_what_is_not_finite_is_left_out_of_pictures(tmp_path: Path) -> None:
    found = spectra(random_adapter(SITES[:2]), weights() | {"dense": jnp.zeros((12, 10))})
    assert found.rows[0].relative == float("inf")
    found.plot(tmp_path / "inf.png", "costs $5 or $6_{")


def test_pictures_need_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "lora_jax\[cli\]"'):
        report("spectra").plot(tmp_path / "x.png")


# On disk.


@pytest.mark.parametrize("name", sorted(file.parent.name for file in GOLDEN.glob("*/adapter_config.json")))
def test_factors_of_pefts_files(name: str) -> None:
    """Norms are those that `inspect` measures, which are held to PEFT's; what has no factors has a note."""
    from lora_jax.io.inspect import inspect

    adapter, notes = read_factors(GOLDEN / name)
    found = spectra(adapter).noted(notes)
    measured = {entry.name: entry for entry in inspect(GOLDEN / name).entries}
    for path in adapter:
        norms = [row.norm for row in found.rows if row.path == path]
        near(np.sqrt(np.sum(np.square(norms))), measured[path].norms[2], 1e-4)
    assert set(measured) - {"vera_A, vera_B"} <= {row.path for row in found.rows}
    assert all(row.values is not None or row.note for row in found.rows)


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        adapter = random_adapter([replace(SITES[0], path="up/kernel")], seed)
        lora.save(tmp_path / f"orbax{seed}", random_adapter([SITES[0], SITES[4], SITES[5]], seed))
        lora.peft.save(tmp_path / f"peft{seed}", adapter)
    lora.save(tmp_path / "bias", lora.Adapter({"bias": lora.Replace(jnp.ones(10), BIAS)}))
    (tmp_path / "there.png").write_bytes(b"mine")
    return tmp_path


@pytest.mark.parametrize("form", ["orbax", "peft"])
def test_inspect_draws(form: str, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"{form}0", "--plot", "one.png"]) == 0
    said = capsys.readouterr().out
    assert "effective rank" in said and "Written: one.png" in said
    assert main(["inspect", f"{form}0", "--against", f"{form}1", "--plot", "two.png"]) == 0
    assert "inputs φ" in capsys.readouterr().out
    assert main(["inspect", f"{form}0", "--against", f"{form}1"]) == 0
    for name in ("one.png", "two.png"):
        assert (saved / name).read_bytes().startswith(b"\x89PNG")


REFUSED = {
    "orbax0 --plot there.png": "there.png exists already",
    "orbax0 --plot nowhere/x.png": "nowhere is no directory",
    "orbax0 --plot x.pdf": "--plot writes a PNG",
    "nowhere --plot x.png": "There is nothing at nowhere",
    "bias --plot x.png": "There is nothing to draw: no update has low-rank factors",
    "orbax0 --against peft0 --plot x.png": "no parameter with factors in common",
    "orbax0 --against nowhere": "There is nothing at nowhere",
}


@pytest.mark.parametrize("args", REFUSED)
def test_inspect_refuses_in_one_line(args: str, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(saved.rglob("*"))
    assert main(["inspect", *args.split()]) in (1, 2)
    complaint = capsys.readouterr().err
    assert complaint.startswith("lora-jax: ") and complaint.count("\n") == 1
    assert REFUSED[args] in complaint
    assert sorted(saved.rglob("*")) == before
    assert (saved / "there.png").read_bytes() == b"mine"
