"""The headless runner refuses before it runs, skips what is done, and says where a cell failed."""

from __future__ import annotations

import json
import os
import shlex
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from sqlbench.data.tasks import Task, write_split
from sqlbench.errors import NotebookError, RunError
from sqlbench_lab.home import FOLDERS
from sqlbench_lab.notebooks import check_parameters, run_notebook, run_notebooks, source_hash

PARAMETERS = """\
profile = "laptop"
run = "demo"
results = "results"
steps = 60
rate = 0.5
splits = ["headline"]
live = True
limit = None
"""


def write(path: Path, *code: str, parameters: str = PARAMETERS) -> Path:
    cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    cells += [nbformat.v4.new_code_cell(source) for source in code]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"language_info": {"name": "python"}}), path)
    return path


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"stepz": 3}, "Unknown parameter of .*: stepz"),
        ({"steps": "3"}, "Invalid parameter 'steps' of .*: '3'. Give a value of type int"),
        ({"steps": True}, "Give a value of type int"),
        ({"steps": 1.5}, "Give a value of type int"),
        ({"live": 1}, "Give a value of type bool"),
        ({"splits": "headline"}, "Give a list of str"),
        ({"splits": [1]}, "Give a list of str"),
        ({"run": None}, "Give a value of type str"),
    ],
)
def test_a_wrong_parameter_is_refused(tmp_path: Path, given: dict, says: str) -> None:
    with pytest.raises(NotebookError, match=says):
        check_parameters(write(tmp_path / "01_a.ipynb"), given)


@pytest.mark.parametrize("given", [{"rate": 1}, {"limit": 5}, {"splits": []}, {"profile": "gpu"}])
def test_a_right_parameter_replaces_the_default(tmp_path: Path, given: dict) -> None:
    values = check_parameters(write(tmp_path / "01_a.ipynb"), given)
    assert given.items() <= values.items()
    assert values["steps"] == 60


@pytest.mark.parametrize("line", ["steps = 2 * 3", "import os", "a = b = 1", "steps: int = 1", "print(1)"])
def test_a_parameters_cell_that_is_not_plain_literals_is_refused(tmp_path: Path, line: str) -> None:
    with pytest.raises(NotebookError, match="literal"):
        check_parameters(write(tmp_path / "01_a.ipynb", parameters=line), {})


def test_nothing_runs_when_a_later_notebook_would_be_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "nb" / "01_data_prep.ipynb", parameters='profile = "laptop"\nmark = "x"')
    write(tmp_path / "nb" / "02_baseline_eval.ipynb", parameters="steps = 1")
    with pytest.raises(NotebookError, match="Invalid parameter 'steps' of 02_baseline_eval: 'many'"):
        run_notebooks(folder=first.parent, results=tmp_path / "results", parameters=["mark=y", "steps=many"])
    with pytest.raises(NotebookError, match="Unknown parameter of the notebooks: step"):
        run_notebooks(folder=first.parent, results=tmp_path / "results", parameters=["step=1"])
    assert not (tmp_path / "results").exists()


def test_a_run_leaves_provenance_and_is_skipped_the_second_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counter = tmp_path / "count"
    code = f"with open({str(counter)!r}, 'a') as f: f.write('x')\nprint('step 1')\n(profile, steps, splits)"
    notebook = write(tmp_path / "01_a.ipynb", code)
    output = tmp_path / "out" / "01_a.ipynb"
    first = run_notebook(notebook, output, {"steps": 7, "profile": "gpu"})
    again = run_notebook(notebook, output, {"steps": 7, "profile": "gpu"})
    assert (first.skipped, again.skipped, counter.read_text()) == (False, True, "x")
    assert "step 1" in capsys.readouterr().err  # what a long cell prints is seen while it runs
    done = nbformat.read(output, as_version=4)
    note = done.metadata["sqlbench"]
    assert (note["parameters"]["steps"], note["finished"], note["versions"]["papermill"][0]) == (7, True, "2")
    assert "('gpu', 7, ['headline'])" in str(done.cells[-1].outputs)
    assert str(tmp_path) not in str(done.metadata)
    assert source_hash(output) == source_hash(notebook)
    other = run_notebook(notebook, output, {"steps": 8})
    assert not other.skipped
    assert not list(output.parent.glob("*.partial.ipynb"))


def test_a_failing_cell_is_named_and_the_partial_notebook_kept(tmp_path: Path) -> None:
    notebook = write(tmp_path / "01_a.ipynb", "print('fine')", "1 / 0", "print('never')")
    output = tmp_path / "out" / "01_a.ipynb"
    with pytest.raises(
        NotebookError, match=r"01_a failed in cell 3: ZeroDivisionError: division by zero\. See .*partial"
    ) as caught:
        run_notebook(notebook, output, {"steps": 7})
    partial = tmp_path / "out" / "01_a.partial.ipynb"
    assert str(partial) in str(caught.value)
    assert "fine" in partial.read_text()
    assert not output.exists()


def test_a_dead_kernel_is_an_error(tmp_path: Path) -> None:
    notebook = write(tmp_path / "01_a.ipynb", "import os\nos._exit(3)")
    with pytest.raises(NotebookError, match="kernel died"):
        run_notebook(notebook, tmp_path / "out.ipynb", {})


