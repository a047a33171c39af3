"""Half a character or NUL, from wherever text comes, is replaced once; what is whole stays as it is."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqlbench.agent.trajectory import Completion
from sqlbench.data.tasks import DataSet, Task, write_split
from sqlbench.text import CleanPieces, clean
from sqlbench_chat.connection import _parse
from sqlbench_chat.generations import Feedback, FeedbackStore

HALVES = "\ud83d", "\ude00"
pieces = st.sampled_from([*HALVES, "\0", "a", "\u00e9", "\U0001f600"]) | st.text(max_size=3)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("", ""),
        ("SELECT 1", "SELECT 1"),
        ("\u00e9\U0001f600", "\u00e9\U0001f600"),
        ("a\ud83d", "a\ufffd"),
        ("\ude00a", "\ufffda"),
        ("\ud83d\ude00", "\U0001f600"),
        ("\ude00\ud83d", "\ufffd\ufffd"),
        ("\ud83d\ud83d\ude00", "\ufffd\U0001f600"),
        ("a\0b", "a\ufffdb"),
    ],
)
def test_halves_are_joined_or_replaced(text, cleaned):
    assert clean(text) == cleaned


@given(st.lists(pieces, max_size=12))
def test_a_text_in_pieces_is_cleaned_like_the_whole(parts):
    cleaning = CleanPieces()
    shown = [*map(cleaning.add, parts), cleaning.end()]
    assert "".join(shown) == clean("".join(parts))
    assert all(clean(piece) == piece for piece in shown)


def test_what_is_recorded_can_be_written_and_read_again(tmp_path):
    assert Completion(text="SELECT '\ud83d'").text == "SELECT '\ufffd'"
    store = FeedbackStore(tmp_path / "feedback.jsonl")
    store.append(Feedback(question="\ud83d?", db="d", sql="SELECT '\0'", remark="\ud83d\ude00", execution="\ude00"))
    (kept,) = store.all()
    assert (kept.question, kept.sql, kept.remark, kept.execution) == (
        "\ufffd?",
        "SELECT '\ufffd'",
        "\U0001f600",
        "\ufffd",
    )


def test_a_data_set_with_half_a_character_can_be_written_and_loaded(tmp_path):
    task = Task(task_id="1", db_id="d", question="\ud83d?", gold="SELECT '\0'", split="dev")
    write_split(tmp_path, "dev", [task])
    (tmp_path / "dataset.json").write_text("{}")
    assert DataSet(tmp_path).load("dev") == [task] and task.key
    assert (task.question, task.gold) == ("\ufffd?", "SELECT '\ufffd'")


def test_example_questions_of_a_model_are_cleaned_and_a_hostile_line_is_skipped():
    lines = [json.dumps({"question": "\ud83d?", "sql": "SELECT '\0'"}), '{"question": ' + "[" * 100_000 + "}"]
    (example,) = _parse("\n".join(lines))
    assert (example.question, example.sql) == ("\ufffd?", "SELECT '\ufffd'")
