"""Tables on the console."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from contextlab.cli.shared import console


def print_table(title: str, rows: list[dict[str, str]]) -> None:
    console.print(f"[bold]{escape(title)}[/]")
    table = Table(header_style="dim", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for i, column in enumerate(rows[0]):
        word = max(map(len, column.split()), default=0)  # a heading is broken between words only
        table.add_column(escape(column), justify="left" if i == 0 else "right", no_wrap=i == 0, min_width=word)
    for row in rows:
        table.add_row(*(escape(str(value)) for value in row.values()))
    console.print(table)
    console.print()
