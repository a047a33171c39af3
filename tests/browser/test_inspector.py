"""Notebooks in JupyterLab itself, run and clicked: 07's filters, selection and difference, and 06's chat.

The inspector's static form needs no server.
"""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from sqlbench.agent.trajectory import Completion
from sqlbench.data.tasks import DataSet
from sqlbench.evaluation import evaluate
from sqlbench_lab.inspector import Inspector

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(1500)]

TASKS = 9


class Third:
    """Answers a third of the questions right at once, a third after a repair, a third with a column too much."""

    name, family = "third", "nano"

    def __init__(self, data: DataSet) -> None:
        self.tasks = {t.question: (n % 3, t.gold) for n, t in enumerate(data.load("headline"))}

    async def complete(self, messages, on_text=None) -> Completion:
        agent, content = messages[0].content.split()[0], messages[1].content
        kind, gold = self.tasks[content.split("\n")[0]]
        if agent == "check":
            return Completion(text=f"THE QUERY IS {'IN' * ('no_such_column' in content)}CORRECT")
        if kind and agent == "write":
            return Completion(text="SELECT no_such_column")
        return Completion(text=gold if kind < 2 else f"SELECT *, 1 AS surplus FROM ({gold})")


@pytest.fixture(scope="session")
def runs(pocket: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results folder with the two evaluations that the notebook looks at."""
    results = tmp_path_factory.mktemp("results")
    for turns in (1, 3):
        name = f"demo/cells/before_t{turns}_c2048"
        settings = {"max_turns": turns, "limit": TASKS, "schema_linking": False}  # as in a cell of the grid
        evaluate(pocket.root, "headline", Third(pocket), name, results=results, **settings)
    return results


def run_notebook(lab, page, name: str, **parameters) -> None:
    """Open a notebook with parameters in JupyterLab and run all of it."""
    notebook = parameterize_notebook(load_notebook_node(str(lab.folder / name)), parameters)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    nbformat.write(notebook, lab.folder / name)
    lab.open(page, name)
    page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")


def run_again(page, source: str):
    """Run the cell with this text again; returns its output."""
    cell = page.locator(".jp-CodeCell", has_text=source)
    cell.locator(".cm-content").click()
    page.keyboard.press("Control+Enter")
    return cell.locator(".jp-OutputArea-output")


def assert_no_errors(page) -> None:
    assert page.locator(".jp-mod-error, [data-mime-type='application/vnd.jupyter.stderr']").count() == 0


def wait_for_text(page, text: str) -> None:
    page.get_by_text(text).first.wait_for()


def test_the_inspector_filters_selects_and_shows_a_difference(lab, page, pocket, runs, picture) -> None:
    run_notebook(lab, page, "07_trajectory_inspector.ipynb", data=str(pocket.root), results=str(runs), limit=TASKS)
    page.locator(".jp-OutputArea-output", has_text="no training run in this folder yet").wait_for()
    assert_no_errors(page)

    inspector = page.locator(".sqlbench-inspector").first
    inspector.get_by_label("outcome").select_option("wrong")
    wait_for_text(inspector, f"{TASKS // 3} of {TASKS} rollouts: {TASKS // 3} wrong")
    rows = inspector.locator(".sqlbench-list option")
    assert rows.count() == TASKS // 3
    number = 1
    question = rows.nth(number).inner_text().replace("\u00a0", " ").split("  ")[-1].strip()
    inspector.locator(".sqlbench-list select").select_option(index=number)
    inspector.locator("h4", has_text=question).wait_for()
    inspector.locator("pre b", has_text="surplus").first.wait_for()
    assert inspector.locator("mark").first.is_visible()
    prompt = inspector.locator("summary", has_text="prompt").first
    prompt.click()
    assert inspector.locator("details[open] pre", has_text=question).first.is_visible()
    prompt.click()
    page.set_viewport_size({"width": 1500, "height": 2400})
    picture(inspector, "inspector")

    inspector.get_by_label("text").fill("no such text anywhere")
    wait_for_text(inspector, f"0 of {TASKS} rollouts")
    inspector.get_by_label("text").fill("")
    inspector.locator("h4", has_text=rows.first.inner_text().replace("\u00a0", " ").split("  ")[-1].strip()).wait_for()
    shown = inspector.locator("h4").first.inner_text()
    run_again(page, "chosen = inspector.selected").filter(has_text=shown).first.wait_for()

    comparison = page.locator(".sqlbench-comparison")
    flip = comparison.locator(".sqlbench-list").first
    assert flip.locator("option").count() == TASKS // 3
    flip.locator("select").select_option(index=1)
    question = flip.locator("option").nth(1).inner_text().replace("\u00a0", " ").split("  ")[-1].strip()
    comparison.locator("h4", has_text=question[-30:]).wait_for()
    assert comparison.locator(".card").count() == 2
    picture(comparison, "comparison")


def test_a_stored_notebook_that_is_not_trusted_keeps_gold_beside_predicted(lab, page, runs, picture) -> None:
    """JupyterLab removes style sheets from the outputs of a notebook that somebody else ran."""
    inspector = Inspector(runs / "laptop/demo/cells/before_t3_c2048").filter(outcome="wrong")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("inspector")])
    data = {"text/html": str(inspector.html()), "text/plain": repr(inspector)}
    notebook.cells[0].outputs = [nbformat.v4.new_output("display_data", data)]
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, lab.folder / "stored.ipynb")
    lab.open(page, "stored.ipynb")
    page.set_viewport_size({"width": 1500, "height": 2000})
    view = page.locator(".jp-OutputArea-output div.sqlbench")
    view.wait_for()
    assert page.locator(".jp-OutputArea-output style").count() == 0
    gold, predicted = (view.locator("td", has=page.locator("h4", has_text=name)) for name in ("Gold", "Predicted"))
    left, right = gold.first.bounding_box(), predicted.first.bounding_box()
    assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]
    looks = view.locator("pre, pre *, td, th").evaluate_all(
        "all => all.map(e => [getComputedStyle(e).textAlign, getComputedStyle(e).textDecorationLine])"
    )
    numbers = view.locator("td.number").count()
    assert sum(align == "right" for align, _ in looks) == numbers
    assert not [line for _, line in looks if "line-through" in line]
    surplus = view.locator("pre b", has_text="surplus").first
    assert surplus.evaluate("e => getComputedStyle(e).backgroundColor") == "rgb(255, 217, 168)"
    picture(page, "untrusted")


def test_a_question_is_asked_answered_and_judged_in_the_notebook(lab, page, pocket, tmp_path: Path, picture) -> None:
    """The notebook asks one benchmark question itself; the second one is typed, and marked wrong with a remark."""
    name, remark = "06_self_improving_agent.ipynb", "<b>only</b> the newest"
    run_notebook(lab, page, name, data=str(pocket.root), results=str(tmp_path), questions=1, model="nano")
    page.locator(".jp-OutputArea-output", has_text="1 questions since the last evolution").wait_for()
    assert_no_errors(page)
    page.get_by_placeholder("Ask a question about this database").fill("How many customers are there?")
    page.get_by_placeholder("Ask a question about this database").press("Enter")
    page.get_by_role("button", name="Retry differently").nth(1).wait_for()
    card = page.locator(".sqlbench-card").last
    assert "How many customers are there?" in card.inner_text()
    assert card.locator(".attempt pre").first.inner_text().startswith("SELECT")
    card.get_by_placeholder("What is wrong with it?").fill(remark)
    card.get_by_role("button", name="Wrong").click()
    wait_for_text(card, f"Marked wrong: {remark}")
    kept = [json.loads(x) for x in (tmp_path / "laptop/demo/chat/feedback.jsonl").read_text().splitlines()]
    assert (kept[-1]["question"], kept[-1]["verdict"]) == ("How many customers are there?", "wrong")
    assert kept[-1]["remark"] == remark
    picture(page, "notebook_chat")
    run_again(page, "evolution = chat.session.evolution").filter(has_text="2 questions since").wait_for()


def test_the_static_form_is_complete_without_a_kernel(page, runs, tmp_path: Path, picture) -> None:
    inspector = Inspector(runs / "laptop/demo/cells/before_t3_c2048").filter(outcome="wrong")
    file = tmp_path / "static.html"
    file.write_text(f"<!doctype html><meta charset='utf-8'>{inspector.html()!s}", encoding="utf-8")
    page.goto(file.as_uri())
    assert page.locator("pre b", has_text="surplus").first.is_visible()
    assert page.locator("mark").first.is_visible()
    assert page.get_by_text(inspector.selected.question).count() >= 2  # in the list and as the title
    page.locator("summary", has_text="prompt").first.click()
    assert page.locator("details[open] pre").first.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    picture(page, "static")
