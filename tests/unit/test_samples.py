"""Estimates from several rollouts per task, against values worked out by hand or by counting."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

import pytest

from sqlbench.agent.trajectory import OVERLONG, Execution, Trajectory
from sqlbench.results import Rollouts, Summary, summarise
from sqlbench.samples import NOT_RUN, Judge, Samples, estimate_samples, pass_at, result_of
from sqlbench.stats import bootstrap
from sqlbench_lab.display import flips, sample_table

FAILED = Execution(turn=1, sql="bad", status="error", error="no such column")


def ran(value: object, sql: str = "q", turn: int = 1, **fields: object) -> Execution:
    return Execution(turn=turn, sql=sql, status="ok", columns=["x"], rows=[[value]], n_rows=1, **fields)


def rollout(task: str, sample: int, right: bool | None, *executions: Execution, **fields: object) -> Trajectory:
    given = {"task_key": task, "task_id": task, "db_id": "d", "question": "?", "gold": "g"} | fields
    reward = None if right is None else float(right)
    error = "model: ModelError: gone" if right is None else None
    pred = executions[-1].sql if executions else None
    return Trajectory(**{"pred": pred, "reward": reward, "error": error} | given, sample=sample, executions=executions)


def summary_of(records: Iterable[Trajectory]) -> Summary:
    return summarise(Rollouts.of(records))


def estimated(records: Iterable[Trajectory], n: int, judge: Judge) -> Samples:
    return estimate_samples(Rollouts.of(records), n, judge)


def never(db_id: str, gold: str, sql: str) -> bool:
    raise AssertionError(f"{sql} was judged")


def values(samples: Samples, turn: int = -1) -> dict[str, float]:
    return {name: round(estimate.value, 6) for name, estimate in samples.by_turn[turn].items()}


@pytest.mark.parametrize("n", range(1, 9))
def test_pass_at_k_is_the_share_of_all_choices_of_k_with_a_right_one(n: int) -> None:
    for right in range(n + 1):
        for k in range(1, n + 1):
            chosen = list(combinations([True] * right + [False] * (n - right), k))
            assert pass_at(k, n, right) == pytest.approx(sum(map(any, chosen)) / len(chosen))


def test_pass_at_k_is_not_biased_as_the_power_of_the_share_of_wrong_ones_is() -> None:
    power = 1 - (1 - 2 / 5) ** 3
    assert (pass_at(3, 5, 2), power) == pytest.approx((0.9, 0.784))


@pytest.mark.parametrize(
    ("queries", "vote", "first"),
    [
        ("baa", True, False), ("ba", False, False), ("abba", True, True),
        ("cccA", False, False), ("ccca", True, True),  # however many failed
        ("cc", False, False), ("Cc", True, True), ("cb", False, False),
    ],
)  # fmt: skip
def test_votes_are_by_result_and_ties_go_to_the_first(queries: str, vote: bool, first: bool) -> None:
    """Results a, A and b, and c for a query that failed; a and C are right."""
    made = [
        rollout("t", sample, kind in "aC", FAILED if kind in "cC" else ran(kind)) for sample, kind in enumerate(queries)
    ]
    found, n = values(estimated(made, len(queries), never)), len(queries)
    assert (found[f"majority@{n}"], found[f"best@{n}"]) == (vote, first)


def test_results_are_equal_whatever_the_order_of_rows_and_the_names_of_columns() -> None:
    def shown(rows: list[list[object]], n: int, columns: str = "xy", status: str = "ok") -> Execution:
        return Execution(turn=1, sql="", status=status, columns=list(columns), rows=rows, n_rows=n)

    base = result_of(shown([[1, "a"], [2, "b"]], 2))
    assert base == result_of(shown([[2.0, "b"], [1, "a"]], 2, "pq"))
    assert base != result_of(shown([[1, "a"], [1, "a"], [2, "b"]], 3))  # how often a row comes counts
    assert base != result_of(shown([[1, "a"], [2, "b"]], 50))
    assert base != result_of(shown([["1", "a"], [2, "b"]], 2))
    assert result_of(ran(0.1 + 0.2)) == result_of(ran(0.3)) and result_of(ran(2.9999999999)) == result_of(ran(3))
    assert result_of(ran(12345678901.0)) == result_of(ran(12345678901)) != result_of(ran(12345678902))
    assert result_of(ran(-1)) != result_of(ran(-2)) and result_of(ran(None)) != result_of(ran("None"))
    assert result_of(shown([], 0)) != NOT_RUN and result_of(shown([], 0)) != result_of(shown([], 0, "x"))
    assert result_of(FAILED) == NOT_RUN == result_of(shown([], 0, status="too_large"))


def test_estimates_of_known_rollouts() -> None:
    """Three tasks of four rollouts: two right of four, one of four, and none with a failed rollout."""
    made = [
        *(rollout("a", i, i < 2, ran(7 if i < 2 else i)) for i in range(4)),  # results 7 7 2 3: the vote is right
        rollout("b", 0, False, FAILED),
        rollout("b", 1, True, ran(1)),  # the first that ran
        rollout("b", 2, False, ran(2)),
        rollout("b", 3, False, ran(2)),  # but not the vote
        *(rollout("c", i, False, FAILED) for i in range(3)),
        rollout("c", 3, None),
    ]
    found = estimated(reversed(made), 4, never)  # in any order
    assert values(found) == {
        "avg@4": round((2 / 4 + 1 / 4 + 0) / 3, 6), "pass@1": 0.25,
        "pass@2": round((5 / 6 + 1 / 2 + 0) / 3, 6),
        "pass@4": 1.0,  # of the two tasks with four scored rollouts
        "majority@4": round(1 / 3, 6), "best@4": round(2 / 3, 6),
    }  # fmt: skip
    assert [e.tasks for e in found.by_turn[0].values()] == [3, 3, 3, 2, 3, 3]
    estimate = found.by_turn[0]["avg@4"]
    assert (estimate.low, estimate.high) == bootstrap([0, 1 / 4, 1 / 2])
    assert estimate.low < estimate.value < estimate.high


def test_what_was_cut_off_by_its_own_length_has_no_vote() -> None:
    made = [
        rollout("a", 0, False, ran(1), reason=OVERLONG),
        rollout("a", 1, True, ran(1)),
    ]
    assert values(estimated(made, 2, never))["best@2"] == values(estimated(made, 2, never))["majority@2"] == 1


def test_every_turn_has_its_estimates_and_an_answer_stands_until_the_end() -> None:
    judged = []

    def verdict(db_id: str, gold: str, sql: str) -> bool:
        judged.append((gold, sql))
        return sql == "right"

    made = [
        rollout("a", 0, True, ran(0, "wrong"), ran(1, "right", 2), gold="a"),  # fixed
        rollout("a", 1, False, ran(1, "right"), ran(2, "wrong", 2), gold="a"),  # broken
        rollout("b", 0, True, ran(1, "right"), gold="b"),  # one turn
        rollout("b", 1, False, FAILED, ran(3, "other", 2), ran(3, "bad", 3), gold="b", pred="other"),  # goes back
    ]
    queries = Rollouts.of(made[-1:]).queries
    assert queries["sql"][queries["stands"]].tolist() == ["bad", "other", "other"]
    found = estimated(made, 2, verdict)
    assert judged == [("a", "wrong"), ("a", "right"), ("b", "bad")]  # answers have their verdict
    assert [values(found, turn)["avg@2"] for turn in range(3)] == [0.5, 0.5, 0.5]
    assert [values(found, turn)["pass@2"] for turn in range(3)] == [1.0, 1.0, 1.0]
    assert [values(found, turn)["best@2"] for turn in range(3)] == [0.5, 1.0, 1.0]
    assert values(estimated(made[:3], 2, lambda *_: None)) == {
        "avg@2": 1.0, "pass@1": 1.0, "majority@2": 1.0, "best@2": 1.0,
    }  # fmt: skip  # what cannot be judged is left out


def test_a_task_that_a_split_has_twice_is_two_tasks() -> None:
    made = [rollout("a", sample, sample == 0, ran(sample)) for sample in (0, 1, 0, 1)]
    assert estimated(made, 2, never).by_turn[0]["avg@2"].tasks == 2


def test_intervals_of_several_rollouts_a_task_do_not_count_them_as_tasks() -> None:
    """Eight equal rollouts of each of 20 tasks say no more than one of each."""
    one = [rollout(str(i), 0, i % 2 == 0, ran(0)) for i in range(20)]
    eight = [t.model_copy(update={"sample": sample}) for t in one for sample in range(8)]
    score = summary_of(eight).score
    assert (score.n, score.ex) == (160, 0.5)
    assert (score.low, score.high) == bootstrap([0.0] * 10 + [1.0] * 10)
    assert summary_of(reversed(eight)).score == score
    average = estimated(eight, 8, never).by_turn[0]["avg@8"]
    assert (average.value, average.low, average.high) == (score.ex, score.low, score.high)
    assert score.high - score.low == pytest.approx(summary_of(one).score.high - summary_of(one).score.low, abs=0.05)


def test_execution_match_with_failed_rollouts_as_wrong_stands_beside_it() -> None:
    summary = summary_of(
        [rollout("a", 0, True, ran(1)), rollout("b", 0, False, ran(1)), *(rollout(x, 0, None) for x in "cd")]
    )
    assert (summary.score.n, summary.score.ex, summary.failed) == (2, 0.5, 2)
    assert (summary.score_with_failed.n, summary.score_with_failed.ex) == (4, 0.25)
    assert "EX 50.0%" in summary.text() and ", with failed rollouts as wrong 25.0% (95% " in summary.text()
    assert "as wrong" not in summary_of([rollout("a", 0, True, ran(1))]).text()


def test_the_table_has_a_row_a_turn_and_the_calls_of_the_whole() -> None:
    made = [rollout("a", 0, True, FAILED, ran(1, "x", 2)), rollout("a", 1, False, ran(2))]
    found = estimated(made, 2, lambda *_: False)
    summary = summary_of(made).model_copy(update={"samples": found, "transitions": 1.5})
    table = sample_table({"vote": Summary.model_validate_json(summary.model_dump_json()), "greedy": summary_of(made)})
    assert table[["run", "turn", "calls per task"]].values.tolist() == [["vote", 1, ""], ["vote", 2, 3.0]]
    assert table["avg@2"].tolist() == ["0.0 (0.0 to 0.0)", "50.0 (50.0 to 50.0)"]
    assert "2 rollouts per task, 95% intervals over tasks:\nafter turn 1: avg@2 0.0%" in summary.text()
    assert "after turn 2: avg@2 50.0% (50.0% to 50.0%), pass@1 50.0%" in summary.text()
    assert sample_table({}).empty


def test_changed_verdicts_are_those_of_the_same_sample() -> None:
    before = [rollout("a", 0, False, ran(1, "old 0")), rollout("a", 1, True, ran(1, "old 1"))]
    after = [rollout("a", 1, True, ran(1, "new 1")), rollout("a", 0, True, ran(1, "new 0"))]
    found = flips(before, after)
    assert found[["change", "before", "after"]].values.tolist() == [["gained", "old 0", "new 0"]]
