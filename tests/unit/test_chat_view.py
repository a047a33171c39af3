"""The chat view without a browser: what it shows while it works, what it keeps, and that nothing ends it."""

from __future__ import annotations

import ast
import asyncio
import json
import shutil
import sqlite3
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import ipywidgets
import psycopg
import pytest

from sqlbench.agent.prompts import STRATEGIES
from sqlbench.agent.trajectory import Completion, Message
from sqlbench.data.tasks import DataSet, Task, write_split
from sqlbench.errors import DataError, ModelError, PromptTooLongError, RunError
from sqlbench_chat.allowance import spend
from sqlbench_chat.builtin import BuiltIn
from sqlbench_chat.card import TurnCard
from sqlbench_chat.offer import ollama_models
from sqlbench_chat.page import _notebook
from sqlbench_chat.prompts import diff_html
from sqlbench_chat.session import ChatSession
from sqlbench_chat.settings import ChatConfig
from sqlbench_chat.view import ChatView

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


def saying(queries: Iterator[str]) -> Callable[[str, str], str]:
    """Answers with one query after the other, and is never content with one."""

    def answer(system: str, user: str) -> str:
        if "lines of JSON" in user:  # for examples
            return ""
        return WRONG if "You review" in system else f"```sql\n{next(queries)}\n```"

    return answer


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


async def ask(view: ChatView, question: str) -> TurnCard:
    view.ask(question)
    await view.wait()
    return view.cards[-1]


def feedback(tmp_path: Path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "state" / "feedback.jsonl").read_text().splitlines()]


def test_a_question_is_streamed_repaired_and_answered(tmp_path: Path, shop: Path) -> None:
    seen: list[str] = []

    async def steps(view: ChatView) -> None:
        view.connect(str(shop))
        await view.wait()
        view.ask("Who are the <b>customers</b>?")
        view.cards[-1]._body.observe(lambda change: seen.append(change["new"]), "value")
        await view.wait()

    view = drive(tmp_path, steps)
    queries = [html.split("<pre>")[1].split("</pre>")[0] for html in seen]
    partial = [q for q in dict.fromkeys(queries) if FIRST.startswith(q)]
    assert len(partial) > 3 and partial[-1] == FIRST  # the query grows piece by piece
    repair = next(html for html in seen if html.count("<code>") == 2)
    assert "no such column: nme" in repair  # the error is there before the next attempt is
    chosen = view.cards[-1].turn.attempts[1].strategy
    assert chosen in STRATEGIES and f"<code>{chosen}</code>" in repair and SECOND not in repair
    final = seen[-1]
    assert "2 rows" in final and "2 attempts" in final and "review: looks right" in final and "..." not in final
    table = view.cards[-1].result.table.value
    assert "&lt;script&gt;alert(1)" in table and "<script>" not in table
    assert "&lt;b&gt;customers" in final and "<b>customers" not in final


