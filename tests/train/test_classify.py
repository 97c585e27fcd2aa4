"""`--task classify`: a head that the model has or a new one, merged, on a mesh, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_runs import bytes_encoder, bytes_model, in_two_processes

from lora_jax import models
from lora_jax.cli import main
from lora_jax.models.classes import class_names
from lora_jax.train.metrics import read_metrics

HOW = "--length 64 --batch 8 --steps 16 --eval-every 8 --held-out 8 --warmup 1 --lr 0.03"


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of two classes."""
    path = tmp_path_factory.mktemp("labels") / "labels.jsonl"
    lines = [{"input": f"{'good' if i % 2 else 'bad'} {i}", "label": "yes" if i % 2 else "no"} for i in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def classify(base: Path, labels: Path, out: Path, more: str = "") -> int:
    args = f"finetune --task classify --model {base} --data {labels} --out {out} {HOW} {more}"
    return main(args.split())


BASES = {
    "decoder": ["score"],
    "encoder": ["classifier"],
    "encoder without a head": ["bert.pooler.dense", "classifier"],
}


@pytest.mark.parametrize("kind", BASES)
def test_a_model_learns_classes_and_is_merged(
    kind: str, model: Path, labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = model
    if kind.startswith("encoder"):
        bare = {"architectures": ["BertModel"], "pooled": False}
        base = bytes_encoder(tmp_path / "m", **({} if kind == "encoder" else bare))
    assert classify(base, labels, tmp_path / "out", "--merge") == 0
    records = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert records[0]["base_eval_loss"] > 0.3 and records[-1]["eval_accuracy"] == 1.0
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", BASES[kind])
    merged = models.load(tmp_path / "out" / "merged")
    assert (class_names(merged), merged.tokenizer is None) == (("no", "yes"), False)
    assert f"lora-jax evaluate --model {base} --adapter" in capsys.readouterr().out
    args = f"evaluate --model {base} --data {labels} --adapter {tmp_path}/out/adapter --merged {tmp_path}/out/merged"
    assert main([*args.split(), "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["merged"]["accuracy"] == rows["adapter out"]["accuracy"] == 1.0
    np.testing.assert_allclose(rows["merged"]["loss"], rows["adapter out"]["loss"], rtol=1e-3, atol=1e-6)


def test_a_mesh_gives_the_losses_of_one_device(model: Path, labels: Path, tmp_path: Path) -> None:
    losses = {}
    for mesh in ("", "--mesh data=2,fsdp=2,tensor=2"):
        out = tmp_path / f"out{len(mesh)}"
        assert classify(model, labels, out, f"{mesh} --steps 3 --eval-every 3 --merge") == 0
        records = read_metrics(out / "metrics.jsonl")
        losses[mesh] = [each[name] for each in records for name in ("loss", "norm", "eval_loss") if name in each]
    np.testing.assert_allclose(*losses.values(), rtol=1e-5)
    heads = [load_file(out / "merged" / "model.safetensors")["score.weight"] for out in sorted(tmp_path.iterdir())]
    np.testing.assert_allclose(*heads, rtol=1e-4, atol=1e-6)


def test_an_adapter_for_classes_is_for_no_other_model(
    model: Path, labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert classify(model, labels, tmp_path / "out", "--steps 1 --held-out 0") == 0
    adapter = tmp_path / "out" / "adapter"
    assert main(f"generate --model {model} --adapter {adapter} --prompt a".split()) == 2
    assert "Unexpected: score.weight" in (said := capsys.readouterr().err)
    assert "trained to tell classes apart (task_type SEQ_CLS): lora-jax evaluate takes it" in said
    args = f"evaluate --model {model} --adapter {adapter} --data {labels} --labels no perhaps yes"
    assert main(args.split()) == 2
    assert "The model is a decoder for 3 classes: are these all" in capsys.readouterr().err


@pytest.mark.full
def test_two_processes_write_one_merged_model(model: Path, labels: Path, tmp_path: Path) -> None:
    how = f"{HOW} --steps 3 --eval-every 3 --merge"
    assert classify(model, labels, tmp_path / "one", "--steps 3 --eval-every 3 --merge") == 0
    args = f"finetune --task classify --model {model} --data {labels} --out {tmp_path}/two {how} --mesh data=2,fsdp=2"
    in_two_processes(args.split())
    one, two = (load_file(tmp_path / name / "merged" / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, each in one.items():
        np.testing.assert_allclose(each, two[name], rtol=1e-4, atol=1e-5)


def test_classes_have_the_numbers_that_the_model_gives_them(labels: Path, tmp_path: Path) -> None:
    base = bytes_encoder(tmp_path / "m", id2label={"0": "yes", "1": "no"})
    assert classify(base, labels, tmp_path / "out", "--steps 1 --merge") == 0
    assert class_names(models.load(tmp_path / "out" / "merged")) == ("yes", "no")
    text = (tmp_path / "out" / "merged" / "config.json").read_text()
    assert json.loads(text)["id2label"] == {"0": "yes", "1": "no"}


def test_what_cannot_be_trained_so_is_refused(
    model: Path, labels: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = bytes_encoder(tmp_path / "encoder")
    assert main(["finetune", "--model", str(encoder), "--data", str(data), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "is an encoder for 2 classes, which continues no texts: --task classify trains it" in said
    three = bytes_encoder(tmp_path / "three", id2label={"0": "a", "1": "b", "2": "c"})
    assert classify(three, labels, tmp_path / "out") == 2
    assert "has a head for 3 classes, and the data have 2" in capsys.readouterr().err
    score = bytes_model(
        tmp_path / "score", architectures=["LlamaForSequenceClassification"], id2label={"0": "no", "1": "yes"}
    )
    assert main(["generate", "--model", str(score), "--prompt", "a"]) == 2
    assert "is a decoder for 2 classes, which continues no texts" in capsys.readouterr().err
    single = tmp_path / "single.jsonl"
    single.write_text("".join(line for line in labels.read_text().splitlines(True) if "yes" in line))
    assert classify(model, single, tmp_path / "out") == 2
    assert "has the label 'yes': there is nothing to tell apart" in capsys.readouterr().err
    assert classify(model, data, tmp_path / "out") == 2
    assert "holds 'completion', and --task classify needs label: did you mean --task sft?" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
