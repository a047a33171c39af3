"""Rows of an answer: in pages, sorted by any column, as CSV, and as a chart if suitable."""

from __future__ import annotations

import base64
import csv
import io
import re
import warnings
from collections.abc import Sequence
from datetime import date, datetime, time
from decimal import Decimal
from numbers import Real
from typing import Any

import ipywidgets as w
from markupsafe import Markup

from sqlbench.database.engine import in_thread
from sqlbench.database.types import QueryResult
from sqlbench.text import clean
from sqlbench_chat.parts import Panel, button, download, html
from sqlbench_chat.turn import HTML

PAGE = 20
LONG = 160
"""Length in characters above which a cell folds a text."""
BARS, POINTS = 30, 2000
"""Maximum number of rows of a bar chart, and of a line chart."""
_DATE = re.compile(r"\d{4}-\d{2}(-\d{2}([ T]\d{2}:\d{2}(:\d{2})?)?)?")


def cell(value: Any) -> Any:
    """Format a database value for a cell of the chat: floats without binary noise, long texts folded."""
    if value is None:
        return Markup("<i>NULL</i>")
    if isinstance(value, float):
        return f"{value:.15g}"  # further digits are noise
    if isinstance(value, bytes | memoryview):
        raw = bytes(value)
        return HTML.fold(f"BLOB, {len(raw):,} bytes", raw[:256].hex(" "))
    text = str(value)
    return HTML.fold(text[: LONG // 2] + "…", text) if len(text) > LONG else value


def order(value: Any) -> tuple:
    """Return the sort key of a value in a column of mixed types: numbers, then by type, then NaN, NULL last."""
    if value is None:
        return (3, "", "")
    if value != value:  # NaN, of which a Decimal cannot be compared
        return (2, "", "")
    if isinstance(value, Real | Decimal):
        return (0, "", value)
    comparable = isinstance(value, str | bytes | date | datetime | time)
    return (1, type(value).__name__, value if comparable else str(value))


def as_csv(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Format the rows as CSV; bytes are hexadecimal digits, NULL is empty."""
    out = io.StringIO()
    write = csv.writer(out)
    write.writerow(columns)
    write.writerows([bytes(v).hex() if isinstance(v, bytes | memoryview) else v for v in row] for row in rows)
    return out.getvalue()


def chart_kind(rows: Sequence[Sequence[Any]]) -> str:
    """Return ``bar`` for a category and a number, ``line`` for a date and a number, else an empty text."""
    if len(rows) < 2 or any(len(row) != 2 or None in row for row in rows):
        return ""
    labels, values = zip(*rows, strict=True)
    if not all(isinstance(v, Real | Decimal) for v in values):
        return ""
    if all(isinstance(x, date) or (isinstance(x, str) and _DATE.fullmatch(x)) for x in labels):
        return "line" if len(rows) <= POINTS else ""
    names = all(isinstance(x, str) for x in labels) and len(set(labels)) == len(labels)
    return "bar" if names and len(rows) <= BARS else ""


def chart(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Markup:
    """Draw the chart as a PNG image."""
    from matplotlib.figure import Figure

    kind, labels, values = chart_kind(rows), [clean(str(row[0]))[:40] for row in rows], [float(row[1]) for row in rows]
    figure = Figure(figsize=(6.4, 0.6 + 0.26 * len(rows) if kind == "bar" else 2.8), layout="constrained")
    axes, places = figure.subplots(), list(range(len(rows)))
    if kind == "bar":
        axes.barh(places, values, color="#0072b2")
        axes.set_yticks(places, labels)
        axes.invert_yaxis()
        axes.set_xlabel(clean(columns[1])[:60])
    else:
        values = [value for _, value in sorted(zip(labels, values, strict=True))]
        axes.plot(places, values, color="#0072b2", marker="o" if len(rows) <= 60 else None, markersize=3)
        shown = places[:: max(1, len(rows) // 8)]
        axes.set_xticks(shown, [sorted(labels)[i] for i in shown], rotation=30, ha="right")
        axes.set_ylabel(clean(columns[1])[:60])
    axes.spines[["top", "right"]].set_visible(False)
    for text in [*axes.get_xticklabels(), *axes.get_yticklabels(), axes.xaxis.label, axes.yaxis.label]:
        text.set_parse_math(False)  # a dollar sign does not start a formula
    out = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # about letters that the font lacks
        figure.savefig(out, format="png", dpi=110)
    return HTML.chart(base64.b64encode(out.getvalue()).decode(), f"{columns[1]} by {columns[0]}")


class ResultView(Panel):
    """View of a result in pages."""

    def __init__(self) -> None:
        self.head, self.table, self._chart, self._saved = (w.HTML() for _ in range(4))
        self._before = button("Back", lambda: self._turn_to(self._page - 1))
        self._after = button("More", lambda: self._turn_to(self._page + 1))
        self._save = button("CSV", self.save, tooltip="Save all rows as a CSV file")
        self._pages = w.HBox([self._before, self._after, self._save])
        super().__init__([self.head, self.table, self._pages, self._saved, self._chart], self._do, "sqlbench-result")
        self.columns: Sequence[str] = ()
        self.rows: list = []
        self._page, self._sorted, self._down = 0, -1, False

    async def show(self, result: QueryResult, note: str = "") -> None:
        """Show a result, or the reason for its absence."""
        self.columns, self.rows, self._all = result.columns, list(result.rows), list(result.rows)
        self._page, self._sorted, self._saved.value, self._chart.value = 0, -1, "", ""
        self._cut = result.error if result.status == "too_large" else ""
        failed = not result.ok and not self.rows
        self._pages.layout.display = "none" if failed or not self.rows else ""
        if failed:
            self.head.value, self.table.value = html(HTML.trouble(result.status, result.error or "")), ""
            return
        self._note = note
        self._draw()
        if chart_kind(self.rows):
            self._chart.value = html(await in_thread(chart, self.columns, self.rows))

    def _draw(self) -> None:
        start = self._page * PAGE
        shown = [[(cell(v), isinstance(v, Real | Decimal)) for v in row] for row in self.rows[start : start + PAGE]]
        place = (start + 1, start + len(shown), len(self.rows))
        self.head.value = html(HTML.result_head(place, self._cut, self._note))
        self.table.value = html(HTML.result(self.columns, shown, self._sorted, self._down, start))
        several = len(self.rows) > PAGE
        self._before.layout.display = self._after.layout.display = "" if several else "none"
        self._before.disabled, self._after.disabled = start == 0, start + PAGE >= len(self.rows)

    def _turn_to(self, page: int) -> None:
        self._page = page
        self._draw()

    def _do(self, action: str, argument: str) -> None:
        if action == "sort" and argument.isdecimal() and int(argument) < len(self.columns):
            self.sort(int(argument))

    def sort(self, column: int) -> None:
        """Sort by a column: first ascending, then descending, then in the database's order."""
        if column != self._sorted:
            self._sorted, self._down = column, False
        elif not self._down:
            self._down = True
        else:
            self._sorted = -1
        self.rows, self._page = list(self._all), 0
        if self._sorted >= 0:
            self.rows.sort(key=lambda row: order(row[column]), reverse=self._down)
        self._draw()

    def save(self) -> None:
        """Offer all rows as a CSV file."""
        self._saved.value = html(download("result.csv", as_csv(self.columns, self.rows), "text/csv;charset=utf-8"))
