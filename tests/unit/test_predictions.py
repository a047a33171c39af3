"""Predictions leave in the formats of Spider's and BIRD's evaluators and come back for scoring."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from sqlbench.agent.trajectory import Completion, Trajectory
from sqlbench.cli import main
from sqlbench.data.tasks import Task, write_split
from sqlbench.evaluation import evaluate
from sqlbench.predictions import one_line

BREAKS = [
    "SELECT 1\nFROM (SELECT 2)\n\n",
    "SELECT 'a\nb'",
    "SELECT 'it''s\r\n' || \t'x\ty'",
    "SELECT 1 -- it's one\n, 2",
    "SELECT 1, -- FROM nowhere\r\n 'x -- y', '/* z */' /* a\n'b */, 3",
    "SELECT '--\n' /* never closed '",
    "SELECT 'a' LIKE 'a\n%'",
    "SELECT 'a\n' 'b'",
    'SELECT "x", `y`, [z] FROM (SELECT 1 AS x, 2 AS y, 3 AS z)',
]


@pytest.mark.parametrize("sql", BREAKS)
def test_a_query_on_one_line_means_the_same(sql):
    line = one_line(sql)
    assert line and not set("\t\r\n") & set(line)
    with closing(sqlite3.connect(":memory:")) as connection:
        assert connection.execute(line).fetchall() == connection.execute(sql).fetchall()


@pytest.mark.parametrize("sql", ["SELECT 'no end\n", "SELECT 1\v", "SELECT 1 FROM"])
def test_a_query_that_fails_still_fails(sql):
    with closing(sqlite3.connect(":memory:")) as connection:
        for text in (sql, one_line(sql)):
            with pytest.raises(sqlite3.Error):
                connection.execute(text)


@pytest.mark.parametrize("sql", ['SELECT 1 AS "a\nb"', "SELECT 1 AS 'a\nb'", "[" * 60_000])
def test_what_cannot_be_written_on_one_line_is_not(sql):
    assert one_line(sql) is None


TASKS = {
    "Which names?": ("SELECT name FROM item", "SELECT name -- all\nFROM item"),
    "How many?": ("SELECT count(*) FROM item", "SELECT 'two\nlines'"),
    "Broken?": ("SELECT colour FROM item", ""),
    "Which one?": ("SELECT name FROM item WHERE id = 2", "SELECT name FROM item\tWHERE id = 2"),
}


class Says:
    """A model that knows one query for each question, and breaks at one."""

    name, family = "says", "nano"

    async def complete(self, messages, on_text=None) -> Completion:
        prompt = messages[-1].content
        return Completion(text=next(sql for question, (_, sql) in TASKS.items() if question in prompt))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A data set in the folder data, and its evaluation in the folder laptop/run."""
    root = tmp_path_factory.mktemp("root")
    (root / "data/database/shop").mkdir(parents=True)
    with closing(sqlite3.connect(root / "data/database/shop/shop.sqlite")) as connection:
        connection.executescript("CREATE TABLE item (id, name); INSERT INTO item VALUES (1, 'nut'), (2, 'bolt');")
    tasks = [
        Task(task_id=str(n), db_id="shop", question=q, gold=gold, split="dev", scorable=q != "Broken?")
        for n, (q, (gold, _)) in enumerate(TASKS.items())
    ]
    write_split(root / "data", "dev", tasks)
    write_split(root / "data", "short", tasks[:1])
    write_split(root / "data", "other", [task.model_copy(update={"db_id": "bank"}) for task in tasks])
    (root / "data/dataset.json").write_text('{"headline": "dev"}')
    evaluate(root / "data", "headline", Says(), "run", results=root, max_turns=1)
    return root