def test_a_verdict_is_kept_once_and_teaches_the_bandit(tmp_path: Path, shop: Path) -> None:
    async def steps(view: ChatView) -> None:
        view.connect(str(shop))
        await view.wait()
        card = await ask(view, "Who?")
        assert "1/4" in view.prompts.head.value
        card.judge(False, " only <b>new</b> ones ")
        card.judge(True)
        assert "Marked wrong: only &lt;b&gt;new" in card._verdict.value and card._right.disabled

    view = drive(tmp_path, steps)
    before, after = feedback(tmp_path)
    assert (before["verdict"], before["sql"], before["db"]) == (None, SECOND, "shop")
    assert (after["verdict"], after["remark"], after["generation"]) == ("wrong", "only <b>new</b> ones", 0)
    assert "1/4" in view.prompts.head.value and "openai:NAME" in view.prompts.head.value
    assert view.session is not None
    (lesson,) = view.session.bandit.lessons
    assert (lesson.situation.error_class, lesson.situation.attempt) == ("no_such_column", 1)
    assert lesson.strategy in view.prompts.learned.value and lesson.reward < 0
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
        assert len(card.turn.attempts) == 1 and "gave up" not in card.turn.conclusion
        head, table = card.result.head.value, card.result.table.value
        assert f"Result: {words}" in head and ", 1 to 20 of " in head and len(card.result.rows) > 20
        assert "note 0<" in table and "note 19<" in table and "note 20<" not in table
        assert "too_large" not in f"{head}{table}{card.html()}"
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
        view.cards[-1].retry()
        await view.wait()
        view.cards[-1].judge(True)

    view = drive(tmp_path, steps)
    assert view.session is not None and isinstance(view.session.model, Scripted)
    retry = view.session.model.prompts[-1][-1].content  # its answer is a repetition, so it is not reviewed
    assert FIRST in retry and SECOND in retry
    assert len(view.cards) == 2 and view.cards[-1].turn.attempts[0].strategy in STRATEGIES
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
            view.cards[-1].retry()
            await view.wait()
        view.cards[-1].judge(True)

    view = drive(tmp_path, steps, saying(queries))
    assert view.session is not None
    assert view.cards[-1].turn.html().count("an earlier query again") == 1
    assert "Result: 2 rows" in view.cards[-1].result.head.value
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

    view = drive(tmp_path, steps, saying(queries))
    turn = view.cards[-1].turn
    assert turn.sql == SECOND and not turn.error and "Result: 2 rows" in view.cards[-1].result.head.value
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
    assert "gave up" in view.cards[-1].turn.conclusion and "5 attempts" in view.cards[-1].turn.conclusion
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
        assert card.turn.error == "The model failed: the model is out of order" and "trouble" in card._body.value
        broken = False
        card = await ask(view, "Who?")
        assert "2 attempts" in card.turn.conclusion
        shop.unlink()
        card = await ask(view, "Who?")
        assert "No such file" in card.turn.error

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
            assert "annot write" in view._message.value and card.turn.verdict is None
            kept.rmdir()
            (tmp_path / "away").rename(kept) if (tmp_path / "away").exists() else None
        card.judge(True)
        assert card.turn.verdict == "right" and "Marked right" in card._verdict.value

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
        assert "(1 table, 500 columns)" in view._message.value and "more columns" in view.diagram.picture.value
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
            assert "2 attempts" in card.turn.conclusion and "Ada" in card.html()
            assert "column &#34;nme&#34; does not exist" in card.html()
            assert view.session is not None and isinstance(view.session.model, Scripted)
            assert all("PostgreSQL" in prompt[0].content for prompt in view.session.model.prompts)
            admin.execute("DROP DATABASE mortal WITH (FORCE)")
            for _ in range(2):
                error = (await ask(view, "Who?")).turn.error
                assert error.startswith("The database failed: ") and "\n" not in error

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
        assert view.cards[-1].turn.conclusion == "stopped" and view._ask.description == "Ask"
        assert "2 attempts" in (await ask(view, "Who?")).turn.conclusion

    drive(tmp_path, steps)


def test_databases_of_a_data_set_have_a_benchmark_and_own_ones_do_not(
    tmp_path: Path, pocket: DataSet, shop: Path
) -> None:
    builtin = BuiltIn(pocket.root)
    tasks = builtin.benchmark("concert")
    levels = [task.hardness for task in tasks]
    assert {level: levels.count(level) for level in levels} == {"easy": 20, "medium": 20, "hard": 8}
    gold = {task.question: task.gold for task in tasks}
    wrong = tasks[0].question

    def answer(system: str, user: str) -> str:
        if "You review" in system:
            return RIGHT
        if "lines of JSON" in user:
            return json.dumps({"question": tasks[0].question, "sql": tasks[0].gold})
        question = user.split("Question: ")[1].split("\n")[0]
        return "SELECT 'wrong'" if question == wrong else gold[question]

    async def steps(view: ChatView) -> None:
        assert view.connection is not None and view._databases.options == tuple(builtin.names)
        view._databases.value = "concert"
        await view.wait()
        assert view._tabs.titles == ("Chat", "ER diagram", "Benchmark")
        assert [e.description for e in view._examples.children] == [tasks[0].question]
        view.benchmark()
        await view.wait()
        scores = view.bench.scores.value
        assert "48 of 48 questions" in scores and ">47 of 48</td>" in scores and ">97.9% (95% " in scores
        assert ">19 of 20</td>" in scores and ">95.0% (95% " in scores and scores.count("✗ wrong") == 1
        assert gold[wrong].split()[-1] in scores and ">gold</th>" in scores
        view.bench.level.value = "hard"
        view.benchmark()
        await view.wait()
        assert "8 of 8 questions" in view.bench.scores.value
        history = view.bench._history.value
        assert history.index("100.0% (95% ") < history.index("97.9% (95% ") and history.count("generation 0") == 2
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
    assert FIRST in html and "Marked wrong: nobody" in html and ">generation 0</span>" in html


