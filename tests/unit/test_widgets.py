"""The views show everything, escape everything, and say what is in the run folders and nothing else."""

from __future__ import annotations

import json
import math
import re
import sqlite3
import time
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup
from tokenizers import Tokenizer

from pocket import NANO_PATH
from sqlbench import __version__
from sqlbench.agent.trajectory import Completion, Execution, Message, Trajectory, Transition
from sqlbench.checks import capabilities
from sqlbench.cli import main
from sqlbench.data.tasks import Task, write_split
from sqlbench.errors import DataError, ModelError
from sqlbench.evaluation import evaluate
from sqlbench.results import Score
from sqlbench.runs import METRICS, TRAJECTORIES, RunFolder
from sqlbench.stats import mcnemar
from sqlbench_lab import view
from sqlbench_lab.comparison import Comparison
from sqlbench_lab.display import advantage_example, query_table, training_settings
from sqlbench_lab.figures import accuracy_and_causes, group_rewards, read_metrics
from sqlbench_lab.inspector import Inspector
from sqlbench_lab.monitor import Monitor
from sqlbench_lab.rollouts import advantages, rollout_table
from sqlbench_train.metrics import write_rows

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'"
GOLD = "SELECT name, price FROM item WHERE price > 1"
ANSWERS = {
    "right": GOLD.lower(),
    "other rows": "SELECT name, price FROM item WHERE price > 2",
    "other width": "SELECT name FROM item",
    "refused": "SELECT absent FROM item",
    "hostile": f"SELECT '{HOSTILE.replace(chr(39), chr(39) * 2)}' AS x, * FROM item",
    "broken": "",
}


class Scripted:
    """Answers a question with what `ANSWERS` holds for its last words, in order in a rewrite; a check may say no."""

    family = "nano"

    def __init__(self, answers: dict[str, str], name: str = "scripted") -> None:
        self.answers, self.name = answers, name

    async def complete(self, messages, on_text=None) -> Completion:
        if messages[0].content.startswith("check"):
            return Completion(text=f"THE QUERY IS {'IN' * ('other rows' in messages[1].content)}CORRECT")
        answer = self.answers[messages[1].content.split("\n")[0].split(": ")[1]]
        answer += " ORDER BY rowid" * messages[0].content.startswith("rewrite")
        if not answer:
            raise ModelError("no answer " + HOSTILE)
        return Completion(text=answer, prompt_tokens=20, response_tokens=5)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve tasks on two databases, two for each of `ANSWERS`."""
    root = tmp_path_factory.mktemp("data")
    for db in ("kiosk", "shop"):
        (root / "database" / db).mkdir(parents=True)
        with sqlite3.connect(root / "database" / db / f"{db}.sqlite") as connection:
            connection.execute("CREATE TABLE item (name TEXT, price INTEGER)")
            items = [("pen", 1), ("ink", 2), (HOSTILE, 3), (None, 4)]
            connection.executemany("INSERT INTO item VALUES (?, ?)", items)
    tasks = [
        Task(
            task_id=f"{number:02}",
            db_id="kiosk" if number % 2 else "shop",
            question=f"{number}: {kind}",
            gold=GOLD,
            split="dev",
            hardness="easy" if number < 6 else "hard",
            kind="where" if number % 3 else "join",
        )
        for number, kind in enumerate([*ANSWERS, *ANSWERS])
    ]
    write_split(root, "dev", tasks)
    (root / "dataset.json").write_text(json.dumps({"name": "t", "headline": "dev"}))
    return root


@pytest.fixture(scope="module")
def run(data: Path) -> Path:
    evaluate(data, "dev", Scripted(ANSWERS), "one", results=data / "results", max_turns=2)
    return data / "results/laptop/one"


@pytest.fixture(scope="module")
def better(data: Path) -> Path:
    """Gains the tasks of other width, loses nothing."""
    evaluate(data, "dev", Scripted(ANSWERS | {"other width": GOLD}), "two", results=data / "results", max_turns=2)
    return data / "results/laptop/two"


def rollout(**values) -> Trajectory:
    given = {"task_key": "k", "task_id": "t", "db_id": "shop", "question": "Which?", "gold": GOLD, "pred": GOLD}
    return Trajectory(**given | {"reward": 1.0, "reason": "equal"} | values)


def training(folder: Path, *, steps: int = 2, **sqlbench) -> Path:
    """A training run folder: groups of four with rewards 1 0 0 0 in step 1 and 1 1 1 1 in step 2, and a validation."""
    settings = {"data": "nowhere", "model": "nano", "random_reward": False} | sqlbench
    algorithm = {"adv_estimator": "grpo", "norm_adv_by_std_in_grpo": True}
    trainer = {"total_training_steps": steps, "total_epochs": 2}
    config = {"sqlbench": settings, "algorithm": algorithm, "trainer": trainer, "data": {"train_batch_size": 4}}
    with RunFolder(folder).open({"kind": "training", "config": config}) as open_run:
        for step, rewards in ((1, (1, 0, 0, 0)), (2, (1, 1, 1, 1))):
            for sample, reward in enumerate(rewards):
                open_run.append(TRAJECTORIES, rollout(step=step, sample=sample, reward=float(reward)))
        open_run.append(TRAJECTORIES, rollout(step=2, validation=True, reward=0.0))
    return folder


class Elements(HTMLParser):
    """Which elements and attributes a text has when it is read as HTML, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.text = ""
        self.feed(str(html))

    def handle_starttag(self, tag, attrs) -> None:
        self.names |= {tag, *(name for name, _ in attrs)}

    def handle_data(self, data: str) -> None:
        self.text += data


