"""The command line starts fast and ends every failure in one line and a non-zero status."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sqlbench import __version__
from sqlbench.cli import main
from sqlbench.data.tasks import Task, write_split
from sqlbench.options import COMMANDS
from sqlbench.runs import RunFolder
from sqlbench_lab.home import FOLDERS

COMMAND = [sys.executable, "-c", "from sqlbench.cli import main; main()"]


@pytest.fixture
def data(tmp_path: Path, monkeypatch) -> Path:
    """A data set of ten tasks in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "database" / "a").mkdir(parents=True)
    with sqlite3.connect(tmp_path / "data" / "database" / "a" / "a.sqlite") as connection:
        connection.execute("CREATE TABLE t (x INTEGER)")
    tasks = [
        Task(task_id=str(i), db_id="a", question=f"how many {i}?", gold="SELECT count(*) FROM t", split="dev")
        for i in range(10)
    ]
    write_split(tmp_path / "data", "dev", tasks)
    (tmp_path / "data" / "dataset.json").write_text(json.dumps({"headline": "dev"}))
    return tmp_path / "data"


@pytest.fixture
def silent_port() -> int:
    """A port that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as server:
        yield server.getsockname()[1]


def fails(capsys, *arguments: str) -> str:
    """Run a command that must fail, and return its only line on standard error."""
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith(("error", "internal", "Traceback"))]
    assert end.value.code == 1 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def evaluate(*options: str) -> list[str]:
    return ["eval", "--data", "data", "--split", "dev", "--run", "r", *options]


def test_help_and_version_of_the_package_load_nothing_heavy():
    code = (
        "import sys\nfrom sqlbench.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'pandas', 'langgraph', 'openai', 'verl', 'transformers', 'rich'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"
    for command in ("data", "nano", "eval", "train", "score", "ablate", "notebooks", "graph", "checks"):
        assert f"  {command} " in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere"], "No data set in nowhere"),
        (["--split", "tets"], ": tets. Choose one of"),
        (["--model", "no/such/model"], "No checkpoint folder"),
        (["--results", "data/dataset.json"], "Cannot write the run folder"),
        (["--run", "../../r"], "Invalid run name"),
        (["--run", "."], "Invalid run name"),
        (["--profile", "../p"], "Unknown profile: ../p"),
        (["--prompts", "gpt"], "Unknown prompt family: gpt."),
    ],
)
def test_wrong_inputs_end_in_one_line(data, capsys, monkeypatch, options, message):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    given = evaluate(*options) if "--model" in options else evaluate("--model", "openai:m", *options)
    assert message in fails(capsys, *given)


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        (["eval"], "'--run'"),
        (evaluate("--limit", "0"), "not '0'"),
        (evaluate("--timeout", "nan"), "not 'nan'"),
        (evaluate("--nosuch"), "--nosuch"),
        (evaluate("--max-turn", "1"), "did you mean --max-turns?"),
        (["eval", "loose", "--run", "r"], "loose"),
        (["train", "--run", "r", "--seed", "many"], "not 'many'"),
        (["env", "--port", "70000"], "not '70000'"),
        (["nano", "train", "--out", "x", "--minutes", "nan"], "not 'nan'"),
        (["nano", "train", "--out", "x", "--threads", "0"], "not '0'"),
        (["nosuch"], "'nosuch'"),
    ],
)
def test_a_wrong_option_is_one_line_with_the_value_and_where_help_is(capsys, arguments, seen):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1
    assert line.startswith("error: ") and seen in line and "--help'" in line


@pytest.mark.parametrize("arguments", [["-h"], ["eval", "-h"], ["data", "spider", "-h"]])
def test_help_is_asked_for_in_short(capsys, arguments):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 0 and capsys.readouterr().out.startswith("usage: sqlbench ")


def test_the_command_says_its_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"sqlbench {__version__}\n"


def test_the_help_is_one_screen_and_lists_every_command_once(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 100
    listed = [line.split()[0] for line in lines if line.startswith("  ") and line[2] != "-"]
    assert sorted(listed) == sorted({name.split()[0] for name in COMMANDS})
    assert "  data       Make data sets (pocket, spider" in "\n".join(lines)


def test_a_command_without_its_command_shows_help(capsys):
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2 and "  eval " in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in fails(capsys, "data", "pocket", "--out", str(tmp_path / "file"))


def test_the_chat_page_is_not_served_without_its_model(data, capsys, monkeypatch):
    assert "No checkpoint folder: nosuch" in fails(capsys, "chat", "--data", "data", "--model", "nosuch")
    Path("file").touch()
    assert "file/laptop" in fails(capsys, "chat", "--data", "data", "--results", "file")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert "No endpoint for the model: openai:m" in fails(capsys, "chat", "--data", "data", "--model", "openai:m")


def test_the_chat_page_is_served_where_the_home_cannot_be_written(data, monkeypatch):
    environment = {name: value for name, value in os.environ.items() if name not in FOLDERS}
    environment |= {"HOME": "/proc/nobody", "OPENAI_BASE_URL": "http://127.0.0.1:9/v1"}
    command = [*COMMAND, "chat", "--data", "data", "--model", "openai:m", "--port", "0"]
    with open("err", "w") as err:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=err, text=True)
    try:
        address = re.search(r"http://\S+", process.stdout.readline())[0]
        while True:  # it announces itself before it listens
            connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=200)
            try:
                connection.request("GET", "/")
                break
            except ConnectionRefusedError:
                assert process.poll() is None
                time.sleep(0.1)
        page = connection.getresponse()
        assert page.status == 200 and b"widget" in page.read()
    finally:
        process.terminate()
        process.wait()
    errors = Path("err").read_text()
    assert errors.startswith("Cannot write /proc/nobody/") and errors.count("\n") == 1


@pytest.mark.parametrize("tasks", ["3", "10"])
def test_a_refusing_endpoint_stops_the_evaluation(data, capsys, monkeypatch, tasks):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    given = evaluate("--model", "openai:m", "--limit", tasks)
    assert "Cannot reach model 'm' at http://127.0.0.1:9/v1" in fails(capsys, *given)
    assert not Path("results/laptop/r/summary.json").exists()


def test_a_hanging_endpoint_stops_the_evaluation(data, capsys, monkeypatch, silent_port):
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{silent_port}/v1")
    assert "No answer within 0.5 s" in fails(capsys, *evaluate("--model", "openai:m", "--timeout", "0.5"))


def test_a_finished_run_is_refused(data, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    with RunFolder("results/laptop/r").open({}) as run:
        run.finish({})
    assert "is already finished" in fails(capsys, *evaluate("--model", "openai:m"))


def test_a_zip_that_is_no_spider_release_is_refused(data, capsys):
    Path("x.zip").write_bytes(b"no zip")
    assert "x.zip" in fails(capsys, "data", "spider", "--from", "x.zip", "--out", "out")
    assert "missing.zip" in fails(capsys, "data", "spider", "--from", "missing.zip", "--out", "out")
    assert "either --from" in fails(capsys, "data", "spider")


def interrupted(code: str) -> tuple[int, str]:
    """Status and errors of a program that gets one SIGINT when it has printed "ready"."""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=200)
    return process.returncode, err


def test_an_interruption_that_is_lost_ends_the_command_all_the_same():
    code = """
