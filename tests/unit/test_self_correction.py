"""Self-correction is measured on rollouts whose every verdict is known beforehand."""

import pytest

from sqlbench.agent.trajectory import Completion, Execution, Trajectory, Transition
from sqlbench.data.tasks import DataSet, Task
from sqlbench_lab.self_correction import correction, row

RIGHT, WRONG = "THE QUERY IS CORRECT", "THE QUERY IS INCORRECT"
OTHER, BROKEN = "SELECT 'no such answer'", "SELECT nothing FROM nowhere"


def record(task: Task, queries: list[str], verdicts: list[str]) -> Trajectory:
    """A rollout that wrote these queries and checked the first of them as said."""
    calls = [("write" if turn == 1 else "rewrite", turn, sql) for turn, sql in enumerate(queries, 1)]
    calls += [("check", turn, verdict) for turn, verdict in enumerate(verdicts, 1)]
    return Trajectory(
        task_key=task.key, task_id=task.task_id, db_id=task.db_id, question=task.question, gold=task.gold,
        transitions=[Transition(agent=a, turn=t, messages=[], completion=Completion(text=x)) for a, t, x in calls],
        executions=[
            Execution(turn=turn, sql=sql, status="error" if sql == BROKEN else "ok")
            for turn, sql in enumerate(queries, 1)
        ],
        pred=queries[-1], reward=float(queries[-1] == task.gold),
    )  # fmt: skip


def test_known_rollouts(pocket: DataSet) -> None:
    task = next(t for t in pocket.load("train") if t.scorable)
    rollouts = [
        record(task, [task.gold], [RIGHT]),
        record(task, [OTHER, task.gold], [WRONG]),  # fixed
        record(task, [task.gold, OTHER], [WRONG]),  # broken: the check was wrong
        record(task, [OTHER], [RIGHT]),  # missed: it ran
        record(task, [BROKEN, BROKEN, task.gold], [WRONG, WRONG]),  # repeated, then fixed
        record(task, [BROKEN], []).model_copy(update={"reward": None, "error": "model: Timeout: gone"}),
        record(task, [OTHER], [RIGHT]).model_copy(update={"gold": BROKEN}),  # scored then, cannot be now
    ]
    found = correction(rollouts, pocket.root)
    assert (found.tasks, found.first, found.last) == (5, 2 / 5, 3 / 5)
    assert (found.rejected, found.precision) == (4, 3 / 4)
    assert (found.recall, found.recall_ran) == (3 / 4, 1 / 2)
    assert found.balanced_accuracy == (3 / 4 + 1 / 2) / 2  # of two right queries one was called so
    assert found.by_turn == [2 / 5, 2 / 5, 3 / 5]  # one gained, one lost; then one gained
    assert (found.fixed, found.broken, found.repeated, found.rewrites) == (2, 1, 1, 4)
    assert found.transitions == pytest.approx((2 + 3 + 3 + 2 + 5) / 5)
    assert found.gain_low <= 0.2 <= found.gain_high and found.p == 1.0  # two gained, one lost
    assert row(found)["By turn"] == "+0.0 / +20.0" and row(found)["Check: balanced (%)"] == 62.5
    assert row(found)["Gain"] == 20.0 and row(found)["Fixed / broken"] == "2 / 1"


def test_repetitions_that_were_sampled_again_count(pocket: DataSet) -> None:
    """Two samples repeat and the third is right; another rollout ends with a repetition, whose query stays."""
    task = next(t for t in pocket.load("train") if t.scorable)
    fixed, ended = record(task, [OTHER, task.gold], [WRONG]), record(task, [BROKEN], [])
    again = [fixed.transitions[0].model_copy(update={"agent": "rewrite", "turn": 2})] * 2
    fixed = fixed.model_copy(update={"transitions": [fixed.transitions[0], *again, *fixed.transitions[1:]]})
    last = ended.transitions[0].model_copy(update={"agent": "rewrite", "turn": 2})
    ended = ended.model_copy(update={"transitions": [*ended.transitions, last]})
    found = correction([fixed, ended], pocket.root)
    assert (found.repeated, found.rewrites, found.fixed) == (3, 4, 1)
    assert found.by_turn == [0.0, 0.5] and found.transitions == (5 + 2) / 2


def test_several_rollouts_of_a_task_are_one_task(pocket: DataSet) -> None:
    """Four equal rollouts of each of two tasks say no more than one of each."""
    tasks = [t for t in pocket.load("train") if t.scorable][:2]
    one = [record(tasks[0], [OTHER, tasks[0].gold], [WRONG]), record(tasks[1], [OTHER], [RIGHT])]
    four = [t.model_copy(update={"sample": sample}) for t in one for sample in range(4)]
    alone, found = correction(one, pocket.root), correction(four, pocket.root)
    assert (found.rewrites, found.fixed, found.rejected) == (4, 4, 4)
    counted = {"rejected", "fixed", "rewrites"}
    assert found.model_dump(exclude=counted) == alone.model_dump(exclude=counted)
    assert (found.tasks, found.first, found.last, found.p) == (2, 0.0, 0.5, 1.0)


def test_nothing_to_judge(pocket: DataSet) -> None:
    found = correction([], pocket.root)
    assert (found.tasks, found.balanced_accuracy, found.by_turn) == (0, None, [])
    assert {row(found)[f"Check: {name} (%)"] for name in ("precision", "recall", "recall, ran", "balanced")} == {""}


def test_a_check_that_saw_nothing_wrong_has_no_recall(pocket: DataSet) -> None:
    """A recall of 0% would say that it missed something."""
    task = next(t for t in pocket.load("train") if t.scorable)
    shown = row(correction([record(task, [task.gold], [RIGHT])], pocket.root))
    assert (shown["Check: recall (%)"], shown["Check: recall, ran (%)"]) == ("", "")
    shown = row(correction([record(task, [BROKEN, task.gold], [WRONG, RIGHT])], pocket.root))
    assert (shown["Check: recall (%)"], shown["Check: recall, ran (%)"]) == (100.0, "")