def sqlbench(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


@pytest.mark.parametrize("name", ["predict.txt", "predict_dev.json"])
def test_a_run_is_exported_in_the_order_of_the_split_and_scored_again(root, tmp_path, capsys, name):
    file, out = tmp_path / name, tmp_path / "out.jsonl"
    assert sqlbench("export", root / "laptop/run", "--out", file) == 0
    assert "4 predictions; 1 without one (excluded, failed or not run) are written as SELECT" in capsys.readouterr().out
    if name.endswith("txt"):
        assert file.read_text().split("\n") == [
            "SELECT name   FROM item", "SELECT ('two'||char(10)||'lines')", "SELECT",
            "SELECT name FROM item WHERE id = 2", "",
        ]  # fmt: skip
    else:
        rows = json.loads(file.read_text())
        assert list(rows) == ["0", "1", "2", "3"]
        assert rows["0"] == "SELECT name -- all\nFROM item\t----- bird -----\tshop"
        assert rows["2"] == "SELECT\t----- bird -----\tshop"
    assert sqlbench("score", "--data", root / "data", "--pairs", file, "--out", out) == 0
    scored = [json.loads(line) for line in out.open()]
    assert [(row["task_id"], row["match"], row["reason"]) for row in scored] == [
        ("0", 1, "equal"), ("1", 0, "rows_differ"), ("2", None, "gold_error"), ("3", 1, "equal"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "more", "says"),
    [
        ("p.txt", "SELECT 1\n" * 3, [], "has 3 predictions, the split 4 tasks. Choose another --split."),
        ("p.txt", "SELECT 1\n" * 4, ["--split", "short"], "has 4 predictions, the split 1 tasks."),
        ("p.txt", b"\xff", [], "Cannot read"),
        ("p.json", "{", [], "Cannot read"),
        ("p.json", "[1]", [], "not an object"),
        ("p.json", '{"0": "SELECT 1\\t----- bird -----\\tbank"}', ["--split", "short"], "is for database 'bank'"),
    ],
)
def test_predictions_for_other_tasks_are_refused_in_one_line(root, tmp_path, capsys, name, text, more, says):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    files = ["--data", root / "data", "--pairs", tmp_path / name, "--out", tmp_path / "out"]
    assert sqlbench("score", *files, *more) == 1
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_predictions_of_others_are_read_as_their_evaluators_read_them(root, tmp_path):
    """Spider's takes the text before a tab; BIRD's takes the values in their order, and no text for no query."""
    files = {
        "p.txt": "SELECT name FROM item\tshop\r\n\r\nSELECT 1\r\nSELECT 'bolt'",
        "p.json": json.dumps(
            {"7": "SELECT name FROM item\t----- bird -----\tshop", "0": 0, "1": "", "2": "SELECT 'bolt'"}
        ),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, newline="")
        assert sqlbench("score", "--data", root / "data", "--pairs", tmp_path / name, "--out", tmp_path / "out") == 0
        scored = [json.loads(line) for line in (tmp_path / "out").open()]
        assert [row["match"] for row in scored] == [1, 0, None, 1]


def test_an_export_of_what_is_not_an_evaluation_is_refused(root, tmp_path, capsys):
    for arguments, says in [
        ([root / "laptop/run", "--out", tmp_path / "p.csv"], "Unknown format"),
        ([tmp_path, "--out", tmp_path / "p.txt"], "Cannot read"),
    ]:
        assert sqlbench("export", *arguments) == 1
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1


def test_of_several_samples_the_first_is_exported_and_a_failed_one_is_not(root, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"kind": "eval", "data": str(root / "data"), "split": "short"}))
    task = Task(task_id="0", db_id="shop", question="Which names?", gold=TASKS["Which names?"][0], split="dev")
    known = {"task_key": task.key, "task_id": "0", "db_id": "shop", "question": task.question, "gold": task.gold}
    records = [
        Trajectory(**known, pred="SELECT 1", sample=1),
        Trajectory(**known, pred="SELECT 2", error="model: E: broke"),
        Trajectory(**known, pred="SELECT 3"),
    ]
    (folder / "trajectories.jsonl").write_text("".join(record.model_dump_json() + "\n" for record in records))
    assert sqlbench("export", folder, "--out", tmp_path / "p.txt") == 0
    assert (tmp_path / "p.txt").read_text() == "SELECT 3\n"
