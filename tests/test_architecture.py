"""docs/architecture.md is true: it names every folder, and each imports only what the page allows."""

import ast
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lora_jax"
PAGE = (ROOT / "docs" / "architecture.md").read_text()
FLOORS = runpy.run_path(str(ROOT / "docs" / "scripts" / "floors.py"))
FLOOR = {name.strip("/"): floor for floor, names in FLOORS["floors"](PAGE).items() for name in names}
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE or path.stem[:2] != "__"]


def room(module: Path) -> str:
    """The folder of a module, or the module itself if it is at the root."""
    inside = module.relative_to(PACKAGE)
    return inside.stem if len(inside.parts) == 1 else inside.parent.as_posix()


def imports(node: ast.AST) -> Iterator[Path]:
    """Modules of the package that are imported when the code runs, not those for type checkers."""
    if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING":
        return
    if isinstance(node, ast.Import):
        yield from filter(None, (found(alias.name) for alias in node.names))
    if isinstance(node, ast.ImportFrom) and node.module:
        named = (found(f"{node.module}.{alias.name}") or found(node.module) for alias in node.names)
        yield from filter(None, named)
    for child in ast.iter_child_nodes(node):
        yield from imports(child)


def found(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    files = [each for each in (path / "__init__.py", path.with_suffix(".py")) if each.exists()]
    return files[0] if files and module != "lora_jax" and module.startswith("lora_jax.") else None


def test_every_folder_is_named() -> None:
    assert FLOOR.keys() == {room(module) for module in MODULES}


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_down(module: Path) -> None:
    here = room(module)
    for other in imports(ast.parse(module.read_text())):
        there = room(other)
        inside = module.name == "__init__.py" and there.startswith(f"{here}/")
        assert there == here or inside or FLOOR[there] < FLOOR[here], f"{there} is not below {here}"


def test_the_library_does_not_import_its_public_names() -> None:
    """They may be anything that is defined above; only the application uses them."""
    users = {room(module) for module in MODULES if "\nimport lora_jax as lora\n" in module.read_text()}
    assert users <= {"bench", "train", "cli"}


def test_picture_shows_the_table() -> None:
    assert FLOORS["PICTURE"].read_text() == FLOORS["draw"](PAGE), "run: python docs/scripts/floors.py"
