"""A data set whose database is not SQLite: PostgreSQL by its address, DuckDB by its files, in every command."""

from __future__ import annotations

import asyncio
import json

import pandas as pd
import psycopg
import pytest

from sql_env import SqlAction
from sql_env.server.episodes import Episodes
from sqlbench.agent.trajectory import Completion
from sqlbench.cli import main
from sqlbench.data.audit import audit_dataset
from sqlbench.data.tasks import DataSet, Task, find_databases, write_split
from sqlbench.database.engine import cached_database
from sqlbench.errors import DatabaseError, DataError
from sqlbench.evaluation import evaluate
from sqlbench.interfaces import load_plugin
from sqlbench.reward import score
from sqlbench.runs import read_trajectories
from sqlbench.scoring import score_pairs
from sqlbench_lab.inspector import Inspector

SCRIPT = """
CREATE TABLE stadium (stadium_id int PRIMARY KEY, name varchar(20) NOT NULL, price decimal(6, 2), opened date);
CREATE TABLE singer (singer_id int PRIMARY KEY, name varchar(20), stadium_id int REFERENCES stadium (stadium_id));
CREATE TABLE award (award_id int PRIMARY KEY);
CREATE VIEW cheap AS SELECT name FROM stadium WHERE price < 15;
INSERT INTO stadium VALUES (1, 'Arena', 10.50, '1990-05-01'), (2, 'Dome', 20, '2001-01-01'),
    (3, 'Field', 20, '2001-07-07');
INSERT INTO singer VALUES (1, 'Ann', 1), (2, 'Bob', 1), (3, 'Cid', 2), (4, 'amy', 3)
"""
TASKS = {
    # question: (gold, hardness, excluded)
    "How many singers are there?": ("SELECT count(*) FROM singer", "easy", ""),
    "Whose names begin with an a?": ("SELECT name FROM singer WHERE name ~ '^[Aa].*'", "easy", ""),
    "Which whole prices are there?": ("SELECT DISTINCT price::int FROM stadium WHERE price::int >= 15", "easy", ""),
    "Which stadiums opened in 2001?": (
        "SELECT name FROM stadium WHERE EXTRACT(YEAR FROM opened) = 2001 ORDER BY price",
        "medium",
        "",
    ),
    "How many singers has each stadium?": (
        "SELECT t.name, count(*) FROM stadium t JOIN singer s USING (stadium_id) GROUP BY t.name",
        "medium",
        "",
    ),
    "Which singers won?": ("SELECT s.name FROM singer s JOIN award a ON a.award_id = s.singer_id", "easy", ""),
    "What colour is it?": ("SELECT colour FROM stadium", "easy", "gold_error"),
    "What happens to be?": ("SELECT random()", "easy", "self_check"),
}
ANSWERS = {
    "Which whole prices are there?": "SELECT price::int FROM stadium WHERE price > 12",
    "Which stadiums opened in 2001?": "SELECT name FROM stadium WHERE opened > '2000-12-31'::date ORDER BY price",
    "Whose names begin with an a?": "SELECT name FROM singer WHERE name LIKE 'a%'",  # wrong
}
RIGHT = 5
PLUGIN = """
from sqlbench.agent.trajectory import Completion


class Model:
    name, family = "scripted", "chat"

    async def complete(self, messages, on_text=None):
        return Completion(text="SELECT count(*) FROM singer")
"""


@pytest.fixture(scope="module")
def server(postgres):
    """Address of a database with the tables, without a password."""
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute("CREATE DATABASE concert")
    address = postgres.replace("//postgres:@", "//postgres@").replace("/postgres?", "/concert?")
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute(SCRIPT)
    return address


@pytest.fixture(params=["postgresql", "duckdb"])
def root(request, tmp_path):
    """A data set of 8 tasks on one database, audited."""
    folder = tmp_path / "data" / "database"
    folder.mkdir(parents=True)
    if request.param == "postgresql":
        (folder / "concert.url").write_text(request.getfixturevalue("server") + "\n")
    else:
        duckdb = pytest.importorskip("duckdb", reason="duckdb is not installed")
        (folder / "concert").mkdir()
        with duckdb.connect(str(folder / "concert" / "concert.duckdb")) as connection:
            connection.execute(SCRIPT)
    tasks = [
        Task(task_id=f"dev-{i}", db_id="concert", question=question, gold=gold, split="dev")
        for i, (question, (gold, *_)) in enumerate(TASKS.items())
    ]
    write_split(tmp_path / "data", "dev", tasks)
    write_split(tmp_path / "data", "train", [t.model_copy(update={"split": "train"}) for t in tasks[:4]])
    (tmp_path / "data" / "dataset.json").write_text("{}")
    audit_dataset(tmp_path / "data", query_timeout=30)
    return tmp_path / "data"


