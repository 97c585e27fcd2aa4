"""Run every example and write docs/examples.md: what it is for, what it prints, what it draws.

python docs/scripts/gallery.py            # all of them, about eight minutes on two cores
python docs/scripts/gallery.py nnx_model  # one; the others keep what they printed last
    python docs/scripts/gallery.py --page     # none; the page follows changes of the examples' code
"""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
OUTPUTS = DOCS / "outputs"
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

HEAD = """\
# Examples

For whoever wants a whole program to start from. Each runs as it is with `python examples/NAME.py`. What is shown below
it was printed and drawn by `python docs/scripts/gallery.py`; lines of progress are left out.
"""
END = """\
## Read next

[Frameworks](frameworks.md) for your kind of model, [sweeps in one step](many-at-once.md), or
[several adapters made into one](compose.md).
"""


def run(example: Path) -> None:
    """Keep what an example prints, and the pictures that it leaves."""
    with TemporaryDirectory() as folder:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "COLUMNS": "100", "TERM": "dumb"}
        command = [sys.executable, str(example)]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
        lines = (line.rstrip() for line in done.stdout.splitlines())
        output = "\n".join(line for line in lines if not line.endswith(" s left"))  # progress
        output = output.replace(f"{Path(folder).resolve()}/", "")
        (OUTPUTS / f"{example.stem}.txt").write_text(f"{output.strip()}\n")
        for picture in sorted(Path(folder).rglob("*.png")):
            shutil.copy(picture, DOCS / "images" / f"example-{example.stem}.png")


def page() -> str:
    """The page of all examples."""
    return "\n".join([HEAD, *map(section, EXAMPLES), END])


def section(example: Path) -> str:
    """One example: its docstring, its output, its picture and its code."""
    source = example.read_text()
    title, _, about = (ast.get_docstring(ast.parse(source)) or "").partition("\n")
    output = (OUTPUTS / f"{example.stem}.txt").read_text()
    parts = [f"## {title.rstrip('.')}", about.strip(), f"```text\n{output}```"]
    picture = DOCS / "images" / f"example-{example.stem}.png"
    if picture.exists():
        parts.append(f"![What {example.name} draws](images/{picture.name})")
    parts.append(
        f'<details markdown="1">\n<summary>examples/{example.name}</summary>\n\n```python\n{source}```\n\n</details>'
    )
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    OUTPUTS.mkdir(exist_ok=True)
    for example in EXAMPLES:
        if example.stem in sys.argv[1:] or len(sys.argv) == 1:
            run(example)
    (DOCS / "examples.md").write_text(page())
