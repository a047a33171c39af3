"""The state machine: which sub-agent is called when, what it is shown, and when it ends."""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
from pathlib import Path

import pytest

from sqlbench.agent.conversation import ConversationAgent
from sqlbench.agent.graph import AFRESH, REFUSED, REJECTED, draw
from sqlbench.agent.prompts import RESAMPLE, STRATEGIES, prompts_for
from sqlbench.agent.repair import BanditContext, FixedRepair, repeated
from sqlbench.agent.resampling import TEMPERATURE, ResamplingAgent
from sqlbench.agent.trajectory import Completion, Message
from sqlbench.config import RolloutConfig
from sqlbench.data.tasks import Task
from sqlbench.database.engine import open_database
from sqlbench.interfaces import load_plugin
from sqlbench.rollout import run_agent

GOOD, BAD, BROKEN = "SELECT name FROM singer", "SELECT age FROM singer", "SELECT nam FROM singer"
YES, NO = "THE QUERY IS CORRECT", "Wrong column. THE QUERY IS INCORRECT"


class Scripted:
    """A model that gives prepared answers, in pieces where asked to; an exception among them is raised."""

    name, family = "scripted", "chat"

    def __init__(self, *answers: str | Exception) -> None:
        self.answers = list(answers)
        self.seen: list[list[Message]] = []

    async def complete(self, messages: list[Message], on_text=None) -> Completion:
        self.seen.append(messages)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if on_text is not None:
            on_text(answer[:5])
            on_text(answer[5:])
        return Completion(text=answer)


class Sampled(Scripted):
    """The same, at any temperature."""

    async def complete(self, messages: list[Message], on_text=None, temperature=None) -> Completion:
        answer = await super().complete(messages, on_text)
        return answer.model_copy(update={"temperature": temperature})


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
    def run(
        *answers: str | Exception,
        family: str = "chat",
        repair=None,
        observer=None,
        start=(),
        kind=Scripted,
        agent=None,
        **settings,
    ):
        model = kind(*answers)
        named = repair if isinstance(repair, str) else None
        config = RolloutConfig(repair=named, **settings)
        task = Task(task_id="", db_id="concert", question="Which names?", gold="", split="")
        parts = task, database, model, prompts_for(family), config, None if named else repair, observer, start
        return asyncio.run(run_agent(*parts, agent=agent)), model

    return run


def agents(state) -> list[str]:
    return [f"{t.agent}{t.turn}" for t in state.transitions]


def test_a_query_called_correct_is_the_end(answer):
    state, _ = answer(f"```sql\n{GOOD};\n```", YES)
    assert agents(state) == ["write1", "check1"]
    assert state.sql == GOOD and [e.sql for e in state.executions] == [GOOD]


def test_an_incorrect_query_is_rewritten_and_executed_again(answer):
    state, _ = answer(BAD, NO, GOOD, YES)
    assert agents(state) == ["write1", "check1", "rewrite2", "check2"]
    assert [(e.turn, e.sql) for e in state.executions] == [(1, BAD), (2, GOOD)]


@pytest.mark.parametrize("turns", [1, 2, 3, 6])
def test_it_ends_after_the_last_turn_without_a_check(answer, turns):
    state, _ = answer(*[text for i in range(10) for text in (f"SELECT {i}", NO)], max_turns=turns)
    assert [t.agent for t in state.transitions] == ["write", *["check", "rewrite"] * (turns - 1)]
    assert len(state.executions) == turns


def test_prompts_show_schema_question_query_result_and_feedback(answer):
    _, model = answer(BAD, NO, BROKEN, GOOD)
    write, check, rewrite, last = ["\n".join(m.content for m in messages) for messages in model.seen]
    assert "singer_id" in write and "Which names?" in write and "SQLite" in write
    assert BAD in check and "50 rows" in check
    assert BAD in rewrite and "50 rows" in rewrite and NO in rewrite
    assert BROKEN in last and "no such column: nam" in last and "use name" in last and REFUSED in last


def test_results_are_shown_in_so_many_characters_and_recorded_with_twenty_rows(answer):
    state, model = answer(GOOD, YES, execution_truncate=40)
    shown = model.seen[1][1].content.split("Result:\n")[1]
    assert len(shown) == 40 and shown.startswith("50 rows")
    assert len(state.executions[0].rows) == 20 and state.executions[0].n_rows == 50


