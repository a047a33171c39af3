"""The state machine: which sub-agent is called when, what it is shown, and when it ends."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest

from sqlbench.agent.graph import AgentContext, draw, run_agent
from sqlbench.agent.prompts import prompts_for
from sqlbench.agent.trajectory import Completion, Message
from sqlbench.config import RolloutConfig
from sqlbench.database.engine import open_database
from sqlbench.database.schema import introspect

GOOD, BAD, BROKEN = "SELECT name FROM singer", "SELECT age FROM singer", "SELECT nam FROM singer"
YES, NO = "THE QUERY IS CORRECT", "Wrong column. THE QUERY IS INCORRECT"


class Scripted:
    """A model that gives prepared answers; an exception among them is raised."""

    name, family = "scripted", "chat"

    def __init__(self, *answers: str | Exception) -> None:
        self.answers = list(answers)
        self.seen: list[list[Message]] = []

    async def complete(self, messages: list[Message]) -> Completion:
        self.seen.append(messages)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return Completion(text=answer)


@pytest.fixture
def database(tmp_path: Path):
    path = tmp_path / "concert.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE singer (singer_id INTEGER PRIMARY KEY, name TEXT, age INTEGER)")
        connection.executemany("INSERT INTO singer VALUES (?, ?, ?)", [(i, f"Zoë {i}", 20 + i) for i in range(50)])
    database = open_database(path)
    yield database
    database.close()


@pytest.fixture
def answer(database):
    def run(*answers: str | Exception, family: str = "chat", **settings):
        model = Scripted(*answers)
        context = AgentContext(model, database, introspect(database), prompts_for(family), RolloutConfig(**settings))
        state = asyncio.run(run_agent("Which names?", "SCHEMA", context))
        return state, model

    return run


def agents(state) -> list[str]:
    return [f"{t.agent}{t.turn}" for t in state["transitions"]]


def test_a_query_called_correct_is_the_end(answer):
    state, _ = answer(f"```sql\n{GOOD};\n```", YES)
    assert agents(state) == ["write1", "check1"]
    assert state["sql"] == GOOD and [e.sql for e in state["executions"]] == [GOOD]


def test_an_incorrect_query_is_rewritten_and_executed_again(answer):
    state, _ = answer(BAD, NO, GOOD, YES)
    assert agents(state) == ["write1", "check1", "rewrite2", "check2"]
    assert [(e.turn, e.sql) for e in state["executions"]] == [(1, BAD), (2, GOOD)]


@pytest.mark.parametrize("turns", [1, 2, 3, 6])
def test_it_ends_after_the_last_turn_without_a_check(answer, turns):
    state, _ = answer(*[BAD, NO] * 10, max_turns=turns)
    assert [t.agent for t in state["transitions"]] == ["write", *["check", "rewrite"] * (turns - 1)]
    assert len(state["executions"]) == turns


def test_prompts_show_schema_question_query_result_and_feedback(answer):
    _, model = answer(BROKEN, NO, GOOD, YES)
    write, check, rewrite, _ = ["\n".join(m.content for m in messages) for messages in model.seen]
    assert "SCHEMA" in write and "Which names?" in write and "SQLite" in write
    assert BROKEN in check and "no such column: nam" in check and "use name" in check
    assert BROKEN in rewrite and "no such column: nam" in rewrite and NO in rewrite


def test_results_are_shown_in_so_many_characters_and_recorded_with_twenty_rows(answer):
    state, model = answer(GOOD, YES, execution_truncate=40)
    shown = model.seen[1][1].content.split("Result:\n")[1]
    assert len(shown) == 40 and shown.startswith("50 rows")
    assert len(state["executions"][0].rows) == 20 and state["executions"][0].n_rows == 50


def test_cells_are_recorded_as_json_values(answer):
    state, _ = answer("SELECT x'00ff', NULL, 1.5, 9e999, 'Zoë'", YES)
    assert state["executions"][0].rows == [["00ff", None, 1.5, "inf", "Zoë"]]


@pytest.mark.parametrize(("answers", "kept"), [((), []), ((GOOD,), ["write1"]), ((BAD, NO), ["write1", "check1"])])
def test_a_broken_model_ends_the_rollout_and_keeps_what_was_done(answer, kept, answers):
    state, _ = answer(*answers, ConnectionError("gone"))
    assert state["error"] == "model: ConnectionError: gone"
    assert agents(state) == kept if kept else "transitions" not in state or not state["transitions"]


def test_prose_goes_to_the_database_which_refuses_it(answer):
    state, _ = answer("I do not know.", max_turns=1)
    assert state["executions"][0].status == "error"


def test_the_graph_can_be_drawn_as_mermaid_text():
    text = draw()
    for edge in ("write_query", "execute_query", "check_query", "rewrite_query"):
        assert edge in text
    assert "check_query -.-> rewrite_query" in text and "rewrite_query --> execute_query" in text


def test_nothing_is_traced_even_where_the_environment_asks_for_it(answer, monkeypatch):
    from langsmith import utils

    seen = []
    monkeypatch.setenv("LANGSMITH_TRACING", "true")
    complete = Scripted.complete

    async def watched(model, messages):
        seen.append(utils.tracing_is_enabled())
        return await complete(model, messages)

    monkeypatch.setattr(Scripted, "complete", watched)
    answer(GOOD, YES)
    assert seen == [False, False]