class Scripted:
    """A model that knows the answers, right or wrong, and finds every query correct."""

    name, family = "scripted", "chat"

    def __init__(self) -> None:
        self.prompts: list[str] = []

    async def complete(self, messages, on_text=None) -> Completion:
        prompt = "\n".join(message.content for message in messages)
        self.prompts.append(prompt)
        question = next(q for q in TASKS if q in prompt)
        sql = ANSWERS.get(question, TASKS[question][0])
        return Completion(text="THE QUERY IS CORRECT" if "THE QUERY IS CORRECT" in prompt else f"```sql\n{sql}\n```")


def exit_code(*arguments):
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    return left.value.code


def dialect(root):
    return cached_database(DataSet(root).database("concert")).dialect


def test_the_audit_reads_gold_queries_in_the_dialect_of_the_database(root):
    tasks = DataSet(root).load("dev")
    assert [(t.question, t.gold, t.hardness, t.excluded) for t in tasks] == [(q, *rest) for q, rest in TASKS.items()]
    found = pd.read_parquet(root / "audit.parquet").set_index("task_id")
    assert dict(found["empty_tables"][found["split"] == "dev"])["dev-5"] == "award"
    audit = audit_dataset(root, query_timeout=30)
    assert audit.tables_without_rows == {"concert": ["award"]}
    assert (audit.splits["dev"].tasks, audit.splits["dev"].scorable, audit.splits["dev"].with_rows) == (8, 6, 8)
    assert [t.needs_order for t in tasks[:5]] == [False, False, False, True, False]


def test_an_evaluation_runs_scores_and_shows_the_dialect(root, tmp_path):
    model = Scripted()
    summary = evaluate(root, "dev", model, "run", results=tmp_path / "results", query_timeout=30.0)
    assert (summary.score.n, summary.score.correct, summary.failed) == (6, RIGHT, 0)
    name = {"postgresql": "PostgreSQL", "duckdb": "DuckDB"}[dialect(root)]
    assert all(name in prompt and "SQLite" not in prompt for prompt in model.prompts)
    assert any("CREATE TABLE singer" in prompt and "REFERENCES stadium" in prompt for prompt in model.prompts)
    rollouts = list(read_trajectories(tmp_path / "results/laptop/run/trajectories.jsonl"))
    assert {t.dialect for t in rollouts} == {dialect(root)}
    assert (summary.components["group"], summary.components["order"], summary.components["joins"]) == (1, 1, 1)
    inspector = Inspector(tmp_path / "results/laptop/run", data=root)
    inspector.select(next(i for i, t in enumerate(rollouts) if "whole prices" in t.question))
    shown = str(inspector.rollout_html())
    assert "price" in shown and "INT" in shown


def test_samples_count_equal_results_of_the_database(root, tmp_path):
    summary = evaluate(
        root, "dev", Scripted(), "run", results=tmp_path, samples=2, temperature=0.5, query_timeout=30.0, limit=3
    )
    assert summary.samples.n == 2 and summary.score.n == 6