def test_a_difference_of_prompts_marks_words_and_leaves_out_components_that_are_equal() -> None:
    html = diff_html({"a": "same\nold", "b": "b"}, {"a": "same\n<new>", "b": "b"})
    assert "same\n<del>old</del><ins>&lt;new&gt;</ins>" in html
    assert "<small>b</small>" not in html


# --- what the page offers ---------------------------------------------------------------------------------------------


class Small(Scripted):
    """As nano: made for few databases, with a short window."""

    name, family = "nano", "nano"


def test_a_model_that_does_not_know_the_database_says_so_and_offers_only_what_it_can_answer(
    tmp_path: Path, shop: Path, pocket: DataSet
) -> None:
    def answer(system: str, user: str) -> str:
        return "SELECT count(*) FROM customer" if "many" in user else "SELECT nme FROM customer"

    async def run() -> None:
        view = ChatView(session=ChatSession(Small(answer), tmp_path / "state", BuiltIn(pocket.root)))
        await view.wait()
        assert not view.offer.children
        view.connect(str(shop))
        await view.wait()
        banner = view.offer.children[0].value
        assert (
            "trained on the databases that come with sqlbench" in banner
            and "owner/name" in view.offer.model.placeholder
        )
        assert [example.description for example in view._examples.children] == ["How many customers are there?"]
        view.offer.use("openai:")
        await view.wait()
        assert (
            "No model named" in view._message.value and view.session is not None and view.session.model.name == "nano"
        )
        view.choose("concert")
        await view.wait()
        assert not view.offer.children

    asyncio.run(run())


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ('{"models": [{"name": "qwen2.5-coder:7b"}, {"name": "llama3"}]}', ["qwen2.5-coder:7b", "llama3"]),
        ("<html>", []),
        ('{"models": 3}', []),
        (None, []),
    ],
)
def test_the_models_of_ollama_are_found_by_themselves(answer: str | None, found: list[str]) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert (await reader.readline()).startswith(b"GET /api/tags")
        body = (answer or "").encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (len(body), body))
        writer.close()

    async def run() -> list[str]:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            if answer is None:
                server.close()
            return await ollama_models(address)

    assert asyncio.run(run()) == found


@pytest.mark.parametrize("window", [3000, 10])
def test_a_prompt_over_the_models_window_is_tried_with_less_of_the_schema(tmp_path: Path, window: int) -> None:
    with sqlite3.connect(tmp_path / "many.sqlite") as raw:
        for i in range(60):
            raw.execute(
                f"CREATE TABLE table_{i} (first_column INTEGER PRIMARY KEY, second_column TEXT, third_column TEXT)"
            )

    def answer(system: str, user: str) -> str:
        if len(user) > window:
            raise PromptTooLongError(
                "A prompt of 9 tokens is too long. Lower table_info_truncate or raise --max-tokens."
            )
        return RIGHT if "You review" in system else "SELECT count(*) FROM table_0"

    async def steps(view: ChatView) -> None:
        view.connect(str(tmp_path / "many.sqlite"))
        await view.wait()
        turn = (await ask(view, "How many?")).turn
        if window > 10:
            assert turn.sql and not turn.error
        else:
            assert "more than scripted can read at once" in turn.error and "_truncate" not in turn.error

    drive(tmp_path, steps, answer)


