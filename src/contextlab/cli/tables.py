"""Tables on the console: one writer for all commands, which never cuts a name, a number or a column.

What is too wide for the terminal gives way in this order: headings are broken between words; sentences are wrapped;
optional columns are left out, and a line says which; sentences stand below their rows; columns stand in a second table,
with those that tell the rows apart; and where all that is too wide, each row takes lines of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from textwrap import wrap

from rich.cells import cell_len
from rich.text import Text

from contextlab.cli.shared import console

Row = Mapping[str, str | Text]

LEAST = 36
"""Columns of the terminal that a sentence wants beside other cells."""
MOST_FOLDS = 4
"""Tables that one may be folded into."""
INDENT = "  "
NUMBER = re.compile(r"[-+±<>]?\d|-?$|never\b")
"""Cells that are set to the right."""


def print_table(
    title: str,
    rows: Sequence[Row],
    *,
    prose: Sequence[str] = (),
    optional: Sequence[str] = (),
    see: str = "",
    heads: str = "",
    header: bool = True,
) -> None:
    """Print rows, whose keys are the columns; nothing of a cell is cut, whatever the terminal's width.

    prose: columns of sentences, which may be wrapped. optional: columns that may be left out, the first of them first;
    `see` says how to see them. heads: a column whose values are headings over the rows. header: whether the columns'
    names are shown.
    """
    if title:
        console.print(Text(title, style="bold"), soft_wrap=True)
    for line in table_lines(rows, console.width, prose=prose, optional=optional, see=see, heads=heads, header=header):
        console.print(line, soft_wrap=True, highlight=False)
    console.print()


def table_lines(
    rows: Sequence[Row],
    width: int,
    *,
    prose: Sequence[str] = (),
    optional: Sequence[str] = (),
    see: str = "",
    heads: str = "",
    header: bool = True,
) -> Iterator[Text]:
    """The lines of a table, of at most `width` columns of a terminal but where one word is longer."""
    layout = _Layout(rows, width, frozenset(prose), heads, header)
    columns = [column for column in rows[0] if column != heads]
    left_out: list[str] = []
    for column in [*optional, ""]:
        form = layout.beside(columns)
        if form is not None or not column:
            break
        left_out.append(column)
        columns.remove(column)
    plain = [column for column in columns if column not in prose]
    if form is not None:
        yield from layout.table(form)
    elif len(plain) < len(columns) and (form := layout.beside(plain)) is not None:
        yield from layout.table(form, [column for column in columns if column in prose])
    elif not heads and len(plain) == len(columns) and (folds := layout.folds(columns)):
        for i, each in enumerate(folds):
            yield from [Text()] * (i > 0)
            yield from layout.table(each)
    else:
        yield from layout.records(plain, [column for column in columns if column in prose])
    if left_out:
        named = " and ".join((", ".join(left_out[:-1]), left_out[-1])) if len(left_out) > 1 else left_out[0]
        for line in _wrapped(f"Not shown for want of room: {named}." + f" {see}" * bool(see), width):
            yield Text(line, "dim")


@dataclass(frozen=True)
class _Form:
    """The width of each column that stands beside the others, and of the gap between two."""

    widths: Mapping[str, int]
    gap: int


@dataclass(frozen=True)
class _Layout:
    """Rows to be laid out; see `table_lines` for what the fields are."""

    rows: Sequence[Row]
    width: int
    prose: frozenset[str]
    heads: str
    header: bool

    def beside(self, columns: Sequence[str]) -> _Form | None:
        """The columns side by side; None where they have no room."""
        cells = {column: max(_width(row[column]) for row in self.rows) for column in columns}
        for heading in (cell_len, _longest) if self.header else (lambda column: 0,):
            natural = {column: max(cells[column], heading(column)) for column in columns}
            for gap in (2, 1):
                spare = self.width - gap * (len(columns) - 1) - sum(natural.values())
                if spare >= 0:
                    return _Form(natural, gap)
            widest = max((c for c in columns if c in self.prose), key=lambda c: natural[c], default=None)
            if widest is not None:  # of several sentences the longest is wrapped
                least = max(LEAST, *(_longest(_plain(row[widest])) for row in self.rows))
                if natural[widest] + spare >= least:
                    return _Form({**natural, widest: natural[widest] + spare}, 1)
        return None

    def folds(self, columns: Sequence[str]) -> list[_Form]:
        """The columns in as few tables as hold them, each with those that tell the rows apart; [] where none do."""
        keys = self._keys(columns)
        groups: list[list[str]] = []
        for column in columns[len(keys) :]:
            if groups and self.beside([*keys, *groups[-1], column]) is not None:
                groups[-1].append(column)
            else:
                groups.append([column])
        forms = [self.beside([*keys, *group]) for group in groups]
        found = [form for form in forms if form is not None]
        return found if len(found) == len(forms) <= MOST_FOLDS else []

    def _keys(self, columns: Sequence[str]) -> list[str]:
        """The first columns, up to three, that tell the rows apart."""
        for count in range(1, min(4, len(columns))):
            if len({tuple(_plain(row[column]) for column in columns[:count]) for row in self.rows}) == len(self.rows):
                return list(columns[:count])
        return list(columns[:1])

    def table(self, form: _Form, below: Sequence[str] = ()) -> Iterator[Text]:
        """Rows of cells side by side. below: columns of sentences, each below its row."""
        right = {c for c in form.widths if all(NUMBER.match(_plain(row[c])) for row in self.rows)}
        right.discard(next(iter(form.widths)))
        if self.header:
            headings = {column: _wrapped(column, width) for column, width in form.widths.items()}
            yield from _side_by_side(headings, form, right, bottom=True, style="dim")
        for row in self._under_heads():
            if isinstance(row, Text):
                yield row
                continue
            cells = {column: self._cell(row, column, width) for column, width in form.widths.items()}
            yield from _side_by_side(cells, form, right)
            for column in below:
                yield from self._below(_plain(row[column]))

    def records(self, plain: Sequence[str], prose: Sequence[str]) -> Iterator[Text]:
        """Each row on lines of its own: its name, its sentences, then the other cells, each with its column's name."""
        name, *others = plain
        for row in self._under_heads():
            if isinstance(row, Text):
                yield row
                continue
            yield Text().append(row[name])
            for column in prose:
                yield from self._below(_plain(row[column]))
            line = ""
            for told in (f"{c} {' '.join(_plain(row[c]).split())}" for c in others if _plain(row[c])):
                if line and cell_len(f"{INDENT}{line}, {told}") > self.width:
                    yield Text(INDENT + line + ",")
                    line = ""
                line = f"{line}, {told}" if line else told
            yield from [Text(INDENT + line)] * bool(line)

    def _below(self, sentence: str) -> list[Text]:
        return (
            [Text(INDENT + line) for line in _wrapped(sentence, max(1, self.width - len(INDENT)))] if sentence else []
        )

    def _cell(self, row: Row, column: str, width: int) -> list[str | Text]:
        """The lines of a cell: those that it has, and more of a sentence."""
        cell = row[column]
        if isinstance(cell, Text):
            return [cell]
        return list(_wrapped(cell, width) if column in self.prose else cell.split("\n"))

    def _under_heads(self) -> Iterator[Row | Text]:
        """The rows, before those of each heading an empty line and the heading."""
        if not self.heads:
            yield from self.rows
            return
        for i, (head, own) in enumerate(groupby(self.rows, key=lambda row: _plain(row[self.heads]))):
            yield from [Text()] * (i > 0)
            yield Text(head, style="bold")
            yield from own


def _side_by_side(
    cells: Mapping[str, Sequence[str | Text]], form: _Form, right: Iterable[str], bottom: bool = False, style: str = ""
) -> Iterator[Text]:
    """The lines of one row, each cell of which has one line or more."""
    height = max(len(lines) for lines in cells.values())
    for i in range(height):
        line = Text(style=style)
        blanks = 0
        for column, lines in cells.items():
            at = i - (height - len(lines)) * bottom
            shown = lines[at] if 0 <= at < len(lines) else ""
            room = form.widths[column] - cell_len(_plain(shown))
            if _plain(shown):
                line.append(" " * (blanks + room * (column in right))).append(shown)
                blanks = form.gap + room * (column not in right)
            else:
                blanks += form.gap + form.widths[column]
        yield line


def _wrapped(text: str, width: int) -> list[str]:
    """Lines broken between words only; [""] of no text."""
    return wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]


def _width(cell: str | Text) -> int:
    return max(map(cell_len, _plain(cell).split("\n")))


def _longest(text: str) -> int:
    return max(map(cell_len, text.split()), default=0)


def _plain(cell: str | Text) -> str:
    return cell.plain if isinstance(cell, Text) else cell