def test_cells_are_recorded_as_json_values(answer):
    state, _ = answer("SELECT x'00ff', NULL, 1.5, 9e999, 'Zoë'", YES)
    assert state.executions[0].rows == [["00ff", None, 1.5, "inf", "Zoë"]]


@pytest.mark.parametrize(("answers", "kept"), [((), []), ((GOOD,), ["write1"]), ((BAD, NO), ["write1", "check1"])])
def test_a_broken_model_ends_the_rollout_and_keeps_what_was_done(answer, kept, answers):
    state, _ = answer(*answers, ConnectionError("gone"))
    assert state.error == "model: ConnectionError: gone"
    assert agents(state) == kept


def test_prose_goes_to_the_database_which_refuses_it(answer):
    state, _ = answer("I do not know.", max_turns=1)
    assert state.executions[0].status == "error"


def test_the_graph_can_be_drawn_as_mermaid_text():
    text = draw()
    for edge in ("write_query", "execute_query", "check_query", "rewrite_query"):
        assert edge in text
    assert (
        "check_query -.-> rewrite_query" in text
        and "execute_query -.-> rewrite_query" in text
        and "rewrite_query -.-> execute_query" in text
        and "rewrite_query -.-> __end__" in text
    )


def test_the_first_notebook_draws_the_graph_that_runs(repo):
    cells = json.loads((repo / "notebooks/00_overview.ipynb").read_text(encoding="utf-8"))["cells"]
    (text,) = (t for cell in cells if "```mermaid" in (t := "".join(cell["source"])))
    arrows = re.compile(r"^\s*(\w+)(?:\(.*?\))? (-->|-\.->) (\w+)", re.MULTILINE)
    drawn = {(a.lower(), arrow, b.lower()) for a, arrow, b in arrows.findall(text)}
    names = draw().replace("_query", "").replace("__", "")
    assert drawn == set(arrows.findall(names)) and len(drawn) == 10


class Asked:
    """A repair policy that takes the strategies in their order and keeps what it was told."""

    def __init__(self) -> None:
        self.situations: list[BanditContext] = []

    def choose(self, situation: BanditContext) -> str:
        self.situations.append(situation)
        return STRATEGIES[len(self.situations) - 1]


def test_a_repair_policy_chooses_the_strategy_of_each_rewrite(answer):
    repair = Asked()
    state, model = answer(BROKEN, BAD, NO, GOOD, YES, repair=repair, max_turns=5)
    assert [(t.agent, t.turn, t.strategy) for t in state.transitions] == [
        ("write", 1, None), ("rewrite", 2, STRATEGIES[0]), ("check", 2, None), ("rewrite", 3, STRATEGIES[1]),
        ("check", 3, None),
    ]  # fmt: skip
    assert [(s.error_class, s.attempt, s.previous_strategy) for s in repair.situations] == [
        ("no_such_column", 1, "generate"), ("none", 2, STRATEGIES[0]),
    ]  # fmt: skip
    first, second = model.seen[1][1].content, model.seen[3][1].content
    components = prompts_for("chat").components
    assert first.endswith(components["repair.rewrite_full"]) and second.endswith(components["repair.fix_column"])


@pytest.mark.parametrize("repair", [None, FixedRepair("fix_column")])
def test_a_query_that_did_not_run_is_rewritten_without_a_check(answer, repair):
    state, model = answer(BAD, NO, BROKEN, GOOD, YES, repair=repair, max_turns=5)
    assert agents(state) == ["write1", "check1", "rewrite2", "rewrite3", "check3"]
    last = model.seen[3][1].content
    assert REFUSED in last and NO not in last  # nor the remarks on the query before


def test_with_repair_a_rewrite_sees_every_query_so_far_with_its_result(answer):
    errors = {
        BROKEN: "column: nam",
        "SELECT nme FROM singer": "column: nme",
        "SELECT name FROM singers": "table: singers",
    }
    _, model = answer(*errors, GOOD, YES, repair=FixedRepair("fix_column"), max_turns=5)
    prompt = model.seen[3][1].content
    shown = [prompt.index(part) for sql, error in errors.items() for part in (sql + "\n", "no such " + error)]
    assert shown == sorted(shown)


