"""An evaluation counts every task once, can be interrupted at any point, and stops early where nothing can work."""

from __future__ import annotations

import asyncio
import copy
import json
import random
import sqlite3
from collections import Counter
from pathlib import Path

import pytest

from sqlbench.agent.trajectory import Completion
from sqlbench.data.tasks import DataSet, Task, write_split
from sqlbench.errors import DataError, ModelError, PromptTooLongError, RunError
from sqlbench.evaluation import evaluate
from sqlbench.runs import RunFolder

COUNT = "SELECT count(*) FROM t"


class Oracle:
    """Answers each question with the query it names; the checks always agree. `broken` questions raise."""

    family = "nano"

    def __init__(self, broken: set[str] = frozenset(), stop_after: int | None = None, name: str = "oracle") -> None:
        self.broken, self.stop_after, self.name = set(broken), stop_after, name
        self.calls: list[str] = []

    async def complete(self, messages) -> Completion:
        await asyncio.sleep(0)
        if messages[0].content.startswith("check"):
            return Completion(text="THE QUERY IS CORRECT", prompt_tokens=30, response_tokens=4)
        question = messages[1].content.split("\n")[0]
        self.calls.append(question)
        if self.stop_after is not None and len(self.calls) > self.stop_after:
            raise KeyboardInterrupt
        if question in self.broken:
            raise ModelError(f"no answer to {question}")
        return Completion(text=question.split(": ")[1], prompt_tokens=20, response_tokens=10)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """20 scorable tasks on two databases, every second answered wrong by the oracle, and one that is excluded."""
    root = tmp_path / "data"
    for db in ("a", "b"):
        (root / "database" / db).mkdir(parents=True)
        with sqlite3.connect(root / "database" / db / f"{db}.sqlite") as connection:
            connection.execute("CREATE TABLE t (x INTEGER)")
            connection.executemany("INSERT INTO t VALUES (?)", [(i,) for i in range(5)])
    tasks = [
        Task(
            task_id=str(i),
            db_id="ab"[i % 4 // 2],
            question=f"{i}: {COUNT if i % 2 else 'SELECT 0'}",
            gold=COUNT,
            split="dev",
            hardness="easy" if i < 10 else "extra",
            phrasing="A" if i < 5 else "B",
            scorable=i < 20,
        )
        for i in range(21)
    ]
    write_split(root, "dev", tasks)
    (root / "dataset.json").write_text(json.dumps({"name": "t", "headline": "dev"}))
    return root


def run(data: Path, model, name: str = "run", **options):
    return evaluate(data, options.pop("split", "dev"), model, name, results=data.parent / "results", **options)


def folder(data: Path, name: str = "run") -> RunFolder:
    return RunFolder(data.parent / "results" / "laptop" / name)


def test_all_that_the_numbers_depend_on_is_stored(data):
    run(data, Oracle(), max_turns=1, limit=2, temperature=1, timeout=3, concurrency=1)
    config = folder(data).config()
    assert config.pop("prompts") and config.pop("data").endswith("data")
    assert config == {
        "kind": "eval",
        "split": "dev",
        "limit": 2,
        "model": "oracle",
        "weights": None,
        "temperature": 1.0,
        "samples": 1,
        "seed": None,
        "max_tokens": None,
        "request": {},
        "rollout": {
            "max_turns": 1,
            "check": True,
            "repair": None,
            "table_info_truncate": 2048,
            "schema_tokens": None,
            "schema_linking": True,
            "sample_rows": 0,
            "value_hints": False,
            "execution_truncate": 2048,
            "strict": True,
            "query_timeout": 5.0,
        },
        "family": "nano",
        "agent": "self-correcting",
        "reward": "execution-match",
    }


def test_the_summary_counts_every_task_once(data):
    summary = run(data, Oracle())
    assert (summary.score.n, summary.score.correct, summary.score.ex) == (20, 10, 0.5)
    assert summary.score.low < 0.5 < summary.score.high
    assert (summary.rollouts, summary.failed, summary.unscorable) == (20, 0, 1)
    assert {k: v.n for k, v in summary.by_hardness.items()} == {"easy": 10, "extra": 10}
    assert {k: v.n for k, v in summary.by_database.items()} == {"a": 10, "b": 10}
    assert {k: v.n for k, v in summary.by_phrasing.items()} == {"A": 5, "B": 15}
    assert (summary.turns, summary.transitions) == (1, 2)
    assert {k: (v.calls, v.prompt, v.response) for k, v in summary.tokens.items()} == {
        "all": (40, 25, 7), "write": (20, 20, 10), "check": (20, 30, 4),
    }  # fmt: skip
    assert folder(data).summary()["score"]["ex"] == 0.5
    assert "EX 50.0%" in summary.text() and "n=20" in summary.text()


def test_failed_rollouts_are_counted_and_not_scored(data):
    summary = run(data, Oracle(broken={f"1: {COUNT}", "2: SELECT 0"}))
    assert (summary.score.n, summary.failed, summary.rollouts) == (18, 2, 20)
    assert summary.failures == {"model: ModelError": 2}


def test_answers_that_make_the_next_prompt_too_long_are_scored_as_wrong_and_counted_apart(data):
    class RunOn(Oracle):
        async def complete(self, messages) -> Completion:
            if messages[0].content.startswith("check"):
                raise PromptTooLongError("a prompt has 9 tokens")
            return await super().complete(messages)

    summary = run(data, RunOn())
    assert (summary.score.n, summary.score.correct, summary.failed) == (20, 0, 0)
    assert summary.reasons == {"overlong": 20}


def test_an_interrupted_run_goes_on_where_it_stopped(data):
    with pytest.raises(KeyboardInterrupt):
        run(data, Oracle(stop_after=7), concurrency=2)
    before = len(list(folder(data).trajectories()))
    assert 0 < before < 20 and not folder(data).finished
    second = Oracle()
    assert run(data, second, concurrency=2).score.n == 20
    assert len(second.calls) == 20 - before
    assert len({t.task_id for t in folder(data).trajectories()}) == 20


def test_failed_rollouts_run_again_on_resume(data):
    with pytest.raises(KeyboardInterrupt):
        run(data, Oracle(broken={f"1: {COUNT}"}, stop_after=15), concurrency=1)
    summary = run(data, Oracle())
    assert (summary.score.n, summary.failed) == (20, 0)


def test_a_question_that_a_split_has_twice_is_run_twice_however_often_it_is_interrupted(data):
    tasks = DataSet(data).load("dev")[:4]
    write_split(data, "dev", [*tasks, *(task.model_copy(update={"task_id": f"{task.task_id}-2"}) for task in tasks)])
    asked = 0
    for left in (5, 2, 0):  # ended after the fifth answer, after two more, and not at all
        model = Oracle(stop_after=left or None)
        try:
            assert run(data, model, concurrency=1).score.n == 8
        except KeyboardInterrupt:
            asked += left
    assert len(model.calls) == 8 - asked
    assert sorted(Counter(t.question for t in folder(data).trajectories()).values()) == [2] * 4


class Sampler(Oracle):
    """Answers at random, as its seed and the question say."""

    def __init__(self, seed: int = 0, **options) -> None:
        super().__init__(**options)
        self.seed, self.temperature = seed, 1.0

    def seeded(self, seed: int) -> Sampler:
        other = copy.copy(self)  # the calls are counted together
        other.seed = seed
        return other

    async def complete(self, messages) -> Completion:
        answer = await super().complete(messages)
        if messages[0].content.startswith("check"):
            return answer
        luck = random.Random(f"{self.seed} {messages[1].content}").random() < 0.5
        return answer.model_copy(update={"text": COUNT if luck else "SELECT 0"})


def answers(data: Path, name: str) -> dict[tuple[str, int], str]:
    """The answer of each sample of each task."""
    records = list(folder(data, name).trajectories())
    found = {(t.task_id, t.sample): t.pred for t in records}
    assert len(found) == len(records)
    return found


def test_samples_are_the_same_however_often_they_are_interrupted(data):
    one = run(data, Sampler(seed=3), "one")
    whole = run(data, Sampler(), "whole", samples=4, seed=3)
    for stop_after in (7, 30, None):  # in the first sample of each task, in the second, and not at all
        model = Sampler(stop_after=stop_after)
        try:
            summary = run(data, model, "parts", samples=4, seed=3, concurrency=3)
        except KeyboardInterrupt:
            assert not folder(data, "parts").finished
    found = answers(data, "parts")
    assert len(found) == 80 and found == answers(data, "whole")
    assert {key: sql for key, sql in found.items() if key[1] == 0} == answers(data, "one")
    assert summary.samples == whole.samples and one.samples is None
    assert len({tuple(sql for (_, s), sql in sorted(found.items()) if s == sample) for sample in range(4)}) == 4
    run(data, Sampler(), "other", samples=4, seed=4)
    assert answers(data, "other") != found
    right = Counter(task for (task, _), sql in found.items() if sql == COUNT)
    (last,) = summary.samples.by_turn
    assert (summary.score.n, summary.score.ex) == (80, right.total() / 80)
    assert last["avg@4"].value == pytest.approx(right.total() / 80)
    assert last["pass@4"].value == len(right) / 20 > last["pass@2"].value > last["pass@1"].value
    ties = {str(i): found[str(i), 0] == COUNT for i in range(20)}
    vote = sum(right[task] > 2 or (right[task] == 2 and first) for task, first in ties.items())
    assert last["majority@4"].value == vote / 20
    assert last["best@4"].value == sum(ties.values()) / 20  # every query runs
    assert RunFolder(folder(data, "parts").root).summary()["samples"]["n"] == 4


def test_a_failed_sample_runs_again_and_no_other(data):
    broken = f"1: {COUNT}"
    summary = run(data, Sampler(broken={broken}), samples=3)
    assert (summary.failed, summary.score.n, summary.samples.by_turn[0]["avg@3"].tasks) == (3, 57, 19)
    again = Sampler()
    assert run(data, again, samples=3).failed == 0 and again.calls == [broken] * 3


def test_a_query_that_was_replaced_is_judged_for_the_turn_it_stood(data):
    class Mending(Sampler):
        async def complete(self, messages) -> Completion:
            if messages[0].content.startswith("check"):
                wrong = "SELECT 0" in messages[1].content
                return Completion(text=f"THE QUERY IS {'IN' * wrong}CORRECT")
            if messages[0].content.startswith("rewrite"):
                return Completion(text=COUNT)
            return await super().complete(messages)

    summary = run(data, Mending(), samples=2, max_turns=2)
    first, last = summary.samples.by_turn
    assert first["avg@2"].value < last["avg@2"].value == 1.0 == summary.score.ex
    assert first["avg@2"].value == sum(t.executions[0].sql == COUNT for t in folder(data).trajectories()) / 40


def test_a_missing_database_does_not_look_like_a_dead_model_to_many_samples(data):
    (data / "database" / "b" / "b.sqlite").unlink()
    (data / "database" / "b").rmdir()
    assert run(data, Sampler(), limit=8, samples=9, concurrency=1).failed == 36


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 2}, "Cannot draw 2 samples at temperature 0: all are alike. Give a --temperature above 0."),
        ({"seed": 1}, "Cannot seed openai:m: only a local model's samples repeat. Leave out --seed."),
        ({"samples": 2, "temperature": 1.0, "seed": 1}, "Cannot seed openai:m"),
    ],
)
def test_samples_that_cannot_be_drawn_are_refused(data, monkeypatch, options, message):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    with pytest.raises(ModelError) as refused:
        run(data, "openai:m", **options)
    assert str(refused.value).startswith(message) and not folder(data).root.exists()


