"""Notebook 06's endpoint: what the chat learns from it is caused by the remark, not by the script alone."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from sqlbench.data.tasks import DataSet
from sqlbench.models import open_model
from sqlbench.reward import score
from sqlbench_chat.builtin import BuiltIn
from sqlbench_chat.scripted import ScriptedEndpoint
from sqlbench_chat.session import ChatSession
from sqlbench_chat.turn import Turn


@pytest.fixture
def builtin(pocket: DataSet, monkeypatch: pytest.MonkeyPatch) -> BuiltIn:
    builtin = BuiltIn(pocket.root)
    endpoint = ScriptedEndpoint(task for task in builtin.tasks() if task.db_id == "shop")
    monkeypatch.setenv("OPENAI_BASE_URL", endpoint.url)
    monkeypatch.setenv("NO_PROXY", "*")
    return builtin


def use(builtin: BuiltIn, folder: Path, remark: str) -> ChatSession:
    """Ask four questions, judge the answers by gold, and let the prompt evolve."""
    shop = builtin.connect("shop")
    session = ChatSession(open_model("openai:m"), folder, builtin, "openai:m")
    for task in builtin.benchmark("shop")[::-1][:4]:
        turn = Turn(question=task.question, database="shop")
        asyncio.run(session.ask(turn, shop))
        right = bool(score(task.gold, turn.sql, shop.database).match)
        session.judge(turn, right, "" if right else remark)
    session.evolution.evolve()
    return session


def test_a_repair_works_and_the_remark_brings_a_better_generation(builtin: BuiltIn, tmp_path: Path) -> None:
    evolution = use(builtin, tmp_path, "Leave out ids that I did not ask for.").evolution
    (made,) = evolution.history[1:]
    assert made.score > made.baseline and made.held_out == 20
    assert "- Leave out ids that I did not ask for." in made.components["write.system"]
    assert evolution.store.all()[0].verdict == "right"

    turn = Turn(question=builtin.benchmark("shop")[-1].question, database="shop")
    session = ChatSession(open_model("openai:m"), tmp_path / "other", builtin, "openai:m")
    asyncio.run(session.ask(turn, builtin.connect("shop")))
    first, second = turn.attempts
    assert "no such table" in first.execution.error and second.execution.error is None and turn.sql == second.sql


def test_another_remark_brings_none(builtin: BuiltIn, tmp_path: Path) -> None:
    evolution = use(builtin, tmp_path, "Be careful.").evolution
    assert len(evolution.history) == 1 and evolution.outcome.startswith("no rewrite answered more than")
