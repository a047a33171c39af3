"""What each transition of a rollout is rewarded for and compared with, on known numbers."""

import asyncio

import numpy as np
import pytest
import torch

from sqlbench.agent.trajectory import Completion, Execution, Trajectory, Transition
from sqlbench.data.tasks import DataSet
from sqlbench.database.engine import cached_database
from sqlbench_train.credit import CREDITS, balanced, group_and_key, group_of, judged, permuted, rewards, situations

GOLD, WRONG, BROKEN = "GOLD", "SELECT 'no such answer'", "SELECT nothing FROM nowhere"


def call(agent: str, turn: int, text: str) -> Transition:
    return Transition(agent=agent, turn=turn, messages=[], completion=Completion(text=text))


RIGHT, INCORRECT = "THE QUERY IS CORRECT", "THE QUERY IS INCORRECT"


def made(pocket: DataSet, calls: list[Transition], queries: list[str], **more: str) -> Trajectory:
    """A rollout with these calls and queries of the same task, judged; GOLD stands for its gold query."""
    task = next(t for t in pocket.load("train") if t.scorable)
    queries = [task.gold if query == GOLD else query for query in queries]
    calls = [call(c.agent, c.turn, c.completion.text.replace(GOLD, task.gold)) for c in calls]
    record = Trajectory(
        task_key=task.key, task_id=task.task_id, db_id=task.db_id, question=task.question, gold=task.gold,
        transitions=calls,
        executions=[
            Execution(turn=turn, sql=sql, status="error" if sql == BROKEN else "ok")
            for turn, sql in enumerate(queries, 1)
        ],
        pred=queries[-1], reward=0.0, **more,
    )  # fmt: skip
    return asyncio.run(judged(record, cached_database(pocket.database(task.db_id))))


def whole(pocket: DataSet, **more: str) -> Trajectory:
    """Wrong, missed; fixed, called wrong; repeated and sampled again; broken; and nothing but repetitions."""
    calls = [
        call("write", 1, WRONG), call("check", 1, RIGHT),
        call("rewrite", 2, GOLD), call("check", 2, INCORRECT),
        call("rewrite", 3, GOLD + " ;"), call("rewrite", 3, BROKEN),
        call("rewrite", 4, WRONG), call("rewrite", 4, BROKEN),
    ]  # fmt: skip
    return made(pocket, calls, [WRONG, GOLD, BROKEN], **more)