def test_the_reward_for_running_does_not_look_at_the_question(data):
    tasks = DataSet(data).load("dev")[:4]  # answered by SELECT 0, right, SELECT 0, right
    broken = tasks[3].model_copy(update={"question": "3: SELECT nothing"})
    write_split(data, "dev", [*tasks[:3], broken])
    summary = run(data, Oracle(), max_turns=1, reward="runs")
    assert (summary.score.ex, summary.reward, summary.failed) == (1 / 4, 3 / 4, 0)
    assert {t.task_id: t.reward for t in folder(data).trajectories()} == {"0": 1.0, "1": 1.0, "2": 1.0, "3": 0.0}


def test_rollouts_of_another_data_set_are_not_continued(data):
    with pytest.raises(KeyboardInterrupt):
        run(data, Oracle(stop_after=7), concurrency=2)
    tasks = DataSet(data).load("dev")
    write_split(data, "dev", [task.model_copy(update={"question": f"9{task.question}"}) for task in tasks])
    with pytest.raises(RunError, match="Data set changed"):
        run(data, Oracle())
    assert run(data, Oracle(), overwrite=True).rollouts == 20


def test_other_settings_do_not_continue_a_run(data):
    with pytest.raises(KeyboardInterrupt):
        run(data, Oracle(stop_after=3))
    with pytest.raises(RunError, match=r"rollout\.max_turns was 3, is now 1"):
        run(data, Oracle(), max_turns=1)
    with pytest.raises(RunError, match="model was"):
        run(data, Oracle(name="other"))


