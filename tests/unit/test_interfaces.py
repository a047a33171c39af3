"""Parts of one's own: found by name, mistakes told in one line, recorded and counted like the built-in ones."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import sys
from pathlib import Path

import pytest

from sql_env.models import MAX_ATTEMPTS, SqlAction
from sql_env.server.episodes import Episodes
from sql_env.server.sql_environment import SqlEnvironment
from sqlbench.agent.prompts import prompts_for
from sqlbench.agent.repair import ATTEMPT_COST
from sqlbench.agent.trajectory import Completion, Message, Trajectory
from sqlbench.cli import main
from sqlbench.config import RolloutConfig
from sqlbench.data.tasks import Task
from sqlbench.database.engine import cached_database, open_database
from sqlbench.errors import PluginError
from sqlbench.evaluation import evaluate
from sqlbench.interfaces import is_plugin, load_plugin
from sqlbench.models import open_model
from sqlbench.results import Rollouts, difference, summarise
from sqlbench.rollout import MOST_CALLS, rollout
from sqlbench.runs import RunFolder
from sqlbench_chat.connection import connect
from sqlbench_chat.session import ChatSession
from sqlbench_chat.turn import Turn
from sqlbench_lab.display import story
from sqlbench_lab.inspector import Inspector
from sqlbench_lab.rollouts import advantages
from sqlbench_lab.tables import eval_stats
from sqlbench_train.metrics import step_metrics

GOLD = "SELECT name FROM singer WHERE age > 20"
OTHER = "SELECT name FROM singer"
PARTS = '''
from mine_records import Completion, Table, Column, Schema, QueryResult, Task, Limits

class Agent:
    async def run(self, context):
        return await context.ask("write", context.prompts.write(context.task.question, context.schema_text, "sqlite"))

class Sync:
    def run(self, context):
        return "SELECT 1"

class Needs:
    def __init__(self, something):
        pass

    async def run(self, context):
        return ""

def half(task, context):
    return 0.5

class Model:
    name, family = "mine", "nano"

    async def complete(self, messages, on_text=None):
        return Completion(text="SELECT name FROM singer")

class Warehouse:
    """A database without SQLite."""

    name, target, dialect, limits = "warehouse", "warehouse", "sqlite", Limits()

    def schema(self):
        return Schema((Table("singer", (Column("name"), Column("age"))),))

    def refresh(self):
        return ("warehouse", 1)

    def execute(self, sql, limits=None):
        return QueryResult("ok", ("name",), [("Bob",)] if "singer" in sql else [])

class Data:
    def splits(self):
        return ["only"]

    def load(self, split):
        gold = "SELECT name FROM singer WHERE age > 20"
        return [Task(task_id=str(i), db_id="w", question=f"Who {i}?", gold=gold, split=split) for i in range(2)]

    def database(self, db_id):
        return warehouse

warehouse = Warehouse()
number = 7
'''
RECORDS = """
from sqlbench.agent.trajectory import Completion
from sqlbench.data.tasks import Task
from sqlbench.database.types import Column, Limits, QueryResult, Schema, Table
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A working directory with parts of one's own; gone from the imported modules afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    (tmp_path / "mine.py").write_text(PARTS)
    (tmp_path / "mine_records.py").write_text(RECORDS)
    for name, text in {"broken": "x = 1 / 0", "leaves": "raise SystemExit('bye')", "lacks": "import nowhere"}.items():
        (tmp_path / f"{name}.py").write_text(text)
    yield tmp_path
    for name in ("mine", "mine_records", "broken", "leaves", "lacks"):
        sys.modules.pop(name, None)


@pytest.fixture
def database(tmp_path: Path):
    path = tmp_path / "concert.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE singer (name TEXT, age INTEGER)")
        connection.executemany("INSERT INTO singer VALUES (?, ?)", [("Ann", 20), ("Bob", 30), ("Cy", 40)])
    database = open_database(path)
    yield database
    database.close()


class Says:
    """A model that gives prepared answers; the last one again and again, an exception is raised."""

    name, family = "says", "nano"

    def __init__(self, *answers: str | Exception) -> None:
        self.answers = list(answers)

    async def complete(self, messages, on_text=None) -> Completion:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return Completion(text=answer)


def run(database, agent=None, *answers: str | Exception, **more) -> Trajectory:
    task = Task(task_id="7", db_id="concert", question="Who?", gold=GOLD, split="dev", hardness="easy")
    model, config = Says(*(answers or (GOLD,))), RolloutConfig(max_turns=1)
    return asyncio.run(rollout(task, database, model, prompts_for("nano"), config, agent=agent, **more))


# ---- names


