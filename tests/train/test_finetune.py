"""`lora-jax finetune`: from a model's directory and examples to PEFT's adapter, metrics and a merged model."""

import json
import shlex
import signal
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import assert_close
from safetensors.numpy import load_file
from tiny_runs import assert_equal_runs

import lora_jax as lora
from lora_jax import models
from lora_jax.cli import main
from lora_jax.cli.finetune import Finetune
from lora_jax.errors import CheckpointError
from lora_jax.report.terminal import Progress
from lora_jax.train.job import FinetuneJob
from lora_jax.train.loop import TrainingError
from lora_jax.train.metrics import Metrics, plot_loss, read_metrics
from lora_jax.train.options import AdapterOptions, DataOptions, TrainingOptions, flag


def test_the_files_of_a_run(whole: Path, model: Path, data: Path) -> None:
    assert sorted(path.name for path in whole.iterdir()) == ["adapter", "config.json", "loss.png", "metrics.jsonl"]
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")
    records = read_metrics(whole / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert all({"step", "loss", "tokens", "norm", "learning_rate"} <= record.keys() for record in records)
    assert [record["step"] for record in records if "eval_loss" in record] == [3, 6]
    assert records[0]["base_eval_loss"] > records[-1]["eval_loss"]
    config = json.loads((whole / "config.json").read_text())
    assert (config["options"]["training"]["steps"], config["lora"]["dropout"]) == (6, 0.1)
    assert config["model"]["name"] == str(model) and set(config["data"]) == {data.name}
    card = (whole / "adapter" / "README.md").read_text()
    assert f"base_model: {model}" in card and "| rank | 8 |" in card and config["data"][data.name] in card


def test_the_adapter_is_pefts_and_belongs_to_the_directory(whole: Path, model: Path) -> None:
    config = json.loads((whole / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model) and config["task_type"] == "CAUSAL_LM"
    assert sorted(config["target_modules"]) == ["down_proj", "q_proj"] and config["r"] == 8
    names = load_file(whole / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight" in names and len(names) == 8
    loaded = models.load(model)
    sites = lora.find_sites(loaded.apply, loaded.params, np.zeros((1, 4), np.int32))
    adapter = lora.peft.load(whole / "adapter", loaded.params, sites)
    assert all(bool((update.b != 0).any()) for update in adapter.values())


def test_merge_and_what_is_said(
    tiny: list[str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([*tiny, "--merge", "--out", str(out)]) == 0
    said, complaints = capsys.readouterr()
    assert "fine-tuning: step 6/6, loss" in complaints and "tokens/s" in complaints and "peak" in complaints
    for part in (
        "0+0=[0<|endoftext|>]",
        "trainable params: ",
        "model/layers/self_attn/q_proj/weight",
        "held out",
        "merged into the base: the loss differs by",
        f"lora-jax generate --model {model} --adapter {out / 'adapter'} --prompt",
        f"lora-jax export {out / 'adapter'}",
        f"{out / 'loss.png'}: ",
    ):
        assert part in said, part
    loaded, merged = models.load(model), models.load(out / "merged")
    tokens = np.arange(12, dtype=np.int32).reshape(1, 12)
    sites = lora.find_sites(loaded.apply, loaded.params, tokens)
    adapter = lora.peft.load(out / "adapter", loaded.params, sites)
    assert_close(
        merged.apply(merged.params, tokens), lora.adapt(loaded.apply)(loaded.params, adapter, tokens), factor=10
    )


def interrupt(step: int) -> Callable[..., None]:
    """A `Progress.update` that presses Ctrl-C after a step."""
    update = Progress.update

    def interrupting(self: Progress, done: int, now: str) -> None:
        update(self, done, now)
        if done == step:
            signal.raise_signal(signal.SIGINT)

    return interrupting


def test_ctrl_c_and_resume_give_the_undisturbed_run(
    tiny: list[str], folder: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "with a space"
    resume = ["finetune", "--out", str(out), "--resume"]
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "update", interrupt(4))
        assert main([*tiny, "--out", str(out)]) == 130
    assert shlex.join(resume) in capsys.readouterr().err
    assert not (out / "adapter").exists()
    assert main([*tiny, "--out", str(out)]) == 2
    assert "--resume to continue" in capsys.readouterr().err
    assert main([*resume, "--steps", "7"]) == 2
    assert "leave out --steps" in capsys.readouterr().err
    assert main(resume) == 0
    assert_equal_runs(out, whole)


def test_a_finished_run_is_left_alone_and_reproduced_by_its_config(
    tiny: list[str], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    assert main([*tiny, "--out", str(whole)]) == 2
    assert "finished run" in capsys.readouterr().err
    assert main(["finetune", "--out", str(whole), "--resume"]) == 0
    assert "nothing is left to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before
    assert main(["finetune", "--config", str(whole / "config.json"), "--out", str(tmp_path / "again"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["losses"]["adapted"]["loss"] < found["losses"]["base"]["loss"]
    assert (tmp_path / "again" / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    assert (tmp_path / "again" / "config.json").read_text() == (whole / "config.json").read_text()


def test_a_yaml_file_and_flags_that_go_before_it(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"model: {model}\ndata: {data}\nsteps: 2\nbatch: 2\nlength: 32\ntargets: [q_proj]\nrank: 3\nlr: 1e-2\n"
    (tmp_path / "run.yaml").write_text(text)
    args = ["finetune", "--config", str(tmp_path / "run.yaml"), "--rank", "2", "--out", str(tmp_path / "out")]
    assert main([*args, "--optimizer", "lion", "--seed", "3"]) == 0
    options = json.loads((tmp_path / "out" / "config.json").read_text())["options"]
    assert (options["adapter"]["rank"], options["adapter"]["targets"], options["training"]["seed"]) == (
        2,
        ["q_proj"],
        3,
    )
    assert (options["training"]["optimizer"], options["training"]["lr"]) == ("lion", 0.01)


def test_patience_ends_a_run_and_the_best_adapter_is_kept(tiny: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = [*tiny, "--steps", "40", "--lr", "3", "--clip", "0", "--eval-every", "1", "--patience", "2"]
    assert main([*args, "--out", str(out)]) == 0
    records = read_metrics(out / "metrics.jsonl")
    losses = [record["eval_loss"] for record in records]
    best = int(np.argmin(losses))
    assert len(records) == best + 3 < 40
    kept = (
        load_file(out / "best" / "adapter_model.safetensors"),
        load_file(out / "adapter" / "adapter_model.safetensors"),
    )
    assert any((kept[0][name] != kept[1][name]).any() for name in kept[0])


def test_an_adapter_goes_on_from_one_on_disk(tiny: list[str], whole: Path, tmp_path: Path) -> None:
    args = [each for each in tiny if each not in ("--dropout", "0.1", "--targets", "q_proj", "down_proj")]
    assert main([*args, "--from", str(whole / "adapter"), "--lr", "1e-9", "--out", str(tmp_path / "out")]) == 0
    one, other = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (whole, tmp_path / "out"))
    assert one.keys() == other.keys()
    for name in one:
        assert_close(other[name], one[name], factor=10)


STARTS = {
    "dora": ["--method", "dora"],
    "pissa": ["--init", "pissa"],
    "eva": ["--init", "eva"],
    "corda": ["--init", "corda-kpm"],
    "lora-ga": ["--init", "lora-ga"],
    "lora-fa": ["--method", "lora-fa", "--precondition", "lora-fa"],
    "adalora": ["--method", "adalora", "--target-rank", "4"],
    "vera": ["--method", "vera", "--rank", "16"],
    "rslora": ["--rslora", "--lora-plus", "8", "--rate-pattern", "q_proj=0.5", "--rank-pattern", "q_proj=4"],
    "trained": ["--train", "norm", "--trainable-tokens", "65", "66"],
}


SOON = ("eva", "adalora")
METHODS = [pytest.param(name, marks=() if name in SOON else pytest.mark.full) for name in STARTS]


@pytest.mark.parametrize("name", METHODS)
def test_methods_and_initialisers(name: str, tiny: list[str], tmp_path: Path) -> None:
    args = [*tiny, "--dropout", "0", "--steps", "2", "--eval-every", "2", "--init-batches", "2", *STARTS[name]]
    assert main([*args, "--out", str(tmp_path / "out")]) == 0
    records = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert np.isfinite([record["loss"] for record in records]).all()


def test_preferences(model: Path, tmp_path: Path) -> None:
    lines = [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    args = (
        f"finetune --task dpo --model {model} --data {tmp_path}/pairs.jsonl --length 64 --batch 2 --steps 8 --lr 0.02"
    )
    assert main([*args.split(), "--eval-every", "8", "--warmup", "1", "--out", str(tmp_path / "out")]) == 0
    records = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert records[0]["loss"] == pytest.approx(np.log(2), rel=1e-4)
    assert records[-1]["eval_loss"] < 0.6 and records[-1]["eval_accuracy"] == 1.0


def test_a_loss_that_is_not_finite_names_the_lines(
    tiny: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [*tiny, "--lr", "1e38", "--clip", "0", "--out", str(tmp_path / "out")]
    assert main(args) == 1
    complaint = capsys.readouterr().err.splitlines()[-1]
    assert "at step" in complaint and "whose batch holds the examples of lines" in complaint and str(data) in complaint


def test_failure_is_one_line_and_exit_code_1(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(job: FinetuneJob) -> None:
        raise TrainingError("the loss is nan at step 4")

    monkeypatch.setattr(FinetuneJob, "run", fail)
    assert main([*tiny, "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == "lora-jax: the loss is nan at step 4\n"


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "--help"]) == 0
    shown = capsys.readouterr().out
    groups = (Finetune, AdapterOptions, TrainingOptions, DataOptions)
    options = {field.name for group in groups for field in fields(group)}
    for option in options - {"adapter", "training", "reading", "source"}:
        assert flag(option) in shown
    assert "--from" in shown


def test_metrics_forget_what_a_resumed_run_will_do_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    for step in (1, 2, 3):
        metrics.write(step, {"loss": 1 / step})
    path.write_text(path.read_text() + '{"step": 4, "tr')
    Metrics(path, step=2)
    assert read_metrics(path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]
    Metrics(path)
    assert read_metrics(path) == []


@pytest.mark.parametrize("line", ["", "{", "[]", "{}", '{"step": "1"}', "[" * 100_000])
def test_a_line_that_is_no_record_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line 2, is no record of a run"):
        Metrics(path, step=2)


@pytest.mark.parametrize("records", [[], [{"step": 4, "loss": 2.0}], [{"step": 5, "eval_loss": 1.0}]])
def test_metrics_that_are_missing_are_not_drawn(records: list[dict[str, float]], tmp_path: Path) -> None:
    if records:
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png", "title")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl cannot be written: No such file"):
        metrics.flush()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl cannot be written: Is a directory"):
        metrics.write(1, {})


def test_one_program_for_all_steps(whole: Path, tiny: list[str], tmp_path: Path) -> None:
    compiled: list[Any] = []
    usual = jax.jit

    def counted(function: Any, **options: Any) -> Any:
        made = usual(function, **options)
        if getattr(function, "__name__", "") == "step":
            compiled.append(made)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", counted)
        assert main([*tiny, "--out", str(tmp_path / "out")]) == 0
    assert [each._cache_size() for each in compiled] == [1]


def test_the_encoding_of_many_examples_is_shown(
    data: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("lora_jax.train.material._MANY", 60)
    how = "--length 32 --batch 2 --steps 1 --held-out 0 --targets q_proj"
    assert main(f"finetune --model {model} --data {data} --out {tmp_path}/out {how}".split()) == 0
    assert "encoding: example 64/64, 100%" in capsys.readouterr().err