def test_the_time_limit_of_a_query_is_a_setting_of_the_run(data):
    endless = "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT count(*) FROM r"
    tasks = [Task(task_id="0", db_id="a", question=f"0: {endless}", gold=COUNT, split="dev")]
    write_split(data, "dev", tasks)
    summary = run(data, Oracle(), max_turns=1, query_timeout=0.1)
    assert summary.reasons == {"pred_timeout": 1}
    (record,) = folder(data).trajectories()
    assert [e.error for e in record.executions] == ["no result within 0.1 s"]
    write_split(data, "dev", [tasks[0].model_copy(update={"gold": endless, "question": f"0: {COUNT}"})])
    with pytest.raises(ModelError, match=r"Raise --query-timeout from 0\.1 s"):
        run(data, Oracle(), "gold", max_turns=1, query_timeout=0.1)
    (record,) = folder(data, "gold").trajectories()
    assert record.reward is None and record.failed
    with pytest.raises(RunError, match=r"rollout\.query_timeout was 0\.1, is now 5\.0"):
        run(data, Oracle(), "gold", max_turns=1)


def test_a_finished_run_is_refused_unless_overwriting(data):
    run(data, Oracle(), limit=3)
    with pytest.raises(RunError, match="is already finished"):
        run(data, Oracle(), limit=3)
    assert run(data, Oracle(), limit=4, overwrite=True).score.n == 4