def test_without_repair_a_rewrite_sees_the_last_query_only(answer):
    state, model = answer(BROKEN, BAD, NO, GOOD, YES)
    assert BROKEN not in model.seen[3][1].content and BAD in model.seen[3][1].content
    assert {t.strategy for t in state.transitions} == {None}


SAME = [BROKEN, BROKEN + " ;;", BROKEN.replace(" ", "\n  ")]


@pytest.mark.parametrize("again", SAME)
@pytest.mark.parametrize("repair", [None, FixedRepair("fix_column")])
def test_a_rewrite_that_repeats_a_failed_query_is_replaced_by_a_sample_of_the_first_prompt(answer, again, repair):
    state, model = answer(BROKEN, again, again, GOOD, YES, kind=Sampled, repair=repair)
    assert agents(state) == ["write1", "rewrite2", "write2", "write2", "check2"]
    assert [t.completion.temperature for t in state.transitions] == [None, None, TEMPERATURE, TEMPERATURE, None]
    assert model.seen[0] == model.seen[2] == model.seen[3] != model.seen[1]
    assert [(e.turn, e.sql) for e in state.executions] == [(1, BROKEN), (2, GOOD)] and state.sql == GOOD
    assert repeated(state.transitions, state.executions) == [False, True, True, False, False]


@pytest.mark.parametrize("again", SAME)
@pytest.mark.parametrize(("kind", "afresh"), [(Sampled, AFRESH), (Scripted, 0)])
def test_it_ends_with_the_last_query_where_nothing_new_comes(answer, again, kind, afresh):
    """Any failed query before counts, not only the last one; a model of one temperature is not asked again."""
    state, model = answer(BROKEN, BAD, NO, *[again] * (1 + afresh), kind=kind, max_turns=9)
    expected = ["write1", "rewrite2", "check2", "rewrite3", *["write3"] * afresh]
    assert agents(state) == expected and not model.answers
    assert [e.sql for e in state.executions] == [BROKEN, BAD] and state.sql == BAD
    assert repeated(state.transitions, state.executions) == [False] * 3 + [True] * (1 + afresh)


@pytest.mark.parametrize("kind", [Scripted, Sampled])
@pytest.mark.parametrize("between", [[], [BROKEN]])
def test_a_policy_that_repeats_a_query_that_ran_stands_by_it(answer, kind, between):
    """A check that calls everything wrong must not talk the policy out of right answers."""
    state, model = answer(GOOD, NO, *between, GOOD + " ;", kind=kind, max_turns=9)
    assert [t.agent for t in state.transitions] == ["write", "check", *["rewrite"] * (1 + len(between))]
    assert state.sql == GOOD and not model.answers


def test_without_a_check_a_query_that_ran_is_final(answer):
    state, model = answer(BROKEN, BAD, check=False, max_turns=9)
    assert agents(state) == ["write1", "rewrite2"] and state.sql == BAD and not model.answers


def test_resampling_as_a_strategy_replaces_failed_and_rejected_queries_by_other_first_ones(answer):
    """Unlike the agent of that name it keeps the check, and does not run a query again."""
    state, model = answer(BROKEN, BROKEN, BAD, NO, GOOD, YES, kind=Sampled, repair=RESAMPLE, max_turns=9)
    assert agents(state) == ["write1", "write2", "write2", "check2", "write3", "check3"] and state.sql == GOOD
    writes = [t for t in state.transitions if t.agent == "write"]
    assert [(t.strategy, t.completion.temperature) for t in writes] == [(None, None), *[(RESAMPLE, 1.0)] * 3]
    assert model.seen[0] == model.seen[1] == model.seen[4]
    assert repeated(state.transitions, state.executions) == [False, True, False, False, False, False]


def test_a_rejected_query_that_is_sampled_again_stands(answer):
    state, model = answer(BAD, NO, f"{BAD} ;", kind=Sampled, repair=RESAMPLE, max_turns=9)
    assert agents(state) == ["write1", "check1", "write2"] and state.sql == BAD and not model.answers


