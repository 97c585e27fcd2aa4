"""The README and the pages in docs/ keep what they promise: their examples run and print what they show."""

import doctest
import re
import runpy
import shlex
import shutil
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers import assert_same, random_adapter
from linen_transformer import Transformer, TransformerConfig
from safetensors.numpy import load_file, save_file
from talking_models import talking_directory

import lora_jax as lora
from lora_jax.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_readme_example_prints_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, shown = re.search(r"```python\n(.*?)```\s+prints\s+```text\n(.*?)```", README, re.DOTALL).groups()
    monkeypatch.chdir(tmp_path)
    printed = StringIO()
    with redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert printed.getvalue() == shown


def test_readme_peft_section_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Python goes on where the first example ends; its commands find what they name."""
    monkeypatch.chdir(tmp_path)
    section = README[README.index("## From and to PEFT") : README.index("## Speed")]
    first = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    names: dict[str, Any] = {}
    with redirect_stdout(StringIO()):
        exec(compile(first + re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], "README.md", "exec"), names)
    assert_same(names["again"], names["adapter"])
    prepare_commands(tmp_path)
    commands = re.search(r"```bash\n(.*?)```", section, re.DOTALL)[1].splitlines()
    assert len(commands) == 6
    for command in commands:
        with redirect_stdout(StringIO()):
            assert main(shlex.split(command, comments=True)[1:]) == 0, command
    assert_same(lora.load("again"), lora.load("saved"))


def prepare_commands(folder: Path) -> None:
    """A base and an adapter of PEFT's, and an adapter as `lora-jax finetune` leaves it."""
    golden = ROOT / "tests" / "golden" / "linear"
    shutil.copytree(golden, folder / "their-adapter")
    (folder / "base").mkdir()
    state = load_file(golden / "expected.safetensors")
    base = {key.removeprefix("base."): value for key, value in state.items() if key.startswith("base.")}
    save_file(base, folder / "base" / "model.safetensors")
    model = Transformer(TransformerConfig(layers=2, width=16, heads=2, kv_heads=1, hidden=24))
    tokens = jnp.zeros((1, 4), jnp.uint8)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    sites = lora.find_sites(model.apply, params, tokens)
    adapter = random_adapter([site for site in sites.values() if "layers" in site.path])
    lora.save(folder / "saved", adapter, params=params)


def test_readme_commands_are_single_lines() -> None:
    commands = re.findall(r"^python3 -m venv .*$", README, re.MULTILINE)
    assert len(commands) == 2
    assert "lora-jax finetune" in commands[0]
    assert "pytest" in commands[1]


@pytest.mark.full
@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_docs_examples(page: Path) -> None:
    assert doctest.testfile(str(page), module_relative=False).failed == 0


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


SMALL = {
    "docstrings": "--model model --count 16 --held-out 2 --steps 2 --length 512",
    "sweep": "--steps 4 --eval-every 2 --pretrain-steps 2 --learning-rates 0.01 1e9",
}
"""Arguments that make an example small; the others take none."""


@pytest.mark.full
@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_run(example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))
    talking_directory(tmp_path / "model", max_position_embeddings=1024)
    monkeypatch.setattr("sys.argv", [str(example), *SMALL.get(example.stem, "").split()])
    with redirect_stdout(StringIO()):
        runpy.run_path(str(example), run_name="__main__")


def test_differences_from_peft_name_tests_that_exist() -> None:
    named = re.findall(r"`((?:\w+/)?test_\w+\.py)::(test_\w+)`", (ROOT / "docs" / "differences.md").read_text())
    assert len(named) > 25
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), f"{file} has no {test}"
