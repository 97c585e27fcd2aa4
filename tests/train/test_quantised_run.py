"""`lora-jax finetune --quantise`: an adapter beside codes, and the model that it is merged into."""

import json
from pathlib import Path

import numpy as np
import pytest
from packed_directories import gptq, written
from safetensors.numpy import load_file
from tiny_runs import bytes_model, sums

from lora_jax import models
from lora_jax.cli import main
from lora_jax.quantised.leaf import is_quantised
from lora_jax.train.builtin import write_tokenizer
from lora_jax.train.metrics import read_metrics


@pytest.mark.parametrize("format", ["nf4"])
def test_a_run_on_codes(format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = bytes_model(tmp_path / "model", hidden_size=64, intermediate_size=128, head_dim=16)
    data, out = sums(tmp_path / "sums.jsonl"), tmp_path / "out"
    args = f"finetune --model {model} --data {data} --out {out} --quantise {format} --merge --steps 6 --length 16"
    assert main([*args.split(), "--lr", "0.01", "--eval-every", "3", "--warmup", "1"]) == 0
    assert "Merged into the base as it was before: loss" in capsys.readouterr().out
    records = read_metrics(out / "metrics.jsonl")
    assert records[-1]["eval_loss"] < records[0]["base_eval_loss"]
    assert json.loads((out / "config.json").read_text())["options"]["quantise"] == format
    merged, plain = (load_file(path / "model.safetensors") for path in (out / "merged", model))
    name = "model.layers.0.mlp.up_proj.weight"
    change = merged[name] - plain[name]
    assert np.linalg.matrix_rank(change, tol=1e-5) <= 8 and np.abs(change).max() > 0
    for verb in (["generate", "--prompt", "1+1=", "--max-tokens", "4"], ["evaluate", "--data", str(data), "--json"]):
        call = [verb[0], "--model", str(model), "--adapter", str(out / "adapter"), "--quantise", format, *verb[1:]]
        assert main(call) == 0
        assert capsys.readouterr().out
    leaf = models.load(model, quantise="nf4").params["model"]["layers"]["mlp"]["up_proj"]["weight"]
    assert is_quantised(leaf)


def test_a_run_on_a_packed_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What it is merged into is the numbers of the codes; the verb that rewrites checkpoints has none to rewrite."""
    plain = bytes_model(tmp_path / "plain", hidden_size=64, intermediate_size=128, head_dim=16)
    stored, numbers = gptq(load_file(plain / "model.safetensors"), shifted=True, shuffled=True)
    said = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}
    model = written(json.loads((plain / "config.json").read_text()), tmp_path / "model", stored, said)
    write_tokenizer(model)
    data, out = sums(tmp_path / "sums.jsonl"), tmp_path / "out"
    args = f"finetune --model {model} --data {data} --out {out} --merge --steps 6 --length 16 --eval-every 3"
    assert main([*args.split(), "--lr", "0.01", "--warmup", "1"]) == 0
    assert "merged into the base: the loss differs by" in capsys.readouterr().out
    merged, name = load_file(out / "merged" / "model.safetensors"), "model.layers.0.mlp.up_proj.weight"
    change = merged[name] - numbers[name]
    assert np.linalg.matrix_rank(change, tol=1e-5) <= 8 and np.abs(change).max() > 0
    assert main(["merge", str(model), str(out / "adapter"), str(tmp_path / "merged")]) == 2
    assert "is quantised (quantization_config in config.json: 'gptq')" in " ".join(capsys.readouterr().err.split())
