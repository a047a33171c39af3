"""The notebooks run headless, in order, on the smallest sizes, and leave what they promise.

Their stored outputs, which come from a run on full sizes, are then compared by nbval with a second run over the results
of the first, in which nothing is left to train: to the letter where nothing depends on sizes, else after what does is
taken out. Run alone: ``pytest tests/notebooks`` (about five minutes; verl is started twice).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from sqlbench_lab.notebooks import ORDER, NotebookRun, read_parameters, run_notebooks

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
PATHS = sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))
EXACT = ("00_overview", "01_data_prep")
"""Nothing in them depends on what was trained, or on how long."""
MACHINE_PATHS = [str(folder) for folder in (NOTEBOOKS.parents[1], Path.home(), tempfile.gettempdir())]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> NotebookRun:
    root = tmp_path_factory.mktemp("notebooks")
    (root / "temporary").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(root / "temporary"))
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(root / "torch"))  # by default torch keeps it in TMPDIR
        return run_notebooks(
            "smoke", "run", folder=NOTEBOOKS, results=root / "results", parameters=[f"data={root / 'pocket'}"]
        )


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_a_notebook_is_thin_and_has_plain_parameters(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert {"profile", "run", "results"} <= set(read_parameters(path))
    code = [c.source for c in notebook.cells if c.cell_type == "code"]
    assert not any(
        line.lstrip().startswith(("def ", "class ", "!", "%")) for source in code for line in source.splitlines()
    )
    assert max(source.count("\n") for source in code) < 25
    assert len(notebook.cells) - len(code) >= len(code) / 2, "prose before code"
    assert notebook.cells[0].source.startswith("# 0")


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_what_is_kept_of_a_notebook_names_no_machine(path: Path) -> None:
    text = path.read_text()
    assert not [path for path in MACHINE_PATHS if path in text]


def test_the_runner_knows_every_notebook() -> None:
    assert [p.stem for p in PATHS] == list(ORDER)


@pytest.mark.notebooks
@pytest.mark.slow
@pytest.mark.timeout(600)
class TestSmoke:
    def test_all_notebooks_run(self, smoke: NotebookRun) -> None:
        assert [e.name for e in smoke.executed] == list(ORDER)
        assert not any(e.skipped for e in smoke.executed)

    def test_nothing_is_left_in_the_temporary_folder(self, smoke: NotebookRun) -> None:
        assert list((smoke.folder.parents[2].parent / "temporary").iterdir()) == []

    def test_outputs_hold_no_warnings_logs_or_bars(self, smoke: NotebookRun) -> None:
        for executed in smoke.executed:
            for number, cell in enumerate(nbformat.read(executed.path, as_version=4).cells):
                for output in cell.get("outputs", []):
                    where = f"{executed.name}, cell {number}: {output}"
                    assert output.output_type != "error", where
                    assert output.get("name") != "stderr", where
                    assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {}), where
                    assert "Warning" not in str(output.get("text", "")), where

    def test_tables_are_left_as_csv_and_markdown(self, smoke: NotebookRun) -> None:
        tables = smoke.folder / "tables"
        for name in ("audit", "baseline", "before_after", "curves", "accuracy", "efficiency"):
            assert len(pd.read_csv(tables / f"{name}.csv")) >= 1, name
            assert (tables / f"{name}.md").read_text().startswith("| "), name
        assert len(pd.read_csv(tables / "accuracy.csv")) == 2

    def test_figures_are_left_as_png_and_svg(self, smoke: NotebookRun) -> None:
        for name in ("training", "reward_curves", "all_curves", "time_split", "before_after", "ablation"):
            assert (smoke.folder / "figures" / f"{name}.png").stat().st_size > 5_000, name
            assert (smoke.folder / "figures" / f"{name}.svg").stat().st_size > 5_000, name

    def test_the_closing_message_has_the_headline(self, smoke: NotebookRun) -> None:
        text = smoke.text()
        assert "before training" in text and "95% CI" in text
        assert str(smoke.folder / "tables") in text

    @pytest.mark.parametrize("name", ORDER)
    def test_stored_outputs_are_what_the_notebook_shows(self, smoke: NotebookRun, tmp_path: Path, name: str) -> None:
        stored = load_notebook_node(str(NOTEBOOKS / f"{name}.ipynb"))
        given = nbformat.read(smoke.folder / "notebooks" / f"{name}.ipynb", as_version=4).metadata.papermill.parameters
        given.pop("questions", None)  # asking as many as the stored copy takes seconds
        nbformat.write(parameterize_notebook(stored, given), tmp_path / f"{name}.ipynb")
        result = nbval(tmp_path / f"{name}.ipynb", "exact" if name in EXACT else "shape")
        assert result.returncode == 0, result.stdout[-5000:]

    def test_a_second_run_skips_everything(self, smoke: NotebookRun) -> None:
        results = smoke.folder.parents[2]
        data = f"data={results.parent / 'pocket'}"
        again = run_notebooks("smoke", "run", folder=NOTEBOOKS, results=results, parameters=[data])
        assert all(e.skipped for e in again.executed)


def nbval(notebook: Path, sanitizer: str) -> subprocess.CompletedProcess[str]:
    """Validate a notebook against the outputs it holds, in a process of its own."""
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "--color=no", "-q", notebook.name]
    command += ["--nbval-sanitize-with", str(Path(__file__).with_name(f"sanitize_{sanitizer}.cfg"))]
    command += ["-p", "no:cacheprovider", "--rootdir=."]
    # nbval keeps what a notebook clears, so there must be no progress bars.
    environment = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.run(command, cwd=notebook.parent, capture_output=True, text=True, env=environment, timeout=1000)


TABLE = """
import pandas as pd
from IPython.display import HTML, display
display(pd.DataFrame({"questions": range(ROWS), "EX (%)": 4.5}))
HTML("<div class='sqlbench'><style>b {}</style><h4>Flipped tasks</h4><small>ROWS from a to b</small></div>")
"""


@pytest.mark.notebooks
@pytest.mark.slow
def test_sizes_may_differ_and_nothing_else(tmp_path: Path) -> None:
    """What nbval is worth with this sanitizer: cells hold the outputs of one table and show another."""
    longer, shown = TABLE.replace("ROWS", "3"), TABLE.replace("ROWS", "2")
    other = [shown.replace("EX", "accuracy"), shown.replace("Flipped", "New"), shown.replace("display(", "repr(")]
    cells = [nbformat.v4.new_code_cell(source) for source in (longer, *other, f"{shown}print('more')")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, kernel_name="python3").execute()
    for cell in notebook.cells:
        cell.source = shown
    nbformat.write(notebook, tmp_path / "some.ipynb")
    assert nbval(tmp_path / "some.ipynb", "shape").stdout.split()[0] == ".FFFF"
