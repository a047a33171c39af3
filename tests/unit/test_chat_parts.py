"""The parts of the chat page by themselves: cells, order, charts, CSV, diagrams, differences of prompts."""

from __future__ import annotations

import asyncio
import csv
import io
import math
from dataclasses import replace
from datetime import date
from decimal import Decimal

import pytest

from sqlbench.database.types import Column, ForeignKey, QueryResult, Schema, Table
from sqlbench_chat.er import matching, neighbours
from sqlbench_chat.generations import Generation
from sqlbench_chat.prompts import MOST_WORDS, curve_html, text_diff
from sqlbench_chat.result import PAGE, ResultView, as_csv, cell, chart, chart_kind
from sqlbench_lab.diagram import er_svg


def shown(columns: tuple[str, ...], rows: list[tuple]) -> ResultView:
    view = ResultView()
    asyncio.run(view.show(QueryResult("ok", columns, rows)))
    return view


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (37500.829999999994, "37500.83"),
        (0.1 + 0.2, "0.3"),
        (3.0, "3"),
        (float("inf"), "inf"),
        (7, 7),
        (Decimal("1.10"), Decimal("1.10")),
        (None, "<i>NULL</i>"),
        ("<b>", "<b>"),
    ],
)
def test_a_cell_shows_a_value_without_the_tail_of_a_float(value: object, text: object) -> None:
    assert cell(value) == text


def test_long_texts_and_blobs_are_folded_and_escaped() -> None:
    folded = cell("<i>" + "x" * 400)
    assert folded.startswith("<details") and folded.count("&lt;i&gt;") == 2 and "x" * 400 in folded
    assert "BLOB, 1,000 bytes" in cell(b"\x01" * 1000) and len(cell(b"\x01" * 100_000)) < 2000


def test_rows_come_in_pages_and_in_the_order_of_any_column() -> None:
    rows = [(i % 7, f"name {i}" if i else None) for i in range(50)]
    view = shown(("n", "<name>"), rows)
    assert "1 to 20 of 50" in view.head.value and "&lt;name&gt;" in view.table.value
    assert view.table.value.count("<tr>") == 21
    view._after.click()
    view._after.click()
    assert "41 to 50 of 50" in view.head.value and view._after.disabled
    view._bridge.value = "sort:1#1"
    assert view.rows[0] == (1, "name 1") and view.rows[-1] == (0, None) and "1 to 20" in view.head.value
    assert 'aria-sort="ascending"' in view.table.value
    view._bridge.value = "sort:1#2"
    assert view.rows[0] == (0, None) and 'aria-sort="descending"' in view.table.value
    view._bridge.value = "sort:1#3"
    assert view.rows == rows
    for hostile in ("sort:9#4", "sort:x#5", "drop:1#6", "#7", "sort:-1#8"):
        view._bridge.value = hostile
    assert view.rows == rows


def test_a_column_of_any_values_can_be_sorted() -> None:
    view = shown(
        ("v",),
        [
            ("b",),
            (2,),
            (None,),
            (b"x",),
            (1.5,),
            ("a",),
            (Decimal(1),),
            (date(2024, 1, 1),),
            ({"a": 1},),
            (Decimal("NaN"),),
            (math.nan,),
        ],
    )
    view.sort(0)
    assert [row[0] for row in view.rows][:3] == [Decimal(1), 1.5, 2] and view.rows[-1] == (None,)
    assert all(row[0] != row[0] for row in view.rows[-3:-1])


def test_csv_holds_every_row_and_reads_back() -> None:
    rows = [(1, 'a "quoted"\nline, with comma', None, b"\xff")] * (PAGE + 5)
    read = list(csv.reader(io.StringIO(as_csv(("a", "b,c", "d", "e"), rows))))
    assert read[0] == ["a", "b,c", "d", "e"]
    assert read[1:] == [["1", 'a "quoted"\nline, with comma', "", "ff"]] * (PAGE + 5)
    view = shown(("a",), [(1,)])
    view.save()
    assert 'download="result.csv"' in view._saved.value and "base64," in view._saved.value


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        ([("Rock", 3), ("Jazz", Decimal("1.5"))], "bar"),
        ([("2024-01-01", 3.5), ("2024-02", 1)], "line"),
        ([(date(2024, 1, 1), 1), (date(2024, 1, 2), 2)], "line"),
        ([("Rock", 3)], ""),
        ([("Rock", 3), ("Rock", 4)], ""),
        ([("Rock", 3), ("Jazz", None)], ""),
        ([(1, 3), (2, 4)], ""),
        ([("a", "b"), ("c", "d")], ""),
        ([("a", 1, 2), ("b", 1, 2)], ""),
        ([(str(i), i) for i in range(200)], ""),
        ([], ""),
    ],
)
def test_a_chart_is_drawn_where_a_result_invites_one(rows: list[tuple], kind: str) -> None:
    assert chart_kind(rows) == kind
    assert ("<img" in shown(("label", "value"), rows)._chart.value) == bool(kind)


def test_a_chart_takes_any_label() -> None:
    assert "iVBOR" in chart(("$x$", "\\frac{"), [("$_{", 1), ("\u4e2d\u6587", 2), ("\ud83d\ude00", -3)])


# --- the diagram ------------------------------------------------------------------------------------------------------


def table(name: str, *refers: str) -> Table:
    columns = (Column("id", "INTEGER", primary_key=True), *(Column(f"{r}_id", "INTEGER") for r in refers))
    return Table(name, columns, tuple(ForeignKey(f"{r}_id", r, "id") for r in refers))


def test_a_table_is_shown_with_its_neighbours_and_found_by_a_column() -> None:
    schema = Schema((table("artist"), table("Album", "Artist"), table("track", "album"), table("genre"), table("user")))
    assert [t.name for t in neighbours(schema, "Album")] == ["artist", "Album", "track"]
    assert [t.name for t in neighbours(schema, "genre")] == ["genre"]
    assert [t.name for t in matching(schema, " ALBUM ")] == ["Album", "track"]
    assert len(matching(schema, "")) == 5


def test_views_stand_apart_at_the_right() -> None:
    svg = er_svg(Schema((table("a"), table("b", "a"), replace(table("summary"), view=True))))
    assert svg.count("stroke-dasharray") == 1 and svg.count("<g data-do") == 3
    place = {name: float(svg.split(f'near:{name}"><rect x="')[1].split('"')[0]) for name in ("a", "b", "summary")}
    assert place["summary"] > place["b"] > place["a"]


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_a_difference_marks_words_and_is_bounded() -> None:
    assert text_diff("Write one <query>.", "Write a <query>.") == (
        "<pre>Write <del>one</del><ins>a</ins> &lt;query&gt;.</pre>"
    )
    long = "word " * MOST_WORDS
    assert text_diff(long, long + "x").count("<ins>") == 1


def test_the_scores_of_the_generations_are_a_curve() -> None:
    first = Generation(number=0, components={})
    assert curve_html([first]) == ""
    later = [Generation(number=1, components={}, parent=0, score=0.5, baseline=0.25, held_out=8)]
    later += [Generation(number=2, components={}, parent=1, score=0.75, baseline=0.5, held_out=8)]
    svg = curve_html([first, *later])
    assert svg.count("<circle") == 3 and "generation 2: 75%" in svg and "0 25% 1 50% 2 75%" in svg