def test_pairs_are_scored_in_both_modes_and_in_processes(root, tmp_path):
    golds = [gold for gold, _, excluded in TASKS.values() if not excluded]
    pairs = [{"db_id": "concert", "gold": gold, "pred": gold} for gold in golds]
    pairs += [
        {"db_id": "concert", "gold": golds[0], "pred": "DROP TABLE singer"},
        {"db_id": "nosuch", "gold": "x", "pred": ""},
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    for workers, strict in ((1, True), (2, False)):
        counts = score_pairs(
            root, tmp_path / "pairs.jsonl", tmp_path / "out", workers=workers, strict=strict, query_timeout=30.0
        )
        assert counts == {"pairs": 8, "scored": 7, "matched": 6, "equal": 6, "pred_rejected": 1, "no_database": 1}


def test_gold_answers_are_kept_by_the_content_of_the_database(root):
    database = cached_database(DataSet(root).database("concert"))
    gold = "SELECT random()"  # another one only if it is run again
    assert score(gold, "SELECT 7", database).match == score(gold, "SELECT 7", database).match == 0
    assert database.refresh() == cached_database(DataSet(root).database("concert")).refresh()


def test_the_environment_serves_its_tasks(root, tmp_path, monkeypatch):
    (tmp_path / "concert_model.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    episodes = Episodes(root, "train", "concert_model:Model", query_timeout=30.0)

    async def play():
        task = next(t for t in episodes.tasks.values() if t.question.startswith("Whose"))
        episode = await episodes.start(task, "one", None)
        wrong = await episodes.attempt(episode, SqlAction(strategy="generate"))
        right = await episodes.attempt(episode, SqlAction(strategy="rewrite_full", sql=task.gold))
        return episode.observation(), wrong, right

    seen, wrong, right = asyncio.run(play())
    assert seen.dialect == {"postgresql": "PostgreSQL", "duckdb": "DuckDB"}[dialect(root)]
    assert "CREATE TABLE singer" in seen.schema_text and (wrong.success, right.success) == (False, True)


def test_the_command_line_evaluates_audits_and_asks(root, tmp_path, monkeypatch, capsys):
    (tmp_path / "concert_model.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    seconds = ["--query-timeout", "30"]
    assert exit_code("data", "audit", "--data", str(root), *seconds) == 0
    model = ["--model", "concert_model:Model"]
    assert exit_code("eval", "--data", str(root), "--split", "dev", *model, "--run", "x", *seconds) == 0
    assert "16.7%" in capsys.readouterr().out
    where = str(DataSet(root).database("concert"))
    assert exit_code("ask", "How many?", "--db", where, *model, *seconds) == 0
    assert "4" in capsys.readouterr().out


# ---- addresses


def test_a_password_in_a_data_set_is_refused_without_being_shown(tmp_path):
    (tmp_path / "database").mkdir()
    (tmp_path / "database" / "a.url").write_text("postgresql://me:secret@localhost/x")
    (tmp_path / "database" / "b.url").write_text("postgresql://localhost/x?password=secret")
    for name in "ab":
        with pytest.raises(DataError, match=r"Password in .*\.url: postgresql.*PGPASSWORD") as caught:
            find_databases(tmp_path, name)
        assert "secret" not in str(caught.value)


def test_the_password_comes_from_the_environment_and_is_nowhere(server, tmp_path, monkeypatch):
    monkeypatch.setenv("PGPASSWORD", "pa55word")
    database = cached_database(server + "&application_name=x")
    assert database.execute("SELECT 1").ok and "pa55word" not in repr(vars(database))


def test_an_address_may_be_a_path_and_never_names_code(tmp_path, monkeypatch):
    folder = tmp_path / "database"
    (folder / "far").mkdir(parents=True)
    (folder / "far" / "t.csv").write_text("a\n1\n")
    for name, text in {"near": "far", "own": "warehouse:Warehouse"}.items():
        (folder / f"{name}.url").write_text(text)
    (tmp_path / "warehouse.py").write_text("raise SystemExit('ran')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert find_databases(tmp_path, "near") == [str(folder / "far")]
    assert find_databases(tmp_path, "far") == [folder / "far"]  # the files themselves are the tables
    with pytest.raises(DatabaseError, match="warehouse:Warehouse"):
        cached_database(find_databases(tmp_path, "own")[0])
    assert find_databases(tmp_path, "other") == find_databases(tmp_path, "../x\0" + "y" * 999) == []


def test_a_database_of_your_own_is_found_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "warehouse.py").write_text(
        "from sqlbench.database.engine import Database\nfrom sqlbench.database.types import Limits\n\n\n"
        "Warehouse = Database(':memory:', Limits())\nWarehouse.dialect = 'mysql'\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    own = cached_database("warehouse:Warehouse")
    assert own is load_plugin("database", "warehouse:Warehouse")
    assert score("SELECT 1 AS `a` ORDER BY 1", "SELECT 1", own).match == 1


@pytest.mark.parametrize("address", ["mysql://me@host/x", "snowflake://account/x", "bigquery://project/x"])
def test_other_servers_are_refused_with_the_name_of_the_seam(tmp_path, address, capsys):
    assert exit_code("ask", "How many?", "--db", address, "--model", "nano") == 1
    said = capsys.readouterr().err
    assert "Unsupported kind of database: " + address.split(":")[0] in said
    assert "module:attribute" in said and "sqlbench.interfaces.Database" in said and said.count("\n") == 1