def test_an_answer_without_a_query_can_be_retried_but_not_judged(tmp_path: Path, shop: Path) -> None:
    broken = True

    def answer(system: str, user: str) -> str:
        if broken:
            raise ModelError("No answer within 120 s: model 'm'. Raise --timeout, or check the server.")
        return repairing(system, user)

    async def steps(view: ChatView) -> None:
        nonlocal broken
        view.connect(str(shop))
        await view.wait()
        view.ask("Who?")
        assert "waiting for the model" in view.cards[-1]._body.value
        assert [b.description for b in view.cards[-1].children[1:]] == ["Stop"]
        await view.wait()
        card = view.cards[-1]
        assert card.turn.error == "The model failed: No answer within 120 s: model 'm'."
        assert [b.description for b in card.children[1:]] == ["Retry"]
        card.judge(True)
        assert card.turn.verdict is None
        broken = False
        card._retry.click()
        await view.wait()
        assert len(view.cards) == 2 and view.cards[-1].turn.sql == SECOND and not view.cards[-1].turn.earlier

    drive(tmp_path, steps, answer)


def test_retry_differently_sends_the_remark_and_says_when_nothing_changed(tmp_path: Path, shop: Path) -> None:
    async def steps(view: ChatView) -> None:
        view.connect(str(shop))
        await view.wait()
        card = await ask(view, "Who?")
        card.remark.value = "only those in Bern"
        card.retry()
        await view.wait()
        again = view.cards[-1]
        assert "only those in Bern" in again._body.value and "Same query again" in again._body.value
        assert card.turn.verdict == "wrong" and "Same query again" not in card._body.value

    view = drive(tmp_path, steps)
    assert view.session is not None and isinstance(view.session.model, Scripted)
    rewrites = [p[-1].content for p in view.session.model.prompts if "An earlier" in p[0].content]
    assert "The user says about this query: only those in Bern" in rewrites[-1]
    assert [(f["verdict"], f["remark"]) for f in feedback(tmp_path)][1] == ("wrong", "only those in Bern")


def test_a_query_is_edited_and_run_by_hand_but_never_writes(tmp_path: Path, shop: Path) -> None:
    async def steps(view: ChatView) -> None:
        view.connect(str(shop))
        await view.wait()
        card = await ask(view, "Who?")
        for sql, head in {
            "SELECT 1 AS one UNION SELECT 2": "Result: 2 rows",
            "DELETE FROM customer": "rejected",
            "SELECT nme FROM customer": "no such column: nme",
        }.items():
            card.sql.value = sql
            card.run()
            await view.wait()
            assert head in card.result.head.value
        assert "by hand" not in card.result.head.value  # of a query that failed there are no rows

    drive(tmp_path, steps)
    with sqlite3.connect(shop) as raw:
        assert raw.execute("SELECT count(*) FROM customer").fetchone() == (2,)


def test_an_answer_in_words_comes_from_its_rows_and_is_kept(tmp_path: Path, shop: Path) -> None:
    def failing(system: str, user: str) -> str:
        raise ModelError("the model is out of reach")

    def answer(system: str, user: str) -> str:
        return "<think>hm</think>Bo and <another>." if "plain sentences" in user else repairing(system, user)

    async def steps(view: ChatView) -> None:
        view.connect(str(shop))
        await view.wait()
        card = await ask(view, "Who?")
        card.say()
        await view.wait()
        assert "Bo and &lt;another&gt;." in card._body.value and "hm" not in card.turn.summary
        assert view.session is not None and isinstance(view.session.model, Scripted)
        assert "Bo" in view.session.model.prompts[-1][-1].content
        summary, view.session.model.answer = card.turn.summary, failing
        card.say()
        await view.wait()
        assert "out of reach" in view._message.value and card.turn.summary == summary

    drive(tmp_path, steps, answer)


