"""Tables of results: drawn on a terminal, plain columns where they go to a file or another program."""

import io
import sys
from collections.abc import Mapping, Sequence


def table(rows: Sequence[Mapping[str, str]], left: int = 1) -> str:
    """Rows of equal keys as aligned columns, the keys above; the first `left` columns are flush left, others right."""
    if sys.stdout.isatty():
        return _drawn(rows, left)
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ("  ".join(_set(cell, width, n < left) for n, (cell, width) in enumerate(zip(row, widths, strict=True)))
             for row in cells)  # fmt: skip
    return "\n".join(line.rstrip() for line in lines)


def _set(cell: str, width: int, left: bool) -> str:
    return cell.ljust(width) if left else cell.rjust(width)


def _drawn(rows: Sequence[Mapping[str, str]], left: int) -> str:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(rows[0]):
        drawn.add_column(Text(name), justify="left" if number < left else "right", overflow="fold", no_wrap=number > 0)
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row.values()))
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard")
    console.print(drawn)
    return console.file.getvalue().strip("\n")  # pyright: ignore[reportAttributeAccessIssue]
