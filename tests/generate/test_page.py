"""docs/generate.md: its commands and its Python run on a small random model."""

import json
import re
import shlex
from pathlib import Path

import pytest
from helpers import random_adapter

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

from talking_models import talking_directory

import lora_jax as lora
from lora_jax import models
from lora_jax.cli import main
from lora_jax.generate.adapters import model_sites

PAGE = (Path(__file__).parents[2] / "docs" / "generate.md").read_text()


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = models.load(talking_directory(Path("base")))
    sites = model_sites(model)
    lora.peft.save("run/adapter", random_adapter(sites, 1), sites=sites)
    lora.save("german", random_adapter(sites, 2))
    models.load(talking_directory(Path("merged"), seed=1))
    Path("prompts.jsonl").write_text(re.search(r"```json\n(.*?)```", PAGE, re.DOTALL)[1])
    Path("valid.jsonl").write_text(json.dumps({"prompt": "1+1=", "completion": "2"}))


@pytest.mark.full
def test_commands_and_python_run(inside: None, capsys: pytest.CaptureFixture[str]) -> None:
    commands = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)).splitlines()
    commands = [command for command in commands if command]
    assert len(commands) == 5
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, command
    capsys.readouterr()
    exec(compile(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1], "generate.md", "exec"), {})
    assert capsys.readouterr().out.count(" length\n") == 3