def test_a_query_is_rewarded_for_its_match_and_a_check_for_its_verdict(pocket: DataSet) -> None:
    record = whole(pocket)
    assert [e.match for e in record.executions] == [0, 1, 0]
    assert rewards(record, "transition") == [0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_a_rewrite_is_rewarded_for_what_it_changed_and_a_repetition_for_nothing(pocket: DataSet) -> None:
    record = whole(pocket)
    found = rewards(record, "change")
    assert found[4] is None, "a repetition of a query that ran"
    assert found[:4] == [0.0, 0.0, 1.0, 0.0] and found[5:] == [pytest.approx(-1.2), 0.0, 0.0]
    assert situations(record) == ["", "wrong", "ran-wrong", "right", *["ran-right"] * 2, *["failed"] * 2]


@pytest.mark.parametrize(
    ("queries", "expected"),
    [
        ([BROKEN, GOLD], [0.0, 1.2]),
        ([BROKEN, WRONG], [0.0, 0.2]),
        ([WRONG, BROKEN], [0.0, -0.2]),
        ([WRONG, WRONG + " AS x"], [0.0, 0.0]),
        ([GOLD, WRONG], [1.0, -1.0]),
        ([GOLD, GOLD], [1.0, None]),
        ([BROKEN, BROKEN], [0.0, 0.0]),
    ],
)
def test_every_kind_of_change(pocket: DataSet, queries: list[str], expected: list[float | None]) -> None:
    calls = [call("write" if turn == 1 else "rewrite", turn, sql) for turn, sql in enumerate(queries, 1)]
    assert rewards(made(pocket, calls, queries), "change") == [e if e is None else pytest.approx(e) for e in expected]


def test_a_query_that_is_written_afresh_has_its_own_match(pocket: DataSet) -> None:
    record = made(pocket, [call("write", 1, BROKEN), call("write", 2, GOLD)], [BROKEN, GOLD])
    assert rewards(record, "change") == [0.0, 1.0] and situations(record) == ["", ""]


@pytest.mark.parametrize("credit", ["transition", "change"])
def test_a_sample_that_repeats_does_not_earn_what_the_next_one_brings(pocket: DataSet, credit: str) -> None:
    calls = [call("write", 1, BROKEN), call("rewrite", 2, BROKEN), call("write", 2, BROKEN), call("write", 2, GOLD)]
    assert rewards(made(pocket, calls, [BROKEN, GOLD]), credit) == [0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("credit", ["transition", "change"])
def test_what_made_the_next_prompt_too_long_did_nothing_right(pocket: DataSet, credit: str) -> None:
    record = made(pocket, [call("write", 1, WRONG), call("check", 1, INCORRECT)], [WRONG])
    assert rewards(record, credit) == [0.0, 1.0]
    assert rewards(record.model_copy(update={"reason": "overlong"}), credit) == [0.0, 0.0]


def check_scores(*verdicts: tuple[str, float]) -> dict[str, float]:
    keys = [group_and_key("task", 0, i, "check", "change", kind)[1] for i, (kind, _) in enumerate(verdicts)]
    return dict(zip(keys, [score for _, score in verdicts], strict=True))


@pytest.mark.parametrize("right", [0, 1, 3, 20])
@pytest.mark.parametrize("says_correct", [False, True])
def test_a_check_that_always_says_the_same_earns_nothing(right: int, says_correct: bool) -> None:
    kinds = ["right"] * right + ["wrong"] * 17
    scores = check_scores(*((kind, float((kind == "right") == says_correct)) for kind in kinds))
    assert set(balanced(scores).values()) <= {0.0}


def test_right_verdicts_on_both_kinds_of_queries_weigh_the_same_in_sum() -> None:
    """Two right queries, one of them called so; eight wrong ones, six of them called so."""
    scores = check_scores(("right", 1.0), ("right", 0.0), *[("wrong", 1.0)] * 6, *[("wrong", 0.0)] * 2)
    scores["task_write_7_0"] = 1.0
    found = [*balanced(scores).values()]
    assert found == pytest.approx([0.5, -0.5, *[0.25 / 4] * 6, *[-0.75 / 4] * 2])
    assert sum(found) == pytest.approx(0)


def test_a_coin_that_is_right_by_chance_earns_nothing_on_average() -> None:
    """What a verdict earns says nothing about the policy's base rate: 90% INCORRECT on 90% wrong queries."""
    random = np.random.default_rng(0)
    kinds = ["wrong"] * 900 + ["right"] * 100
    says = random.random(1000) < 0.9
    scores = check_scores(*((k, float((k == "wrong") == s)) for k, s in zip(kinds, says, strict=True)))
    found = np.array([*balanced(scores).values()])
    # Its mean gain by saying INCORRECT rather than CORRECT cancels between the two kinds of queries.
    push = np.where(says, 1 - 0.9, -0.9) * found
    assert abs(push.sum()) < 2.0 and abs(push[:900].sum()) > 5 and abs(push[900:].sum()) > 5


def test_permuted_rewards_are_the_same_ones_and_say_nothing_of_their_rollout() -> None:
    earned = [1.0, 0.0, 0.0, 0.0]
    assert permuted(earned, 1) == permuted(earned, 1) and permuted([], 1) == [] and permuted([0.5], 1) == [0.5]
    made = [permuted(earned, seed) for seed in range(4000)]
    assert all(sorted(one) == sorted(earned) for one in made) and earned == [1.0, 0.0, 0.0, 0.0]
    shares = [sum(place) / 4000 for place in zip(*made, strict=True)]
    assert shares == pytest.approx([1 / 4] * 4, abs=0.03)  # 4 standard deviations


def test_rewrites_and_checks_are_compared_over_all_tasks_of_a_step() -> None:
    rows = [("a", "write", ""), ("a", "rewrite", "failed"), ("b", "rewrite", "failed"), ("b", "rewrite", "ran-right")]
    rows += [("a", "check", "right"), ("b", "check", "wrong")]
    pairs = [group_and_key(task, 0, 1, agent, "change", situation) for task, agent, situation in rows]
    groups = ["a_write", "rewrite@failed", "rewrite@failed", "rewrite@ran-right", "check", "check"]
    assert [group for group, _ in pairs] == groups == [group_of(key) for _, key in pairs]
    assert [key.split("_")[0] for _, key in pairs] == [task for task, *_ in rows]
    sessions = [key.rsplit("_", 1)[0] for _, key in pairs]
    assert len(set(sessions)) == len(rows), "verl gives rows of one session one advantage"


@pytest.mark.parametrize("credit", CREDITS)
def test_no_two_transitions_of_a_group_have_the_same_key(credit: str) -> None:
    """verl keeps one row a key: of two rows with the same key one would be lost without a word."""
    rows = [(session, index, "write") for session in range(16) for index in range(9)]
    assert len({group_and_key("task", *row, credit)[1] for row in rows}) == len(rows)


@pytest.mark.parametrize("credit", ["rollout", "transition", "published"])
def test_verl_compares_a_transition_with_those_of_its_group(credit: str) -> None:
    """Two rollouts of one task: wrong, called wrong, fixed; and wrong, called right."""
    from tensordict import TensorDict
    from verl import DataProto
    from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories

    rows = [(0, 0, "write"), (0, 1, "check"), (0, 2, "rewrite"), (1, 0, "write"), (1, 1, "check")]
    of_rollout = [1.0, 1.0, 1.0, 0.0, 0.0]
    rewards = [0.0, 1.0, 1.0, 0.0, 0.0] if credit == "transition" else of_rollout
    groups, keys = zip(*(group_and_key("task", *row, credit) for row in rows), strict=True)
    assert len(set(keys)) == len(rows) and {key.split("_")[0] for key in keys} == {"task"}
    scores, mask = torch.tensor(rewards).unsqueeze(1), torch.ones(len(rows), 1)
    data = DataProto(batch=TensorDict({"token_level_rewards": scores, "response_mask": mask}, len(rows)))
    data.non_tensor_batch["uid"] = np.array(groups, dtype=object)
    found = compute_advantage_for_multi_trajectories(data, list(keys), "grpo", num_repeat=2).batch["advantages"][:, 0]
    half = 0.5 / np.std([0, 1], ddof=1)
    # By transition, two writes that were wrong alike teach nothing, the checks differ, and the rewrite is alone in its
    # group: verl would give it its reward, which is why the trainer leaves groups of one out.
    # As published, three of five transitions have reward 1: their mean is 0.6, and the longer rollout counts more.
    high, low = (np.array([1, 0]) - 0.6) / np.std(of_rollout, ddof=1)
    expected = {
        "rollout": [half, half, half, -half, -half],
        "transition": [0.0, half, 1.0, 0.0, -half],
        "published": [high, high, high, low, low],
    }[credit]
    assert found.tolist() == pytest.approx(expected, abs=1e-4)
