"""A planted key or password is sought in every file, line of output and message that it could have got into.

The endpoint does the worst one can: it repeats, in its errors, all that it was sent.
"""

from __future__ import annotations

import asyncio
import base64
import html
import json
import re
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nbformat
import psycopg
import pytest
from ipywidgets import Widget

from sqlbench.agent.prompts import prompts_for
from sqlbench.agent.trajectory import Message
from sqlbench.cli import main
from sqlbench.data.tasks import Task, write_split
from sqlbench.database.engine import open_database
from sqlbench.errors import DatabaseError, ModelError, NotebookError
from sqlbench.masking import mask
from sqlbench.models import open_model
from sqlbench_chat.connection import connect, model_examples
from sqlbench_chat.generations import Evolution, Feedback
from sqlbench_chat.view import ChatView
from sqlbench_lab.notebooks import run_notebook

KEY, PASSWORD, TOKEN = "sk-planted-4f9c1d7e2b", "planted/pw@77d0", "planted-query-9a31"
QUOTED = "planted%2Fpw%4077d0"
PLANTED = [KEY, PASSWORD, QUOTED, TOKEN, "pw@77d0", "4f9c1d7e2b"]
ASK = [Message(role="user", content="?")]


class Endpoint(ThreadingHTTPServer):
    """Answers every `every`-th request, and the others with an error that repeats them."""

    daemon_threads = True

    def __init__(self, every: int) -> None:
        self.seen: list[str] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                owner.seen.append(f"{self.path} {dict(self.headers)}")
                text, streamed = "```sql\nSELECT 'wrong'\n```", '"stream":true' in body.replace(" ", "")
                part = {"delta" if streamed else "message": {"role": "assistant", "content": text}}
                answer = {"id": "1", "object": "chat.completion" + ".chunk" * streamed, "created": 1, "model": "m"}
                answer |= {"choices": [{"index": 0, "finish_reason": "stop", **part}]}
                good = len(owner.seen) % every == 0
                raw = json.dumps(answer if good else {"error": f"{owner.seen[-1]} {body}"}).encode()
                if streamed and good:
                    raw = b"data: " + raw + b"\n\ndata: [DONE]\n\n"
                self.send_response(200 if good else 401)
                self.send_header("Content-Type", "text/event-stream" if streamed and good else "application/json")
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_: object) -> None: ...

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture(params=["key", "address"])
def endpoint(request, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Endpoint]:
    """A server that lets itself be used with a key, or with a token in its address."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "*")
    server = Endpoint(every=2)
    where = f"127.0.0.1:{server.server_address[1]}/v1"
    if request.param == "key":
        monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")  # as it comes out of many a file
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://{where}")
    else:
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://{where}?token={TOKEN}")
    yield server
    server.shutdown()
    server.server_close()
    sent = KEY if request.param == "key" else TOKEN
    assert server.seen and all(sent in line for line in server.seen), "it was not even sent"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    (root / "database" / "shop").mkdir(parents=True)
    with closing(sqlite3.connect(root / "database" / "shop" / "shop.sqlite")) as connection, connection:
        connection.execute("CREATE TABLE customer (customer_id INTEGER PRIMARY KEY, name TEXT)")
        connection.execute("INSERT INTO customer VALUES (1, 'Ada')")
    tasks = [
        Task(task_id=str(i), db_id="shop", question=f"question {i}?", gold="SELECT name FROM customer", split="dev")
        for i in range(24)
    ]
    write_split(root, "dev", tasks)
    (root / "dataset.json").write_text("{}")
    return root


def search(*texts: object, folder: Path | None = None) -> None:
    """Fail where a planted secret stands in a text or in a file of the folder."""
    found = [f"{secret} in {str(text)[:300]}" for text in texts for secret in PLANTED if secret in str(text)]
    for path in folder.rglob("*") if folder else ():
        if path.is_file():
            raw = path.read_bytes()
            found += [f"{secret} in {path}" for secret in PLANTED if secret.encode() in raw]
    assert not found, found


def chain(error: BaseException) -> str:
    """All that a traceback of it shows, but for the lines of this file, which name the secrets."""
    return "\n".join(line for line in "".join(traceback.format_exception(error)).splitlines() if "Error" in line)


def test_messages_of_a_model(endpoint):
    for on_text in (None, lambda piece: None):
        with pytest.raises(ModelError, match=r"HTTP 401: .*\*\*\*") as caught:
            asyncio.run(open_model("openai:m").complete(ASK, on_text))
        search(caught.value, chain(caught.value))
        assert asyncio.run(open_model("openai:m").complete(ASK)).text


@pytest.mark.parametrize(
    "address",
    [
        f"http://bob:{QUOTED}@127.0.0.1/v1",
        f"http://{QUOTED}@127.0.0.1/v1",
        f"http://bob:{PASSWORD}@127.0.0.1/v1",
        f"http://bob:x?{PASSWORD}@127.0.0.1/v1",
        f"http://bob:{QUOTED}@127.0.0.1:x/v1",
        f"http://bob:{QUOTED[:9]}\n{QUOTED[9:]}@127.0.0.1/v1",
        f"http://127.0.0.1/v1?key={KEY}\udcff",
        f"http://[{PASSWORD}/v1",
    ],
)
def test_an_address_with_a_password_or_that_cannot_be_read_is_refused_and_not_shown(monkeypatch, tmp_path, address):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_BASE_URL", address)
    with pytest.raises(ModelError, match=r"^Invalid OPENAI_BASE_URL: .* put the key into OPENAI_API_KEY\.$") as caught:
        open_model("openai:m")
    search(caught.value, chain(caught.value))


ODD = "sk-p'l\"a<n>t&e%41d/4f+9c1\\d7e2b=77"
"""A key on which every way of escaping leaves its mark."""
USED = f"bob:{ODD}"


def hexadecimal(text: str) -> str:
    return "".join(f"%{byte:02x}" for byte in text.encode())


@pytest.mark.parametrize(
    "repeated",
    [
        ODD,
        ODD.upper(),
        ODD[:20],
        ODD[12:],
        json.dumps({"authorization": f"Bearer {ODD}"}),
        json.dumps(json.dumps({"authorization": ODD})),
        json.dumps(json.dumps(json.dumps(ODD))),
        repr({"authorization": ODD}),
        "".join(f"\\u{ord(c):04x}" for c in ODD),
        "".join(f"\\x{ord(c):02x}" for c in ODD),
        urllib.parse.quote(ODD),
        urllib.parse.quote(ODD, safe="").lower(),
        urllib.parse.quote_plus(urllib.parse.quote_plus(ODD)),
        f"?key={hexadecimal(ODD)}&x=1",
        html.escape(ODD),
        html.escape(json.dumps(ODD)),
        "".join(f"&#{ord(c)};" for c in ODD),
        ODD.encode().hex(),
        base64.b64encode(ODD.encode()).decode(),
        base64.b64encode(f"Bearer {ODD}".encode()).decode(),
        base64.b64encode(f"Bearer {ODD}!".encode()).decode(),
        base64.b64encode(USED.encode()).decode(),
        base64.urlsafe_b64encode(f"x:{ODD}".encode()).decode().rstrip("="),
        json.dumps(base64.encodebytes(f"Authorization: Basic {ODD * 3}".encode()).decode()),
        urllib.parse.quote(base64.b64encode(USED.encode()).decode(), safe=""),
        f"{ODD[:18]}\n  {ODD[18:]}",
    ],
)
def test_a_key_that_comes_back_in_another_form_is_not_shown(repeated):
    shown = mask(f"Incorrect key {repeated} given, ask your administrator", {ODD})
    assert shown.startswith("Incorrect key ") and "***" in shown and shown.endswith(" given, ask your administrator")
    left = shown.removeprefix("Incorrect key ").removesuffix(" given, ask your administrator")
    decoded = html.unescape(urllib.parse.unquote(left)).lower()
    assert not [i for i in range(len(ODD) - 6) if ODD[i : i + 7].lower() in decoded]
    assert len(left) < 60  # the words around a key may stay


@pytest.mark.parametrize(
    "text", ["", "nothing of it", "C:\\temp\\x20 &amp; 50%25 \\u0041", "sk-p'l is short", "\0" * 9]
)
def test_a_text_without_a_secret_stays_as_it_is(text):
    assert mask(text, {ODD, "", "short", " " * 8}) == text


@pytest.mark.parametrize("place", ["key", "query"])
def test_an_endpoint_that_repeats_a_credential_in_another_form(monkeypatch, tmp_path, place):
    """The forms that an endpoint made of what it got, not of what this test knows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "*")
    forms = [
        lambda text: text,
        json.dumps,
        repr,
        html.escape,
        urllib.parse.quote,
        lambda text: json.dumps(urllib.parse.quote_plus(text)),
        lambda text: base64.b64encode(text.encode()).decode(),
        lambda text: text.encode().hex(),
    ]
    for form in forms:
        with closing(Echo(form)) as server:
            where = f"127.0.0.1:{server.server_address[1]}/v1"
            quoted = urllib.parse.quote(ODD, safe="")
            monkeypatch.setenv("OPENAI_API_KEY", ODD if place == "key" else "")
            address = {"key": where, "query": f"{where}?code={quoted}"}[place]
            monkeypatch.setenv("OPENAI_BASE_URL", f"http://{address}")
            with pytest.raises(ModelError, match=r"HTTP 403: .*\*\*\*") as caught:
                asyncio.run(open_model("openai:m").complete(ASK))
            shown = html.unescape(urllib.parse.unquote(str(caught.value)))
            assert not [i for i in range(len(ODD) - 9) if ODD[i : i + 10] in shown], shown
            assert base64.b64encode(USED.encode()).decode()[6:30] not in shown