def test_resampling_forgets_a_query_that_did_not_run_and_writes_another(answer):
    state, model = answer(BROKEN, BROKEN, BAD, kind=Sampled, agent=ResamplingAgent(), max_turns=5)
    assert agents(state) == ["write1", "write2", "write3"] and state.sql == BAD
    assert [t.completion.temperature for t in state.transitions] == [None, 1.0, 1.0]
    assert model.seen[0] == model.seen[1] == model.seen[2] and BROKEN not in model.seen[2][1].content


@pytest.mark.parametrize("kind", [Scripted, Sampled])
def test_resampling_ends_with_the_last_query_where_none_runs(answer, kind):
    state, _ = answer(*[f"SELECT x{i}" for i in range(9)], kind=kind, agent=ResamplingAgent(), max_turns=4)
    assert agents(state) == ["write1", "write2", "write3", "write4"] and state.sql == "SELECT x3"


def test_resampling_samples_an_answer_to_a_question_whose_last_one_was_rejected(answer):
    state, _ = answer(GOOD, kind=Sampled, agent=ResamplingAgent(), start=[(BAD, "50 rows")])
    assert [(t.agent, t.completion.temperature) for t in state.transitions] == [("write", 1.0)]


def test_a_conversation_shows_every_query_with_its_result_and_ends_where_the_model_stands_by_one(answer):
    state, model = answer(BROKEN, BAD, f"```sql\n{GOOD}\n```", f"{BAD};", agent=ConversationAgent(), max_turns=9)
    assert agents(state) == ["write1", "rewrite2", "rewrite3", "rewrite4"] and state.sql == BAD
    last = model.seen[-1]
    assert [m.role for m in last] == ["system", "user", *["assistant", "user"] * 3]
    assert last[:4] == model.seen[1] and [m.content.split("\n")[1] for m in last[2::2]] == [BROKEN, BAD, GOOD]
    assert "no such column: nam" in last[3].content and "singer" in last[1].content


@pytest.mark.parametrize("end", ["It answers the question.", ""])
def test_a_conversation_ends_where_the_model_gives_no_further_query(answer, end):
    state, _ = answer(GOOD, end, agent=ConversationAgent(), max_turns=9)
    assert state.sql == GOOD and len(state.executions) == 1 and state.error is None


def test_a_conversation_ends_after_the_turns(answer):
    state, model = answer(BROKEN, BAD, GOOD, agent=ConversationAgent(), max_turns=2)
    assert state.sql == BAD and model.answers == [GOOD]


def test_a_conversation_begins_with_what_was_rejected_before(answer):
    state, model = answer(GOOD, GOOD, agent=ConversationAgent(), start=[(BAD, "50 rows")], max_turns=3)
    assert agents(state) == ["rewrite1", "rewrite2"] and state.sql == GOOD
    assert BAD in model.seen[0][2].content and "50 rows" in model.seen[0][3].content


def test_a_family_without_conversations_is_asked_for_rewrites(answer):
    state, model = answer(BROKEN, BAD, BAD, agent=ConversationAgent(), family="nano", max_turns=9)
    assert agents(state) == ["write1", "rewrite2", "rewrite3"] and state.sql == BAD
    assert [len(prompt) for prompt in model.seen] == [2, 2, 2]
    assert BROKEN in model.seen[2][1].content and BAD in model.seen[2][1].content


def test_five_attempts_are_made_where_every_query_differs(answer):
    state, _ = answer(*[f"SELECT x{i}" for i in range(9)], repair=FixedRepair("fix_syntax"), max_turns=5)
    assert agents(state) == ["write1", "rewrite2", "rewrite3", "rewrite4", "rewrite5"]


class Told:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple] = []

    def text(self, agent, turn, piece) -> None:
        self.events.append(("text", agent, turn, piece))

    def transition(self, transition) -> None:
        self.events.append(("transition", transition))

    def execution(self, execution, execution_text) -> None:
        self.events.append(("execution", execution, execution_text))


