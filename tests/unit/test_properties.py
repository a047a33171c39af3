"""Properties that hold for whatever a model writes, a database is called and a disk keeps.

Inputs are generated; ``make test`` tries the same few each time, and with SQLBENCH_LONG=1 (as in ``make soak``) every
property is tried on as many new ones as `many` says.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from sqlbench.agent.prompts import CORRECT, INCORRECT, extract_sql, parse_verdict, render_execution, truncate
from sqlbench.agent.trajectory import Completion, Execution, Message, Trajectory, Transition
from sqlbench.data.tasks import DataSet, Task, write_split
from sqlbench.database.engine import open_database
from sqlbench.database.schema import introspect, mermaid_er, quote, sample_rows, schema_text
from sqlbench.database.types import Column, Limits, QueryResult, Schema, Table
from sqlbench.reward import score
from sqlbench.rollout import record_execution
from sqlbench.runs import TRAJECTORIES, RunFolder, read_trajectories
from sqlbench_chat.connection import connect
from sqlbench_lab.diagram import er_svg
from sqlbench_train.metrics import step_metrics

LONG = os.environ.get("SQLBENCH_LONG") == "1"


def many(quick: int, long: int) -> settings:
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    count = long if LONG else quick
    return settings(
        max_examples=count, deadline=None, derandomize=not LONG, suppress_health_check=slow, print_blob=True
    )


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
word = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20)

# --- what a model writes ----------------------------------------------------------------------------------------------

prose = text.filter(lambda t: "```" not in t and "</think>" not in t)
query = st.builds(lambda body: f"SELECT {body}", prose).map(str.strip).filter(lambda q: q[-1] not in ";`")
parts = st.sampled_from(["```", "```sql", "```SQL\n", "`", "\n", ";", " ", "</think>", "<think>", "SELECT 1", "sql"])


@many(300, 20_000)
@given(st.lists(parts | text, max_size=12).map("".join))
def test_a_query_is_a_piece_of_the_answer(answer):
    sql = extract_sql(answer)
    assert sql in answer and sql == sql.strip() and "</think>" not in sql


@many(200, 10_000)
@given(prose, query, prose, st.sampled_from(["sql", "SQL", "sqlite", "postgresql"]), st.sampled_from(["", ";"]))
def test_a_query_in_a_block_is_found_whole(before, sql, after, tag, end):
    block = f"```{tag}\n{sql}{end}\n"
    assume("`" not in (before[-1:], after[:1]))
    for answer in (
        f"{before}{block}```{after}",
        f"{before}{block}",
        f"<think>```sql\nno\n```</think>{before}{block}```",
    ):
        assert extract_sql(answer) == sql


@many(200, 10_000)
@given(text, st.lists(st.sampled_from([CORRECT, INCORRECT]), max_size=4), st.sampled_from(["{}", "**{}**.", "`{}`!"]))
def test_the_last_verdict_counts_and_silence_is_no(filler, verdicts, form):
    assume("query" not in filler.lower())
    cased = [verdict.lower() if i % 2 else verdict for i, verdict in enumerate(verdicts)]
    answer = f"\n{filler}\n".join(["", *(form.format(verdict) for verdict in cased), ""])
    assert parse_verdict(answer) == (bool(verdicts) and verdicts[-1] == CORRECT)


# --- what a prompt shows ----------------------------------------------------------------------------------------------

CELLS = st.none() | st.integers() | st.floats() | text | st.binary(max_size=60)


@many(300, 20_000)
@given(text, st.integers(0, 250), st.sampled_from(["", " ... (truncated)", "…"]))
def test_a_cut_text_is_its_beginning_and_still_text(full, limit, mark):
    cut = truncate(full, limit, mark)
    assert len(cut) <= limit or cut == full
    assert cut == full or full.startswith(cut.removesuffix(mark))
    assert cut.encode().decode() == cut


@many(200, 10_000)
@given(st.data(), st.integers(1, 4), st.integers(0, 300), st.sampled_from(["nano", "chat"]))
def test_a_result_fits_its_limit_whatever_is_in_it(data, width, limit, family):
    rows = data.draw(st.lists(st.tuples(*[CELLS] * width), max_size=30))
    names = tuple(data.draw(st.lists(word, min_size=width, max_size=width)))
    error = data.draw(st.none() | text)
    result = QueryResult("error", error=error) if error else QueryResult("ok", names, rows)
    record = record_execution(1, "SELECT 1", result, limit)
    shown = render_execution(record, family, limit)
    assert len(shown) <= limit and shown.encode().decode() == shown
    assert Execution.model_validate_json(record.model_dump_json()) == record


# --- databases with odd names -----------------------------------------------------------------------------------------

KEYWORDS = ["order", "Group", "SELECT", "from", "where", "table", "index", "values", "primary", "check", "user", "end"]
ODD = [
    "a b",
    'quo"te',
    "it's",
    "semi;colon",
    "--",
    "/*",
    "Straße",
    "表",
    "🎵",
    "1st",
    "%",
    "a.b",
    "[x]",
    "`y`",
    " ",
    "$1",
]
names = st.sampled_from([*KEYWORDS, *ODD]) | word
kinds = st.sampled_from(["INTEGER", "TEXT", "REAL", "VARCHAR(20)", "NUMERIC(10, 2)", "BLOB", ""])


@st.composite
def scripts(draw) -> tuple[str, list[tuple[str, list[str]]]]:
    """CREATE TABLE statements, and the tables and columns that they make."""
    tables = draw(st.lists(names, min_size=1, max_size=4, unique_by=_folded).map(_allowed))
    statements, made = [], []
    for table in tables:
        size = draw(st.integers(1, 6))
        columns = draw(st.lists(names, min_size=size, max_size=size, unique_by=_folded))
        lines = [f"{quote(c)} {draw(kinds)}" for c in columns]
        if keys := draw(st.lists(st.sampled_from(columns), max_size=2, unique=True)):
            lines.append(f"PRIMARY KEY ({', '.join(map(quote, keys))})")
        if draw(st.booleans()):  # a reference, which may be to the table itself or to one that is not there
            target = draw(st.sampled_from([*tables, "nowhere"]))
            lines.append(f"FOREIGN KEY ({quote(columns[-1])}) REFERENCES {quote(target)}")
        statements.append(f"CREATE TABLE {quote(table)} ({', '.join(lines)});")
        statements.append(f"INSERT OR IGNORE INTO {quote(table)} VALUES ({', '.join(['1'] * size)});")
        made.append((table, columns))
    return "\n".join(statements), made


def _folded(name: str) -> str:
    """SQLite takes ASCII letters of either case for the same."""
    return re.sub("[A-Z]", lambda m: m[0].lower(), name)


def _allowed(tables: list[str]) -> list[str]:
    return [f"t{name}" if _folded(name).startswith("sqlite_") else name for name in tables]


def made(folder: str, script: str, name: str = "odd") -> Path:
    path = Path(folder) / f"{name}.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(script)
    return path


@many(60, 3_000)
@given(scripts())
def test_a_database_with_odd_names_is_read_as_it_is_and_can_be_asked(made_of):
    script, tables = made_of
    with tempfile.TemporaryDirectory() as folder:
        connection = connect(made(folder, script))
        database, schema = connection.database, connection.schema
        assert [(t.name, [c.name for c in t.columns]) for t in schema.tables] == tables
        for table, columns in tables:
            assert len(sample_rows(database, table)) == 1
            one = database.execute(f"SELECT {', '.join(map(quote, columns))} FROM {quote(table)}")
            assert one.ok and len(one.rows) == 1 and len(one.columns) == len(columns)
        for example in connection.examples:
            assert database.execute(example.sql).ok
        check_renderings(schema, folder)
        database.close()


def check_renderings(schema: Schema, folder: str) -> None:
    """The text of the schema makes the schema again, and diagrams can be read."""
    again = open_database(made(folder, schema_text(schema, "ddl", 1 << 30), "again"))
    assert introspect(again).tables == schema.tables
    again.close()
    for limit in (0, 1, 50, 300):
        assert all(len(schema_text(schema, style, limit)) <= limit for style in ("compact", "ddl"))
    assert schema_text(schema, "compact", 1 << 30).count("\n") == len(schema.tables) - 1
    ElementTree.fromstring(er_svg(schema))
    entity = re.compile(r"    \w+ \{|        \w+ \w+( PK)?,?( FK)?|    \}|    \w+ \}o--\|\| \w+ : \w+")
    assert all(entity.fullmatch(line) for line in mermaid_er(schema).splitlines()[1:])


def test_500_columns_without_a_key_are_one_table(tmp_path):
    script = f"CREATE TABLE wide ({', '.join(quote(f'c {i}') for i in range(500))});"
    schema = connect(made(str(tmp_path), script)).schema
    assert len(schema.tables[0].columns) == 500 and not any(c.primary_key for c in schema.tables[0].columns)
    check_renderings(schema, str(tmp_path))


def test_postgresql_is_shown_capitals_in_quotes():
    table = Table("Order Item", (Column("itemId", "INTEGER"), Column("price", "NUMERIC")))
    shown = schema_text(Schema((table,), "postgresql"), "ddl")
    assert shown == 'CREATE TABLE "Order Item" (\n  "itemId" INTEGER,\n  price NUMERIC\n);'


# --- what is kept -----------------------------------------------------------------------------------------------------

number = st.floats(allow_nan=False, allow_infinity=False)
cells = st.none() | st.integers() | number | text
executions = st.builds(
    Execution, turn=st.integers(1, 5), sql=text, status=text, rows=st.lists(st.lists(cells, max_size=3))
)
completions = st.builds(
    Completion, text=text, response_ids=st.none() | st.lists(st.integers(0)), logprobs=st.none() | st.lists(number)
)
transitions = st.builds(
    Transition,
    agent=st.sampled_from(["write", "check", "rewrite"]),
    turn=st.integers(1, 5),
    messages=st.lists(st.builds(Message, role=text, content=text), max_size=2),
    completion=completions,
)
trajectories = st.builds(
    Trajectory,
    task_key=word,
    task_id=text,
    db_id=text,
    question=text,
    gold=text,
    transitions=st.lists(transitions, max_size=2),
    executions=st.lists(executions, max_size=2),
    pred=st.none() | text,
    reward=st.none() | number,
    error=st.none() | text,
)


@many(100, 5_000)
@given(st.lists(trajectories, max_size=4), st.integers(0, 400))
def test_rollouts_come_back_as_they_were_written_and_a_torn_line_costs_itself(records, lost):
    with tempfile.TemporaryDirectory() as home:
        with RunFolder(home).open({}) as folder:
            for record in records:
                folder.append(TRAJECTORIES, record)
        path = Path(home) / TRAJECTORIES
        assert list(read_trajectories(path)) == records
        raw = path.read_bytes() if records else b""
        whole = raw[: max(0, len(raw) - lost)]
        path.write_bytes(whole)
        kept = list(read_trajectories(path))
        assert kept == records[: whole.count(b"\n")]
        with RunFolder(home).open({}) as folder:
            for record in records[len(kept) :]:
                folder.append(TRAJECTORIES, record)
        assert list(read_trajectories(path)) == records


@many(40, 2_000)
@given(st.lists(st.builds(Task, task_id=text, db_id=text, question=text, gold=text, split=text), max_size=5))
def test_a_split_comes_back_as_it_was_written_and_equal_tasks_make_equal_files(tasks):
    with tempfile.TemporaryDirectory() as home:
        root = Path(home)
        (root / "dataset.json").write_text("{}")
        first = write_split(root, "dev", tasks).read_bytes()
        loaded = DataSet(root).load("dev")
        assert loaded == tasks and [t.key for t in loaded] == [t.key for t in tasks]
        assert write_split(root, "dev", loaded).read_bytes() == first


# --- groups of rollouts -----------------------------------------------------------------------------------------------


@many(200, 10_000)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from([0.0, 1.0, None]), st.booleans()), max_size=30))
def test_a_step_counts_its_rollouts_and_leaves_failed_ones_out(drawn):
    records = [
        Trajectory(task_key=key, task_id="", db_id="", question="", gold="", reward=None if broke else reward,
                   error="model: gone" if broke else None)
        for key, reward, broke in drawn
    ]  # fmt: skip
    metrics = step_metrics(records, "")
    rewards = [reward for _, reward, broke in drawn if not broke and reward is not None]
    assert metrics["rollouts"] == len(drawn) and metrics["failed_rollouts"] == sum(broke for *_, broke in drawn)
    assert metrics.get("ex") == (sum(rewards) / len(rewards) if rewards else None)


ROWS = st.lists(st.tuples(st.sampled_from("abcdefg"), st.integers(1, 500)), min_size=1, max_size=40)


@many(200, 10_000)
@given(ROWS, ROWS)
def test_weights_turn_the_mean_over_kept_tokens_into_the_mean_over_the_batch(kept, left_out):
    pytest.importorskip("verl", reason="the training extra is not installed")
    from sqlbench_train.loss import row_weights

    batch = kept + [(name.upper(), count) for name, count in left_out]
    tokens = sum(count for _, count in kept)
    share = Counter()
    for weight, (rollout, count) in zip(row_weights("per_rollout_mean", kept, batch), kept, strict=True):
        share[rollout] += weight * count / tokens
    assert all(math.isclose(part * len(dict(batch)), 1) for part in share.values())
    for weight in row_weights("token_mean", kept, batch):
        assert math.isclose(weight / tokens, 1 / sum(count for _, count in batch))


# --- what is executed -------------------------------------------------------------------------------------------------

FRAGMENTS = """SELECT|FROM|WHERE|item|name|id|price|count(*)|(|)|,|;|'|"|*|=|1|-1|1e308|NULL|x'00'|AND|OR|NOT|IN|CASE
UNION ALL|GROUP BY|HAVING|ORDER BY|LIMIT|OFFSET|JOIN|ON|AS|r|VALUES|WHEN|THEN|ELSE|END|--|/*|*/|:a|?1|glob|like|EXPLAIN
WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM r)|INSERT INTO item VALUES (1,2,3)|DELETE FROM item|BEGIN
DROP TABLE item|PRAGMA|ATTACH|VACUUM INTO 'x.db'|CREATE TABLE x(y)|REPLACE INTO item|UPDATE item SET id=id|RETURNING *
printf('%*d', 9999999, 1)|randomblob(1e9)|zeroblob(1e9)|replace(hex(zeroblob(1e6)),'0','00')|load_extension('x')
sqlite_master|sqlite_dbpage|OVER (PARTITION BY id)|json_each('[1]')|instr(name,name)|upper(name)|LIMIT 1e9
item a, item b, item c, item d|substr(name,-9223372036854775808)|abs(-9223372036854775808)|1/0|9223372036854775807+1
CAST(name AS BLOB)|\x00|é|\ud7ff|group_concat(name)|randomblob(8)||name|max(price)
IS NOT NULL|BETWEEN 1 AND 2""".replace("\n", "|").split("|")
SAID = [
    "SELECT name, count(*) FROM item GROUP BY name HAVING count(*) > 1 ORDER BY 2 DESC LIMIT 3",
    "SELECT a.name FROM item a JOIN item b ON a.id = b.id WHERE a.price > (SELECT avg(price) FROM item)",
    "WITH t AS (SELECT price FROM item) SELECT max(price) FROM t UNION SELECT 1",
    "SELECT CASE WHEN price > 1 THEN 'x' ELSE upper(name) END FROM item WHERE name LIKE '%a%'",
]


@st.composite
def mutated(draw) -> str:
    """A sensible query with pieces cut out, doubled, and put in."""
    sql = draw(st.sampled_from(SAID))
    for _ in range(draw(st.integers(1, 4))):
        start, end = sorted((draw(st.integers(0, len(sql))), draw(st.integers(0, len(sql)))))
        piece = draw(st.sampled_from([*FRAGMENTS, "", sql[start:end] * 2]) | text)
        sql = f"{sql[:start]} {piece} {sql[end:]}"
    return sql


hostile = mutated() | st.lists(st.sampled_from(FRAGMENTS), max_size=25).map(" ".join) | text
STATUSES = {"ok", "error", "timeout", "too_large", "rejected"}
EXECUTION = Limits(seconds=0.2, rows=1000)


@pytest.fixture(scope="module")
def item(tmp_path_factory):
    """A small table, alone in its folder."""
    path = tmp_path_factory.mktemp("fuzz") / "item.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT, price REAL)")
        connection.executemany("INSERT INTO item (name, price) VALUES (?, ?)", [(f"n{i % 40}", i) for i in range(300)])
    return open_database(path, EXECUTION)


@many(400, 40_000)
@given(sql=hostile)
def test_whatever_is_executed_ends_in_time_and_leaves_everything_as_it_was(item, sql):
    before = state(item)
    result = item.execute(sql)
    assert result.status in STATUSES and (result.status == "ok") == (result.error is None)
    assert len(result.rows) <= EXECUTION.rows
    assert not LONG or result.seconds < EXECUTION.seconds + 2.0, f"{result.seconds:.1f} s"
    assert state(item) == before


def state(database) -> tuple:
    folder = Path(database.target).parent
    return sorted(os.listdir(folder)), hashlib.sha256(Path(database.target).read_bytes()).digest()


@many(100, 10_000)
@given(sql=hostile)
def test_whatever_is_scored_gets_a_verdict_and_gold_stays_right(item, sql):
    gold = SAID[0]
    assert score(gold, sql, item).match in (0, 1)
    assert score(gold, gold, item).match == 1


# --- what is asked of the environment's server ------------------------------------------------------------------------


class OneAnswer(BaseHTTPRequestHandler):
    """A model that always says the same."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "SELECT 1"}}
        head = {"id": "1", "object": "chat.completion", "created": 1, "model": "m"}
        body = json.dumps(head | {"choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def environment(pocket, tmp_path):
    """Address of a running ``sqlbench env``, whose standard error must stay free of tracebacks."""
    model = ThreadingHTTPServer(("127.0.0.1", 0), OneAnswer)
    threading.Thread(target=model.serve_forever, daemon=True).start()
    settings = {"OPENAI_BASE_URL": f"http://127.0.0.1:{model.server_address[1]}/v1", "NO_PROXY": "*"}
    settings |= {"ENABLE_WEB_INTERFACE": "true"}  # its routes too
    command = [
        sys.executable,
        "-c",
        "from sqlbench.cli import main; main()",
        "env",
        "--port",
        "0",
        "--model",
        "openai:m",
    ]
    log = tmp_path / "log"
    with open(log, "w") as err:
        data = ["--data", str(pocket.root), "--split", "dev_seen_pretrain"]
        server = subprocess.Popen([*command, *data], env=os.environ | settings, stdout=subprocess.DEVNULL, stderr=err)
    try:
        deadline = time.monotonic() + 200
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield found[0]
        assert "Traceback" not in log.read_text()
    finally:
        server.kill()
        server.wait()
        model.shutdown()
        model.server_close()


def test_the_server_answers_whatever_it_is_sent(environment, tmp_path):
    command = Path(sys.executable).with_name("schemathesis")
    options = ["--checks", "not_a_server_error"]
    options += ["--max-examples", "2000" if LONG else "8", "--phases", "examples,coverage,fuzzing", "--no-color"]
    options += ["--generation-database", "none", *(() if LONG else ("--seed", "1"))]
    done = subprocess.run(
        [command, "run", f"{environment}/openapi.json", *options],
        cwd=tmp_path,
        env=os.environ | {"NO_PROXY": "*"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "13 selected / 13 total" in done.stdout