class Echo(ThreadingHTTPServer):
    """Refuses every request and repeats its headers and path in some form."""

    daemon_threads = True

    def __init__(self, form: Callable[[str], str]) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                raw = form(f"{self.headers['Authorization']} {self.path}").encode()
                self.send_response(403)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_: object) -> None: ...

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()


@pytest.mark.parametrize(
    "key",
    [
        f"{KEY[:9]}\n{KEY[9:]}",
        f"{KEY}\r\nX-Other: 1",
        f"{KEY}\tx",
        f"{KEY} x",
        f"{KEY}\x7f",
        f"“{KEY}”",
        f"{KEY}é",
        f"x\u200b{KEY}",
    ],
)
def test_a_key_that_cannot_be_sent_is_refused_without_showing_it(monkeypatch, tmp_path, data, capsys, key):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(SystemExit) as ended:
        main(["eval", "--run", "run", "--data", str(data), "--split", "dev", "--model", "openai:m"])
    out, err = capsys.readouterr()
    assert ended.value.code == 1 and err.count("\n") == 1 and err.startswith("error: Invalid OPENAI_API_KEY: ")
    search(out, err, folder=tmp_path)
    assert KEY[:9] not in err and KEY[9:] not in err


@pytest.mark.parametrize("written", [f"  {KEY}\n", f'"{KEY}"', f"'{KEY}'\r\n", f"Bearer {KEY}", f' "bearer  {KEY}" '])
def test_a_key_may_be_copied_with_what_stands_around_it(monkeypatch, tmp_path, written):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "*")
    server = Endpoint(every=1)
    monkeypatch.setenv("OPENAI_BASE_URL", f' "http://127.0.0.1:{server.server_address[1]}/v1"\n')
    monkeypatch.setenv("OPENAI_API_KEY", written)
    assert asyncio.run(open_model("openai:m").complete(ASK)).text
    server.shutdown()
    server.server_close()
    assert f"'Bearer {KEY}'" in server.seen[0]


