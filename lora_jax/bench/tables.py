"""Tables of measurements, for a terminal or as Markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console, Group
from rich.table import Table


@dataclass
class Report:
    """Tables with a heading, for a terminal or as Markdown.

    Attributes:
      facts: what was measured on and with.
      tables: title, column names and rows of text; an empty row is a line between sections.

    Example:
      >>> report = Report({"jax": "0.12.0"})
      >>> report.add("Products", ["size", "time"], [["8×8", "2 µs"]])
      >>> print(report.markdown())
      jax 0.12.0
      <BLANKLINE>
      **Products**
      <BLANKLINE>
      | size | time |
      | --- | ---: |
      | 8×8 | 2 µs |
    """

    facts: Mapping[str, str]
    tables: list[tuple[str, Sequence[str], Sequence[Sequence[str]]]] = field(default_factory=list)

    def add(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Add a table."""
        self.tables.append((title, columns, rows))

    def print(self) -> None:
        """Show on the terminal."""
        Console().print(self)

    def __rich__(self) -> Group:
        return Group(self._heading(), *(_table(*each) for each in self.tables))

    def markdown(self) -> str:
        """The same as Markdown."""
        blocks = [self._heading()]
        for title, columns, rows in self.tables:
            lines = columns, ["---", *["---:"] * (len(columns) - 1)], *filter(None, rows)
            blocks.append("\n".join([f"**{title}**", "", *(f"| {' | '.join(line)} |" for line in lines)]))
        return "\n\n".join(blocks)

    def _heading(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.facts.items())


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row) if row else table.add_section()
    return table
