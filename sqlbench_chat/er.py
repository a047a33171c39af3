"""Diagram tab: the schema as a picture to drag, zoom, search and narrow to a table's neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import ipywidgets as w

from sqlbench.database.schema import mermaid_er
from sqlbench.database.types import Schema, Table
from sqlbench_chat.parts import Panel, button, html
from sqlbench_lab import view
from sqlbench_lab.diagram import er_svg


def neighbours(schema: Schema, name: str) -> tuple[Table, ...]:
    """Return a table with the tables that it refers to and those that refer to it."""
    here = name.lower()
    refers = {t.label.lower(): {key.ref_label.lower() for key in t.foreign_keys} for t in schema.tables}
    near = {here} | refers.get(here, set()) | {label for label, targets in refers.items() if here in targets}
    return tuple(t for t in schema.tables if t.label.lower() in near)


def matching(schema: Schema, text: str) -> tuple[Table, ...]:
    """Return the tables with a text in their name or in a column's name."""
    part = text.strip().lower()
    return tuple(t for t in schema.tables if any(part in n.lower() for n in (t.label, *(c.name for c in t.columns))))


class Diagram(Panel):
    """The diagram tab."""

    def __init__(self) -> None:
        self._schema = Schema(())
        self.search = w.Text(placeholder="Find a table or column", layout=w.Layout(flex="1 1 200px", max_width="360px"))
        self.search.observe(lambda _: self._draw(matching(self._schema, self.search.value)), "value")
        self._what, self.picture, self._source = w.HTML(), w.HTML(), w.HTML()
        self.picture.add_class("sqlbench-diagram")
        row = w.HBox([self.search, button("All tables", self.all)], layout=w.Layout(flex_flow="row wrap"))
        super().__init__([row, self._what, self.picture, self._source], self._do)

    def show(self, schema: Schema) -> None:
        """Draw a schema."""
        self._schema = schema
        source = view.folded("as mermaid text", view.HTML.pre(mermaid_er(schema)))
        self._source.value = html(source)
        self.all()

    def all(self) -> None:
        """Draw every table."""
        self.search.value = ""
        self._draw(self._schema.tables)

    def _do(self, action: str, argument: str) -> None:
        if action == "near":
            self._draw(neighbours(self._schema, argument), f"{argument} and its neighbours: ")

    def _draw(self, tables: Sequence[Table], what: str = "") -> None:
        count = f"{what}{len(tables)} of {len(self._schema.tables)} tables. "
        hint = "Click a table for its neighbours; drag to move, turn the wheel to zoom." if tables else ""
        self._what.value = html(view.HTML.strong(count), view.HTML.small(hint))
        self.picture.value = er_svg(replace(self._schema, tables=tuple(tables)))