def test_evaluation(endpoint, data, tmp_path, capfd):
    arguments = [
        "eval",
        "--data",
        str(data),
        "--split",
        "dev",
        "--model",
        "openai:m",
        "--run",
        "run",
        "--concurrency",
        "1",
    ]
    main_quietly([*arguments, "--max-turns", "1"])
    shown = capfd.readouterr()
    assert "HTTP 401" in (tmp_path / "results" / "laptop" / "run" / "trajectories.jsonl").read_text()
    search(shown.out, shown.err, folder=tmp_path)


def main_quietly(arguments: list[str]) -> None:
    try:
        main(arguments)
    except SystemExit as end:
        assert end.code in (0, 1)


def test_prompt_evolution(endpoint, data, tmp_path):
    evolution = Evolution(
        tmp_path / "evolution", prompts_for("chat"), "openai:m", database=lambda name: open_database(data / name)
    )
    shop = open_database(data / "database" / "shop" / "shop.sqlite")
    evolution.database = lambda name: shop
    for i in range(8):
        verdict = "right" if i < 4 else "wrong"
        evolution.record(Feedback(question=f"q{i}", db="shop", sql="SELECT 1", verdict=verdict, remark="no"))
    said = []
    for _ in range(3):
        try:
            evolution.evolve()
        except ModelError as error:
            said += [error, chain(error)]
    assert said and "HTTP 401" in str(said)
    search(*said, evolution.outcome, folder=tmp_path)


