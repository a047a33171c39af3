"""A rollout ends as right, wrong, unscorable or failed, and these four are never mixed up."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from pathlib import Path

import pytest

from sqlbench.agent.prompts import prompts_for
from sqlbench.agent.repair import FixedRepair
from sqlbench.agent.trajectory import Completion, Trajectory
from sqlbench.config import RolloutConfig
from sqlbench.data.tasks import Task
from sqlbench.database.engine import open_database
from sqlbench.errors import ModelError, PromptTooLongError
from sqlbench.rollout import failed_rollout, rollout, run_agent

GOLD = "SELECT name FROM singer WHERE age > 20"


class OneAnswer:
    """A model that always says the same, or breaks."""

    name, family = "one answer", "nano"

    def __init__(self, answer: str | None, finish_reason: str = "stop") -> None:
        self.answer, self.finish_reason = answer, finish_reason

    async def complete(self, messages, on_text=None) -> Completion:
        if self.answer is None:
            raise ModelError("endpoint gone")
        return Completion(text=self.answer, finish_reason=self.finish_reason)


@pytest.fixture
def database(tmp_path: Path):
    path = tmp_path / "concert.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE singer (singer_id INTEGER PRIMARY KEY, name TEXT, age INTEGER)")
        connection.executemany("INSERT INTO singer VALUES (?, ?, ?)", [(1, "Ann", 20), (2, "Bob", 30), (3, "Cy", 40)])
    database = open_database(path)
    yield database
    database.close()


@pytest.fixture
def run(database):
    def one(
        answer: str | None, gold: str = GOLD, finish_reason: str = "stop", scorable: bool = True, **more
    ) -> Trajectory:
        given = {"question": "Who?", "gold": gold, "split": "dev", "hardness": "easy", "scorable": scorable}
        task = Task(task_id="7", db_id="concert", **given)
        model = OneAnswer(answer, finish_reason)
        return asyncio.run(rollout(task, database, model, prompts_for("nano"), RolloutConfig(), **more))

    return one


def test_a_right_answer_has_reward_one_and_carries_its_task(run):
    record = run("SELECT name FROM singer WHERE age >= 30")
    assert (record.reward, record.failed, record.pred) == (1.0, False, "SELECT name FROM singer WHERE age >= 30")
    assert (record.task_id, record.db_id, record.gold, record.hardness, record.split) == (
        "7", "concert", GOLD, "easy", "dev",
    )  # fmt: skip
    assert record.turns == 2 and record.seconds > 0  # its one answer is no verdict, and then a repetition


@pytest.mark.parametrize("answer", ["SELECT name FROM singer", "SELECT x FROM y", "no idea", "", "DROP TABLE singer"])
def test_a_wrong_or_broken_query_has_reward_zero_and_did_not_fail(run, answer):
    record = run(answer)
    assert (record.reward, record.failed) == (0.0, False) and record.reason


def test_a_broken_model_has_no_reward_and_failed(run):
    record = run(None)
    assert record.reward is None and record.failed and record.pred is None
    assert record.error == "model: ModelError: endpoint gone"


@pytest.mark.parametrize("room", [0, 1, 2])
def test_answers_that_make_the_next_prompt_too_long_are_wrong_and_a_first_prompt_that_is_failed(database, room):
    """The query would have been right; the first prompt holds the schema and the question only."""

    class Small(OneAnswer):
        async def complete(self, messages, on_text=None) -> Completion:
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls > room:
                raise PromptTooLongError("a prompt has 9 tokens")
            return Completion(text=GOLD if self.calls == 1 else "THE QUERY IS INCORRECT")

    task = Task(task_id="7", db_id="concert", question="Who?", gold=GOLD, split="dev")
    record = asyncio.run(rollout(task, database, Small(None), prompts_for("nano"), RolloutConfig()))
    assert [t.agent for t in record.transitions] == ["write", "check"][:room]
    if room == 0:
        assert (record.reward, record.error) == (None, "model: PromptTooLongError: a prompt has 9 tokens")
    else:
        assert (record.reward, record.reason, record.failed, record.pred) == (0.0, "overlong", False, GOLD)


@pytest.mark.parametrize("scorable", [True, False])
@pytest.mark.parametrize(
    ("gold", "reason"),
    [
        ("SELECT nothing FROM nowhere", "gold_error"),
        ("DROP TABLE singer", "gold_rejected"),
        ("SELECT zeroblob(100000000)", "gold_too_large"),
    ],
)
def test_a_gold_query_that_does_not_run_has_no_reward_and_failed_where_it_had_run(run, scorable, gold, reason):
    record = run("SELECT name FROM singer", gold=gold, scorable=scorable)
    assert record.reward is None and record.failed == scorable and record.reason == reason
    assert not scorable or "was changed" in record.error


def test_an_answer_cut_at_the_token_limit_is_executed_and_marked(run):
    record = run("SELECT name FROM singer WHERE", finish_reason="length")
    assert record.executions[0].status == "error" and record.reward == 0.0
    assert {t.completion.finish_reason for t in record.transitions} == {"length"}


def test_a_record_survives_the_way_to_disk_and_back(run):
    record = run("SELECT name FROM singer")
    assert Trajectory.model_validate_json(record.model_dump_json()) == record


def test_a_rollout_that_could_not_start_failed():
    task = Task(task_id="7", db_id="concert", question="Who?", gold=GOLD, split="dev")
    record = failed_rollout(task, "database", FileNotFoundError("gone"))
    assert record.failed and record.reward is None and record.error == "database: FileNotFoundError: gone"


def test_repair_and_observer_reach_the_agent(run):
    class Told:
        def __init__(self) -> None:
            self.executions = []

        def text(self, agent, turn, piece) -> None: ...

        def transition(self, transition) -> None: ...

        def execution(self, execution, execution_text) -> None:
            self.executions.append(execution)

    told = Told()
    record = run("SELECT nothing FROM singer", repair=FixedRepair("fix_column"), observer=told)
    assert [t.strategy for t in record.transitions] == [None, "fix_column"]
    assert told.executions == record.executions and record.reward == 0.0


def test_a_record_from_before_there_were_strategies_loads(run):
    record = run("SELECT name FROM singer")
    old = json.loads(record.model_dump_json())
    for transition in old["transitions"]:
        del transition["strategy"]
    assert Trajectory.model_validate_json(json.dumps(old)) == record


def ask(database, model, **more):
    task = Task(task_id="", db_id="concert", question="Who?", gold="", split="")
    return asyncio.run(run_agent(task, database, model, prompts_for("nano"), RolloutConfig(max_turns=1), **more))


def test_a_question_without_gold_is_answered_by_the_same_agent(database):
    context = ask(database, OneAnswer("SELECT name FROM singer;"))
    assert context.sql == "SELECT name FROM singer" and context.executions[0].n_rows == 3 and context.error is None
    prompt = context.transitions[0].messages[1].content
    assert "Who?" in prompt and "singer: singer_id, name, age" in prompt


def test_asking_again_starts_with_a_rewrite_of_the_earlier_answer(database):
    start = [("SELECT age FROM singer", "3 rows: 20")]
    context = ask(database, OneAnswer("SELECT name FROM singer"), start=start, repair=FixedRepair("fix_table"))
    (call,) = context.transitions
    assert (call.agent, call.turn, call.strategy) == ("rewrite", 1, "fix_table")
    assert "query: SELECT age FROM singer\n result: 3 rows: 20\n repair: fix table" in call.messages[1].content


def test_an_answer_that_breaks_says_why(database, tmp_path):
    assert ask(database, OneAnswer(None)).error == "model: ModelError: endpoint gone"
    path = tmp_path / "gone.sqlite"
    sqlite3.connect(path).execute("CREATE TABLE t (a)").connection.close()
    gone = open_database(path)
    path.write_text("this is no database, " * 99)
    assert ask(gone, OneAnswer("SELECT 1")).error.startswith("schema: DatabaseError: ")
    gone.close()


def test_an_error_names_nothing_that_the_prompt_hides(tmp_path):
    with sqlite3.connect(tmp_path / "concert.sqlite") as connection:
        connection.execute("CREATE TABLE singer (singer_id INTEGER PRIMARY KEY, name TEXT)")
        connection.execute("CREATE TABLE stadium (stadium_id INTEGER PRIMARY KEY, venue TEXT)")
    task = Task(task_id="7", db_id="concert", question="Where?", gold="SELECT 1", split="dev")

    def shown(cut: int) -> str:
        database, config = open_database(tmp_path / "concert.sqlite"), RolloutConfig(table_info_truncate=cut)
        done = asyncio.run(rollout(task, database, OneAnswer("SELECT venue"), prompts_for("nano"), config))
        assert "no such column: venue" in done.executions[0].error
        return done.transitions[-1].messages[1].content

    assert "venue is in stadium" in shown(2048) and "stadium" not in shown(30)


def test_prompts_show_sample_rows_where_asked_to(database):
    task = Task(task_id="7", db_id="concert", question="Who?", gold=GOLD, split="dev")
    for count, expected in ((0, []), (2, ["-- 1 | Ann | 20", "-- 2 | Bob | 30"])):
        model, config = OneAnswer(f"```sql\n{GOLD}\n```"), RolloutConfig(max_turns=1, sample_rows=count)
        done = asyncio.run(rollout(task, database, model, prompts_for("chat"), config))
        text = done.transitions[0].messages[-1].content
        assert [line for line in text.splitlines() if line.startswith("-- ") and line[3].isdigit()] == expected
        assert done.reward == 1


def test_half_a_character_in_an_answer_is_recorded_by_a_stand_in(run):
    done = run("SELECT '\ud83d', '\0'")
    assert (done.reward, done.pred) == (0.0, "SELECT '\ufffd', '\ufffd'")
    assert Trajectory.model_validate_json(done.model_dump_json()) == done


def test_an_agent_of_ones_own_may_run_half_a_character(database):
    class Own:
        async def run(self, context) -> str:
            await context.execute("SELECT '\ud83d'")
            return "SELECT '\ud83d'"

    task = Task(task_id="7", db_id="concert", question="Who?", gold=GOLD, split="dev")
    done = asyncio.run(rollout(task, database, OneAnswer(""), prompts_for("nano"), RolloutConfig(), agent=Own()))
    assert done.executions[0].sql == "SELECT '\ufffd'" and done.error is None
    assert Trajectory.model_validate_json(done.model_dump_json()) == done
