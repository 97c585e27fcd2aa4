"""Draw the floors of the package from the table in docs/architecture.md.

python docs/scripts/floors.py
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

DOCS = Path(__file__).parents[1]
PAGE, PICTURE = DOCS / "architecture.md", DOCS / "images" / "floors.svg"
STEPS = {"sites": "find_sites", "init/": "init", "apply": "adapt", "merge": "merge"}
"""Where the four steps of every program are."""

WIDTH, BOX, STRIDE = 880, 30, 44
COLOURS = """\
text { font: 13px ui-monospace, monospace; fill: #24292f; text-anchor: middle }
.floor { fill: #6e7781; text-anchor: start }
rect { fill: #f6f8fa; stroke: #d0d7de }
.step { fill: #ddf4ff; stroke: #54aeff }"""


def floors(page: str) -> Mapping[int, Sequence[str]]:
    """The folders and modules on each floor, in the order of the table."""
    found: dict[int, list[str]] = {}
    for floor, name in re.findall(r"^\| (\d+) \| `([\w/]+)` \|", page, re.MULTILINE):
        found.setdefault(int(floor), []).append(name)
    return found


def draw(page: str) -> str:
    """The picture as SVG: a line of boxes for each floor, the highest first."""
    shapes = []
    for line, (floor, names) in enumerate(floors(page).items()):
        y = 10 + STRIDE * line
        shapes.append(f'<text class="floor" x="10" y="{y + 20}">{floor}</text>')
        width = (WIDTH - 50) / len(names)
        for i, name in enumerate(names):
            x, step = 40 + width * i, STEPS.get(name)
            label = f"{name} · {step}" if step and step != name.strip("/") else name
            style = ' class="step"' if step else ""
            shapes.append(f'<rect{style} x="{x:.1f}" y="{y}" width="{width - 8:.1f}" height="{BOX}" rx="4"/>')
            shapes.append(f'<text x="{x + width / 2 - 4:.1f}" y="{y + 20}">{label}</text>')
    height = STRIDE * len(floors(page)) + 10
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">'
    ground = '<path fill="#fff" d="M0 0h880v2000H0z"/>'
    return "\n".join([head, f"<style>\n{COLOURS}\n</style>", ground, *shapes, "</svg>\n"])


if __name__ == "__main__":
    PICTURE.write_text(draw(PAGE.read_text()))