# --- PostgreSQL -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(postgres: str) -> str:
    """Address of a database whose user has to give a password, and gives the planted one."""
    with psycopg.connect(postgres, autocommit=True) as connection:
        (path,) = connection.execute("SHOW hba_file").fetchone()
        rules = Path(path).read_text()
        Path(path).write_text(f"local all guarded scram-sha-256\n{rules}")
        connection.execute("SELECT pg_reload_conf()")
        connection.execute(f"CREATE ROLE guarded LOGIN PASSWORD '{PASSWORD}'")
        connection.execute("CREATE TABLE customer (customer_id INTEGER PRIMARY KEY, name TEXT)")
        connection.execute("INSERT INTO customer VALUES (1, 'Ada')")
        connection.execute("GRANT SELECT ON customer TO guarded")
        user, _, rest = postgres.partition("@")
        address = f"{user.rpartition('/')[0]}/guarded:{QUOTED}@{rest}"
        end = time.monotonic() + 300  # the server reads its rules again when it gets to it
        while time.monotonic() < end:
            try:
                psycopg.connect(address.replace(QUOTED, "another")).close()
            except psycopg.OperationalError:
                return address
            connection.execute("SELECT pg_reload_conf()")
            time.sleep(0.2)
        rules = connection.execute("SELECT * FROM pg_hba_file_rules").fetchall()
    pytest.fail(f"the server asks for no password; its rules: {rules}")


def refused(guarded: str) -> list[str]:
    """Addresses with the planted password that do not open."""
    return [
        guarded.replace("guarded:", "nobody:"),
        guarded.replace("/postgres?", "/none?"),
        guarded.replace(QUOTED, f"{QUOTED}x"),
        guarded.replace(QUOTED, PASSWORD),
        guarded.replace("postgresql:", "mysql:"),
        f"{guarded}&nonsense=1",
        f"postgresql://localhost:1/x?password={QUOTED}",
        f"host=localhost port=1 user=guarded password={PASSWORD}",
    ]