# ---- inspector


@pytest.mark.parametrize(
    ("filters", "tasks"),
    [
        ({}, range(12)),
        ({"outcome": "right"}, (0, 6)),
        ({"outcome": "failed"}, (5, 11)),
        ({"outcome": "wrong", "hardness": "easy"}, (1, 2, 3, 4)),
        ({"database": "kiosk", "outcome": "wrong"}, (1, 3, 7, 9)),
        ({"turns": (2, 2)}, (1, 3, 7, 9)),
        ({"reward": (0.5, 1.0)}, (0, 6)),
        ({"text": "ABSENT from"}, (3, 9)),
        ({"text": "no answer <script>"}, (5, 11)),
        ({"text": "in no rollout"}, ()),
    ],
)
def test_filters_leave_what_they_say(run: Path, filters: dict, tasks) -> None:
    inspector = Inspector(run).filter(text="something else").filter(**filters)
    found = inspector.rollouts.loc[inspector.matches]
    assert found["task"].tolist() == [f"{n:02}" for n in tasks]
    assert (inspector.selected is None) == (not tasks)
    assert inspector.selected is None or inspector.selected.task_id == f"{tasks[0]:02}"


def test_training_rollouts_are_filtered_by_step_and_part(tmp_path: Path) -> None:
    inspector = Inspector(training(tmp_path / "run"))
    assert len(inspector.filter(step=2).matches) == 5
    assert len(inspector.filter(step=2, part="training").matches) == 4


def test_an_unknown_filter_or_value_is_refused_with_the_choices(run: Path) -> None:
    with pytest.raises(DataError, match=r"Unknown filter: verdict\. Choose one of outcome, hardness"):
        Inspector(run).filter(verdict="right")
    with pytest.raises(DataError, match=r"outcome='correct'\. Choose one of all, right, wrong, failed"):
        Inspector(run).filter(outcome="correct")
    inspector = Inspector(run)
    for wrong in ({"turns": "two"}, {"turns": (5, 1)}, {"text": 5}):
        with pytest.raises(DataError, match=f"Invalid filter: {next(iter(wrong))}="):
            inspector.filter(**wrong)
    inspector._controls["outcome"].value = "wrong"
    assert "wrong" in repr(inspector) and "right" not in repr(inspector)  # the menus go on working


@pytest.mark.parametrize("config", [{}, {"kind": "training"}, {"kind": "training", "config": {"sqlbench": None}}])
def test_a_config_that_is_none_of_ours_is_named(run: Path, tmp_path: Path, config: dict) -> None:
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / TRAJECTORIES).write_bytes((run / TRAJECTORIES).read_bytes())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"config\.json is not the config of a run"):
        Inspector(tmp_path / "copy")
    Monitor(tmp_path / "copy", every=60).close()


def test_metrics_that_are_damaged_are_named(tmp_path: Path) -> None:
    training(tmp_path / "run")
    (tmp_path / "run" / METRICS).write_text("no json\n")
    with pytest.raises(DataError, match=r"Not JSON: .*metrics\.jsonl, line 1"):
        read_metrics(tmp_path / "run")


