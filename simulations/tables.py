"""Tables for a terminal of any width: what does not fit beside each other follows in further tables below."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, JustifyMethod
from rich.table import Table

WIDEST_CELL = 28
"""Characters; longer cells, which are names, wrap."""
PADDING = 2
"""Characters between two columns."""


def print_table(
    console: Console,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: Sequence[int] = (0,),
    bold: Sequence[int] = (),
    widest: int = WIDEST_CELL,
) -> None:
    """Prints as many tables as the console's width needs; each begins with the names (column 0).

    Headings wrap between words and are never cut. `left` are the columns aligned to the left, `bold` the bold rows;
    cells of more than `widest` characters wrap.
    """
    for columns in fitting(headings, rows, console.width, widest):
        table = Table(box=SIMPLE_HEAD, padding=(0, PADDING - 1, 0, 0), show_edge=False)
        for column in columns:
            width = _width(column, headings, rows, widest)
            justify: JustifyMethod = "left" if column in left else "right"
            table.add_column(headings[column], justify=justify, overflow="fold", min_width=width, max_width=width)
        for number, row in enumerate(rows):
            table.add_row(*(row[column] for column in columns), style="bold" if number in bold else None)
        console.print(table, highlight=False, markup=False)
        console.print()


def fitting(
    headings: Sequence[str], rows: Sequence[Sequence[str]], width: int, widest: int = WIDEST_CELL
) -> list[list[int]]:
    """The columns of each table: as many as the terminal has room for; every table begins with the names (column 0)."""
    for_columns = width - _width(0, headings, rows, widest) - PADDING
    tables: list[list[int]] = []
    room = 0
    for column in range(1, len(headings)):
        needed = _width(column, headings, rows, widest) + PADDING
        if not tables or room < needed:
            tables.append([0])
            room = for_columns
        tables[-1].append(column)
        room -= needed
    return tables


def _width(column: int, headings: Sequence[str], rows: Sequence[Sequence[str]], widest: int) -> int:
    """Characters that a column needs: headings wrap between words only, cells beyond `widest` wrap."""
    cells = max((len(row[column]) for row in rows), default=0)
    return max(min(cells, widest), *(len(word) for word in headings[column].split()), 1)