def test_messages_of_a_database(guarded, capfd):
    for target in refused(guarded):
        for function in (connect, open_database):
            if function is open_database and not target.startswith("postgresql:"):
                continue  # it takes paths of files, and shows them
            with pytest.raises(DatabaseError) as caught:
                function(target)
            search(caught.value, chain(caught.value))
    with pytest.raises(DatabaseError, match="password authentication failed"):
        connect(guarded.replace(QUOTED, f"{QUOTED}x"))
    opened = connect(guarded)
    assert opened.database.execute("SELECT name FROM customer").rows == [("Ada",)]
    search(repr(opened), opened.name, opened.database, opened.database.execute("SELECT nme FROM customer").error)
    search(*capfd.readouterr())


def test_the_chat(guarded, endpoint, tmp_path, capfd):
    async def use() -> ChatView:
        view = ChatView(None, "openai:m", tmp_path / "state")
        await view.wait()
        for target in [*refused(guarded), guarded]:
            view._target.value = target
            view._connect.click()
            await view.wait()
            search(view._message.value, view._target.value, Widget.get_manager_state())
        assert view.connection is not None and view.connection.schema.tables
        for question in ("how many customers?", "who?", "why?"):
            view.ask(question)
            await view.wait()
            view.cards[-1].judge(False, "not that")
        with pytest.raises(ModelError):
            await asyncio.gather(*(model_examples(view.connection, view.session.model) for _ in range(2)))
        return view

    view = asyncio.run(use())
    search(json.dumps(Widget.get_manager_state()), view._repr_mimebundle_(), folder=tmp_path)
    assert (tmp_path / "state" / "feedback.jsonl").is_file()
    search(*capfd.readouterr())


# --- what else is kept and shown --------------------------------------------------------------------------------------


@pytest.mark.parametrize("endpoint", ["address"], indirect=True)
def test_notebooks(guarded, endpoint, data, tmp_path, monkeypatch):
    monkeypatch.setenv("DSN", guarded.replace(QUOTED, f"{QUOTED}x"))
    cells = [
        nbformat.v4.new_code_cell('run = "demo"', metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(
            "import os\nfrom sqlbench.evaluation import evaluate\n"
            f"evaluate({str(data)!r}, 'dev', 'openai:m', run, max_turns=1, concurrency=1).text()"
        ),
        nbformat.v4.new_code_cell("from sqlbench_chat.connection import connect\nconnect(os.environ['DSN'])"),
    ]
    path, out = tmp_path / "01_secrets.ipynb", tmp_path / "out" / "01_secrets.ipynb"
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"language_info": {"name": "python"}})
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, path)
    with pytest.raises(NotebookError) as caught:
        run_notebook(path, out, {})
    assert "password authentication failed" in str(caught.value) + "".join(p.read_text() for p in out.parent.iterdir())
    search(caught.value, chain(caught.value), folder=tmp_path)


@pytest.mark.parametrize("endpoint", ["key"], indirect=True)
def test_the_environments_server(endpoint, data, tmp_path):
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
    log, lines = tmp_path / "err", tmp_path / "out"
    with open(log, "w") as err, open(lines, "w") as out:
        server = subprocess.Popen(
            [*command, "--data", str(data), "--split", "dev"], stdout=out, stderr=err, cwd=tmp_path
        )
    try:
        deadline = time.monotonic() + 200
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)

        def call(path: str, body: dict | None = None) -> str:
            raw = None if body is None else json.dumps(body).encode()
            request = urllib.request.Request(found[0] + path, raw, {"Content-Type": "application/json"})
            try:
                with urllib.request.urlopen(request, timeout=60) as response:
                    return response.read().decode()
            except urllib.error.HTTPError as error:
                return error.read().decode()

        answers = [call("/reset", {"episode_id": "e"})]
        answers += [call("/step", {"action": {"strategy": "generate"}, "episode_id": "e"}) for _ in range(2)]
        answers += [
            call(path) for path in ("/state?episode_id=e", "/env/info", "/env/tasks", "/metadata", "/openapi.json")
        ]
        assert "HTTP 401" in str(answers) and "wrong" in str(answers)
        search(*answers)
    finally:
        server.kill()
        server.wait()
    search(folder=tmp_path)
