"""`lora-jax finetune`: the whole job on tiny settings, resuming bit for bit, and refusals that write nothing."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same

import lora_jax as lora
from lora_jax.cli import main
from lora_jax.cli.finetune import Finetune
from lora_jax.errors import CheckpointError
from lora_jax.models import Transformer, TransformerConfig
from lora_jax.report.terminal import Progress
from lora_jax.train import data, pretrain
from lora_jax.train.job import FinetuneJob
from lora_jax.train.loop import TrainingError
from lora_jax.train.metrics import Metrics, cross_entropy, evaluate, plot_loss, read_metrics
from lora_jax.train.options import AdapterOptions, TrainingOptions, flag


def interrupt(title: str, step: int) -> Callable[..., None]:
    """A `Progress.update` that presses Ctrl-C after a step."""
    update = Progress.update

    def interrupting(self: Progress, done: int, now: str) -> None:
        update(self, done, now)
        if (self._title, done) == (title, step):
            signal.raise_signal(signal.SIGINT)

    return interrupting


def assert_equal_runs(one: Path, other: Path) -> None:
    assert_same(lora.load(one / "adapter"), lora.load(other / "adapter"))
    assert (one / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in other.iterdir())


def test_the_whole_job(whole: Path):
    assert sorted(path.name for path in whole.iterdir()) == ["adapter", "config.json", "loss.png", "metrics.jsonl"]
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")
    records = read_metrics(whole / "metrics.jsonl")
    assert [(record["step"], record["tokens"]) for record in records] == [(step, 128) for step in range(1, 7)]
    assert [record["step"] for record in records if "eval_loss" in record] == [3, 6]
    assert (
        all({"loss", "norm", "learning_rate"} <= record.keys() for record in records) and records[0]["base_eval_loss"]
    )
    assert all(bool((update.b != 0).any()) for update in lora.load(whole / "adapter").values())
    assert lora.load_config(whole / "adapter") == lora.LoraConfig(dropout=0.1)
    config = json.loads((whole / "config.json").read_text())
    assert (config["options"]["training"]["steps"], config["lora"]["dropout"]) == (6, 0.1)


def test_what_it_says_and_that_the_base_is_read_from_the_cache(
    tiny: list[str],
    folder: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def never(*args: Any) -> None:
        raise AssertionError("pre-trained again")

    monkeypatch.setattr("lora_jax.train.job.pretrain", never)
    text = tmp_path / "wörter.txt"
    text.write_text("Grüße aus Köln! [bold]no markup[/bold]\n" * 20)
    assert main([*tiny, "--data", str(text), "--targets", "query", "value", "--out", str(tmp_path / "out")]) == 0
    said, complaints = capsys.readouterr()
    assert "fine-tuning: step 6/6" in complaints
    for part in (
        "trainable params: 1,792 || all params: 28,576 || trainable%: 6.2710",
        "params/layers/attn/query/kernel",
        "base",
        "bits/byte",
        "agree: largest difference",
        "[bold]no markup[/bold]",
        f"{tmp_path / 'out' / 'loss.png'}",
    ):
        assert part in said


def test_ctrl_c_in_either_stage_and_resume_give_the_undisturbed_run_bit_for_bit(
    tiny: list[str], folder: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("LORA_JAX_CACHE", str(folder / "other cache"))
    out = folder / "with a space"
    resume = ["finetune", "--out", str(out), "--resume"]
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "update", interrupt("pre-training", 5))
        assert main([*tiny, "--out", str(out)]) == 130
    assert shlex.join(resume) in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "update", interrupt("fine-tuning", 4))
        assert main(resume) == 130
    assert not (out / "adapter").exists()
    capsys.readouterr()
    assert main([*tiny, "--out", str(out)]) == 2
    assert "--resume to continue" in capsys.readouterr().err
    assert main([*resume, "--steps", "7"]) == 2
    assert "leave out --steps" in capsys.readouterr().err
    assert main(resume) == 0
    assert_equal_runs(out, whole)


def test_json_is_all_that_is_printed(
    tiny: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*tiny, "--json", "--out", str(tmp_path / "out")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["out"] == str(tmp_path / "out")
    assert found["adapter"]["trainable"] == sum(row["trainable"] for row in found["adapter"]["rows"])
    assert all(losses["adapted"]["bits"] > 0 for losses in found["losses"].values())
    assert found["samples"].keys() == {"base", "adapted"} and found["difference"] < 1e-3
    assert "json" not in json.loads((tmp_path / "out" / "config.json").read_text())["options"]


def test_a_finished_run_is_left_alone(tiny: list[str], whole: Path, capsys: pytest.CaptureFixture[str]):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    assert main([*tiny, "--out", str(whole)]) == 2
    assert "finished run" in capsys.readouterr().err
    assert main(["finetune", "--out", str(whole), "--resume"]) == 0
    assert "nothing is left to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


@pytest.mark.full
def test_a_real_ctrl_c(tiny: list[str], folder: Path, whole: Path):
    out = folder / "process"
    cached = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or ""}
    environment = os.environ | cached | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "lora_jax", *tiny, "--steps", "100000", "--out", str(out)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len(read_metrics(out / "metrics.jsonl")) < 5:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said, complaints = process.communicate(timeout=300)
    assert process.returncode == 130, said + complaints
    assert f"to continue: python -m lora_jax finetune --out {out} --resume" in complaints
    assert complaints.count("\n") == 1
    assert list((out / "state" / "finetune").iterdir())


REFUSED = {
    "": "finetune",
    "finetun": "there is no verb finetun: did you mean finetune?",
    "finetune --bogus 3": "--bogus",
    "finetune --step 3": "finetune has no option --step: did you mean --steps?",
    "finetune --steps x": "--steps",
    "finetune --steps 0": "--steps must be above 0, got 0",
    "finetune --warmup -1": "--warmup must be at least 0",
    "finetune --lr nan": "--lr must be above 0",
    "finetune --learning-rate 1": "did you mean --lr?",
    "finetune --batch-size 1": "did you mean --batch?",
    "finetune --seq-len 1": "did you mean --length?",
    "finetune --optimizer adamx": "there is no optimizer 'adamx' (nearest: adamw",
    "finetune --optimizer sgd --weight-decay 0.1": "sgd decays no weights",
    "finetune --optimizer-options b2": "--optimizer-options takes NAME=NUMBER, not 'b2'",
    "finetune --patience 0": "--patience must be at least 1",
    "finetune --rank 0": "rank",
    "finetune --dropout 1.5": "dropout",
    "finetune --init pisssa": "init",
    "finetune --targets quarry": "params/layers/attn/query/kernel",
    "finetune --model huge": "tiny",
    "finetune --pretrain-steps 0": "--pretrain-steps",
    "finetune --length 10000000": "are needed",
    "finetune --resume": "nothing to resume",
    "finetune --resume --overwrite": "give one of them",
    "finetune --data missing.txt": "cannot read missing.txt: No such file",
    "finetune --data .": "cannot read .: Is a directory",
    "finetune --data empty.txt": "empty.txt is empty",
    "finetune --data binary.txt": "binary.txt is not UTF-8 text: byte 0xff at position 1",
    "finetune --data short.txt": "short.txt has 5 bytes, but 1,026 are needed",
    "finetune --out short.txt": "cannot write to short.txt",
    "finetune --out short.txt/below": "cannot write to short.txt/below",
}


@pytest.mark.parametrize("args", REFUSED)
def test_refusals_are_one_line_and_write_nothing(
    args: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))
    files = {"empty.txt": b"\n", "binary.txt": b"a\xff", "short.txt": b"short"}
    for name, content in files.items():
        Path(name).write_bytes(content)
    assert main(args.split()) == 2
    said, complaint = capsys.readouterr()
    assert said == ""
    assert complaint.startswith("lora-jax: ")
    assert complaint.count("\n") == 1
    assert REFUSED[args] in complaint
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_the_extra_is_named_when_it_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("lora_jax.cli.find_spec", lambda name: None)
    assert main(["finetune"]) == 2
    assert (
        capsys.readouterr().err == 'lora-jax: the command line needs tyro and matplotlib: pip install "lora_jax[cli]"\n'
    )


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]):
    assert main(["finetune", "--help"]) == 0
    shown = capsys.readouterr().out
    options = {field.name for group in (Finetune, AdapterOptions, TrainingOptions) for field in fields(group)}
    for option in options - {"adapter", "training"}:
        assert flag(option) in shown


SPOILT = {
    "model": ("huge", "model: 'huge' is no"),
    "data": (5, "data: 5 is no Path"),
    "remat": (1, "remat: 1 is no bool"),
    "more": (1, "there is no option more"),
    "training": ({"steps": "3"}, "training: steps: '3' is no int"),
    "adapter": ({"targets": [5]}, "adapter: targets: 5 is no str"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_options_of_a_config_that_mean_nothing_are_named(
    name: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((whole / "config.json").read_text())
    config["options"][name], complaint = SPOILT[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["finetune", "--resume", "--out", str(tmp_path)]) == 2
    assert complaint in capsys.readouterr().err


def test_failure_is_one_line_and_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def fail(job: FinetuneJob) -> None:
        raise TrainingError("the loss is nan at step 4")

    monkeypatch.setattr(FinetuneJob, "run", fail)
    assert main(["finetune", "--model", "tiny"]) == 1
    assert capsys.readouterr().err == "lora-jax: the loss is nan at step 4\n"


def test_the_cache_is_keyed_by_all_that_the_base_depends_on_and_survives_damage(folder: Path):
    model = Transformer(TransformerConfig())
    recipe, corpus = pretrain.Recipe(steps=5, seq_len=8), data.split("text", b"0123456789" * 10, 8)
    path = pretrain.cache_path(model, recipe, corpus)
    assert path.parent == folder / "cache"
    others = [
        pretrain.cache_path(Transformer(TransformerConfig(layers=3)), recipe, corpus),
        pretrain.cache_path(model, replace(recipe, steps=6), corpus),
        pretrain.cache_path(model, recipe, data.split("text", b"0123456789" * 11, 8)),
    ]
    assert len({path, *others}) == 4
    assert pretrain.cache_path(Transformer(TransformerConfig(remat=True)), recipe, corpus) == path

    variables = {"w": jnp.arange(3.0)}
    assert pretrain.load_cached(path, variables) is None
    pretrain.store(path, variables)
    pretrain.store(path, variables)
    assert_same(pretrain.load_cached(path, variables), variables)
    for file in path.rglob("*"):
        if file.is_file():
            file.write_bytes(b"damaged")
    assert pretrain.load_cached(path, variables) is None
    assert not list(path.parent.glob("partial-*"))


def test_batches_depend_on_seed_and_step_alone():
    text = np.arange(200, dtype=np.uint8)
    tokens = data.batch(text, 1, 2, 4, 16)
    assert tokens.shape == (4, 17)
    assert (np.diff(tokens.astype(int)) == 1).all()
    assert_same(data.batch(text, 1, 2, 4, 16), tokens)
    assert not np.array_equal(data.batch(text, 1, 3, 4, 16), tokens)
    assert not np.array_equal(data.batch(text, 2, 2, 4, 16), tokens)
    assert_same(data.batch(text[:17], 0, 0, 1, 16), text[None, :17])


def test_the_stdlib_sample_is_fixed_and_holds_no_evaluation_text():
    source = data.python_source()
    assert source == data.python_source()
    assert 4_000_000 <= len(source) <= 4_500_000
    assert data.python_topics()[:200] not in source
    assert data.split("source", source, 256).held_out.size == len(source) // 10


def test_evaluation_weights_every_sequence_once():
    sequences = np.arange(5 * 4, dtype=np.uint8).reshape(5, 4)
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(256, 256)), jnp.float32)
    predict = lambda tokens: logits[tokens]  # noqa: E731
    expected = float(cross_entropy(predict(sequences[:, :-1]), sequences).mean())
    assert evaluate(predict, sequences, size=3).nats == pytest.approx(expected, rel=1e-6)


def test_metrics_forget_what_a_resumed_run_will_do_again(tmp_path: Path):
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
