"""What is kept of a training on a GPU: a small form of its run folder, tables made from it, rollouts to look at."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from sqlbench.agent.prompts import CORRECT, INCORRECT
from sqlbench.agent.trajectory import Completion, Execution, Message, Trajectory, Transition
from sqlbench.data.tasks import DataSet
from sqlbench.runs import read_trajectories
from sqlbench_lab.inspector import Inspector


@pytest.fixture(autouse=True)
def scripts(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(repo / "benchmarks"))


def rollouts(pocket: DataSet) -> list[Trajectory]:
    """Four validation rollouts at step 0 and at step 1, and a group of two at step 1."""
    tasks = [task for task in pocket.load("headline") if task.scorable][:4]
    wrong = "SELECT 'wrong'"

    def made(number: int, queries: list[bool], verdicts: list[bool], step: int, **more: object) -> Trajectory:
        task = tasks[number]
        sql = [task.gold if right else wrong for right in queries]
        calls = [Transition(agent="write", turn=1, messages=ASKED, completion=answer(sql[0]))]
        for turn, correct in enumerate(verdicts, 1):
            text = CORRECT if correct else INCORRECT
            calls.append(Transition(agent="check", turn=turn, messages=ASKED, completion=answer(text)))
            if not correct:
                calls.append(Transition(agent="rewrite", turn=turn + 1, messages=ASKED, completion=answer(sql[turn])))
        executions = [Execution(turn=n, sql=text, status="ok") for n, text in enumerate(sql, 1)]
        return Trajectory(
            task_key=task.key, task_id=task.task_id, db_id=task.db_id, question=task.question, gold=task.gold,
            hardness="easy", transitions=calls, executions=executions, pred=sql[-1], reward=float(queries[-1]),
            step=step, **more,
        )  # fmt: skip

    before = [
        made(0, [False, True], [False], 0, validation=True),  # fixed
        made(1, [True, False], [False], 0, validation=True),  # spoiled
        made(2, [False, False, False], [False, False], 0, validation=True),  # repeated twice
        made(3, [True], [True], 0, validation=True),
    ]
    after = [made(n, [True], [True], 1, validation=True) for n in range(3)]
    after.append(made(3, [False], [True], 1, validation=True))
    training = [made(0, [True], [True], 1), made(0, [False, False], [False], 1, sample=1)]
    return [*before, *training, *after]


ASKED = [Message(role="user", content="How many?")]


def answer(text: str) -> Completion:
    cut = "length" if text == INCORRECT else "stop"
    return Completion(
        text=text, prompt_tokens=10, response_tokens=2, finish_reason=cut, prompt_ids=[1] * 10,
        response_ids=[1, 2], logprobs=[-0.5, -0.5],
    )  # fmt: skip


@pytest.fixture()
def run(pocket: DataSet, tmp_path: Path) -> Path:
    """A run folder as a training leaves it, stopped within its second step."""
    folder = tmp_path / "run"
    folder.mkdir()
    records = rollouts(pocket)
    records.append(records[5].model_copy(update={"step": 2}))
    (folder / "trajectories.jsonl").write_text("".join(r.model_dump_json() + "\n" for r in records) + '{"torn')
    ours = {"data": "/somewhere/pocket", "model": "/somewhere/model", "trained_agents": "write"}
    actor = {"actor": {"optim": {"lr": 1e-6}}, "rollout": {"n": 2}}
    config = {"sqlbench": ours, "data": {"train_batch_size": 1}, "actor_rollout_ref": actor}
    (folder / "config.json").write_text(json.dumps({"kind": "training", "config": config}, indent=2))
    steps = [{"step": 0, "data": {}}, {"step": 1, "data": {"timing_s/step": 9.0}}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    return folder


def test_the_small_form_has_each_query_and_verdict(pocket: DataSet, run: Path, tmp_path: Path) -> None:
    import compact_run

    out = tmp_path / "small"
    made = compact_run.compact(run, out, pocket.root, "owner/name", size=8)
    assert made == {"validation": 8, "training": 2}
    with gzip.open(out / "validation.jsonl.gz", "rt") as file:
        lines = [json.loads(line) for line in file]
    assert [[query["right"] for query in line["queries"]] for line in lines[:4]] == [
        [False, True], [True, False], [False, False, False], [True],
    ]  # fmt: skip
    assert [call["correct"] for call in lines[2]["calls"] if call["agent"] == "check"] == [False, False]
    (counts,) = [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]
    assert counts == {
        "step": 1, "rollouts": 2, "failed": 0, "right": 1, "answers": 5, "cut": 1, "response_tokens": 10,
        "rewrites": 1, "repeated": 1, "checks": 2, "said_incorrect": 1,
    }  # fmt: skip
    config = (out / "config.json").read_text()
    assert "somewhere" not in config and "data/pocket" in config and "owner/name" in config
    kept = list(read_trajectories(out))
    assert [(t.step, t.validation) for t in kept] == [(0, True)] * 2 + [(1, False)] * 2 + [(1, True)] * 2
    assert all(x.completion.prompt_ids is None and x.completion.logprobs for t in kept for x in t.transitions)
    assert {t.task_id for t in kept if t.step == 0} == {t.task_id for t in kept if t.step == 1 and t.validation}


def test_without_data_only_queries_like_the_last_are_judged(run: Path, tmp_path: Path) -> None:
    import compact_run
    import gpu_report

    compact_run.compact(run, tmp_path / "small")
    found = gpu_report.read_run(tmp_path / "small", tmp_path)
    loop = gpu_report.loop(found.validations[0])
    assert (loop.unknown, loop.compared, loop.fixed, loop.repeated) == (2, 2, 0, 2)


def test_the_tables_count_what_happened(pocket: DataSet, run: Path, tmp_path: Path) -> None:
    import compact_run
    import gpu_report

    compact_run.compact(run, tmp_path / "all/small", pocket.root)
    (found,) = gpu_report.read_runs(tmp_path / "all")
    loop = gpu_report.loop(found.validations[0])
    assert (loop.first, loop.last, loop.compared) == (50.0, 50.0, 4)
    assert (loop.fixed, loop.spoiled, loop.repeated, loop.rewrites) == (1, 1, 2, 4)
    assert loop.said_incorrect == 80.0  # four of five checks
    assert loop.balanced == 75.0  # one of two right queries, all three wrong ones
    assert loop.calls == (3 + 3 + 5 + 2) / 4 and loop.cut == pytest.approx(100 * 4 / 13)
    row = gpu_report.accuracy_table([found]).iloc[0]
    assert row["EX before"].startswith("50.0%") and row["EX after"].startswith("75.0%") and row["gain"][:5] == "+25.0"
    assert gpu_report.time_table([found]).empty  # there is no step after the first
    page = "<!-- table:gpu-time -->\nold\n<!-- /table:gpu-time -->\nrest"
    assert gpu_report.fill(page, {"gpu-time": "new\n"}) == page.replace("old", "new")


def test_the_pages_hold_the_tables_of_what_is_kept(repo: Path) -> None:
    import gpu_report

    listed = (repo / "results/gpu/README.md").read_text(encoding="utf-8")
    runs = [run for run in gpu_report.read_runs(repo / "results/gpu") if f"| `{run.name}` |" in listed]  # not one's own
    tables = gpu_report.tables_of(runs)
    for page, names in (("results/gpu/README.md", set(tables)), ("docs/gpu.md", {"gpu-accuracy", "gpu-time"})):
        text = (repo / page).read_text(encoding="utf-8")
        assert gpu_report.fill(text, tables) == text, f"{page}: run python benchmarks/gpu_report.py"
        assert all(f"<!-- table:{name} -->\n{tables[name]}" in text for name in names)


def test_the_inspector_opens_the_rollouts_that_are_kept(repo: Path) -> None:
    for run in sorted((repo / "results/gpu").glob("*/validation.jsonl.gz")):
        inspector = Inspector(run.parent)
        assert 30 <= len(inspector.matches) <= 40
        for number in inspector.matches:
            inspector.select(number)
            assert inspector.selected.executions and "What happened" in inspector.rollout_html()
    assert (repo / "results/gpu/coder-0.5b/trajectories.jsonl").is_file()
