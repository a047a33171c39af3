"""The chat view without a browser: what it shows while it works, what it keeps, and that nothing ends it."""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import psycopg
import pytest

from sqlbench.agent.prompts import STRATEGIES
from sqlbench.agent.trajectory import Completion, Message
from sqlbench.data.tasks import DataSet, Task, write_split
from sqlbench.errors import DataError, ModelError
from sqlbench.widgets.chat import Card, ChatView, diff_html
from sqlbench.widgets.session import PER_LEVEL, BuiltIn, ChatSession

RIGHT, WRONG = "THE QUERY IS CORRECT", "THE QUERY IS INCORRECT"
FIRST, SECOND = "SELECT nme FROM customer", "SELECT full_name FROM customer ORDER BY full_name"


class Scripted:
    """A model that answers with what a function says, streamed in pieces of a few characters."""

    name, family = "scripted", "chat"

    def __init__(self, answer: Callable[[str, str], str]) -> None:
        self.answer = answer
        self.prompts: list[list[Message]] = []

    async def complete(self, messages: list[Message], on_text: Callable[[str], None] | None = None) -> Completion:
        self.prompts.append(messages)
        text = self.answer(messages[0].content, messages[-1].content)
        for i in range(0, len(text), 5):
            await asyncio.sleep(0)
            if on_text:
                on_text(text[i : i + 5])
        return Completion(text=text)


def repairing(system: str, user: str) -> str:
    """Misspells a column first, and repairs it when told so."""
    if "You review" in system:
        return RIGHT
    return f"```sql\n{SECOND if 'An earlier' in system else FIRST}\n```"


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    path = tmp_path / "shop.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE customer (customer_id INTEGER PRIMARY KEY, full_name TEXT)")
        connection.execute("INSERT INTO customer VALUES (1, '<script>alert(1)</script>'), (2, 'Bo')")
    return path


@pytest.fixture(scope="module")
def readings(postgres: str) -> str:
    """Address of a database with one table of 10,001 rows."""
    return on_a_server(postgres)


def drive(
    tmp_path: Path,
    steps: Callable[[ChatView], Coroutine[Any, Any, None]],
    answer: Callable[[str, str], str] = repairing,
    builtin: BuiltIn | None = None,
) -> ChatView:
    """Open a view, run the steps in its event loop, and wait until all is quiet."""

    async def run() -> ChatView:
        view = ChatView(session=ChatSession(Scripted(answer), tmp_path / "state", builtin))
        await view.wait()
        await steps(view)
        await view.wait()
        return view

    return asyncio.run(run())


async def ask(view: ChatView, question: str) -> Card:
    view.ask(question)
    await view.wait()
    return view.cards[0]


def feedback(tmp_path: Path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "state" / "feedback.jsonl").read_text().splitlines()]


def test_a_question_is_streamed_repaired_and_answered(tmp_path: Path, shop: Path) -> None:
    seen: list[str] = []

    async def steps(view: ChatView) -> None:
        view.connect(str(shop))
        await view.wait()
        view.ask("Who are the <b>customers</b>?")
        view.cards[0]._body.observe(lambda change: seen.append(change["new"]), "value")
        await view.wait()

    view = drive(tmp_path, steps)
    queries = [html.split("<pre>")[1].split("</pre>")[0] for html in seen]
    partial = [q for q in dict.fromkeys(queries) if FIRST.startswith(q)]
    assert len(partial) > 3 and partial[-1] == FIRST  # the query grows piece by piece
    repair = next(html for html in seen if html.count("<code>") == 2)
    assert "no such column: nme" in repair  # the error is there before the next attempt is
    chosen = view.cards[0].transcript.attempts[1].strategy
    assert chosen in STRATEGIES and f"<code>{chosen}</code>" in repair and SECOND not in repair
    final = seen[-1]
    assert "2 rows" in final and "2 attempts" in final and "review: looks right" in final and "..." not in final
    assert "&lt;script&gt;alert(1)" in final and "<script>" not in final
    assert "&lt;b&gt;customers" in final and "<b>customers" not in final


