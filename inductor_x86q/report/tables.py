"""Tables: on a terminal in colour and as wide as it is, as plain text elsewhere.

rich is imported by whoever prints, and not by all who compile.
"""

from __future__ import annotations

import dataclasses
import io
import shutil
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, Group, RenderableType
    from rich.measure import Measurement
    from rich.table import Table as RichTable
    from rich.text import Text

LEAST_WIDTH = 60  # of a table; a narrower terminal breaks its lines
UNLIMITED = 10_000
_LEAST_CELL = 16  # of a column that gives way
_HEADER_LINE = "    \n    \n ── \n    \n    \n    \n    \n    \n"  # what rich draws around cells: nothing else


@dataclasses.dataclass(frozen=True)
class Column:
    """`cut` says what a narrow terminal loses: "end", "beginning" (of a path the end tells more), or nothing."""

    title: str
    right: bool = False
    cut: str = ""
    style: str = ""


class Table:
    """Rows of text under titles."""

    def __init__(self, *columns: Column | str) -> None:
        self.columns = [Column(column) if isinstance(column, str) else column for column in columns]
        self.rows: list[tuple[Sequence[str], str]] = []

    def add(self, *cells: str, style: str = "") -> None:
        self.rows.append((cells, style))

    def text(self, width: int = UNLIMITED) -> str:
        """Plain text, no line longer than `width` characters where enough can be cut."""
        return plain(self, max(width, LEAST_WIDTH))

    def __rich__(self) -> RichTable:
        from rich.box import Box
        from rich.cells import cell_len
        from rich.table import Table as RichTable

        table = RichTable(box=Box(_HEADER_LINE), padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
        for number, column in enumerate(self.columns):
            longest = max(map(cell_len, [column.title, *(cells[number] for cells, _ in self.rows)]))
            table.add_column(
                styled(column.title, "bold"),
                style=column.style,
                justify="right" if column.right else "left",
                no_wrap=not column.cut,
                overflow="crop",
                min_width=min(longest, _LEAST_CELL) if column.cut else longest,
            )
        for cells, style in self.rows:
            table.add_row(*map(_cell, cells, self.columns), style=style or None)
        return table


def _cell(text: str, column: Column) -> RenderableType:
    return _Cut(text, column.cut == "beginning") if column.cut else styled(text, "", overflow="crop")


@dataclasses.dataclass(frozen=True)
class _Cut:
    """A text that may lose its end, or its beginning."""

    text: str
    keep_end: bool

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        from rich.cells import cell_len
        from rich.measure import Measurement

        size = cell_len(self.text)
        return Measurement(min(size, _LEAST_CELL), size)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        text, size = self.text, options.max_width
        if len(text) > size:
            text = "…" + text[len(text) - size + 1 :] if self.keep_end else text[: size - 1] + "…"
        yield styled(text, "", overflow="crop")


def styled(text: str, style: str, overflow: Any = None) -> Text:
    """Text as it is, whatever brackets it holds."""
    from rich.text import Text

    return Text(text, style, overflow=overflow)


# --- where it goes ----------------------------------------------------------------------------------------------------


def group(*parts: Any) -> Group:
    """Parts below each other; strings stand as they are, however long."""
    from rich.console import Group
    from rich.text import Text

    return Group(*(Text(part) if isinstance(part, str) else part for part in parts))


def plain(what: RenderableType, width: int) -> str:
    """As text without colour; lines outside tables are as long as they are."""
    from rich.console import Console

    target = io.StringIO()
    console = Console(file=target, width=width, color_system=None, force_terminal=False, force_jupyter=False)
    console.print(what, soft_wrap=True)
    return "\n".join(line.rstrip() for line in target.getvalue().splitlines())


def terminal_width() -> int:
    return max(shutil.get_terminal_size((120, 40)).columns, LEAST_WIDTH)


def show(what: RenderableType) -> None:
    """Prints to standard output: in colour on a terminal, plain elsewhere."""
    from rich.console import Console

    console = Console(highlight=False, width=terminal_width())
    if console.is_terminal or console.is_jupyter:
        console.print(what, soft_wrap=True)
    else:
        print(plain(what, terminal_width()), flush=True)
