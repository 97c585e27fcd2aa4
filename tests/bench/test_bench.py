"""`lora-jax bench`: what is counted, compared before it is timed, and written; no test looks at times."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.bench import Benchmark, Dense, DisagreementError, Model, RunError, Settings, measure
from lora_jax.bench.programs import Program
from lora_jax.bench.result import draw
from lora_jax.bench.timing import rounds, steps
from lora_jax.cli import main
from lora_jax.errors import ConfigError

INTO, OUT, TOKENS, RANKS, ADAPTERS = 12, 10, (1, 6), (2, 3), (1, 3)
SMALL = Settings(ranks=RANKS, tokens=TOKENS, adapters=ADAPTERS, rounds=2)
TOY = Model("toy", layers=1, width=16, heads=2, kv_heads=1, hidden=24)


@pytest.fixture(scope="module")
def dense() -> Benchmark:
    return measure([Dense(INTO, OUT)], SMALL)


def test_operations(dense: Benchmark) -> None:
    for row in dense.rows:
        base, thin = 2 * row.tokens * INTO * OUT, 2 * row.tokens * (row.rank or 0) * (INTO + OUT)
        if row.mode in ("base", "merged"):
            assert row.flops == base
        elif row.mode == "adapter":
            assert row.flops == thin
        elif row.form == "factored":
            beside = row.tokens * OUT + row.rank * (INTO + OUT)  # The sum of both; the scale.
            assert base + thin <= row.flops <= base + thin + beside
        elif row.mode == "routed":
            assert row.flops > base + thin
    assert any(row.form == "factored" for row in dense.rows)


def test_every_mode_rank_and_number_of_tokens_is_there_once(dense: Benchmark) -> None:
    rows = [(row.tokens, row.mode, row.rank, row.adapters) for row in dense.rows]
    modes = [("adapter", None), ("separate", None), ("merged", None), *(("routed", count) for count in ADAPTERS)]
    of_rank = [(mode, rank, count) for rank in RANKS for mode, count in modes]
    assert rows == [(tokens, *each) for tokens in TOKENS for each in [("base", None, None), *of_rank]]
    for row in dense.rows:
        assert (row.form in ("rows", "mask", "blocks")) == (row.mode == "routed")
        assert (row.form in ("factored", "merged")) == (row.mode == "separate")
        assert row.bytes is not None and row.bytes > 0
        assert row.temporary_bytes is not None
        assert len(row.times) == SMALL.rounds and row.seconds == median(row.times) > 0
        assert row.ratio_quartiles[0] <= row.ratio <= row.ratio_quartiles[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model(dtype: Any) -> None:
    settings = Settings(ranks=(2,), tokens=(6,), adapters=(3,), length=3, dtype=dtype, rounds=1)
    base, adapter, _, merged, routed = measure([TOY], settings).rows
    assert (base.tokens, base.examples, routed.mode) == (6, 2, "routed")
    assert merged.flops == base.flops
    sites = TOY.work((2, 3), dtype, 0).sites
    assert len(sites) == 7 * TOY.layers
    if dtype == "float32":  # In narrower dtypes casts count too.
        assert adapter.flops == 2 * 6 * 2 * sum(site.fan_in + site.fan_out for site in sites)


def test_examples_of_several_tokens() -> None:
    settings = Settings(ranks=(2,), tokens=(16,), adapters=(2,), length=8, rounds=1)
    *_, routed = measure([Dense(INTO, OUT)], settings).rows
    assert (routed.examples, routed.form) == (2, "rows")


def off(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its results off by a little."""
    return lambda *args, **kwargs: jax.tree.map(lambda leaf: leaf * 1.01, fn(*args, **kwargs))