def test_the_selection_is_the_trajectory_on_disk(run: Path) -> None:
    stored = {t.task_id: t for t in RunFolder(run).trajectories()}
    inspector = Inspector(run)
    for number in inspector.matches:
        selected = inspector.select(number).selected
        assert selected == stored[selected.task_id]
    with pytest.raises(DataError, match=r"Unknown rollout: 12\. Give a number from 0 to 11\."):
        inspector.select(12)


def test_choosing_in_the_list_selects(run: Path) -> None:
    inspector = Inspector(run).filter(outcome="wrong")
    inspector._list.value = inspector.matches[2]
    assert inspector.selected.task_id == "03" and "no such column: absent" in inspector._detail.value


def test_nothing_of_a_model_or_database_becomes_an_element(run: Path, better: Path, tmp_path: Path) -> None:
    hostile = rollout(
        question=HOSTILE, gold=HOSTILE, pred=HOSTILE, db_id=HOSTILE, hardness=HOSTILE, task_id=HOSTILE, reason=HOSTILE,
        transitions=[
            Transition(
                agent=HOSTILE, turn=1, messages=[Message(role=HOSTILE, content=HOSTILE)], strategy=HOSTILE,
                completion=Completion(text=HOSTILE, response_ids=[1], logprobs=[-2.0], finish_reason=HOSTILE),
            )
        ],
        executions=[Execution(turn=1, sql=HOSTILE, status="ok", columns=[HOSTILE], rows=[[HOSTILE]], n_rows=1)],
    )  # fmt: skip
    broken = hostile.model_copy(update={"reward": None, "error": HOSTILE, "task_key": "other"})
    pages = [Inspector([hostile, broken]).html(), Inspector([broken]).html()]
    inspector = Inspector(run)
    pages += [inspector.select(number).html() for number in inspector.matches]
    comparison = Comparison({HOSTILE: run, "b" + HOSTILE: better})
    pages += [comparison.html(), comparison.children[0].value, comparison.inspector.children[1].value]
    pages += [comparison.inspector.children[2].value, Monitor(training(tmp_path / "<script>")).children[0].value]
    for page in pages:
        found = Elements(page)
        assert not found.names & {"script", "img", "onerror"}
        assert "<script>" not in page
    assert all("<script>" in Elements(page).text for page in pages[:2])


def test_prompts_and_responses_are_complete(run: Path) -> None:
    long = "\n".join(f"line {n} of a very long text" for n in range(3000))
    transition = Transition(
        agent="write", turn=1, messages=[Message(role="user", content=long)], completion=Completion(text=long[::-1])
    )
    text = Elements(Inspector([rollout(transitions=[transition])]).html()).text
    assert long in text and long[::-1] in text


def test_the_timeline_is_in_the_order_of_events(run: Path) -> None:
    inspector = Inspector(run).filter(text="other rows")
    html = view.timeline_html(inspector.selected)
    places = [html.index(f"<li><b>{step}</b>") for step in ("write", "execute", "check", "rewrite")]
    assert places == sorted(places)
    assert html.count("<b>execute</b>") == 2 and html.count("<summary>prompt") == 3


def test_a_failed_rollout_shows_its_error_and_no_verdict(run: Path) -> None:
    text = Elements(Inspector(run).filter(outcome="failed").html()).text
    assert "! failed" in text and "no answer " + HOSTILE in text and "wrong" not in text


def test_the_static_form_holds_list_and_rollout(run: Path) -> None:
    bundle = Inspector(run).filter(outcome="wrong")._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert bundle["text/plain"] == "Inspector: 8 of 12 rollouts: 8 wrong (filters: outcome wrong)"
    text = Elements(bundle["text/html"]).text
    assert "8 of 12 rollouts" in text and "Gold result" in text and "What happened" in text
    assert "rows_differ: same columns, other rows" in text


def test_results_are_live_where_the_database_is_and_stored_elsewhere(run: Path, tmp_path: Path) -> None:
    inspector = Inspector(run).filter(text="other rows")
    gold, pred = inspector.results()
    assert len(gold.rows) == 3 and len(pred.rows) == 2
    elsewhere = Inspector(run, data=tmp_path).filter(text="other rows")
    gold, pred = elsewhere.results()
    assert gold is None and pred.rows == [(HOSTILE, 3), (None, 4)]
    assert "not on this machine" in elsewhere.html()