def test_an_observer_is_told_of_everything_in_order(answer):
    told = Told()
    state, _ = answer(BROKEN, GOOD, YES, repair=FixedRepair("fix_column"), observer=told)
    names = [(e[0], *e[1:3]) if e[0] == "text" else (e[0],) for e in told.events]
    call = [("transition",)]
    assert names == [
        *[("text", "write", 1)] * 2, *call, ("execution",),
        *[("text", "rewrite", 2)] * 2, *call, ("execution",),
        *[("text", "check", 2)] * 2, *call,
    ]  # fmt: skip
    assert "".join(e[3] for e in told.events if e[:3] == ("text", "rewrite", 2)) == GOOD
    assert [e[1] for e in told.events if e[0] == "transition"] == state.transitions
    executions = [e[1:] for e in told.events if e[0] == "execution"]
    assert [e for e, _ in executions] == state.executions
    assert executions[0][1].startswith("error: no such column: nam") and executions[1][1] == state.history[-1][1]


@pytest.mark.parametrize("repair", [None, FixedRepair("rewrite_full")])
def test_earlier_answers_make_the_first_call_a_rewrite(answer, repair):
    start = [("SELECT 1", "1 row"), (BROKEN, "error: no such column: nam")]
    state, model = answer(BAD, NO, GOOD, YES, repair=repair, start=start)
    assert agents(state) == ["rewrite1", "check1", "rewrite2", "check2"]
    first, second = model.seen[0][1].content, model.seen[2][1].content
    assert first.index("SELECT 1\n") < first.index(BROKEN) < first.index(REJECTED)
    assert second.index("SELECT 1\n") < second.index(BROKEN) < second.index(BAD) < second.index(NO)
    assert [sql for sql, _ in state.history] == ["SELECT 1", BROKEN, BAD, GOOD]


@pytest.mark.parametrize(
    ("text", "name"), [("error: no such column: nam", "no_such_column"), ("empty result", "empty"), ("1 row", "none")]
)
def test_a_policy_is_told_how_an_earlier_answer_failed(answer, text, name):
    repair = Asked()
    answer(GOOD, YES, repair=repair, start=[("SELECT 1", text)])
    assert repair.situations == [BanditContext(error_class=name, attempt=1)]


def test_earlier_answers_count_as_the_same_query(answer):
    """An answer that only repeats them is the answer all the same: there is no other."""
    start = [("SELECT 1", "1 row"), (BAD, "50 rows")]
    state, _ = answer(*["SELECT 1"] * (1 + AFRESH), kind=Sampled, start=start, max_turns=5)
    assert agents(state) == ["rewrite1"] * (1 + AFRESH)
    assert [e.sql for e in state.executions] == ["SELECT 1"] and state.sql == "SELECT 1"


def test_a_broken_model_at_the_first_rewrite_is_an_error_too(answer):
    state, _ = answer(ConnectionError("gone"), start=[(BAD, "50 rows")])
    assert state.error == "model: ConnectionError: gone"


def test_nothing_is_traced_even_where_the_environment_asks_for_it(answer, monkeypatch):
    from langsmith import utils

    seen = []
    monkeypatch.setenv("LANGSMITH_TRACING", "true")
    complete = Scripted.complete

    async def watched(model, messages):
        seen.append(utils.tracing_is_enabled())
        return await complete(model, messages)  # as without an observer: one argument

    monkeypatch.setattr(Scripted, "complete", watched)
    answer(GOOD, YES)
    assert seen == [False, False]


def test_the_published_agent_checks_every_query_the_failed_and_the_last_one_too(database):
    def agents(*answers: str, turns: int) -> list[str]:
        model, task = Scripted(*answers), Task(task_id="", db_id="concert", question="Which?", gold="", split="")
        config = RolloutConfig(max_turns=turns)
        agent = load_plugin("agent", "published")
        done = asyncio.run(run_agent(task, database, model, prompts_for("chat"), config, agent=agent))
        assert done.error is None and not model.answers and done.sql == [a for a in answers if "SEL" in a][-1]
        return [t.agent for t in done.transitions]

    assert agents(GOOD, YES, turns=1) == agents(GOOD, NO, turns=1) == agents(GOOD, YES, turns=3) == ["write", "check"]
    assert agents(BROKEN, NO, BAD, NO, GOOD, NO, turns=3) == ["write", "check", *["rewrite", "check"] * 2]