def test_a_part_is_found_beside_the_working_directory(mine):
    assert type(load_plugin("agent", "mine:Agent")).__name__ == "Agent"
    assert load_plugin("reward", "mine:half")(None, None) == 0.5
    assert load_plugin("database", "mine:warehouse").name == "warehouse"  # an object is taken as it is
    assert type(load_plugin("agent", "self-correcting")).__name__ == "SelfCorrectingAgent"


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("agent", "no_such_module:Agent", ["no module 'no_such_module'", "Check its name"]),
        ("agent", "mine.deeper:Agent", ["no module 'mine.deeper'"]),
        ("agent", "mine:Agnet", ["mine has no 'Agnet'", "Did you mean 'Agent'?"]),
        ("agent", "mine:number", ["int without run", "sqlbench.interfaces.Agent"]),
        ("agent", "mine:half", ["function without run"]),
        ("agent", "mine:Sync", ["async def"]),
        ("agent", "mine:Needs", ["calling it without arguments raised TypeError", "something"]),
        ("agent", "broken:Agent", ["importing broken raised ZeroDivisionError: division by zero"]),
        ("agent", "leaves:Agent", ["importing leaves raised SystemExit: bye"]),
        ("agent", "lacks:Agent", ["importing lacks raised ModuleNotFoundError: No module named 'nowhere'"]),
        (
            "agent",
            "selfcorrecting",
            ["unknown name", "self-correcting or published or conversation or resampling or module:attribute"],
        ),
        ("agent", "../mine:Agent", ["unknown name"]),
        ("reward", "mine:number", ["int without __call__"]),
        ("dataset", "mine:Agent", ["without splits, load, database"]),
        ("model", "mine:Agent", ["without name, family, complete"]),
        ("trainer", "mine:Agent", ["without fit"]),
    ],
)
def test_a_mistake_in_a_name_is_one_line(mine, kind, name, words):
    with pytest.raises(PluginError) as caught:
        load_plugin(kind, name)
    text = str(caught.value)
    assert text.startswith(f"Cannot load {kind} '{name}': ") and "\n" not in text
    assert all(word in text for word in words), text


def test_paths_addresses_and_endpoints_are_no_plugins(mine):
    (mine / "odd:name").mkdir()
    for name in ("nano", "data/pocket", "openai:gpt", "postgresql://u@h/db", ":memory:", "odd:name", "a:b:c"):
        assert not is_plugin(name)
    assert is_plugin("mine:Agent") and is_plugin(Path("mine.sub:Agent.inner"))


def test_the_command_line_says_it_in_one_line_and_ends(mine, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["eval", "--run", "r", "--data", "mine:Data", "--model", "mine:Model", "--agent", "broken:Agent"])
    said = capsys.readouterr().err.strip()
    assert ended.value.code == 1 and said.startswith("error: Cannot load agent") and "\n" not in said
    assert not (mine / "results").exists()


def test_every_part_of_an_evaluation_can_be_ones_own(mine, capsys):
    words = ["eval", "--run", "r", "--data", "mine:Data", "--model", "mine:Model"]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--agent", "mine:Agent", "--reward", "mine:half"])
    assert ended.value.code == 0
    folder = RunFolder("results/laptop/r")
    config, records = folder.config(), list(folder.trajectories())
    names = {key: config[key] for key in ("data", "model", "agent", "reward")}
    assert names == {"data": "mine:Data", "model": "mine:Model", "agent": "mine:Agent", "reward": "mine:half"}
    assert [(t.reward, t.match, t.correct) for t in records] == [(0.5, 1.0, True)] * 2
    assert folder.summary()["score"]["ex"] == 1.0 and folder.summary()["reward"] == 0.5
    assert "EX 100.0%" in (shown := capsys.readouterr().out) and "mean reward 0.500" in shown


def test_a_run_resumes_with_the_same_parts_only(mine, capsys):
    settings = {"data": "mine:Data", "split": "only", "model": "mine:Model", "run": "r"}
    evaluate(**settings, agent="mine:Agent")
    (mine / "results/laptop/r/summary.json").unlink()
    with pytest.raises(SystemExit):
        main(["eval", "--run", "r", "--split", "only", "--data", "mine:Data", "--model", "mine:Model"])
    assert 'agent was "mine:Agent", is now "self-correcting"' in capsys.readouterr().err
    assert evaluate(**settings, agent="mine:Agent").rollouts == 2


def test_a_database_object_is_used_as_it_is(mine):
    warehouse = load_plugin("database", "mine:warehouse")
    assert cached_database(warehouse) is warehouse
    record = run(warehouse, None, OTHER)
    assert (record.reward, record.executions[0].rows) == (1.0, [["Bob"]])
    assert " singer: name, age" in record.transitions[0].messages[1].content
    assert open_model("mine:Model").name == "mine"


# ---- agents