def test_a_query_that_failed_is_not_run_again(data: Path) -> None:
    hangs = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT max(x) FROM n"
    late = Execution(turn=1, sql=hangs, status="timeout", error="as it was recorded")
    inspector = Inspector([rollout(pred=hangs, executions=[late], reward=0.0, reason="pred_timeout")], data)
    pred = inspector.results()[1]
    assert (pred.status, pred.error) == ("timeout", "as it was recorded")


def test_differing_cells_are_marked_and_equal_results_are_not(run: Path) -> None:
    inspector = Inspector(run)
    marked = re.compile(r"<td[^>]*><mark")
    assert not marked.search(inspector.filter(outcome="right").rollout_html())
    assert len(marked.findall(inspector.filter(text="other rows").rollout_html())) == 2  # the row that is missing


def test_torn_lines_are_dropped_and_wrong_ones_named(run: Path, tmp_path: Path) -> None:
    lines = (run / TRAJECTORIES).read_bytes().splitlines(keepends=True)
    (tmp_path / TRAJECTORIES).write_bytes(lines[0] + lines[1][:50])
    assert len(Inspector(tmp_path).rollouts) == 1
    (tmp_path / TRAJECTORIES).write_bytes(lines[0] + b"{}\n")
    with pytest.raises(DataError, match=r"line 2, is not a trajectory: Field required"):
        Inspector(tmp_path)
    with pytest.raises(DataError, match="No rollouts in"):
        Inspector(tmp_path / "none")


def test_a_file_that_was_rewritten_is_not_misread(run: Path, tmp_path: Path) -> None:
    lines = (run / TRAJECTORIES).read_bytes().splitlines(keepends=True)
    (tmp_path / TRAJECTORIES).write_bytes(b"".join(lines))
    inspector = Inspector(tmp_path)
    (tmp_path / TRAJECTORIES).write_bytes(b"".join(reversed(lines)))
    with pytest.raises(DataError, match="was rewritten since it was opened"):
        inspector.select(inspector.matches[-1])


# ---- groups


def test_advantages_are_verls() -> None:
    core = pytest.importorskip("verl.trainer.ppo.core_algos")
    torch = pytest.importorskip("torch")
    for rewards in ([1.0, 0.0, 1.0, 1.0], [1.0, 1.0], [0.0, 0.5, 1.0]):
        for by_std in (True, False):
            found, _ = core.compute_grpo_outcome_advantage(
                torch.tensor(rewards)[:, None],
                torch.ones(len(rewards), 1),
                ["a"] * len(rewards),
                norm_adv_by_std_in_grpo=by_std,
            )
            assert advantages(rewards, by_std) == pytest.approx(found[:, 0].tolist(), abs=1e-5)


def test_a_group_stands_side_by_side_with_its_advantages(tmp_path: Path) -> None:
    inspector = Inspector(training(tmp_path / "run")).filter(step=1)
    html = inspector.rollout_html()
    assert html.count('class="card"') == 3 and html.count('class="card this"') == 1
    assert html.count("advantage +1.50") == 2 and html.count("advantage -0.50") == 3
    inspector._siblings.value = inspector.matches[2]
    assert inspector.selected.sample == 2
    assert "nothing is learnt from it" in inspector.filter(step=2, part="training").rollout_html()


def test_no_advantage_is_shown_where_it_is_not_known(tmp_path: Path) -> None:
    for name, control in (("coin", {"random_reward": True}), ("permuted", {"control": "permuted"})):
        drawn = Inspector(training(tmp_path / name, **control)).filter(step=1)
        assert "card" in drawn.html() and "advantage" not in drawn.html()
    validation = Inspector(training(tmp_path / "run")).filter(part="validation")
    assert "advantage" not in validation.html()


def test_an_advantage_is_worked_out_for_a_group_that_divides(tmp_path: Path) -> None:
    found = advantage_example(training(tmp_path / "run"))
    assert found["reward"].tolist() == [1.0, 0.0, 0.0, 0.0] and set(found["step"]) == {1}
    assert set(found["group mean"]) == {0.25} and set(found["group deviation"]) == {0.5}
    assert found["advantage"].tolist() == [1.5, -0.5, -0.5, -0.5]
    for name, changed in (("coin", {"random_reward": True}), ("own", {"credit": "transition"})):
        assert advantage_example(training(tmp_path / name, **changed)).empty, "it is not this group that is compared"


