"""What the project promises about itself: its sizes, its public names, its oldest versions."""

import ast
import importlib.metadata
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import lora_jax as lora

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lora_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    assert len(text.splitlines()) <= 700
    assert ast.get_docstring(tree), "a module says in its first line what it does"
    assert not re.search(r"jax\._src|jax\.core\b|NotImplementedError|TODO|FIXME", text)


def test_modules_are_small() -> None:
    lengths = sorted(len(path.read_text().splitlines()) for path in MODULES)
    assert lengths[len(lengths) // 2] <= 200


PUBLIC = [name for name in lora.__all__ if not inspect.ismodule(getattr(lora, name))]
FAMILIES = {module: sorted(set(module.__all__)) for module in (lora.analysis, lora.methods, lora.optim, lora.routers)}
NAMED = [(lora, name) for name in PUBLIC] + [(module, name) for module, names in FAMILIES.items() for name in names]


@pytest.mark.parametrize(("module", "name"), NAMED)
def test_public_name_is_documented(module: Any, name: str) -> None:
    thing = getattr(module, name)
    doc = inspect.getdoc(thing)
    assert doc and doc.splitlines()[0].endswith("."), "one summary line"
    if not (inspect.isclass(thing) and issubclass(thing, Exception)) and not inspect.isabstract(thing):
        assert ">>>" in doc, "an example that runs"


def test_public_face_is_small() -> None:
    assert len(PUBLIC) <= 41


def test_oldest_versions_are_those_of_the_oldest_lane() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    floors = {need.name: next(iter(need.specifier)) for need in map(Requirement, project["dependencies"])}
    assert project["requires-python"] == ">=3.11"
    assert (str(floors["jax"]), str(floors["flax"])) == (">=0.10.2", ">=0.12.8")
    for name, floor in floors.items():
        assert floor.contains(importlib.metadata.version(name), prereleases=True)


def test_version_has_a_single_source() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert importlib.metadata.version("lora_jax") == project["version"]
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()


def test_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").exists()


def test_library_does_not_import_the_application() -> None:
    names = "('lora_jax.train', 'lora_jax.bench', 'lora_jax.cli', 'tyro')"
    code = f"import sys, lora_jax; print([m for m in sys.modules if m.startswith({names})])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert shown.stdout.strip() == "[]"


@pytest.mark.parametrize("package", [lora, lora.peft], ids=lambda package: package.__name__)
def test_type_checkers_see_the_lazy_names(package: Any) -> None:
    block = re.search(r"^if TYPE_CHECKING:.*?\n\n", Path(package.__file__).read_text(), re.DOTALL | re.MULTILINE)
    assert block
    assert set(re.findall(r" as (\w+)$", block[0], re.MULTILINE)) == set(package.__all__)
    assert set(package.__all__) <= set(dir(package))


def test_docstring_groups_the_public_names() -> None:
    groups = re.findall(r"^(?:[A-Z][\w ]+:| {20}).*$", lora.__doc__ or "", re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", "".join(groups))) == lora.__all__