BROKEN = {
    "merge": lambda params, adapter: params,
    "thin": off(lambda adapter, reads: {"w": reads["w"] @ adapter["w"].a.T @ adapter["w"].b}),
    "adapt": lambda fn: off(lora.adapt(fn)),
    "AdapterBank": type("Bank", (), {"of": staticmethod(lambda given: lora.AdapterBank.of(given[::-1]))}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_mode_that_computes_something_else_is_not_timed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"lora_jax.bench.programs.{name}", BROKEN[name])
    monkeypatch.setattr("lora_jax.bench.timing.rounds", lambda *args, **kwargs: pytest.fail("timed"))
    with pytest.raises(DisagreementError, match="computes something else"):
        measure([Dense(INTO, OUT)], SMALL)


def test_nan_is_a_disagreement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_jax.bench.programs.merge", lambda params, adapter: {"w": params["w"] * jnp.nan})
    with pytest.raises(DisagreementError):
        measure([Dense(INTO, OUT)], SMALL)


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED"), MemoryError("Unable to allocate")])
def test_what_the_device_cannot_run(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("lora_jax.bench.timing.rounds", fail)
    with pytest.raises(RunError, match=f"12×10, 1 token cannot be run here: {error}"):
        measure([Dense(INTO, OUT)], SMALL)


class Silent:
    """A program of a backend that counts nothing."""

    def cost_analysis(self) -> None:
        return None

    def memory_analysis(self) -> None:
        return None


def test_a_backend_that_does_not_count() -> None:
    program = Program("base", Silent(), ())
    assert (program.counted("flops"), program.counted("bytes accessed"), program.temporary) == (None, None, None)


def test_progress_is_told_to_the_end() -> None:
    told: list[int] = []
    measure([Dense(INTO, OUT)], SMALL, progress=lambda done, now: told.append(done))
    assert told == list(range(1, steps([Dense(INTO, OUT)], SMALL) + 1))


def test_rounds_call_what_they_say() -> None:
    called: list[str] = []
    runs = {name: lambda name=name: called.append(name) for name in "ab"}
    times = rounds(runs, 3, warm_up=1, lead=2, after=lambda: called.append("|"))
    assert called[:2] == ["a", "b"]
    for each in "".join(called[2:]).split("|")[:3]:
        assert each in ("aaabbb", "bbbaaa")
    assert [len(times[name]) for name in "ab"] == [3, 3]


ARGS = "bench --shapes 12x10 --model tiny --ranks 1 2 --tokens 2 --adapters 2 --rounds 2"


def test_the_files_agree_with_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "bench"
    assert main([*ARGS.split(), "--out", str(out)]) == 0
    assert {path.name for path in tmp_path.rglob("*")} == {"new", "bench", "bench.json", "bench.md", "bench.png"}
    found = json.loads((out / "bench.json").read_text())
    assert found["settings"]["ranks"] == [1, 2] and found["machine"]["jax"]
    assert {row["case"] for row in found["rows"]} == {"12×10", "tiny transformer, 2 × 32"}
    for row in found["rows"]:
        assert row["seconds"] == median(row["times"])
    (shown, progress), markdown = capsys.readouterr(), (out / "bench.md").read_text()
    assert "bench: step 22/22" in progress
    lines = [re.split(" {2,}", line) for line in shown.splitlines() if "  " in line]
    cells = [["" if cell == "-" else cell for cell in line] for line in lines if line[0] != "mode"]
    written = [cut(line, "|") for line in markdown.splitlines() if line.startswith("|")]
    assert cells == [line for line in written if line[0] not in ("mode", "---")]
    assert len(cells) == len(found["rows"])
    for row, line in zip(found["rows"], cells, strict=True):
        assert line[0].startswith(row["mode"]) and line[1] == row["form"]
        assert line[2] == str(row["rank"] or "")
        assert row["mode"] == "base" or line[4].startswith(f"{row['ratio']:.2f}"[:3])
    assert (out / "bench.png").read_bytes()[:4] == b"\x89PNG"


def cut(line: str, mark: str) -> list[str]:
    return [cell.strip() for cell in line.strip(mark).split(mark)]


def test_the_picture_shows_the_rows(dense: Benchmark) -> None:
    figure = draw(dense.rows, dense.settings, dense.machine)
    first, second = figure.axes
    assert first.get_title() != second.get_title()
    for axes, tokens in ((first, 1), (second, 6)):
        assert axes.get_xlabel() == "rank"
        lines = {str(line.get_label()): line for line in axes.get_lines()}
        assert len(lines) == 1 + 3 + len(ADAPTERS)
        for mode in ("adapter", "separate", "merged", "routed, 3"):
            label = next(label for label in lines if label.startswith(mode))
            rows = [row for row in dense.rows if row.tokens == tokens and row.mode == mode.split(",")[0]]
            rows = [row for row in rows if row.adapters in (None, 3)]
            np.testing.assert_array_equal(lines[label].get_xdata(), RANKS)
            np.testing.assert_array_equal(lines[label].get_ydata(), [row.ratio for row in rows])
    assert "lower is better" in first.get_ylabel()
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {*lines}


def test_stopped_by_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    for name in ("timing.rounds", "result.draw"):
        monkeypatch.setattr(f"lora_jax.bench.{name}", stop)
        assert main([*ARGS.split(), "--out", str(tmp_path / "bench")]) == 130
        assert capsys.readouterr().err.splitlines()[-1] == "lora-jax: stopped; nothing was left behind"
        assert not list(tmp_path.iterdir())
        monkeypatch.undo()


REFUSED = {
    "--shapes 1024*1024": "'1024*1024' is no shape: write inputs x outputs, such as 1024x4096",
    "--shapes 0x4": "'0x4' is no shape",
    "--shapes 99999999999x4": "'99999999999x4' is too large: at most 16777216 inputs and outputs",
    "--adapters 1000000000000": "adapters=1000000000000 is too large: at most 65536",
    "--shapes 8x6 --ranks 4 7": "rank 7 is larger than a side of 8×6: give ranks up to 6",
    "--model tiny": "rank 64 is larger than a side of tiny transformer, 2 × 32: give ranks up to 16",
    "--model huge": "tiny",
    "--shapes 8x6 8x6 --ranks 2": "8×6 is given twice",
    "--tokens 0": "tokens must be at least 1, got 0",
    "--tokens 8 12 --length 8": "tokens=12 cannot be cut into examples of length=8",
    "--ranks 0": "ranks must be at least 1",
    "--ranks": "ranks: give at least one",
    "--adapters 0": "adapters must be at least 1",
    "--adapters 3 3": "adapters: 3 is given twice",
    "--length 0": "length must be at least 1",
    "--rounds 0": "rounds must be at least 1",
    "--seed -1": "seed must be at least 0",
    "--dtype float16": "('float32', 'bfloat16')",
    "--out taken": "taken exists already: choose another directory for --out",
    "--out file": "file exists already",
    "--out file/below": "cannot write to file/below: ",
}


@pytest.mark.parametrize("args", REFUSED)
def test_refusals_are_one_line(
    args: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").mkdir()
    Path("file").touch()
    assert main(["bench", *args.split()]) == 2
    said, complaint = capsys.readouterr()
    assert (said, complaint.count("\n")) == ("", 1)
    assert complaint.startswith("lora-jax: ")
    assert REFUSED[args] in complaint
    assert {path.name for path in tmp_path.iterdir()} == {"taken", "file"}


def test_settings_from_python() -> None:
    with pytest.raises(ConfigError, match="float32, bfloat16"):
        Settings(dtype="int8")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="cases: give at least one"):
        measure([])
