"""What each transition of a rollout is rewarded for and compared with, on known numbers."""

import asyncio

import numpy as np
import pytest
import torch

from sqlbench.agent.trajectory import Completion, Execution, Trajectory, Transition
from sqlbench.data.tasks import DataSet
from sqlbench.database.engine import cached_database
from sqlbench.training.credit import CREDITS, group_and_key, transition_rewards

WRONG, BROKEN = "SELECT 'no such answer'", "SELECT nothing FROM nowhere"


def call(agent: str, turn: int, text: str) -> Transition:
    return Transition(agent=agent, turn=turn, messages=[], completion=Completion(text=text))


def test_a_query_is_rewarded_for_its_match_and_a_check_for_its_verdict(pocket: DataSet) -> None:
    task = next(t for t in pocket.load("train") if t.scorable)
    queries = {1: WRONG, 2: task.gold, 3: BROKEN}
    record = Trajectory(
        task_key=task.key, task_id=task.task_id, db_id=task.db_id, question=task.question, gold=task.gold,
        transitions=[
            call("write", 1, WRONG), call("check", 1, "THE QUERY IS CORRECT"),
            call("rewrite", 2, task.gold), call("check", 2, "THE QUERY IS INCORRECT"),
            call("rewrite", 3, BROKEN), call("check", 3, "THE QUERY IS INCORRECT"),
        ],
        executions=[Execution(turn=t, sql=q, status="ok" if t < 3 else "error") for t, q in queries.items()],
        pred=BROKEN, reward=0.0,
    )  # fmt: skip
    rewards = asyncio.run(transition_rewards(record, cached_database(pocket.database(task.db_id))))
    assert rewards == [0.0, 0.0, 1.0, 0.0, 0.0, 1.0]
    overlong = record.model_copy(update={"reason": "overlong"})  # its last check was right, and too long to go on from
    rewards = asyncio.run(transition_rewards(overlong, cached_database(pocket.database(task.db_id))))
    assert rewards == [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("credit", CREDITS)
def test_no_two_transitions_of_a_group_have_the_same_key(credit: str) -> None:
    """verl keeps one row a key: of two rows with the same key one would be lost without a word."""
    rows = [(session, index, "write") for session in range(16) for index in range(9)]
    assert len({group_and_key("task", *row, credit)[1] for row in rows}) == len(rows)


@pytest.mark.parametrize("credit", CREDITS)
def test_verl_compares_a_transition_with_those_of_its_group(credit: str) -> None:
    """Two rollouts of one task: wrong, called wrong, mended; and wrong, called right."""
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
