"""Tables of text that fit: drawn and folded on a terminal, aligned in a pipe, or as Markdown.

rich is imported when something is drawn.
"""

import os
import re
import shutil
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any
from unicodedata import combining, east_asian_width

_WIDTH = 120
_LEAST_PATH, _LEAST_TEXT = 20, 16
_GAP = "  "


def escaped(text: object) -> str:
    r"""Text that is safe to print: control bytes and what no terminal shows are spelled out.

    >>> print(escaped("a\x1b[31m\nb\u202e"))
    a\x1b[31m\nb\u202e
    """
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in str(text))


def folded(path: str, width: int) -> str:
    """A path of at most `width` columns: `…` for its middle, while its ends and the numbers of layers stay.

    >>> folded("params/model/decoder/layers_11/attention/query/kernel", 36)
    'params/…/layers_11/…/query/kernel'
    >>> folded("model.layers.11.self_attn.q_proj", 24), folded("w" * 30, 9)
    ('….11.self_attn.q_proj', 'wwww…wwww')
    """
    parts = re.split(r"(?<=[/.])", path)
    numbers = {i for i, part in enumerate(parts) if re.search(r"[\d*]", part)}
    last, middle = len(parts) - 1, range(1, len(parts) - 2)
    order = [*(i for i in middle if i not in numbers), 0, last - 1, *(i for i in middle if i in numbers)]
    for i in dict.fromkeys(order):
        if _columns(path) <= width or not 0 <= i < last:
            continue
        parts[i] = f"…{parts[i][-1]}"
        path = re.sub(r"(…[/.])+", r"\1", "".join(parts))
    if _columns(path) > width:
        keep = max(width - 1, 0)
        path = path[: keep - keep // 2] + "…" + path[len(path) - keep // 2 :]
    return path


@dataclass(frozen=True)
class Table:
    """Cells of text under headers. The first column says what a row is about, mostly a path.

    Attributes:
      headers: of the columns.
      rows: as many cells each; a row without any is a line between sections.
      footer: a last row, of totals; empty if there is none.
      title: above the table.
      notes: lines below it.
      words: columns of words, which are wrapped where they must; all but these and the first are numbers.

    Example:
      >>> print(Table(("path", "rank"), [("layers/0/query", "8"), ("head", "16")]).plain())
      path            rank
      layers/0/query     8
      head              16
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    footer: Sequence[str] = ()
    title: str = ""
    notes: Sequence[str] = ()
    words: Collection[int] = ()

    def plain(self) -> str:
        """Aligned columns without lines, never wrapped, for a pipe; `-` stands for an empty cell.

        Totals and notes follow after an empty line.
        """
        cells = self._cells("-")
        widths = [max(map(_columns, column)) for column in zip(*filter(None, cells), strict=True)]
        lines = [_aligned(row, widths, self._left) for row in cells]
        title = [escaped(self.title)] if self.title else []
        totals = 1 if self.footer else 0
        below = [*lines[len(lines) - totals :], *map(escaped, self.notes)]
        return "\n".join([*title, *filter(None, lines[: len(lines) - totals]), *[""] * bool(below), *below])

    def markdown(self) -> str:
        """The rows as a table of Markdown, below the title."""
        lines = self.headers, ["---", *["---:"] * (len(self.headers) - 1)], *filter(None, self.rows)
        return "\n".join([f"**{self.title}**", "", *(f"| {' | '.join(line)} |" for line in lines)])

    def _cells(self, empty: str = "") -> list[list[str]]:
        """Headers, rows and the footer, as they are printed."""
        rows = [[escaped(cell) or empty for cell in row] for row in (self.headers, *self.rows)]
        return rows + [[escaped(cell) for cell in self.footer]] * bool(self.footer)

    def _left(self, column: int) -> bool:
        return column == 0 or column in self.words

    def __rich_console__(self, console: Any, options: Any) -> Iterable[Any]:
        # Not at the top: a script that prints nothing, or into a pipe, needs no rich.
        from rich.text import Text

        width, thin = options.max_width, self._thinned()
        if widths := self._widths(width, 3, 1):
            yield self._drawn(widths)
        elif widths := thin._widths(width, 3, 1):
            yield thin._drawn(widths)
            yield from map(Text, thin._said())
        elif widths := thin._widths(width, len(_GAP), -len(_GAP)):
            rows = [[folded(row[0], widths[0]), *row[1:]] if row else row for row in thin._cells()]
            lines = (part for row in rows for part in _lines(row, widths))
            yield Text("\n".join([*thin._titled(), *(_aligned(row, widths, thin._left) for row in lines)]))
            yield from map(Text, thin._said())
        else:
            yield Text("\n".join([*thin._titled(), *thin._records(width), *thin._said()]))
        yield from (Text(escaped(note)) for note in self.notes)

    def _thinned(self) -> "Table":
        """Without the columns that say the same in every row, which a note says once."""
        rows = [row for row in self.rows if row]
        same = [i for i in range(1, len(self.headers)) if len(rows) > 1 and len({row[i] for row in rows}) == 1]
        kept = [i for i in range(len(self.headers)) if i not in same or (self.footer and self.footer[i])]
        said = [f"{self.headers[i]} {rows[0][i]}".strip() for i in same if i not in kept and rows[0][i]]
        pick = lambda row: [row[i] for i in kept] if row else row  # noqa: E731
        return Table(
            pick(self.headers), [pick(row) for row in self.rows], pick(self.footer), self.title,
            [*[f"In all rows: {', '.join(said)}"] * bool(said), *self.notes],
            [new for new, i in enumerate(kept) if i in self.words],
        )  # fmt: skip

    def _titled(self) -> list[str]:
        return [escaped(self.title)] if self.title else []

    def _said(self) -> list[str]:
        return [escaped(note) for note in self.notes]

    def _widths(self, width: int, gap: int, frame: int) -> list[int] | None:
        """Widths of the columns, the first folded and headers and words wrapped if they must; None if all is too wide.

        Paths that would look alike when folded are too wide as well.

        Args:
          width: of the terminal.
          gap: what a column takes beside its cells.
          frame: what the table takes beside its columns.
        """
        columns = list(zip(*filter(None, self._cells()), strict=True))
        room, paths = width - gap * len(columns) - frame, set(columns[0])
        longest = max(map(_columns, paths))
        for least in (self._natural, self._broken, self._wrapped):
            rest = [least(i, column) for i, column in enumerate(columns) if i]
            first = min(longest, room - sum(rest))
            if first >= min(longest, _LEAST_PATH) and len({folded(path, first) for path in paths}) == len(paths):
                return [first, *rest]
        return None

    def _natural(self, i: int, column: Sequence[str]) -> int:
        return max(1, *map(_columns, column))

    def _broken(self, i: int, column: Sequence[str]) -> int:
        """With the header in lines of one word."""
        return max(1, _longest_word(column[0]), *map(_columns, column[1:]))

    def _wrapped(self, i: int, column: Sequence[str]) -> int:
        """With words in lines too."""
        if i not in self.words:
            return self._broken(i, column)
        return max(*map(_longest_word, column), min(_LEAST_TEXT, self._natural(i, column)))

    def _drawn(self, widths: Sequence[int]) -> Any:
        from rich.table import Table as Drawing
        from rich.text import Text

        headers, *rows = self._cells()
        footer = rows.pop() if self.footer else [""] * len(headers)
        title = Text(escaped(self.title)) if self.title else None
        drawing = Drawing(title=title, title_justify="left", show_footer=bool(self.footer))
        footer[0] = folded(footer[0], widths[0])
        for i, (header, total, width) in enumerate(zip(headers, footer, widths, strict=True)):
            drawing.add_column(Text(header), Text(total), width=width, justify="left" if self._left(i) else "right")
        for row in rows:
            if row:
                drawing.add_row(Text(folded(row[0], widths[0])), *map(Text, row[1:]))
            else:
                drawing.add_section()
        return drawing

    def _records(self, width: int) -> Iterable[str]:
        """What a narrow terminal shows: for every row its name, and below it headers and cells."""
        headers, *rows = self._cells()
        for name, *cells in filter(None, rows):
            yield from (name[start : start + width] for start in range(0, max(len(name), 1), width))
            pairs = (f"{header} {cell}".strip() for header, cell in zip(headers[1:], cells, strict=True) if cell)
            yield from (f"{_GAP}{line}" for line in _joined(pairs, width - len(_GAP)))

    def __repr__(self) -> str:
        return render(self)


@dataclass(frozen=True, repr=False)
class Tables:
    """Tables below facts that hold for all of them.

    Attributes:
      facts: such as what was measured on and with.
      tables: in order.

    Example:
      >>> tables = Tables({"jax": "0.12.0"})
      >>> tables.add("Products", ["size", "time"], [["8×8", "2 µs"]])
      >>> print(tables.markdown())
      jax 0.12.0
      <BLANKLINE>
      **Products**
      <BLANKLINE>
      | size | time |
      | --- | ---: |
      | 8×8 | 2 µs |
    """

    facts: Mapping[str, str]
    tables: list[Table] = field(default_factory=list)

    def add(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Add a table."""
        self.tables.append(Table(columns, rows, title=title))

    def print(self) -> None:
        """Print them."""
        show(self)

    def plain(self) -> str:
        """All of them for a pipe."""
        return "\n\n".join([self._heading(), *(table.plain() for table in self.tables)])

    def markdown(self) -> str:
        """All of them as Markdown."""
        return "\n\n".join([self._heading(), *(table.markdown() for table in self.tables)])

    def _heading(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.facts.items())

    def __rich_console__(self, console: Any, options: Any) -> Iterable[Any]:
        from rich.text import Text

        yield Text(escaped(self._heading()))
        yield from self.tables

    def __repr__(self) -> str:
        return render(self)


def show(table: Table | Tables) -> None:
    """Print: drawn to the width of a terminal, aligned and whole in a pipe."""
    if not sys.stdout.isatty():
        print(table.plain(), flush=True)
        return
    from rich.console import Console

    plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    width = shutil.get_terminal_size().columns  # rich takes a dumb terminal to have 80.
    Console(width=width, color_system=None if plain else "auto", highlight=False).print(table)


def render(table: object, width: int = _WIDTH) -> str:
    """What rich makes of a table or another renderable, as text without colours."""
    from rich.console import Console

    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def times(sizes: Iterable[int]) -> str:
    """Sizes of axes as `4×8`.

    >>> times((4, 8))
    '4×8'
    """
    return "×".join(map(str, sizes))


def _aligned(row: Sequence[str], widths: Sequence[int], left: Callable[[int], bool]) -> str:
    cells = []
    for i, (cell, width) in enumerate(zip(row, widths, strict=True) if row else ()):
        space = " " * (width - _columns(cell))
        cells.append(cell + space if left(i) else space + cell)
    return _GAP.join(cells).rstrip()


def _lines(row: Sequence[str], widths: Sequence[int]) -> Iterable[Sequence[str]]:
    """A row as several, its cells wrapped at words."""
    if all(_columns(cell) <= width for cell, width in zip(row, widths, strict=False)):
        return [row]
    cells = [list(_joined(cell.split(" "), width, " ")) for cell, width in zip(row, widths, strict=True)]
    return zip_longest(*cells, fillvalue="")


def _joined(parts: Iterable[str], width: int, gap: str = _GAP) -> Iterator[str]:
    """Parts in lines of at most `width` columns; a longer one has its own."""
    line = ""
    for part in parts:
        if line and _columns(f"{line}{gap}{part}") > width:
            yield line
            line = part
        else:
            line = f"{line}{gap}{part}" if line else part
    if line:
        yield line


def scaled(count: int | None, unit: str) -> str:
    """A count in thousands, millions or more; empty if it is not known.

    >>> scaled(2_100_000, "B"), scaled(12, ""), scaled(None, "B")
    ('2.10 MB', '12', '')
    """
    if count is None:
        return ""
    sizes = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
    size, prefix = next(((size, prefix) for size, prefix in sizes if count >= size), (1, ""))
    number = f"{count:d}" if size == 1 else f"{count / size:#.3g}".rstrip(".")
    return f"{number} {prefix}{unit}".rstrip()


def _columns(text: str) -> int:
    """How many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    return sum(0 if combining(each) else 1 + (east_asian_width(each) in "WF") for each in text)


def _longest_word(text: str) -> int:
    return max(map(_columns, text.split()), default=0)