def test_a_verdict_is_kept_once_and_teaches_the_bandit(tmp_path: Path, shop: Path) -> None:
    async def steps(view: ChatView) -> None:
        view.connect(str(shop))
        await view.wait()
        card = await ask(view, "Who?")
        assert "1/4" in view._generation.value
        card.judge(False, " only <b>new</b> ones ")
        card.judge(True)
        assert "Marked wrong: only &lt;b&gt;new" in card._verdict.value and card._right.disabled

    view = drive(tmp_path, steps)
    before, after = feedback(tmp_path)
    assert (before["verdict"], before["sql"], before["db"]) == (None, SECOND, "shop")
    assert (after["verdict"], after["remark"], after["generation"]) == ("wrong", "only <b>new</b> ones", 0)
    assert "1/4" in view._generation.value and "openai:NAME" in view._generation.value
    assert view.session is not None
    (lesson,) = view.session.bandit.lessons
    assert (lesson.situation.error_class, lesson.situation.attempt) == ("no_such_column", 1)
    assert lesson.strategy in view._learned.value and lesson.reward < 0
    again = ChatSession(view.session.model, tmp_path / "state")
    assert again.bandit.lessons == [lesson] and again.evolution.progress == (1, 4)


def large(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE reading (n INTEGER, note TEXT)")
        connection.executemany("INSERT INTO reading VALUES (?, ?)", [(n, f"note {n}") for n in range(10_001)])


def on_a_server(postgres: str) -> str:
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute("CREATE DATABASE readings")
    address = postgres.replace("/postgres?", "/readings?")
    with psycopg.connect(address) as connection:
        connection.execute(
            "CREATE TABLE reading AS SELECT n, 'note ' || n AS note FROM generate_series(0, 10000) n ORDER BY n"
        )
    return address


ALL = "SELECT n, note FROM reading ORDER BY n"
BYTES = "more than 33,554,432 bytes in the first "


@pytest.mark.parametrize(
    ("dialect", "sql", "words"),
    [
        ("sqlite", ALL, "more than 10,000 rows"),
        ("postgresql", ALL, "more than 10,000 rows"),
        ("sqlite", "SELECT n, note, hex(zeroblob(50000)) FROM reading LIMIT 1000", BYTES),
        ("postgresql", "SELECT n, note, repeat('0', 100000) FROM reading LIMIT 1000", BYTES),
    ],
)
def test_a_result_over_a_limit_is_an_answer_with_its_first_rows(
    tmp_path: Path, request: pytest.FixtureRequest, dialect: str, sql: str, words: str
) -> None:
    large(tmp_path / "large.sqlite")
    target = request.getfixturevalue("readings") if dialect == "postgresql" else tmp_path / "large.sqlite"

    async def steps(view: ChatView) -> None:
        view.connect(str(target))
        await view.wait()
        card = await ask(view, "Every reading?")
        assert view.session is not None and not view.session.bandit.lessons
        assert len(card.transcript.attempts) == 1 and "gave up" not in card.transcript.conclusion
        html = str(card.html())
        assert f"Result: {words}" in html and ", the first 20 are shown" in html
        assert "note 0<" in html and "note 19<" in html and "note 20<" not in html and "too_large" not in html
        card.judge(True)

    view = drive(tmp_path, steps, lambda system, user: RIGHT if "You review" in system else f"```sql\n{sql}\n```")
    assert view.session is not None and isinstance(view.session.model, Scripted)
    (check,) = [prompt[-1].content for prompt in view.session.model.prompts if "You review" in prompt[0].content]
    assert words in check and "0 | note 0" in check and "error" not in check
    assert feedback(tmp_path)[-1]["verdict"] == "right" and words in feedback(tmp_path)[-1]["execution"]


def test_retry_differently_shows_the_model_what_was_not_the_answer(tmp_path: Path, shop: Path) -> None:
    async def steps(view: ChatView) -> None:
        view.connect(str(shop))
        await view.wait()
        (await ask(view, "Who?")).judge(False)
        view.ask("Who?", view.cards[0].exchange)
        await view.wait()
        view.cards[0].judge(True)

    view = drive(tmp_path, steps)
    assert view.session is not None and isinstance(view.session.model, Scripted)
    retry = view.session.model.prompts[-1][-1].content  # its answer is a repetition, so it is not reviewed
    assert FIRST in retry and SECOND in retry
    assert len(view.cards) == 2 and view.cards[0].transcript.attempts[0].strategy in STRATEGIES
    first, second = view.session.bandit.lessons
    assert (second.situation.error_class, second.situation.attempt) == ("none", 2) and second.reward > first.reward
    # The same query as before: what the user said about it is not forgotten, and the new verdict comes last.
    assert [f["verdict"] for f in feedback(tmp_path)] == [None, "wrong", "right"]


@pytest.mark.parametrize("again", [False, True])
def test_a_rewrite_that_only_repeats_is_an_attempt_that_changed_nothing(
    tmp_path: Path, shop: Path, again: bool
) -> None:
    """The query before stays the answer, with its rows, and each strategy is credited with its own attempt."""
    queries = iter([FIRST, SECOND, SECOND, "SELECT full_name FROM customer", SECOND])

    async def steps(view: ChatView) -> None:
        view.connect(str(shop))
        await view.wait()
        await ask(view, "Who?")
        if again:
            view.ask("Who?", view.cards[0].exchange)
            await view.wait()
        view.cards[0].judge(True)

    view = drive(
        tmp_path, steps, lambda system, _: WRONG if "You review" in system else f"```sql\n{next(queries)}\n```"
    )
    assert view.session is not None
    html = view.cards[0].transcript.html()
    assert html.count("an earlier query again") == 1 and "Result: 2 rows" in html
    lessons = [(x.situation.error_class, x.situation.attempt, round(x.reward, 2)) for x in view.session.bandit.lessons]
    better, nothing, solved = 0.5 - 0.2 - 0.05, 0.5 - 0.5 - 0.05, 1 - 0.5 - 0.05
    if again:
        assert lessons == [("none", 2, nothing), ("none", 1, solved)]
    else:
        assert lessons == [("no_such_column", 1, better), ("none", 2, solved)]


def test_a_query_that_the_model_goes_back_to_is_the_answer(tmp_path: Path, shop: Path) -> None:
    """Though the last one that was executed failed."""
    queries = iter([SECOND, FIRST, SECOND])

    async def steps(view: ChatView) -> None:
        view.connect(str(shop))
        await view.wait()
        await ask(view, "Who?")

    view = drive(
        tmp_path, steps, lambda system, _: WRONG if "You review" in system else f"```sql\n{next(queries)}\n```"
    )
    html = view.cards[0].transcript.html()
    assert view.cards[0].sql == SECOND and "Result: 2 rows" in html and "gave up" not in html
    assert [f["sql"] for f in feedback(tmp_path)] == [SECOND]
    assert view.session is not None and not view.session.bandit.lessons, "the verdict is the user's"


def test_an_answer_that_never_runs_teaches_without_a_verdict(tmp_path: Path, shop: Path) -> None:
    async def steps(view: ChatView) -> None:
        view.connect(str(shop))
        await view.wait()
        await ask(view, "Who?")

    tries = iter(range(100))
    view = drive(tmp_path, steps, lambda *_: f"SELECT nme{next(tries)} FROM customer")
    assert view.session is not None
    assert "gave up" in view.cards[0].transcript.conclusion and "5 attempts" in view.cards[0].transcript.conclusion
    assert len(view.session.bandit.lessons) == 4


def test_whatever_breaks_is_one_line_and_the_view_goes_on(tmp_path: Path, shop: Path) -> None:
    (tmp_path / "notes.txt").write_text("no database " * 100)
    sqlite3.connect(tmp_path / "empty.sqlite").close()
    broken = True

    def answer(system: str, user: str) -> str:
        if broken:
            raise ModelError("the model is\nout of order")
        return repairing(system, user)

    async def steps(view: ChatView) -> None:
        nonlocal broken
        view.ask("before any database")
        assert not view.cards
        for target, message in {
            "postgresql://me:secret@localhost:1/x": "Cannot open postgresql://me@localhost:1/x",
            str(tmp_path / "notes.txt"): "file is not a database",
            "mysql://me:secret@localhost/x": "Unsupported kind of database: mysql",
            str(tmp_path / "empty.sqlite"): "empty has no tables",
            ":memory:": "has no tables",
        }.items():
            view.connect(target)
            await view.wait()
            assert message in view._message.value and "secret" not in view._message.value
        view.ask("What is in here?")
        assert not view.cards and "has no tables" in view._message.value
        view.connect(str(shop))
        await view.wait()
        card = await ask(view, "Who?")
        assert card.transcript.conclusion == "stopped: model: ModelError: the model is out of order"
        broken = False
        card = await ask(view, "Who?")
        assert "2 attempts" in card.transcript.conclusion
        shop.unlink()
        card = await ask(view, "Who?")
        assert "stopped: " in card.transcript.conclusion and "No such file" in card.transcript.conclusion

    drive(tmp_path, steps, answer)


def test_a_verdict_that_could_not_be_kept_can_be_given_again(tmp_path: Path, shop: Path) -> None:
    async def steps(view: ChatView) -> None:
        view.connect(str(shop))
        await view.wait()
        card = await ask(view, "Who?")
        for name in (".bandit.lock", "feedback.jsonl"):  # as on a disk that is full, or a folder that was removed
            kept = tmp_path / "state" / name
            kept.rename(tmp_path / "away") if kept.exists() else None
            kept.mkdir()
            card.judge(True)
            assert "annot write" in view._message.value and card.exchange and card.exchange.verdict is None
            kept.rmdir()
            (tmp_path / "away").rename(kept) if (tmp_path / "away").exists() else None
        card.judge(True)
        assert card.exchange.verdict == "right" and "Marked right" in card._verdict.value

    drive(tmp_path, steps)
    assert feedback(tmp_path)[-1]["verdict"] == "right"


def test_no_question_goes_to_another_database_than_the_one_chosen(tmp_path: Path, pocket: DataSet) -> None:
    shutil.copytree(pocket.root, tmp_path / "data")
    broken = tmp_path / "data/database/concert/concert.sqlite"
    broken.write_text("no database " * 100)

    async def steps(view: ChatView) -> None:
        assert view.connection is not None
        view.choose("concert")
        await view.wait()
        assert "file is not a database" in view._message.value
        view.ask("Who?")
        assert not view.cards and view._ask.disabled and not view._examples.children
        view.choose(next(name for name in view._databases.options if name != "concert"))
        await view.wait()
        assert view.connection is not None and not view._ask.disabled

    drive(tmp_path, steps, builtin=BuiltIn(tmp_path / "data"))


def test_a_data_set_without_questions_of_a_level_is_refused_in_one_line(tmp_path: Path, shop: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/dataset.json").write_text("{}")
    write_split(tmp_path / "data", "mine", [Task(task_id="1", db_id="shop", question="?", gold="SELECT 1", split="m")])
    with pytest.raises(DataError, match="sqlbench data audit"):
        BuiltIn(tmp_path / "data")


def test_a_table_of_500_columns_is_announced_and_asked(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "wide.sqlite") as raw:
        raw.execute(f"CREATE TABLE wide ({', '.join(f'measurement_{i} REAL' for i in range(500))})")
        raw.execute(f"INSERT INTO wide VALUES ({', '.join('1' * 500)})")

    async def steps(view: ChatView) -> None:
        view.connect(str(tmp_path / "wide.sqlite"))
        await view.wait()
        assert "has 500 columns" in view._message.value and "more columns" in view._diagram.value
        assert "measurement_499" in (await ask(view, "Everything?")).html()

    drive(tmp_path, steps, lambda system, user: RIGHT if "You review" in system else "SELECT * FROM wide")


def test_postgresql_is_asked_in_its_dialect_and_may_go_away(tmp_path: Path, postgres: str) -> None:
    with psycopg.connect(postgres, autocommit=True) as admin:
        admin.execute("CREATE DATABASE mortal")
        target = postgres.replace("/postgres?", "/mortal?")
        with psycopg.connect(target) as raw:
            raw.execute("CREATE TABLE customer (customer_id int PRIMARY KEY, full_name text)")
            raw.execute("INSERT INTO customer VALUES (1, 'Ada')")

        async def steps(view: ChatView) -> None:
            view.connect(target)
            await view.wait()
            assert "connected to mortal: PostgreSQL, 1 table" in view._message.value
            card = await ask(view, "Who?")
            assert "2 attempts" in card.transcript.conclusion and "Ada" in card.html()
            assert "column &#34;nme&#34; does not exist" in card.html()
            assert view.session is not None and isinstance(view.session.model, Scripted)
            assert all("PostgreSQL" in prompt[0].content for prompt in view.session.model.prompts)
            admin.execute("DROP DATABASE mortal WITH (FORCE)")
            for _ in range(2):
                conclusion = (await ask(view, "Who?")).transcript.conclusion
                assert conclusion.startswith("stopped: database: DatabaseError: ") and "\n" not in conclusion

        drive(tmp_path, steps)


def test_one_question_at_a_time_and_it_can_be_stopped(tmp_path: Path, shop: Path) -> None:
    async def steps(view: ChatView) -> None:
        view.connect(str(shop))
        await view.wait()
        view.ask("Who?")
        await asyncio.sleep(0)
        view.ask("And who else?")
        assert view.busy and len(view.cards) == 1 and view._ask.description == "Stop" and view._connect.disabled
        view._ask.click()
        await view.wait()
        assert view.cards[0].transcript.conclusion == "stopped" and view._ask.description == "Ask"
        assert "2 attempts" in (await ask(view, "Who?")).transcript.conclusion

    drive(tmp_path, steps)


def test_databases_of_a_data_set_have_a_benchmark_and_own_ones_do_not(
    tmp_path: Path, pocket: DataSet, shop: Path
) -> None:
    builtin = BuiltIn(pocket.root)
    tasks = builtin.benchmark("concert")
    levels = [task.hardness for task in tasks]
    assert {level: levels.count(level) for level in levels} == dict.fromkeys(("easy", "medium", "hard"), PER_LEVEL)
    gold = {task.question: task.gold for task in tasks}
    wrong = tasks[0].question

    def answer(system: str, user: str) -> str:
        if "You review" in system:
            return RIGHT
        question = user.split("Question: ")[1].split("\n")[0]
        return "SELECT 'wrong'" if question == wrong else gold[question]

    async def steps(view: ChatView) -> None:
        assert view.connection is not None and view._databases.options == tuple(builtin.names)
        view._databases.value = "concert"
        await view.wait()
        assert view._tabs.titles == ("Chat", "ER diagram", "Benchmark")
        assert [len(view._examples.children), view.connection.name] == [5, "concert"]
        assert all(view.connection.database.execute(e.sql).ok for e in view.connection.examples)
        view.benchmark()
        await view.wait()
        scores = view._scores.value
        assert "15 of 15 questions" in scores and "<td>14 of 15</td><td>93%</td>" in scores
        assert "<td>4 of 5</td><td>80%</td>" in scores and scores.count("✗ wrong") == 1
        view._level.value = "hard"
        view.benchmark()
        await view.wait()
        assert "5 of 5 questions" in view._scores.value
        assert view.session is not None and not view.session.bandit.lessons  # measuring is not learning
        view.connect(str(shop))
        await view.wait()
        assert (
            view._tabs.titles == ("Chat", "ER diagram") and view._databases.value == "shop (2)"
        )  # the data set has a shop
        view._databases.value = "concert"
        await view.wait()
        assert view._tabs.titles == ("Chat", "ER diagram", "Benchmark")

    drive(tmp_path, steps, answer, builtin)


def test_without_a_kernel_the_view_is_static_html(tmp_path: Path, shop: Path) -> None:
    async def steps(view: ChatView) -> None:
        view.connect(str(shop))
        await view.wait()
        (await ask(view, "Who?")).judge(False, "nobody")

    html = drive(tmp_path, steps)._repr_mimebundle_()["text/html"]
    assert FIRST in html and "Marked wrong: nobody" in html and "System prompt, generation 0" in html


def test_a_difference_of_prompts_shows_changed_lines_only_and_escaped() -> None:
    html = diff_html({"a": "same\nold", "b": "b"}, {"a": "same\n<new>", "b": "b"})
    assert "<del>- old</del>" in html and "<ins>+ &lt;new&gt;</ins>" in html and "same" not in html
    assert "<small>b</small>" not in html