def agent_of(function):
    return type("Mine", (), {"run": staticmethod(function)})()


def test_what_an_agent_does_is_recorded_and_shown(database):
    told = []

    class Told:
        def text(self, agent, turn, piece) -> None: ...

        def transition(self, transition) -> None:
            told.append((transition.agent, transition.turn))

        def execution(self, execution, text) -> None:
            told.append((execution.turn, text))

    async def look_then_answer(context):
        assert context.task.gold == "" and context.schema_text == " singer: name, age"
        await context.execute(await context.ask("look", [Message(role="user", content="?")]))
        return await context.ask("answer", [Message(role="user", content=context.history[-1][1])])

    record = run(database, agent_of(look_then_answer), OTHER, GOLD, observer=Told())
    assert told == [("look", 1), (1, "3 rows: Ann"), ("answer", 2), (2, "2 rows: Bob")]
    assert (record.reward, record.turns, record.pred) == (1.0, 2, GOLD)  # the answer was executed for the record
    assert [e.sql for e in record.executions] == [OTHER, GOLD]


def test_an_earlier_query_may_be_the_final_one(database):
    async def first(context):
        for sql in (GOLD, OTHER):
            await context.execute(sql)
        return GOLD

    record = run(database, agent_of(first))
    assert (record.pred, record.reward, len(record.executions)) == (GOLD, 1.0, 2)


def boom(context):
    raise ValueError("two\nlines")


@pytest.mark.parametrize(
    ("returned", "error"),
    [
        (lambda context: boom(context), "agent: ValueError: two lines"),
        (lambda context: None, "agent: TypeError: Invalid value of Mine.run: NoneType. Return the final query."),
        (lambda context: 7, "agent: TypeError: Invalid value of Mine.run: int. Return the final query."),
    ],
)
def test_an_agent_that_breaks_is_a_failed_rollout(database, returned, error):
    async def run_it(context):
        await context.execute(OTHER)
        return returned(context)

    record = run(database, agent_of(run_it))
    assert (record.error, record.reward, len(record.executions)) == (error, None, 1)


def test_a_query_that_is_no_text_is_the_agents_mistake(database):
    async def confused(context):
        await context.execute(None)

    assert run(database, agent_of(confused)).error == "agent: TypeError: Invalid query: NoneType. Pass a string."


def test_a_broken_model_fails_the_rollout_even_where_the_agent_goes_on(database):
    async def stubborn(context):
        for _ in range(2):
            try:
                return await context.ask("write", [])
            except Exception:
                pass
        return GOLD

    record = run(database, agent_of(stubborn), ConnectionError("gone"))
    assert (record.error, record.reward, record.pred) == ("model: ConnectionError: gone", None, None)


def test_an_agent_without_end_is_stopped(database):
    async def endless(context):
        while True:
            await context.execute("SELECT 1")

    record = run(database, agent_of(endless))
    assert record.error == f"agent: RuntimeError: Too many calls in one rollout: {MOST_CALLS}. Stop the agent earlier."
    assert len(record.executions) == MOST_CALLS


def test_an_empty_answer_is_wrong_and_did_not_fail(database):
    async def silent(context):
        return ""

    record = run(database, agent_of(silent))
    assert (record.reward, record.reason, record.error) == (0.0, "pred_rejected", None)


# ---- rewards


@pytest.mark.parametrize("value", [0, 1, 0.25, True, None])
def test_a_reward_is_a_number_from_0_to_1_or_none(database, value):
    record = run(database, None, OTHER, reward=lambda task, context: value)
    assert record.error is None and record.reward == (None if value is None else float(value))
    assert (record.match, record.correct, record.reason) == (0.0, False, "rows_differ")


def test_a_reward_may_be_a_coroutine_and_sees_gold_and_the_rollout(database):
    async def judge(task, context):
        await asyncio.sleep(0)
        return (task.gold == GOLD) * len(context.executions) / 4

    assert run(database, None, reward=judge).reward == 0.25


@pytest.mark.parametrize(("value", "shown"), [(1.5, "1.5"), (-1, "-1"), (float("nan"), "nan"), ("1", "'1'")])
def test_any_other_reward_is_a_failed_rollout_that_names_it(database, value, shown):
    def odd(task, context):
        return value

    record = run(database, None, reward=odd)
    assert (
        record.reward is None
        and record.error.startswith("reward: ValueError: Invalid value of the reward ")
        and "odd" in record.error
    )
    assert record.error.endswith(f": {shown}. Return a number from 0 to 1, or None.")


def test_a_reward_that_raises_is_a_failed_rollout(database):
    record = run(database, None, reward=lambda task, context: 1 / 0)
    assert record.error == "reward: ZeroDivisionError: division by zero" and record.reward is None