def test_conversations_are_kept_reopened_renamed_deleted_and_exported(tmp_path: Path, shop: Path) -> None:
    folder = tmp_path / "state/conversations"

    async def steps(view: ChatView) -> None:
        row = view.conversations
        view.connect(str(shop))
        await view.wait()
        (await ask(view, "Who are | the <b>first</b>?")).judge(False, "all of them")
        first = row.conversation.name
        assert f'data-conversation="{first}"' in row._mark.value
        row.turn_to("")
        assert not view.cards
        await ask(view, "And the second?")
        assert [title for title, _ in row.chosen.options] == ["And the second?", "Who are | the <b>first</b>?"]
        row.rename("Mine")
        row.chosen.value = first
        await view.wait()
        (card,) = view.cards
        assert card.turn.verdict == "wrong" and card.turn.remark == "all of them" and len(card.result.rows) == 2
        text = row.conversation.markdown()
        assert "## Who are \\| the &lt;b>first&lt;/b>?" in text and f"````sql\n{SECOND}\n````" in text
        assert "| Bo |" in text and "Marked wrong. all of them" in text
        assert json.loads(row.conversation.jsonl())["sql"] == SECOND
        row.export("md")
        assert f'download="{first}.md"' in row._link.value

    drive(tmp_path, steps)

    async def later(view: ChatView) -> None:
        row = view.conversations
        names = {title: name for title, name in row.chosen.options}
        assert set(names) == {"New conversation", "Mine", "Who are | the <b>first</b>?"} and not view.cards
        first = names["Who are | the <b>first</b>?"]
        view._do("open", f"{'a' * 32}/{first}")  # as a page does that was reloaded
        await view.wait()
        assert view.cards[-1].turn.remark == "all of them"
        view.cards[-1].retry()
        assert "Not connected: shop" in view._message.value
        view.connect(str(shop))
        await view.wait()
        view.cards[-1].retry()
        await view.wait()
        assert len(view.cards) == 2 and view.cards[-1].turn.earlier[-1][0] == SECOND
        row.delete()
        assert not view.cards and not (folder / f"{first}.jsonl").exists()
        for name in ("../../etc/passwd", "x" * 99, "<b>"):
            view._do("open", f"/{name}")
            assert row.conversation.name != name and not view.cards

    drive(tmp_path, later)
    assert sorted(p.suffix for p in folder.iterdir()) == [".jsonl"]


def test_where_others_reach_the_page_each_browser_has_its_own(tmp_path: Path, shop: Path) -> None:
    one, other = "1" * 32, "2" * 32

    async def seen_by(browser: str, question: str) -> list[str]:
        view = ChatView(None, Scripted(lambda *_: FIRST), tmp_path / "state", private=True)
        await view.wait()
        view.connect(str(shop))
        await view.wait()
        for unknown in ("", "/", f"../{browser}/", "<b>/"):
            view._do("open", unknown)
            view.ask(question)
            await view.wait()
            assert not view.cards and view._ask.disabled
        view._do("open", f"{browser}/")
        view._do("open", f"{other}/")  # a page stays with its browser
        assert not view._ask.disabled
        view.ask(question)
        await view.wait()
        view.cards[-1].judge(False, "not this")
        await view.wait()
        return [title for title, _ in view.conversations.chosen.options]

    assert asyncio.run(seen_by(one, "Mine?")) == ["Mine?"]
    assert asyncio.run(seen_by(other, "Yours?")) == ["Yours?"]
    assert asyncio.run(seen_by(one, "Again?")) == ["Again?", "Mine?"]
    state = tmp_path / "state"
    assert sorted(path.name for path in (state / "browsers").iterdir()) == [one, other]
    assert not list((state / "conversations").glob("*")) and not (state / "bandit.json").exists()


def test_a_browser_may_ask_so_many_questions_an_hour(tmp_path: Path, shop: Path, monkeypatch) -> None:
    now = 1_800_000_000.0
    monkeypatch.setattr("sqlbench_chat.allowance.time.time", lambda: now)

    async def asked_by(browser: str, questions: int) -> tuple[int, str]:
        view = ChatView(None, Scripted(lambda *_: FIRST), tmp_path / "state", private=True, hourly=3)
        await view.wait()
        view.connect(str(shop))
        view._do("open", f"{browser}/")
        await view.wait()
        for i in range(questions):
            view.ask(f"Question {i}?")
            await view.wait()
        return len(view.cards), view._message.value

    one, other = "1" * 32, "2" * 32
    assert asyncio.run(asked_by(one, 2))[0] == 2
    now += 600
    cards, message = asyncio.run(asked_by(one, 2))  # another page, or the same one reloaded
    assert cards == 1
    assert "Questions left this hour: 0 of 3, needed: 1. Try again in 50 min." in message
    assert asyncio.run(asked_by(other, 3))[0] == 3
    now += 3001
    assert asyncio.run(asked_by(one, 3))[0] == 2


