"""The verbs `generate`, `chat` and `evaluate` on a small random model."""

import io
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_adapter

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

from talking_models import talking_directory

import lora_jax as lora
from lora_jax import models
from lora_jax.cli import main
from lora_jax.generate import Generator
from lora_jax.generate.adapters import model_sites


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made")
    model = models.load(talking_directory(path / "base"))
    sites = model_sites(model)
    lora.peft.save(path / "fr", random_adapter(sites, 1), sites=sites)
    lora.save(path / "de", random_adapter(sites, 2))
    layers = [site for name, site in sites.items() if "_proj/" in name]
    lora.peft.save(path / "layers", random_adapter(layers, 3), sites=sites)
    lines = [{"prompt": f"say {i}", "adapter": name} for i, name in enumerate((None, "fr", "de"))]
    (path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = [{"prompt": f"say {i}", "completion": f"{i} is said"} for i in range(4)]
    (path / "data.jsonl").write_text("\n".join(map(json.dumps, data)))
    return path


@pytest.fixture(autouse=True)
def inside(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)


def run(line: str) -> int:
    return main(line.split())


def printed(line: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert run(f"{line} --json") == 0
    return json.loads(capsys.readouterr().out)


def test_generate_prints_the_text_and_how_fast(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate --model base --prompt hello --max-tokens 12") == 0
    out, err = capsys.readouterr()
    answer = printed("generate --model base --prompt hello --max-tokens 12", capsys)["answers"][0]
    model = models.load("base")
    expected = Generator(model)([model.tokenizer.encode("user: hello<end>assistant: ")], max_tokens=12)[0]
    assert answer == {"prompt": "hello", "adapter": None, "text": expected.text, "tokens": 12, "ended": "length"}
    assert out.endswith("\n") and out.isprintable() is False and "\x1b" not in out
    assert err.startswith("12 tokens, the first after ") and err.endswith(" tokens/s\n")
    raw = printed("generate --model base --prompt hello --max-tokens 12 --raw", capsys)["answers"][0]["text"]
    assert raw == Generator(model)(["hello"], max_tokens=12)[0].text != expected.text


def test_lines_of_a_file_meet_the_adapters_they_name(capsys: pytest.CaptureFixture[str]) -> None:
    line = "generate --model base --file prompts.jsonl --adapter fr de --max-tokens 6 --raw"
    whole, parts = (printed(f"{line} --batch {batch}", capsys)["answers"] for batch in (16, 2))
    assert whole == parts and [each["adapter"] for each in whole] == [None, "fr", "de"]
    model = models.load("base")
    for each in whole:
        adapter = None if each["adapter"] is None else lora.peft.load("fr", model.params, model_sites(model))
        if each["adapter"] != "de":
            assert each["text"] == Generator(model, adapter)([each["prompt"]], max_tokens=6)[0].text
    assert run("generate --model base --prompt hello --adapter fr de --max-tokens 3") == 0
    assert [each for each in capsys.readouterr().out.splitlines() if each.startswith("hello")] == [
        "hello (fr)", "hello (de)",
    ]  # fmt: skip


def test_chat_answers_line_by_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def answers(text: str) -> list[str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert run("chat --model base --max-tokens 5 --temperature 0 --adapter fr") == 0
        out, err = capsys.readouterr()
        assert err.count("tokens, the first after") == 2
        return [out[: len(out) // 2], out[len(out) // 2 :]]

    forgotten = answers("hi\n/clear\n\nhi\n/quit\nnever read\n")
    assert forgotten[0] == forgotten[1]
    remembered = answers("hi\nhi\n")
    assert remembered[0] + remembered[1] != forgotten[0] + forgotten[1]


def test_chat_says_when_a_conversation_is_too_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("x" * 600))
    assert run("chat --model base") == 0
    assert "longer than the model's 512 tokens: /clear begins anew" in capsys.readouterr().out


def test_evaluate_puts_base_adapted_and_merged_beside_each_other(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = models.load("base")
    adapter = lora.peft.load("fr", model.params, model_sites(model))
    merged = made / "merged"
    assert run("merge base fr merged") == 0
    capsys.readouterr()
    result = printed("evaluate --model base --data data.jsonl --adapter fr --merged merged", capsys)
    base, adapted, whole = result["rows"]
    assert [each["name"] for each in result["rows"]] == ["base", "adapter fr", "merged"]
    assert base["loss"] != adapted["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    assert base["tokens"] == result["counts"]["trained"] > 0 and base["examples"] == 4
    assert merged.exists() and adapter
    assert run("evaluate --model base --data data.jsonl") == 0
    table = capsys.readouterr().out
    assert "perplexity" in table and "Of " in table


def test_evaluate_counts_right_classes(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"input": f"text {i}", "label": "ab"[i % 2]} for i in range(5)]
    (made / "labels.jsonl").write_text("\n".join(map(json.dumps, lines)))
    base, adapted = printed("evaluate --model base --data labels.jsonl --adapter layers --batch 2", capsys)["rows"]
    model = models.with_classes(models.load("base"), "ab")
    adapter = lora.peft.load("layers", model.params, model_sites(models.load("base")))
    for row, params in ((base, model.params), (adapted, lora.merge(model.params, adapter))):
        losses, right = [], []
        for line in lines:
            tokens = jnp.asarray([model.tokenizer.encode(line["input"])])
            shares = jax.nn.log_softmax(model.apply(params, tokens)[0])
            losses.append(-float(shares["ab".index(line["label"])]))
            right.append(int(shares.argmax()) == "ab".index(line["label"]))
        assert row["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
        assert (row["accuracy"], row["examples"]) == (np.mean(right), 5)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("generate --model base", "either --prompt TEXT or --file"),
        ("generate --model base --prompt a --raw --chat", "--chat and --raw exclude each other"),
        ("generate --model base --prompt a --max-tokens 0", "--max-tokens must be at least 1, got 0"),
        ("generate --model base --prompt a --top-p 7", "top_p=7.0 must be"),
        ("generate --model base --file missing.jsonl", "missing.jsonl is nothing"),
        ("generate --model base --file prompts.jsonl --adapter fr", "no adapter 'de'; those given are fr"),
        ("generate --model base --prompt a --adapter nowhere", "nothing at nowhere"),
        ("generate --model nowhere --prompt a", "nowhere"),
        ("generate --model base --prompt a --max-new-tokens 3", "did you mean --max-tokens?"),
        ("chat --model base --json", "generate --json"),
        ("chat --model base --max-tokens 0", "--max-tokens must be at least 1, got 0"),
        ("evaluate --model base --data data.jsonl --batch 0", "--batch 0"),
        ("evaluate --model base --data pairs.jsonl", "pairs.jsonl holds preferences"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_line(
    made: Path, line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (made / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}')
    assert run(line) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and err.startswith("lora-jax: ")