def records() -> list[Trajectory]:
    """Four rollouts of one task with rewards between 0 and 1, made while training; only the last is right."""
    base = {"task_key": "k", "task_id": "1", "db_id": "d", "question": "Who?", "gold": GOLD, "pred": OTHER}
    pairs = [(0.5, 0.0), (0.25, 0.0), (0.5, 0.0), (0.75, 1.0)]
    return [Trajectory(**base, reward=r, match=m, step=1, sample=i) for i, (r, m) in enumerate(pairs)]


def test_whatever_reads_rewards_copes_with_half_a_one():
    made = records()
    assert (summary := summarise(Rollouts.of(made))).score.ex == 0.25 and summary.reward == 0.5
    assert eval_stats(Rollouts.of(made), "write").outcomes == "0001"
    assert difference(*(eval_stats(Rollouts.of(some), "write").right for some in (made[:1], made[3:]))).gained == 1
    values = step_metrics(made, "")
    assert (values["ex"], values["reward"]) == (0.25, 0.5)
    assert "wrong, reward 0.5" in story(made[0]).data and "right, reward 0.75" in story(made[3]).data
    assert advantages([t.reward for t in made], False) == [0.0, -0.25, 0.0, 0.25]
    inspector = Inspector(made)
    assert inspector.rollouts["outcome"].tolist() == ["wrong"] * 3 + ["right"]
    assert inspector.filter(reward=(0.4, 0.6)).matches == [0, 2]
    assert "reward 0.5" in inspector.html()


def test_a_reward_of_a_half_without_a_match_counts_as_not_right():
    made = [t.model_copy(update={"match": None}) for t in records()]
    assert summarise(Rollouts.of(made)).score.correct == 0 and eval_stats(Rollouts.of(made), "").outcomes == "0000"
    assert "wrong" in story(made[0]).data


def test_a_record_from_before_there_was_a_match_reads_as_it_did():
    old = records()[0].model_dump() | {"reward": 1.0}
    del old["match"]
    assert Trajectory.model_validate_json(json.dumps(old)).correct is True


def test_the_schema_of_a_database_is_rendered_once(database, monkeypatch):
    from sqlbench.database import schema

    rendered = []
    monkeypatch.setattr(schema, "_text", lambda *given: rendered.append(given) or "SCHEMA")
    assert {run(database).transitions[0].messages[1].content.split("\n")[1] for _ in range(3)} == {"SCHEMA"}
    assert len(rendered) == 1


def test_a_task_without_gold_is_judged_by_ones_own_reward_alone(database):
    task = Task(task_id="1", db_id="d", question="Who?", gold="", split="dev")
    more = {"reward": lambda task, context: 0.5}
    model, prompts, config = Says(OTHER), prompts_for("nano"), RolloutConfig(max_turns=1)
    record = asyncio.run(rollout(task, database, model, prompts, config, **more))
    assert (record.reward, record.error, record.reason) == (0.5, None, "no_gold")
    assert asyncio.run(rollout(task, database, model, prompts, config)).reward is None


# ---- chat and environment


def test_the_chat_answers_with_ones_own_agent(mine, database):
    async def look_then_answer(context):
        await context.execute(OTHER)
        return await context.ask("answer", [])

    async def talk() -> None:
        session = ChatSession(Says(GOLD), mine / "chat", agent=agent_of(look_then_answer))
        connection = connect(database.target)
        turn = Turn(question="Who?", database=connection.name)
        chat_turn = await session.ask(turn, connection)
        assert [sql for sql, _ in turn.history] == [OTHER, GOLD]
        assert "2 attempts" in turn.conclusion and "2 rows" in turn.html()
        session.judge(turn, True, chat_turn=chat_turn)  # there was no repair to learn from
        assert turn.verdict == "right" and session.bandit.lessons == []

    asyncio.run(talk())


def test_the_chat_refuses_an_agent_that_cannot_be_loaded(mine, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["chat", "--data", "mine:Data", "--model", "mine:Model", "--agent", "mine:Agnet"])
    assert ended.value.code == 1 and "Did you mean 'Agent'?" in capsys.readouterr().err


def test_an_episode_ends_with_ones_own_reward(mine):
    async def play() -> list[float]:
        episodes = Episodes("mine:Data", "only", "mine:Model", reward="mine:half")
        environment = SqlEnvironment(episodes)
        await environment.reset_async(task_id="0")
        strategies = ["generate", *["rewrite_full"] * (MAX_ATTEMPTS - 1)]
        return [(await environment.step_async(SqlAction(strategy=s, sql="SELECT 0"))).reward for s in strategies]

    rewards = asyncio.run(play())
    assert sum(rewards) == pytest.approx(0.5 - MAX_ATTEMPTS * ATTEMPT_COST)
