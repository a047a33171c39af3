"""Entity-relationship diagram of a schema in plain SVG: without JavaScript, fonts or requests, it renders anywhere.

Tables stand in columns, each just right of the tables it refers to. Every name is escaped. A wide table shows its keys,
its first other columns and the number of the rest. A very large schema shows its first `MAX_TABLES` tables.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from sqlbench.database.types import Column, ForeignKey, Schema, Table
from sqlbench_lab.view import TEMPLATES

MAX_TABLES, MAX_COLUMNS = 80, 14
_ROW, _HEAD, _GAP_X, _GAP_Y, _CHAR = 18, 24, 70, 24, 6.7
_MAX_CHARS = 34
_TALL = 900
"""Height at which a column of tables is broken into two."""


@dataclass
class _Box:
    table: Table
    columns: list[Column]
    x: float = 0.0
    y: float = 0.0

    @property
    def keys(self) -> set[str]:
        return {key.column.lower() for key in self.table.foreign_keys}

    @property
    def hidden(self) -> int:
        return len(self.table.columns) - len(self.columns)

    @property
    def height(self) -> float:
        return _HEAD + _ROW * (len(self.columns) + (self.hidden > 0)) + 6

    @property
    def width(self) -> float:
        lines = [_short(self.table.label), *(f"PK {_short(c.name)}  {_short(c.type)}" for c in self.columns)]
        return max(120.0, 20 + _CHAR * max(map(len, lines)))

    def row(self, column: str) -> float:
        """Return the middle of a column's row, or of the title if the column is not drawn."""
        names = [c.name.lower() for c in self.columns]
        i = names.index(column.lower()) if column.lower() in names else -1
        return self.y + (_HEAD + _ROW * (i + 0.5) + 3 if i >= 0 else _HEAD / 2)


def er_svg(schema: Schema) -> str:
    """Draw a schema; its views stand apart, at the right."""
    boxes = {t.label: _Box(t, _drawn(t)) for t in schema.tables[:MAX_TABLES]}
    if not boxes:
        return "<p>No tables to draw.</p>"
    width, height = _place(boxes)
    omitted = len(schema.tables) - len(boxes)
    return TEMPLATES.get_template("diagram.svg").render(
        name=schema.name,
        width=width,
        height=height + 24 * (omitted > 0),
        boxes=boxes.values(),
        edges=[edge for box in boxes.values() for edge in _edges(box, boxes)],
        left=omitted,
        head=_HEAD,
        row=_ROW,
    )


def _drawn(table: Table) -> list[Column]:
    """Return the columns to draw, in declared order: all of a small table, else keys in preference to others."""
    if len(table.columns) <= MAX_COLUMNS:
        return list(table.columns)
    keys = {key.column.lower() for key in table.foreign_keys}
    ranked = sorted(table.columns, key=lambda c: not (c.primary_key or c.name.lower() in keys))
    chosen = set(ranked[: MAX_COLUMNS - 1])
    return [c for c in table.columns if c in chosen]


def _place(boxes: dict[str, _Box]) -> tuple[float, float]:
    """Place every box, and return the width and height of the diagram."""
    depth: dict[str, int] = {}

    def visit(name: str, above: frozenset[str]) -> int:
        if name not in depth:
            targets = {_target(k, boxes) for k in boxes[name].table.foreign_keys} & boxes.keys() - above - {name}
            depth[name] = max((visit(t, above | {name}) + 1 for t in sorted(targets)), default=0)
        return depth[name]

    for name in boxes:
        visit(name, frozenset())
    users: dict[str, list[str]] = {name: [] for name in boxes}
    for name, box in boxes.items():
        for key in box.table.foreign_keys:
            if (target := _target(key, boxes)) in users.keys() - {name}:
                users[target].append(name)
    for name in sorted(boxes, key=lambda n: -depth[n]):  # next to the tables that refer to them: short lines
        depth[name] = max(depth[name], min((depth[user] for user in users[name]), default=0) - 1)
    right = max(depth.values()) + 1
    depth |= {name: right for name, box in boxes.items() if box.table.view}
    x, bottom = 12.0, 0.0
    for level in range(max(depth.values()) + 1):
        members = [boxes[name] for name in boxes if depth[name] == level]
        y, widest = 12.0, 0.0
        for box in members:
            if y > 12 and y + box.height > _TALL:
                x, y, widest = x + widest + _GAP_X, 12.0, 0.0
            box.x, box.y = x, y
            y, widest = y + box.height + _GAP_Y, max(widest, box.width)
            bottom = max(bottom, y)
        x += widest + _GAP_X
    return x - _GAP_X + 12, bottom - _GAP_Y + 12


def _target(key: ForeignKey, boxes: dict[str, _Box]) -> str:
    """Return the label of the table that a key refers to: SQLite keeps the letter case of the key's declaration."""
    label = key.ref_label
    return label if label in boxes else next((name for name in boxes if name.lower() == label.lower()), label)


def _edges(box: _Box, boxes: dict[str, _Box]) -> Iterator[tuple]:
    """Yield one line per drawn foreign key: its start with its bend, its end with its bend, and its label."""
    for key in box.table.foreign_keys:
        target = boxes.get(_target(key, boxes))
        if target is None:
            continue
        y, to_y = box.row(key.column), target.row(key.ref_column)
        if target.x + target.width < box.x:  # the usual case: the target is to the left
            x, to_x, bend, to_bend = box.x, target.x + target.width, -40, 40
        elif target.x > box.x + box.width:
            x, to_x, bend, to_bend = box.x + box.width, target.x, 40, -40
        else:
            x, to_x, bend, to_bend = box.x + box.width, target.x + target.width, 50, 50
        yield x, y, bend, to_x, to_y, to_bend, f"{key.column} refers to {key.ref_label}.{key.ref_column}"


def _xml(text: str) -> str:
    """Replace the characters that XML cannot hold."""
    return re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]", "\ufffd", text)


def _short(name: str) -> str:
    return name if len(name) <= _MAX_CHARS else name[: _MAX_CHARS - 1] + "…"


TEMPLATES.filters.update(xml=_xml, short=_short, g="{:g}".format)