def test_the_settings_are_those_that_ran(tmp_path: Path) -> None:
    table = training_settings(training(tmp_path / "run", steps=7, max_turns=5)).set_index("setting")["value"]
    assert (table["steps"], table["maximum turns"], table["learning rate"]) == ("7", "5", "not recorded")


def test_groups_are_drawn_by_their_right_rollouts(tmp_path: Path) -> None:
    early, late = group_rewards(rollout_table(training(tmp_path / "run"))).axes[0].containers
    assert [bar.get_height() for bar in early] == [0, 100, 0, 0, 0]
    assert [bar.get_height() for bar in late] == [0, 0, 0, 0, 100]
    with pytest.raises(DataError, match="No scored training rollouts"):
        group_rewards(rollout_table(training(tmp_path / "run")).assign(correct=None))


def test_accuracy_and_causes_are_drawn() -> None:
    scores = {"easy": Score.of(pd.Series([1.0, 1.0, 0.0, 0.0]), pd.Series(range(4)))}
    left, right = accuracy_and_causes(scores, {"wrong join": 3, "syntax": 1}).axes
    assert [bar.get_height() for bar in left.patches] == [50.0]
    assert [bar.get_width() for bar in right.patches] == [3, 1]
    assert [label.get_text() for label in right.get_yticklabels()] == ["wrong join", "syntax"]
    assert accuracy_and_causes(scores, {}).axes


def test_a_table_of_queries_is_coloured_and_escaped() -> None:
    shown = query_table(pd.DataFrame({"question": [HOSTILE], "gold": ["SELECT 1 < 2"], "pred": [None]})).data
    assert Elements(shown).text.endswith(f"{HOSTILE}SELECT 1 < 2") and "&lt;span" not in shown
    assert not Elements(shown).names & {"script", "img"} and f">{'SELECT'}</span>" in shown


# ---- SQL, results, tokens


@given(st.text(alphabet="aA1'\" .,=<>\n&;", max_size=40), st.text(alphabet="aA1'\" .,=<>\n&;", max_size=40))
def test_a_diff_keeps_both_texts(gold: str, pred: str) -> None:
    left, right = view.token_diff(gold, pred)
    assert (left.striptags().split(), right.striptags().split()) == (gold.split(), pred.split())
    if gold.lower().split() == pred.lower().split() and "'" not in gold:
        assert "<mark" not in left and "<b " not in right


def test_texts_too_long_to_compare_are_shown_without_marks():
    long = " ".join(f"w{i % 150} <b>" for i in range(50_000))
    assert view.token_diff(long, long + " x") == (Markup.escape(long), Markup.escape(long + " x"))


def test_a_diff_marks_tokens() -> None:
    left, right = view.token_diff("SELECT a FROM t WHERE b = 'X'", "select a\nfrom t where c = 'x'")
    keyword = f'<span style="color: {view.COLOURS["keyword"]}">{{}}</span>'.format
    gold, pred = (mark.format for mark in view.MARKS)
    assert left == " ".join(
        [keyword("SELECT"), "a", keyword("FROM"), "t", keyword("WHERE"), gold("b"), "=", gold("'X'")]
    )
    assert right.replace("\n", " ") == " ".join(
        [keyword("select"), "a", keyword("from"), "t", keyword("where"), pred("c"), "=", pred("'x'")]
    )


def test_sql_is_coloured_and_kept() -> None:
    html = view.sql_html("SELECT a, 'it''s < 5' FROM t LIMIT 10")
    assert Elements(html).text == "SELECT a, 'it''s < 5' FROM t LIMIT 10"
    assert [word for word, _ in re.findall(r">([^<]+)<(/)span", html)] == [
        "SELECT",
        "&#39;it&#39;&#39;s &lt; 5&#39;",
        "FROM",
        "LIMIT",
        "10",
    ]


KEPT = {"table", "thead", "tbody", "tr", "th", "td", "div", "span", "pre", "b", "i", "u", "mark", "small", "h4"}
KEPT |= {"ol", "li", "details", "summary"}
"""Elements of the views that Jupyter and GitHub both keep."""


