"""What the project promises about itself: its sizes, imports, lazy face, public names and oldest versions."""

import ast
import importlib.metadata
import inspect
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement

import lora_jax as lora

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lora_jax"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
FACES = {"lora_jax": lora, "lora_jax.io.peft": lora.peft, "lora_jax.data": lora.data, "lora_jax.text": lora.text}
"""Packages whose names are imported at their first use."""

Graph = dict[str, set[str]]


def imported(tree: ast.AST) -> Iterator[str]:
    """Modules of ours that a module imports, anywhere but for type checkers."""
    if isinstance(tree, ast.If) and getattr(tree.test, "id", "") == "TYPE_CHECKING":
        return
    if isinstance(tree, ast.ImportFrom) and tree.module and tree.module.partition(".")[0] == "lora_jax":
        for alias in tree.names:
            inside = f"{tree.module}.{alias.name}"
            yield inside if inside in MODULES else tree.module
    if isinstance(tree, ast.Import):
        yield from (alias.name for alias in tree.names if alias.name in MODULES)
    for child in ast.iter_child_nodes(tree):
        yield from imported(child)


@cache
def imports() -> Graph:
    """For every module, those it imports."""
    return {module: {*imported(ast.parse(path.read_text()))} - {module} for module, path in MODULES.items()}


def test_modules_import_in_no_circle() -> None:
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, "a circle: " + " → ".join([*way[way.index(module) :], module])
        for other in sorted(imports()[module] - done):
            visit(other, (*way, module))
        done.add(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("module", MODULES)
def test_module(module: str) -> None:
    text = MODULES[module].read_text()
    assert len(text.splitlines()) <= 500
    assert ast.get_docstring(ast.parse(text)), "a module says in its first line what it does"
    assert not re.search(r"jax\._src|jax\.core\b|NotImplementedError|TODO|FIXME", text)


def test_modules_are_small() -> None:
    lengths = sorted(len(path.read_text().splitlines()) for path in MODULES.values())
    assert lengths[len(lengths) // 2] <= 200


def python(code: str, *args: str) -> Any:
    """What a fresh interpreter prints, as JSON."""
    command = [sys.executable, "-c", code, *args]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)


def test_every_module_imports_alone(request: pytest.FixtureRequest) -> None:
    """Whatever was imported before: everything of ours is forgotten before each, everything of others is kept.

    A module runs its package first, so that without circles one of every package says it for all; `--full` tries all.
    """
    full = request.config.getoption("--full")
    beside = [name for name, path in MODULES.items() if path.parent == PACKAGE or path.name == "__init__.py" or full]
    code = """if True:
        import importlib, json, sys
        failed = {}
        for module in sys.argv[1:]:
            for name in [name for name in sys.modules if name.partition(".")[0] == "lora_jax"]:
                del sys.modules[name]
            try:
                importlib.import_module(module)
            except ImportError as error:
                failed[module] = str(error)
        print(json.dumps(failed))
    """
    assert python(code, *(module for module in beside if module != "lora_jax.__main__")) == {}


def test_import_costs_next_to_nothing_beside_jax() -> None:
    """In seconds of the processor, and in modules: what only some names need is imported with those names."""
    code = """if True:
        import json, sys, time
        import jax
        start = time.process_time()
        import lora_jax
        print(json.dumps([time.process_time() - start, sorted(sys.modules)]))
    """
    seconds, modules = python(code)
    theirs = {"orbax", "rich", "matplotlib", "flax", "optax", "chex", "tyro", "safetensors", "huggingface_hub"}
    assert not theirs & set(modules)
    assert [name for name in modules if name.startswith("lora_jax")] == ["lora_jax", "lora_jax.lazy"]
    assert seconds <= 0.2


@pytest.mark.parametrize("package", FACES)
def test_lazy_face(package: str) -> None:
    """Type checkers, `__all__`, `dir` and the names themselves agree."""
    face = FACES[package]
    (block,) = (node for node in ast.parse(MODULES[package].read_text()).body if isinstance(node, ast.If))
    seen = {alias.asname: f"{node.module}.{alias.name}" for node in block.body for alias in node.names}  # pyright: ignore
    assert sorted(seen) == face.__all__
    assert {*face.__all__} <= {*dir(face)}
    for name, home in seen.items():
        thing = getattr(face, name)
        module, _, attribute = home.rpartition(".")
        expected = sys.modules[home] if isinstance(thing, ModuleType) else getattr(sys.modules[module], attribute)
        assert thing is expected
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        _ = face.nothing


def test_functions_are_not_hidden_by_modules_of_their_names() -> None:
    """Importing `lora_jax.merge`, the module, sets no attribute `merge` on the package."""
    for name in lora.__all__:
        if f"lora_jax.{name}" in MODULES:
            importlib.import_module(f"lora_jax.{name}")
            assert isinstance(getattr(lora, name), ModuleType) == (lora._homes[name] == f"lora_jax.{name}")


PUBLIC = [name for name in lora.__all__ if not inspect.ismodule(getattr(lora, name))]
FAMILIES = (
    lora.analysis, lora.data, lora.generate, lora.hub, lora.methods, lora.models, lora.nnx, lora.optim, lora.peft,
    lora.routers, lora.text,
)  # fmt: skip
NAMED = [(lora, name) for name in PUBLIC]
NAMED += [(module, name) for module in FAMILIES for name in module.__all__ if callable(getattr(module, name))]


@pytest.mark.parametrize(("module", "name"), NAMED)
def test_public_name_is_documented(module: Any, name: str) -> None:
    thing = getattr(module, name)
    doc = inspect.getdoc(thing)
    assert doc and doc.splitlines()[0].endswith("."), "one summary line"
    assert ">>>" in doc, "an example that runs"


def test_public_face_is_small() -> None:
    assert len(PUBLIC) <= 50


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
    names = "('lora_jax.train', 'lora_jax.text', 'lora_jax.data', 'lora_jax.bench', 'lora_jax.cli', 'tyro')"
    code = f"import sys, lora_jax; print([m for m in sys.modules if m.startswith({names})])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert shown.stdout.strip() == "[]"


def in_the_locales_encoding(call: ast.Call) -> bool:
    """Whether a call reads or writes text in whatever encoding the locale has."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    given = [each.value for each in call.args if isinstance(each, ast.Constant)]
    binary = any(isinstance(mode, str) and "b" in mode for mode in given)
    binary |= ast.unparse(call.func) in ("os.open", "tensorstore.KvStore.open")
    texts = isinstance(call.func, ast.Attribute) and name in ("read_text", "write_text")
    return (texts or (name == "open" and not binary)) and all(word.arg != "encoding" for word in call.keywords)


@pytest.mark.parametrize("module", MODULES)
def test_text_is_utf8_whatever_the_locale(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert [call.lineno for call in calls if in_the_locales_encoding(call)] == []
