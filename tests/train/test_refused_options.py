"""What `finetune` cannot use: one line each that says what to do, exit code 2, and nothing is written."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_runs import bytes_model, sums

from lora_jax.cli import main

GOOD = "finetune --model model --data sums.jsonl"
REFUSED = {
    "": "finetune",
    "finetun": "there is no verb finetun: did you mean finetune?",
    "finetune --bogus 3": "--bogus",
    "finetune --step 3": "finetune has no option --step: did you mean --steps?",
    "finetune --learning-rate 1": "did you mean --lr?",
    "finetune --batch-size 1": "did you mean --batch?",
    "finetune --seq-len 1": "did you mean --length?",
    "finetune --steps x": "--steps",
    f"{GOOD} --steps 0": "--steps must be above 0, got 0",
    f"{GOOD} --warmup -1": "--warmup must be at least 0",
    f"{GOOD} --lr nan": "--lr must be above 0",
    f"{GOOD} --length 1": "--length must be at least 2",
    f"{GOOD} --patience 0": "--patience must be at least 1",
    f"{GOOD} --accumulate 0": "--accumulate must be above 0",
    f"{GOOD} --rank 0": "rank",
    f"{GOOD} --dropout 1.5": "dropout",
    f"{GOOD} --init pisssa": "init",
    f"{GOOD} --method lorra": "method",
    f"{GOOD} --targets quarry": "'quarry' hits none of the 8 sites",
    f"{GOOD} --rank-pattern q_proj": "--rank-pattern takes NAME=NUMBER",
    f"{GOOD} --optimizer adamx": "there is no optimizer 'adamx' (nearest: ada",
    f"{GOOD} --optimizer sgd --weight-decay 0.1": "sgd decays no weights",
    f"{GOOD} --optimizer-options b2": "--optimizer-options takes NAME=NUMBER, not 'b2'",
    f"{GOOD} --optimizer-options b9=1": "adamw has no option b9",
    f"{GOOD} --schedule step": "cosine",
    f"{GOOD} --dtype int8": "float32",
    f"{GOOD} --date yesterday": "--date must be a day such as 2026-01-31",
    f"{GOOD} --keys prompt": "--keys takes KEY=NAME",
    f"{GOOD} --keys promt=question": "there is no key 'promt'",
    f"{GOOD} --task dpo": "did you mean --task sft?",
    f"{GOOD} --mesh rows=2": "data=NUMBER, fsdp=NUMBER, tensor=NUMBER",
    f"{GOOD} --mesh data=3": "--mesh data=3 is for 3 devices, and there are 8",
    f"{GOOD} --mesh data=8 --batch 4": "take a multiple of 8",
    f"{GOOD} --resume": "nothing to resume",
    f"{GOOD} --resume --overwrite": "give one of them",
    f"{GOOD} --from nowhere": "nowhere",
    f"{GOOD} --from nowhere --rank 3": "--from brings its own adapter: leave out --rank",
    f"{GOOD} --out sums.jsonl": "cannot write to sums.jsonl",
    f"{GOOD} --out sums.jsonl/below": "cannot write to sums.jsonl/below",
    f"{GOOD} --config missing.yaml": "cannot read missing.yaml: No such file",
    f"{GOOD} --config bad.yaml": "bad.yaml is no YAML file of options",
    f"{GOOD} --config list.yaml": "list.yaml must hold options and their values",
    f"{GOOD} --config other.yaml": "there is no option rnk",
    "finetune --model missing --data sums.jsonl": "missing is not a directory with a model",
    "finetune --model empty --data sums.jsonl": "has no config.json",
    "finetune --model unknown --data sums.jsonl": "mamba",
    "finetune --model quantised --data sums.jsonl": "is quantised",
    "finetune --model incomplete --data sums.jsonl": "q_proj",
    "finetune --model silent --data sums.jsonl": "has no tokenizer: copy tokenizer.json",
    "finetune --model narrow --data sums.jsonl": "it is another model's",
    "finetune --model model --data missing.jsonl": "missing.jsonl",
    "finetune --model model --data empty.jsonl": "holds no example",
    "finetune --model model --data array.jsonl": "the file is a JSON array",
    "finetune --model model --data binary.txt": "not UTF-8",
    "finetune --model model --data other.jsonl": "possible are",
    "finetune --model model --data chat.jsonl": "no chat template",
    f"{GOOD} --strict --data oops.jsonl": "oops.jsonl:2: not JSON",
    "finetune --model model --data pairs.jsonl": "did you mean --task dpo?",
    "finetune --model model --data long.jsonl --length 4": "nothing to train on in 4 tokens",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models and files that have something wrong with them."""
    path = tmp_path_factory.mktemp("refused")
    bytes_model(path / "model")
    sums(path / "sums.jsonl")
    (path / "empty").mkdir()
    for name, changes in {
        "unknown": {"model_type": "mamba"},
        "quantised": {"quantization_config": {"bits": 4}},
    }.items():
        config = json.loads((bytes_model(path / name) / "config.json").read_text())
        (path / name / "config.json").write_text(json.dumps({**config, **changes}))
    (bytes_model(path / "silent") / "tokenizer.json").unlink()
    (path / "silent" / "tokenizer_config.json").unlink()
    tensors = load_file(bytes_model(path / "incomplete") / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, path / "incomplete" / "model.safetensors")
    bytes_model(path / "narrow", vocab_size=40)
    files: dict[str, Any] = {
        "empty.jsonl": "\n", "array.jsonl": '[{"text": "a"}]', "binary.txt": b"a\xff", "other.jsonl": '{"a": 1}\n',
        "chat.jsonl": '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 3,
        "oops.jsonl": '{"text": "one"}\noops\n', "bad.yaml": "a: [", "list.yaml": "- 1\n", "other.yaml": "rnk: 3\n",
        "pairs.jsonl": '{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 3,
        "long.jsonl": '{"prompt": "a long question", "completion": "b"}\n' * 3,
    }  # fmt: skip
    for name, content in files.items():
        (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("args", REFUSED)
def test_refusals_are_one_line_and_write_nothing(
    args: str, place: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    assert main(args.split()) == 2
    said, complaint = capsys.readouterr()
    assert said == ""
    assert complaint.startswith("lora-jax: ")
    assert complaint.count("\n") == 1
    assert REFUSED[args] in complaint
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("name", ["tyro", "matplotlib"])
def test_the_extra_is_named_when_it_is_missing(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lora_jax.cli.find_spec", lambda asked: None if asked == name else np)
    assert main(["finetune"]) == 2
    assert f'the command line needs {name}: pip install "lora_jax[cli]"\n' in capsys.readouterr().err


SPOILT = {
    "model": (5, "model: 5 is no str"),
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


@pytest.mark.parametrize("what", ["model", "data"])
def test_a_run_whose_model_or_data_have_changed_is_not_resumed(
    what: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((whole / "config.json").read_text())
    config[what] = {**config[what], "sha256": "0"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["finetune", "--resume", "--out", str(tmp_path)]) == 2
    assert f"the {what} has changed since the run" in capsys.readouterr().err