class Untrusted(HTMLParser):
    """What is left of a stored output where it is not trusted: no script, no style sheet, known elements."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.dropped: set[str] = set()
        self.cells: list[tuple[dict, list]] = []
        self._inside: list[str] = []
        self.feed(re.sub(r"(?s)<(style|script)\b.*?</\1>", "", str(html)))

    def handle_starttag(self, tag, attrs) -> None:
        if tag not in KEPT:
            self.dropped.add(tag)
        if tag == "td" or tag == "th":
            self.cells.append((dict(attrs), []))
        elif tag == "pre" and self.cells and "td" in self._inside:
            self.cells[-1][1].append(dict(attrs).get("style", ""))
        self._inside.append(tag)

    def handle_endtag(self, tag) -> None:
        while self._inside and self._inside.pop() != tag:
            pass


def test_an_untrusted_notebook_keeps_sides_abreast_and_text_to_the_left(run: Path, better: Path) -> None:
    wrong = Inspector(run).filter(outcome="wrong", text="other rows")
    for html in (wrong.html(), Comparison({"a": run, "b": better}).html()):
        shown = Untrusted(html)
        assert not shown.dropped
        assert all("text-align" in cell.get("style", "") for cell, _ in shown.cells)
        sides = [(cell, pres) for cell, pres in shown.cells if pres]
        assert len(sides) >= 2, "gold and prediction are in cells of one row"
        assert all("text-align: left" in style for _, pres in sides[:2] for style in pres)
    assert all("style=" in str(mark) for mark in view.MARKS)


def test_sql_is_laid_out_only_where_it_is_one_statement() -> None:
    assert view.pretty("select a from t where b=1") == "SELECT\n  a\nFROM t\nWHERE\n  b = 1"
    for odd in ("SELECT a; DROP TABLE t", "select from where", "", "(" * 5000):
        assert view.pretty(odd) == odd


ROWS = [("a", 1, 2.5), ("b", 2, None), ("b", 2, None), ("c", 3, 1.0)]


@given(st.permutations(ROWS), st.permutations(range(3)))
def test_the_same_rows_in_another_order_do_not_differ(rows: list[tuple], columns: list[int]) -> None:
    pred = [tuple(row[c] for c in columns) for row in rows]
    assert view.differing(ROWS, pred, ordered=False)[:2] == (set(), set())


def test_one_cell_that_differs_is_one_mark() -> None:
    pred = [*ROWS[:3], ("c", 4, 1.0)]
    gold_marks, pred_marks, pairs = view.differing(ROWS, pred, ordered=False)
    assert (gold_marks, pred_marks) == ({(3, 1)}, {(3, 1)}) and pairs[0] == (3, 3)


def test_rows_and_columns_too_many_are_marked_whole() -> None:
    assert view.differing(ROWS, ROWS[:3], False)[:2] == ({(3, 0), (3, 1), (3, 2)}, set())
    assert view.differing(ROWS, [r[:2] for r in ROWS], False)[0] == {(n, 2) for n in range(4)}
    assert view.differing(ROWS, [], False)[0] == {(n, c) for n in range(4) for c in range(3)}


def test_order_counts_where_it_matters_and_rounding_never() -> None:
    swapped = [ROWS[3], *ROWS[1:3], ROWS[0]]
    assert view.differing(ROWS, swapped, True)[0] == {(0, 0), (0, 1), (0, 2), (3, 0), (3, 1), (3, 2)}
    assert view.differing([(0.1 + 0.2,)], [(0.3,)], False)[:2] == (set(), set())


def test_shown_rows_are_counted_and_those_that_differ_come_first() -> None:
    gold = view.QueryResult("ok", ("x",), [(n,) for n in range(500)])
    pred = view.QueryResult("ok", ("x",), [(n,) for n in range(499)] + [(-1,)])
    html = view.results_html(gold, pred, right=False, ordered=False)
    assert "500 rows, 1 differs; 100 are shown, those that differ first" in html
    first = re.findall(r"<mark[^>]*><b>(-?\d+)</b></mark>", html)
    assert first == ["499", "-1"]


@pytest.mark.parametrize("text", ["SELECT count(*) FROM t", "SELECT a FROM t WHERE b LIKE '%Köln%'"])
def test_tokens_are_shaded_by_their_probability(text: str) -> None:
    tokenizer = NANO_PATH / "tokenizer.json"
    ids = Tokenizer.from_file(str(tokenizer)).encode(text, add_special_tokens=False).ids
    logprobs = [-0.001, math.log(0.3), *[-0.2] * (len(ids) - 2)]
    completion = Completion(text=text, response_ids=ids, logprobs=logprobs)
    html = view.response_html(completion, tokenizer)
    assert text in Elements(html).text
    assert html.count("<u ") == 1 and "p 0.300, log -1.20" in html and html.count("<span ") == len(ids) - 2
    other = view.response_html(completion.model_copy(update={"text": "another model's"}), tokenizer)
    assert f"#{ids[0]} " in other and "another model&#39;s" in other
    assert Elements(view.response_html(Completion(text=text), None)).text == text


# ---- comparison


def test_gained_and_lost_with_their_test(run: Path, better: Path) -> None:
    comparison = Comparison({"one": run, "two": better})
    change = comparison.difference("two")
    assert (change.gained, change.lost, comparison.left_out) == (2, 0, 0)
    assert change.p == mcnemar([1, 0, 0, 0, 0] * 2, [1, 0, 1, 0, 0] * 2)
    assert comparison.summary["tasks"].tolist() == [10, 10]  # the two that failed are left out
    back = Comparison({"two": better, "one": run}).difference("one")
    assert (back.gained, back.lost) == (0, 2)


def test_several_rollouts_of_a_task_count_as_one_task(run: Path, better: Path, tmp_path: Path) -> None:
    """Four equal rollouts of each task say no more than one of each."""

    def four(folder: Path) -> Path:
        with RunFolder(tmp_path / folder.name).open(RunFolder(folder).config()) as copy:
            for record in RunFolder(folder).trajectories():
                for sample in range(4):
                    copy.append(TRAJECTORIES, record.model_copy(update={"sample": sample}))
        return copy.root

    alone, found = Comparison({"one": run, "two": better}), Comparison({"one": four(run), "two": four(better)})
    assert repr(found) == repr(alone) and len(found.tasks) == 12
    assert found.summary.drop(columns="95% CI").equals(alone.summary.drop(columns="95% CI"))
    assert found.by("hardness").equals(alone.by("hardness"))
    assert found.flips.drop(columns="number").equals(alone.flips.drop(columns="number"))


def test_where_tasks_were_gained(run: Path, better: Path) -> None:
    comparison = Comparison({"one": run, "two": better})
    for what, gained in (
        ("hardness", {"easy": 1, "hard": 1}),
        ("database", {"kiosk": 0, "shop": 2}),
        ("construct", {"join": 0, "where": 2}),
    ):
        assert comparison.by(what).set_index(what)["two: gained"].to_dict() == gained
    with pytest.raises(DataError, match="Choose one of hardness, database, construct"):
        comparison.by("model")


def test_a_flipped_task_opens_in_the_inspector(run: Path, better: Path) -> None:
    comparison = Comparison({"one": run, "two": better})
    flips = comparison.flips
    assert flips["change"].tolist() == ["gained", "gained"]
    for number, question in zip(flips["number"], flips["question"], strict=True):
        comparison._list.value = number
        selected = comparison.inspector.selected
        assert selected.question == question and selected.reward == 1
        assert comparison.inspector.rollout_html().count('class="card') == 3  # and their grid
    comparison._change.value = "lost"
    assert comparison.flips.empty and comparison._list.options == ()


def test_only_shared_tasks_are_compared(run: Path, data: Path, tmp_path: Path) -> None:
    evaluate(data, "dev", Scripted(ANSWERS), "part", results=tmp_path, limit=7)
    comparison = Comparison({"all": run, "part": tmp_path / "laptop/part"})
    assert (len(comparison.tasks), comparison.left_out) == (7, 5)
    assert "5 that some lack are left out" in comparison.html()
    with pytest.raises(DataError, match="No task in common"):
        Comparison({"all": run, "training": training(tmp_path / "run")})
    with pytest.raises(DataError, match="Too few runs to compare: 1"):
        Comparison({"all": run})


def test_three_runs_and_a_trainings_last_validation(tmp_path: Path) -> None:
    runs = {name: training(tmp_path / name) for name in ("a", "b", "c")}
    comparison = Comparison(runs)
    assert len(comparison.tasks) == 1 and comparison.summary["run"].tolist() == ["a", "b", "c"]
    assert comparison.by("construct").empty


# ---- monitor


def step_row(step: int) -> dict[str, float]:
    return {"sqlbench/ex": 0.1 * step, "timing_s/step": 10.0, "timing_s/gen": 6.0, "timing_s/update_actor": 3.0}


def test_the_time_left_counts_steps_and_validation(tmp_path: Path) -> None:
    folder = training(tmp_path / "run", steps=10)
    rows = {0: {"sqlbench/val_ex": 0.2, "timing_s/testing": 500.0}} | {n: step_row(n) for n in range(1, 5)}
    write_rows(folder / METRICS, rows | {2: rows[2] | {"timing_s/testing": 20.0}})
    monitor = Monitor(folder, every=60)
    assert monitor.seconds_left() == 6 * (10 + 20 / 4)
    assert monitor.status().startswith("step 4 of 10, about 0:01:30 left, last sign of life 0:00:0")
    monitor.close()


def test_steps_come_from_the_tasks_where_they_were_not_asked_for(tmp_path: Path) -> None:
    folder = training(tmp_path / "run", steps=None)
    (folder / "data").mkdir()
    pd.DataFrame({"task": range(14)}).to_parquet(folder / "data/train.parquet")
    monitor = Monitor(folder, every=60)
    assert monitor.total_steps() == 14 // 4 * 2
    monitor.close()


def test_a_monitor_follows_a_run_to_its_end(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    monitor = Monitor(folder, every=0.05)
    assert "not started yet" in monitor.children[0].value
    training(folder)
    write_rows(folder / METRICS, {1: step_row(1)})
    wait_until(lambda: "step 1 of 2" in monitor.children[0].value and "data:image/png" in monitor.children[1].value)
    first = monitor.children[1].value
    write_rows(folder / METRICS, {1: step_row(1), 2: step_row(2)})
    RunFolder(folder).finish({"steps": 2})
    wait_until(lambda: "finished after 2 steps" in monitor.children[0].value)
    assert monitor.children[1].value != first and monitor._ended.is_set()
    assert monitor._repr_mimebundle_()["text/plain"].endswith("run: finished after 2 steps")


def test_a_monitor_survives_files_that_are_being_written(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    monitor = Monitor(folder, every=0.05)
    (folder / "data").mkdir(parents=True)
    tasks = folder / "data/train.parquet"
    tasks.write_bytes(b"PAR1")
    training(folder, steps=None)
    write_rows(folder / METRICS, {1: step_row(1)})
    time.sleep(0.5)
    pd.DataFrame({"task": range(14)}).to_parquet(tasks)
    wait_until(lambda: "step 1 of 6" in monitor.children[0].value)
    monitor.close()


def wait_until(true) -> None:
    deadline = time.monotonic() + 300
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_evaluation_is_no_training(run: Path) -> None:
    with pytest.raises(DataError, match="is not a training run\\. Open it with the inspector"):
        Monitor(run)


# ---- checks of the overview


def test_what_cannot_run_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):  # a test before this one may have read an .env
        monkeypatch.delenv(name, raising=False)
    found = capabilities(tmp_path).set_index("to")
    assert ((found["runs here"] == "yes") == (found["missing"] == "")).all()
    assert found.loc["work on Spider", "missing"] == "sqlbench data spider --download"
    assert found.loc["evaluate the shipped policy", "runs here"] == "yes"
    asking = ["use a model behind an endpoint", "evolve prompts"]
    assert found.loc[asking, "missing"].str.contains("OPENAI_BASE_URL or OPENAI_API_KEY in .env").all()
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:1/v1")
    assert (capabilities(tmp_path).set_index("to").loc[asking, "runs here"] == "yes").all()


def test_the_command_prints_versions_and_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["checks"])
    first, *rows = capsys.readouterr().out.splitlines()
    assert f"sqlbench {__version__}, python 3." in first and "torch " in first
    assert len(rows) == len(capabilities(tmp_path)) and all(re.match(r"\S.*? {2,}(yes$|no {3}\S)", row) for row in rows)


def test_views_are_markup_only_after_escaping() -> None:
    assert isinstance(view.table(["<b>"], [["<i>", Markup("<i>")]]), Markup)
    assert view.table(["<b>"], [["<i>"]]).count("&lt;") == 2
