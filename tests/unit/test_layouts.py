"""Every layout is imported from a small release in its real format, audited and evaluated through the command line."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
import zipfile
from contextlib import closing
from pathlib import Path

import pandas as pd
import pytest

from sqlbench.cli import main
from sqlbench.data.audit import read_audit
from sqlbench.data.tasks import DataSet
from sqlbench.runs import RunFolder
from sqlbench_lab.display import audit_table

ITEMS = "CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT); INSERT INTO item VALUES (1, 'nut'), (2, 'bolt');"
NAMES, COUNT, BROKEN = "SELECT name FROM item", "SELECT count(*) FROM item", "SELECT colour FROM item"


def database(path: Path, script: str = ITEMS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(script)
    return path


def zipped(folder: Path) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            archive.write(path, path.relative_to(folder.parent).as_posix())
    return packed.getvalue()


def bird_row(number: int, sql: str, difficulty: str, evidence: str = "") -> dict:
    question = {"question_id": number, "db_id": "shop", "question": "Which items?", "evidence": evidence}
    return question | {"SQL": sql, "difficulty": difficulty}


BIRD = [
    bird_row(0, NAMES, "simple"),
    bird_row(1, NAMES, "challenging", "items have names"),
    bird_row(2, COUNT, "moderate"),
    bird_row(3, BROKEN, "simple"),
]


def bird(root: Path) -> Path:
    """``dev.zip`` as it is published: the databases are an archive inside it."""
    databases = root / "dev_databases"
    database(databases / "shop/shop.sqlite")
    (databases / "shop/._shop.sqlite").write_bytes(b"\0")
    (databases / "shop/database_description").mkdir()
    (databases / "shop/database_description/item.csv").write_bytes("original_column_name\nname\n".encode("utf-16"))
    with zipfile.ZipFile(root / "dev.zip", "w") as archive:
        archive.writestr("dev_20240627/dev.json", json.dumps(BIRD))
        archive.writestr("dev_20240627/dev_tables.json", json.dumps([{"db_id": "shop", "table_names": ["item"]}]))
        archive.writestr("dev_20240627/dev_databases.zip", zipped(databases))
        archive.writestr("__MACOSX/dev_20240627/._dev.json", b"\0")
    return root / "dev.zip"


def spider2(root: Path) -> Path:
    """The folder spider2-lite of the repository, with the local databases in their place."""
    database(root / "resource/databases/spider2-localdb/Shop-1.sqlite")
    gold = root / "evaluation_suite/gold"
    for file, text in {
        gold / "sql/local001.sql": f"{NAMES}\nORDER BY id;\n",
        gold / "sql/bq001.sql": "SELECT 1",
        gold / "exec_result/local002_a.csv": "n\n1\n",
        gold / "exec_result/local002_b.csv": "n\n2\n",
        gold / "exec_result/local0021.csv": "n\n2\n",
        root / "resource/documents/names.md": "Items are sorted by id.",
    }.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    rows = [
        {"instance_id": "local001", "db": "Shop-1", "question": "Which items?", "external_knowledge": "names.md"},
        {"instance_id": "local002", "db": "Shop-1", "question": "How many?", "external_knowledge": None},
        {"instance_id": "bq001", "db": "ga4", "question": "How many?", "external_knowledge": None},
    ]
    (root / "spider2-lite.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def agent_lightning(root: Path) -> Path:
    database(root / "data/database/shop/shop.sqlite")
    database(root / "data/test_database/depot/depot.sqlite")
    for name, db_id in (("train_spider", "shop"), ("test_dev_500", "depot"), ("test_dev", "depot")):
        row = {"db_id": db_id, "question": "Which items?", "query": NAMES, "db_path": f"database/{db_id}"}
        pd.DataFrame([row, row | {"query": COUNT}]).to_parquet(root / f"data/{name}.parquet")
    return root


def sqlbench(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def problems(data: Path) -> list[tuple[str, int, str, str]]:
    with (data / "problems.csv").open(newline="") as file:
        return [(row["file"], int(row["row"]), row["reason"], row["detail"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("unpacked", [False, True])
def test_bird_keeps_evidence_difficulty_and_descriptions(tmp_path, capsys, unpacked):
    source, out = bird(tmp_path), tmp_path / "out"
    if unpacked:
        with zipfile.ZipFile(source) as archive:
            archive.extractall(tmp_path / "release")
        source = tmp_path / "release"
    assert sqlbench("data", "bird", "--from", source, "--out", out) == 0
    assert "row 4 of dev.json: gold_error (no such column: colour)" in capsys.readouterr().out
    data = DataSet(out)
    tasks = data.load("dev")
    assert [task.task_id for task in tasks] == ["0", "1", "2", "3"]
    assert [task.hardness for task in tasks] == ["simple", "challenging", "moderate", "simple"]  # of equal queries too
    assert tasks[1].question == "Which items? Hint: items have names"
    assert [task.scorable for task in tasks] == [True, True, True, False]
    assert (data.headline, data.about["query_timeout"]) == ("dev", 30.0)
    folder = data.database("shop").parent
    assert sorted(path.name for path in folder.iterdir()) == ["database_description", "shop.sqlite"]
    described = folder / "database_description/item.csv"
    assert described.read_bytes().decode("utf-16").startswith("original_column_name")
    assert json.loads((out / "tables.json").read_text())[0]["db_id"] == "shop"
    table = audit_table(out)
    assert list(table.columns)[-4:] == ["simple", "moderate", "challenging", "constant query (%)"]


def test_spider_2_lite_takes_what_is_on_sqlite_and_has_a_gold_query(tmp_path, capsys):
    assert sqlbench("data", "spider2-lite", "--from", spider2(tmp_path / "r"), "--out", tmp_path / "out") == 0
    (task,) = DataSet(tmp_path / "out").load("lite")
    assert (task.task_id, task.db_id, task.gold) == ("local001", "Shop-1", f"{NAMES}\nORDER BY id;")
    assert task.question == "Which items? Hint: Items are sorted by id." and task.scorable
    assert problems(tmp_path / "out") == [
        ("spider2-lite.jsonl", 2, "no_gold_sql", "gold results only (2 CSV files)"),
        ("spider2-lite.jsonl", 3, "not_sqlite", "the database is in a cloud"),
    ]
    assert "rows that cannot be scored: 2 (1 no_gold_sql, 1 not_sqlite)" in capsys.readouterr().out


def test_the_parquet_folder_of_agent_lightning_keeps_its_own_500(tmp_path):
    out = tmp_path / "out"
    assert sqlbench("data", "agent-lightning", "--from", agent_lightning(tmp_path / "r"), "--out", out) == 0
    data = DataSet(out)
    assert (data.splits(), data.headline) == (["test_dev", "test_dev_500", "train"], "test_dev_500")
    assert [task.gold for task in data.load("test_dev_500")] == [NAMES, COUNT]
    assert read_audit(out).splits["test_dev_500"].scorable == 2


@pytest.mark.parametrize(
    ("command", "make", "says"),
    [
        ("spider", agent_lightning, "Not a Spider release: {}. Run 'sqlbench data agent-lightning'."),
        ("bird", spider2, "Run 'sqlbench data spider2-lite'."),
        ("bird", lambda root: database(root / "x.sqlite").parent, "Give one that holds train.json, dev.json"),
    ],
)
def test_a_release_of_another_layout_is_recognised(tmp_path, capsys, command, make, says):
    source = make(tmp_path / "r")
    assert sqlbench("data", command, "--from", source, "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert says.format(source) in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


HEADER = "id,question,gold,db_id\n"
GOOD = f"1,Which items?,{NAMES},shop\n"


def own(tmp_path: Path, name: str, text: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_a_csv_file_of_questions_becomes_a_data_set_with_its_faults_named(tmp_path, capsys):
    text = (
        f"\ufeffNr,Frage,SQL,Datenbank,difficulty\r\n1,Which items?,{NAMES},shop,easy\r\n2,,{NAMES},shop,\r\n"
        f'3,"Which\r\nones?",,shop,\r\n4,Which?,{NAMES},../shop,\r\n5,Which?,{NAMES},shop,hard,extra\r\n'
        f"6,Which colours?,{BROKEN},shop,hard\r\n7,Which?,{NAMES},bank,\r\n"
    )
    database(tmp_path / "db/shop.sqlite")
    database(tmp_path / "db/unused.sqlite")
    out, file = tmp_path / "out", own(tmp_path, "mine.csv", text)
    arguments = ["data", "import", file, "--db", tmp_path / "db", "--out", out]
    assert sqlbench(*arguments, "--question", "frage", "--db-id", "Datenbank") == 0
    assert problems(out) == [
        ("mine.csv", 3, "no_question", ""),
        ("mine.csv", 5, "no_gold", ""),
        ("mine.csv", 6, "invalid_db_id", "'../shop'"),
        ("mine.csv", 7, "too_many_cells", "['extra']"),
        ("mine.csv", 8, "gold_error", "no such column: colour"),
        ("mine.csv", 9, "missing_database", "no bank.sqlite"),
    ]
    printed = capsys.readouterr().out
    assert "dev: 3 tasks, 1 scorable" in printed and "row 3 of mine.csv: no_question" in printed
    data = DataSet(out)
    assert [(task.question, task.hardness) for task in data.load("dev") if task.scorable] == [("Which items?", "easy")]
    assert (data.headline, [path.name for path in (out / "database").iterdir()]) == ("dev", ["shop"])
    file.write_text(HEADER + GOOD)  # corrected, and imported again
    assert sqlbench(*arguments) == 0
    assert problems(out) == [] and len(DataSet(out).load("dev")) == 1


@pytest.mark.parametrize("name", ["mine.json", "mine.jsonl", "mine.parquet", "mine.tsv"])
def test_the_usual_formats_and_names_are_read(tmp_path, name):
    rows = [
        {
            "question_id": 7,
            "utterance": "Which items?",
            "query": NAMES,
            "db_id": "other",
            "hint": "é",
            "split": "train",
        },
        {"question_id": 8, "utterance": "How many?", "query": COUNT, "db_id": "other", "hint": None, "split": "dev"},
    ]
    frame, path = pd.DataFrame(rows), tmp_path / name
    if name.endswith("parquet"):
        frame.to_parquet(path)
    elif name.endswith("tsv"):
        frame.to_csv(path, sep="\t", index=False)
    else:
        text = json.dumps(rows) if name.endswith("json") else "\n".join(map(json.dumps, rows))
        path.write_text(text)
    one = database(tmp_path / "my shop (2).db")
    assert sqlbench("data", "import", path, "--db", one, "--out", tmp_path / "out") == 0  # every row is about it
    data = DataSet(tmp_path / "out")
    (first,), (second,) = data.load("train"), data.load("dev")
    assert (first.task_id, first.question, first.db_id) == ("7", "Which items? Hint: é", "my shop _2_")
    assert (second.task_id, second.question, second.scorable) == ("8", "How many?", True)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("no.csv", "", "No usable task in no.csv: 0 rows."),
        ("no.csv", "id,gold,db_id\n1,SELECT 1,shop\n", "1 rows; row 2 of no.csv: no_question. Check its columns"),
        ("latin.csv", "question,gold,db_id\nÄ,SELECT 1,shop\n".encode("latin-1"), "Not UTF-8 text"),
        ("quote.csv", HEADER + "x" * 200_000, "Not UTF-8 text"),
        ("no.json", "{}", "Not a list of objects"),
        ("deep.json", "[" * 100_000, "Not JSON"),
        ("no.parquet", "PAR1", "Not Parquet"),
        ("no.xlsx", "x", "Unknown format: no.xlsx."),
        ("torn.jsonl", '{"question": ', "row 1 of torn.jsonl: not_json"),
        ("no.jsonl", "[1]", "row 1 of no.jsonl: not_an_object ([1])"),
    ],
)
def test_a_file_that_holds_no_questions_is_refused_in_one_line(tmp_path, capsys, name, text, says):
    shop, out = database(tmp_path / "shop.sqlite"), tmp_path / "out"
    assert sqlbench("data", "import", own(tmp_path, name, text), "--db", shop, "--out", out) == 1
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and not out.exists()


def test_what_is_wrong_with_an_option_is_said(tmp_path, capsys):
    file, shop = own(tmp_path, "mine.csv", HEADER + GOOD), database(tmp_path / "shop.sqlite")
    arguments, out = ["data", "import", file, "--out", tmp_path / "out", "--db"], tmp_path / "out"
    for more, says in [
        ([shop, "--gold", "sql"], "No column 'sql' in mine.csv. Its columns are: id, question, gold, db_id."),
        ([tmp_path / "gone"], "No such file"),
        ([shop, "--split", "a/b"], "Invalid name of a split: 'a/b'"),
        (["postgresql://reader:secret@localhost/shop"], "Password in the address of --db."),
        (["postgresql://[reader/shop"], "Invalid address of --db"),
        ([own(tmp_path, "no.db", "not a database" * 100)], "file is not a database"),
    ]:
        assert sqlbench(*arguments, *more) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert says in error and ".." not in error.removeprefix("error: ").replace("...", "")
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert sqlbench(*arguments, shop) == 1
    assert "Folder is not empty" in capsys.readouterr().err and (out / "notes.txt").read_text() == "mine"


def test_what_is_in_the_log_of_a_single_database_is_imported(tmp_path):
    file, shop = own(tmp_path, "mine.csv", HEADER + GOOD), database(tmp_path / "shop.db")
    with closing(sqlite3.connect(shop, isolation_level=None)) as writer:
        writer.execute("PRAGMA journal_mode = wal")
        writer.execute("INSERT INTO item VALUES (3, 'washer')")
        assert sqlbench("data", "import", file, "--db", shop, "--out", tmp_path / "out") == 0
    path = DataSet(tmp_path / "out").database("shop")
    assert [one.name for one in path.parent.iterdir()] == ["shop.sqlite"]
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute(COUNT).fetchone() == (3,)


def test_an_import_replaces_only_what_the_same_kind_of_import_wrote(tmp_path, capsys):
    file, shop, out = own(tmp_path, "mine.csv", HEADER + GOOD), database(tmp_path / "shop.sqlite"), tmp_path / "out"
    assert sqlbench("data", "import", file, "--db", shop, "--out", out) == 0
    assert sqlbench("data", "bird", "--from", bird(tmp_path), "--out", out) == 1
    assert DataSet(out).about["name"] == "import" and "not empty" in capsys.readouterr().err


def test_an_address_is_stored_and_not_copied(tmp_path, postgres):
    file, out = own(tmp_path, "mine.csv", "question,gold\nHow many?,SELECT 1\n"), tmp_path / "out"
    assert sqlbench("data", "import", file, "--db", postgres, "--out", out) == 0
    (stored,) = (out / "database").iterdir()
    assert stored.suffix == ".url" and stored.read_text() == postgres.replace(":@", "@") + "\n"
    assert [task.db_id for task in DataSet(out).load("dev")] == [stored.stem]


def test_further_databases_of_a_folder_come_along(tmp_path):
    for name in ("shop", "shop_v1"):
        database(tmp_path / f"db/shop/{name}.sqlite")
    file, out = own(tmp_path, "mine.csv", HEADER + GOOD), tmp_path / "out"
    assert sqlbench("data", "import", file, "--db", tmp_path / "db", "--out", out) == 0
    assert sorted(path.name for path in (out / "database/shop").iterdir()) == ["shop.sqlite", "shop_v1.sqlite"]


@pytest.mark.parametrize(
    ("command", "make", "scorable"),
    [("bird", bird, 3), ("spider2-lite", spider2, 1), ("agent-lightning", agent_lightning, 2)],
)
def test_each_layout_is_audited_and_evaluated_with_nano(tmp_path, command, make, scorable):
    data, results = tmp_path / "data", tmp_path / "results"
    assert sqlbench("data", command, "--from", make(tmp_path / "r"), "--out", data) == 0
    before = {name: (data / f"{name}.parquet").read_bytes() for name in DataSet(data).splits()}
    assert sqlbench("data", "audit", "--data", data) == 0
    assert {name: (data / f"{name}.parquet").read_bytes() for name in DataSet(data).splits()} == before
    assert sqlbench("eval", "--data", data, "--run", "nano", "--results", results) == 0
    summary = RunFolder(results / "laptop/nano").summary()
    assert (summary["rollouts"], summary["score"]["n"], summary["failed"]) == (scorable, scorable, 0)
    if command == "bird":
        assert list(summary["by_hardness"]) == ["simple", "moderate", "challenging"]