def test_the_limit_counts_scorable_tasks(data):
    assert run(data, Oracle(), limit=5).rollouts == 5


def test_a_dead_model_stops_the_evaluation_with_one_reason(data):
    class Dead(Oracle):
        async def complete(self, messages) -> Completion:
            raise ModelError("Cannot reach model 'm'.")

    says = r"^Evaluation stopped: 8 rollouts in a row failed with: model: ModelError: Cannot reach model 'm'\. Fix this"
    with pytest.raises(ModelError, match=says):
        run(data, Dead(), concurrency=2)
    assert len(list(folder(data).trajectories())) < 20
    assert run(data, Dead.__base__(), concurrency=2).score.n == 20


@pytest.mark.parametrize(("questions", "stops"), [(range(1, 20), False), (range(20), True)])
def test_rollouts_that_fail_in_different_words_stop_an_evaluation_only_where_none_is_left(data, questions, stops):
    """Nineteen in a row: more than the eight that end it where they fail in the same words."""
    broken = {task.question for task in DataSet(data).load("dev") if int(task.task_id) in questions}
    model = Oracle(broken=broken)  # each error names its question
    if stops:
        with pytest.raises(ModelError, match="all 20 rollouts failed"):
            run(data, model)
    else:
        assert run(data, model).failed == 19


def test_a_missing_database_fails_its_rollouts_only(data):
    (data / "database" / "b" / "b.sqlite").unlink()
    dead = data / "database" / "b"
    dead.rmdir()
    summary = run(data, Oracle(), limit=8)
    assert (summary.score.n, summary.failed) == (4, 4) and summary.failures == {"database: DataError": 4}


def test_it_runs_inside_an_event_loop_too(data):
    async def cell():
        return run(data, Oracle(), limit=4)

    assert asyncio.run(cell()).score.n == 4


def test_headline_is_the_split_that_the_data_set_names(data):
    assert run(data, Oracle(), split="headline", limit=2).score.n == 2


def test_unknown_data_and_splits_are_refused(data):
    with pytest.raises(DataError, match="Choose one of: dev"):
        run(data, Oracle(), split="tets")
    with pytest.raises(DataError, match="No data set"):
        run(data / "none", Oracle())


def test_a_model_given_by_name_must_exist(data):
    with pytest.raises(ModelError, match="No checkpoint folder"):
        run(data, "no/such/model")