def test_what_a_browser_asks_at_once_has_to_fit_into_its_hour(tmp_path: Path, monkeypatch) -> None:
    now = 1_800_000_000.0
    monkeypatch.setattr("sqlbench_chat.allowance.time.time", lambda: now)
    spend(tmp_path, 4, 10)
    now += 60
    spend(tmp_path, 5, 10)
    for questions, advice in ((2, "Try again in 59 min"), (6, "Try again in 60 min"), (11, "Choose fewer questions")):
        with pytest.raises(RunError, match=f"^Questions left this hour: 1 of 10, needed: {questions}. {advice}.$"):
            spend(tmp_path, questions, 10)
    spend(tmp_path, 1, 10)


def test_a_card_that_is_no_longer_shown_is_closed(tmp_path: Path, shop: Path, monkeypatch) -> None:
    monkeypatch.setattr("sqlbench_chat.view.SHOWN_CARDS", 2)

    async def steps(view: ChatView) -> None:
        view.connect(str(shop))
        await view.wait()
        counts = []
        for i in range(5):
            card = await ask(view, f"Who? {i}")
            card.judge(False, "not this")
            await view.wait()
            counts.append(len(ipywidgets.widgets.widget._instances))
        assert counts[1] < counts[2] + 60 and counts[2:] == counts[2:3] * 3, counts
        view.conversations.turn_to("")
        await view.wait()
        assert len(ipywidgets.widgets.widget._instances) < counts[0]

    drive(tmp_path, steps)


def test_a_page_that_opens_is_sent_what_it_may_have_missed(tmp_path: Path, shop: Path, monkeypatch) -> None:
    sent: list[Any] = []

    async def steps(view: ChatView) -> None:
        view.connect(str(shop))
        await view.wait()
        examples = view._examples.children
        send = type(view).send_state
        monkeypatch.setattr(
            ipywidgets.Widget, "send_state", lambda self, key=None: (key is None and sent.append(self), send(self, key))
        )
        view._do("open", "/")
        assert {view._message, view._title, view._ask, view._databases} <= set(sent)
        assert view._question not in sent, "somebody may be typing"
        assert not set(view._examples.children) & set(examples)

    drive(tmp_path, steps)


def test_a_benchmark_can_be_cancelled_and_what_was_answered_is_kept(tmp_path: Path, pocket: DataSet) -> None:
    async def steps(view: ChatView) -> None:
        view.benchmark()
        await asyncio.sleep(0)
        assert view.bench.run.description == "Cancel"
        while "<small>0 of " in (view.bench.scores.value or "<small>0 of "):
            await asyncio.sleep(0.01)
        view.bench.run.click()
        await view.wait()
        assert "cancelled after" in view._message.value and view.bench.run.description == "Run the benchmark"

    drive(tmp_path, steps, lambda *_: "SELECT 1", BuiltIn(pocket.root))
    (kept,) = (json.loads(line) for line in (tmp_path / "state/benchmarks.jsonl").read_text().splitlines())
    assert 0 < kept["scores"]["overall"]["n"] < kept["of"] and kept["model"] == "scripted"


@pytest.mark.parametrize("what", ["database", "model"])
def test_the_fields_of_the_page_never_name_code(tmp_path, monkeypatch, what) -> None:
    (tmp_path / "mine.py").write_text("raise SystemExit('ran')\n")
    monkeypatch.chdir(tmp_path)

    async def name_it(view: ChatView) -> None:
        view.connect("mine:Part") if what == "database" else view.use_model("mine:Part")

    view = drive(tmp_path, name_it)
    assert f"Not a {what} that can be named here: mine:Part" in view._message.value


def test_the_page_is_opened_with_the_settings_of_the_command(pocket: DataSet, tmp_path: Path) -> None:
    cell = _notebook(ChatConfig(data=pocket.root, every=7), tmp_path / "state", "Model()").cells[0].source
    opened = next(node.value for node in ast.parse(cell).body if isinstance(node, ast.Assign))
    (options,) = [ast.literal_eval(keyword.value) for keyword in opened.keywords if keyword.arg is None]

    async def seen() -> tuple[int, int]:
        view = ChatView(model=Scripted(lambda *_: "SELECT 1"), **options)
        await view.wait()
        return view.session.evolution.progress

    assert asyncio.run(seen()) == (0, 7) and options["folder"] == str(tmp_path / "state")