import time
from sqlbench.interrupt import stop_when_told
stop_when_told()
while True:
    try:
        print("ready", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        pass
"""
    status, err = interrupted(code)
    assert status == 130 and "Run the same command again to resume" in err


def test_an_interruption_that_python_drops_is_raised_again():
    code = """
import time
from sqlbench.interrupt import stop_when_told
class Slow:
    def __del__(self):
        print("ready", flush=True)
        time.sleep(60)
stop_when_told()
Slow()
time.sleep(60)
"""
    _, err = interrupted(code)
    assert err.endswith("\nKeyboardInterrupt\n")


def test_an_interruption_says_how_to_go_on(data, silent_port):
    environment = os.environ | {
        "OPENAI_BASE_URL": f"http://127.0.0.1:{silent_port}/v1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    process = subprocess.Popen(
        [*COMMAND, *evaluate("--model", "openai:m")],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # A background job of a shell has Ctrl-C ignored, and hands that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.time() + 200
    while not Path("results/laptop/r/config.json").is_file() and time.time() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=200)[1]
    assert process.returncode == 130
    assert "Traceback" not in errors and "Run the same command again to resume" in errors.splitlines()[-1]


def unread(arguments: list[str], output: int | None) -> int:
    """Status of a command whose standard output and error are this file, or closed from the start."""

    def streams() -> None:
        for number in (1, 2):
            os.close(number) if output is None else os.dup2(output, number)

    environment = os.environ | {"PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    return subprocess.run([*COMMAND, *arguments], env=environment, preexec_fn=streams).returncode


def test_an_evaluation_whose_reader_has_left_keeps_its_results(data):
    reader, writer = os.pipe()
    os.close(reader)
    assert unread(evaluate("--limit", "3"), writer) == 0
    assert RunFolder("results/laptop/r").summary()["rollouts"] == 3


@pytest.mark.parametrize(("stream", "status"), [(None, 0), ("/dev/full", 1)])
def test_output_that_cannot_be_written_stops_no_work(data, stream, status):
    assert unread(["data", "audit", "--data", "data"], stream and os.open(stream, os.O_WRONLY)) == status
    assert Path("data/audit.json").is_file()


def test_a_text_can_be_printed_in_any_encoding():
    code = "from sqlbench.streams import harden; harden(); print('M\\xf6bel')"
    environment = os.environ | {"PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    assert subprocess.check_output([sys.executable, "-c", code], env=environment) == rb"M\xf6bel" + b"\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_error_is_told_before_the_process_is_left(unbuffered):
    code = "import os, sys; from sqlbench.streams import harden; harden(); print('why', file=sys.stderr); os._exit(3)"
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (3, "why\n")


def test_a_standard_stream_closed_from_the_start_is_not_taken_for_a_file_of_the_run():
    code = "import os; from sqlbench.streams import harden; harden(); os.write(2, str(os.open('.', 0)).encode())"
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, preexec_fn=lambda: os.closerange(0, 2))
    assert int(done.stderr) > 2


def test_the_package_is_a_command():
    shown = subprocess.run([sys.executable, "-m", "sqlbench", "graph"], capture_output=True, text=True, check=True)
    assert "write_query" in shown.stdout
    wrong = subprocess.run([sys.executable, "-m", "sqlbench", "nosuch"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: ") and "see 'sqlbench --help'" in wrong.stderr


def test_a_defect_leaves_its_traceback_in_a_file(capsys, monkeypatch):
    def boom() -> str:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr("sqlbench.agent.graph.draw", boom)
    with pytest.raises(SystemExit) as end:
        main(["graph"])
    line = capsys.readouterr().err.strip()
    assert end.value.code == 70 and "\n" not in line
    path = Path(line.split("traceback in ")[1].split(";")[0])
    assert "ZeroDivisionError" in path.read_text()
    path.unlink()


def test_the_graph_is_printed_as_mermaid_text(capsys):
    with pytest.raises(SystemExit) as end:
        main(["graph"])
    assert end.value.code == 0 and "write_query" in capsys.readouterr().out
