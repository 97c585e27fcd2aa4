"""The pages in docs/ are complete: every public name, every example, for whom each page is and what to read next."""

import inspect
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

import lora_jax as lora

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
REFERENCE = {
    page: re.findall(r"^::: lora_jax\.(\S+)$", page.read_text(), re.MULTILINE) for page in DOCS.glob("api/*.md")
}
FAMILIES = (
    "analysis", "data", "generate", "hub", "methods", "models", "nnx", "optim", "peft", "routers", "rules", "text",
)  # fmt: skip
GROUPS = dict(re.findall(r"^([A-Z][\w ]+):((?: +`.*\n)+)", lora.__doc__ or "", re.MULTILINE))


def thing(name: str) -> Any:
    found: Any = lora
    for part in name.split("."):
        found = getattr(found, part)
    return found


def test_every_public_name_is_in_the_reference() -> None:
    listed = [name for names in REFERENCE.values() for name in names]
    assert len(listed) == len(set(listed))
    known = [thing(name) for name in listed]
    public = [name for name in lora.__all__ if not inspect.ismodule(getattr(lora, name))]
    public += [f"{family}.{name}" for family in FAMILIES for name in getattr(lora, family).__all__]
    assert [name for name in public if not any(thing(name) is each for each in known)] == []
    assert set(listed) <= set(public)


def test_docstring_of_the_package_groups_names_as_the_reference_does() -> None:
    pages = {page.read_text().partition("\n")[0].removeprefix("# "): names for page, names in REFERENCE.items()}
    for title, line in GROUPS.items():
        names = re.findall(r"`(\w+)`", line)
        assert {name for name in names if name not in FAMILIES} <= set(pages[title]), title
    assert sorted(re.findall(r"`(\w+)`", "".join(GROUPS.values()))) == lora.__all__


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_page_says_for_whom_it_is_and_what_to_read_next(page: Path) -> None:
    text = page.read_text()
    assert re.match(r"# .+\n\n(?:.+\n)*?(?:.*\. )?For ", text), "the first paragraph"
    assert re.findall(r"^## (.+)$", text, re.MULTILINE)[-1] == "Read next"
    assert re.search(r"\]\([^)]+\)", text.rpartition("## Read next")[2]), "a link"


def test_gallery_shows_the_examples_as_they_are() -> None:
    gallery = runpy.run_path(str(DOCS / "scripts" / "gallery.py"))
    assert (DOCS / "examples.md").read_text() == gallery["page"](), (
        "run: python docs/scripts/gallery.py --page, or without it where the output changed"
    )


@pytest.mark.parametrize("page", [*DOCS.glob("*.md"), ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    named = re.findall(r"`((?:lora_jax|tests|docs|examples|benchmarks|\.ci|\.github)/[\w./-]*)`", page.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_changelog_keeps_its_form() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert versions[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", version) for version in versions[1:])
    for version in re.split(r"^## .+$", text, flags=re.MULTILINE)[1:]:
        sections = re.findall(r"^### (.+)$", version, re.MULTILINE)
        order = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
        assert sections == [name for name in order if name in sections]
