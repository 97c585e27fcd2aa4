"""What the site needs beyond MkDocs: public names by their public paths, and the two pages at the root."""

import ast
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add CHANGELOG.md and CONTRIBUTING.md, whose links start at the root."""
    for name in ("changelog", "contributing"):
        text = (ROOT / f"{name.upper()}.md").read_text()
        files.append(File.generated(config, f"{name}.md", content=text.replace("](docs/", "](")))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Let `::: lora_jax.merge` mean the public name, wherever it is defined; links to the root lead to pages."""
    markdown = re.sub(r"\]\((?:\.\./)?(CHANGELOG|CONTRIBUTING)\.md", lambda match: f"]({match[1].lower()}.md", markdown)
    return re.sub(r"^::: (\S+)$", lambda match: _directive(match[1]), markdown, flags=re.MULTILINE)


def _directive(public: str) -> str:
    heading = public.replace("lora_jax", "lora", 1)
    options = f"    options:\n      heading: {heading}\n      toc_label: {heading}\n"
    return f'<a id="{public}"></a>\n\n::: {home(public)}\n{options}'


def home(public: str) -> str:
    """Where a public name is defined.

    Packages are lazy and a function may have the name of a module, so imports are read from the source.
    """
    module, _, name = public.rpartition(".")
    if not module:
        return public
    module = home(module)
    path = ROOT.joinpath(*module.split("."))
    source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return f"{node.module}.{alias.name}"
    return f"{module}.{name}"


class Examples(griffe.Extension):
    """Docstrings say `Example:`; Griffe knows doctests in `Examples:`."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the section before the docstring is parsed."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