def test_a_results_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    notebook = write(tmp_path / "nb" / "01_data_prep.ipynb")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotebookError, match="Cannot write the results folder"):
        run_notebooks(folder=notebook.parent, results=tmp_path / "file")


def test_a_home_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    """Jupyter's, IPython's and matplotlib's folders are then temporary, and no cell shows their complaints."""
    write(tmp_path / "nb" / "01_a.ipynb", "import matplotlib.pyplot as plt\nprint('drawn')")
    command = [sys.executable, "-m", "sqlbench", "notebooks", "--folder", "nb", "--only", "01"]
    environment = {name: value for name, value in os.environ.items() if name not in FOLDERS} | {"HOME": "/proc/nobody"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    lines = [
        line for line in done.stderr.splitlines() if line and not line.startswith("[")
    ]  # the bar, and a kernel that is told to stop
    assert done.returncode == 0 and len(lines) == 1 and lines[0].startswith("Cannot write /proc/nobody/"), done.stderr
    cell = nbformat.read(tmp_path / "results/laptop/demo/notebooks/01_a.ipynb", as_version=4).cells[-1]
    assert [output.get("text") for output in cell.outputs] == ["drawn\n"]
    assert not Path(lines[0].rsplit(" ", 1)[1]).exists()


class Parrot(BaseHTTPRequestHandler):
    """A model that writes the server's `sql` and whose check accepts nothing but what is right."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"]
        verdict = "THE QUERY IS CORRECT" if "count" in self.server.sql else "THE QUERY IS INCORRECT"
        text = verdict if "You review" in asked[0]["content"] else f"```sql\n{self.server.sql}\n```"
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        body = json.dumps({"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]})
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None: ...


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sql", "turns", "limit", "splits"),
    [("SELECT count(*) FROM t", 3, 0, "[]"), ("SELECT 'no'", 3, 0, '["dev"]'), ("SELECT 'no'", 1, 1, "[]")],
)
def test_the_notebooks_run_where_all_is_right_or_wrong_and_with_one_turn(
    tmp_path: Path, repo: Path, monkeypatch: pytest.MonkeyPatch, sql: str, turns: int, limit: int, splits: str
) -> None:
    """An empty list of splits is the headline split."""
    data = tmp_path / "data"
    (data / "database/a").mkdir(parents=True)
    with closing(sqlite3.connect(data / "database/a/a.sqlite")) as connection, connection:
        connection.executescript("CREATE TABLE t (x INTEGER); INSERT INTO t VALUES (1)")
    gold = "SELECT count(*) FROM t"
    write_split(
        data, "dev", [Task(task_id=f"{i}", db_id="a", question=f"{i}?", gold=gold, split="dev") for i in (1, 2)]
    )
    (data / "dataset.json").write_text('{"headline": "dev"}')
    with ThreadingHTTPServer(("127.0.0.1", 0), Parrot) as server:
        server.sql = sql
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_address[1]}/v1")
        monkeypatch.setenv("NO_PROXY", "*")
        given = [f"data={data}", "model=openai:m", f"turns={turns}", f"limit={limit}", f"splits={splits}"]
        done = run_notebooks(
            only=["02", "07"], folder=repo / "notebooks", results=tmp_path / "results", parameters=given
        )
        server.shutdown()
    assert len(done.executed) == 2
    baseline = pd.read_csv(done.folder / "tables/baseline.csv")
    assert (baseline["split"].tolist(), baseline["tasks"].tolist()) == (
        ["headline"] if splits == "[]" else ["dev"], [limit or 2],
    )  # fmt: skip
    cells = nbformat.read(done.folder / "notebooks/07_trajectory_inspector.ipynb", as_version=4).cells
    shown = [output.get("text", "") for cell in cells for output in cell.get("outputs", [])]
    assert ("one turn: there is no repair loop to compare with\n" in shown) == (turns == 1)


def test_a_run_stays_below_its_profile_and_runs_something(tmp_path: Path) -> None:
    notebook = write(tmp_path / "nb" / "01_own.ipynb")
    with pytest.raises(NotebookError, match=r"No ordered notebooks in .* Name the notebooks to run with --only"):
        run_notebooks(folder=notebook.parent, results=tmp_path / "results")
    with pytest.raises(RunError, match=r"Invalid run name: '../x'"):
        run_notebooks(run="../x", only=["01"], folder=notebook.parent, results=tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_make_lab_shows_the_results_beside_the_notebooks(repo: Path) -> None:
    app = pytest.importorskip("jupyterlab.labapp").LabApp
    recipe = subprocess.run(
        ["make", "--no-print-directory", "-n", "-o", ".venv/.installed", "lab"],
        cwd=repo,
        capture_output=True,
        text=True,
        check=True,
    )
    options = shlex.split(recipe.stdout.replace("\\\n", " "))[3:]
    lab = app()
    lab.parse_command_line(options)
    assert (repo / lab.config.ServerApp.root_dir).resolve() == repo.resolve()
    assert (repo / lab.config.LabApp.default_url.removeprefix("/lab/tree/") / "00_overview.ipynb").is_file()
    assert not lab.extra_args, "a folder as an argument would be the root"
