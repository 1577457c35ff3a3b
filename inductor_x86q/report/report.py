"""The report that users hold."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from inductor_x86q.report import html, json, model_explorer, tables, text
from inductor_x86q.report.model import Content

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclasses.dataclass
class Report(Content):
    """`fused`: int8 kernels; `missed`: what should have been int8 and is not; `kept_float`: float by design.

    Example:
        >>> report = inductor_x86q.explain(q, (x,))
        >>> report.layers, len(report.fused)
        (4, 4)
        >>> inductor_x86q.Report.from_json(report.to_json()) == report
        True
        >>> page = report.to_html("my model")
    """

    def missed_text(self) -> str:
        return text.missed(self)

    def summary(self) -> str:
        """The totals in one line."""
        return text.summary(self)

    def __str__(self) -> str:
        return self.table(tables.terminal_width())

    def __repr__(self) -> str:
        return f"<Report: {self.summary()}>"

    def __rich__(self) -> RenderableType:
        return text.renderable(self)

    def table(self, width: int = 120) -> str:
        """The report as text, no line of the table longer than `width` characters (at least 60)."""
        return text.table(self, width)

    def to_json(self) -> str:
        """The report as JSON; `inductor_x86q.report.json` has the schema."""
        return json.write(self)

    @classmethod
    def from_json(cls, content: str) -> Report:
        """The report that `to_json` wrote.

        Raises:
            ValueError: the text is no report, or of a later version of the schema.
        """
        return cls(**json.read(content))

    def to_html(self, title: str = "int8 report", *, compare: Report | None = None) -> str:
        """One self-contained page: totals, the graph, a table of all layers; it needs no network.

        Args:
            compare: the report of before, of the same model: the page says layer by layer what has changed since.
        """
        return html.page(self, title, compare)

    def to_model_explorer(self, title: str = "int8 report") -> str:
        """The graph as JSON that model-explorer opens."""
        return model_explorer.write(self, title)

    def _repr_html_(self) -> str:
        """The page inside a frame: what Jupyter shows of a report."""
        return html.frame(self.to_html())
