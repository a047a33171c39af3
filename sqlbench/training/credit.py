"""Credit for each transition of a rollout, as an alternative to one reward for all of them.

With ``sqlbench.credit=rollout`` every transition of a rollout has the advantage of its last query, as in the seed
experiment: a check that calls a right query wrong is rewarded where the rewrite happens to keep it, and a first query
that is wrong is rewarded where a rewrite mends it. With ``sqlbench.credit=transition`` a query is rewarded for its own
execution match and a check for its verdict, and each is compared with the transitions of the same sub-agent in the
rollouts of the same task. With ``sqlbench.credit=published`` every transition has its rollout's reward, and is compared
with all transitions of the same task, so that a rollout counts as often as it has transitions: the published run.
"""

from __future__ import annotations

from sqlbench.agent.prompts import parse_verdict
from sqlbench.agent.trajectory import OVERLONG, Trajectory
from sqlbench.interfaces import Database
from sqlbench.reward import ascore

CREDITS = ("rollout", "transition", "published")
MOST_TRANSITIONS = 1000
"""More than a rollout can have."""


def group_and_key(task: str, session: int, index: int, agent: str, credit: str) -> tuple[str, str]:
    """The group whose mean reward a transition is compared with, and verl's key of its row.

    verl reads a key as ``<group>_<session>_<index>`` and broadcasts the advantage of a session's last row to the
    others; what stands before the first underscore is the task. With credit by transition a group holds the
    transitions of one sub-agent, each a session of its own; as published, those of all sub-agents.

    Args:
        task: verl's id of the task in this step.
        session: number of the rollout in the task's group.
        index: number of the transition in the rollout.
    """
    if credit == "rollout":
        return task, f"{task}_{session}_{index}"
    group = task if credit == "published" else f"{task}_{agent}"
    return group, f"{group}_{session * MOST_TRANSITIONS + index}_0"


async def transition_rewards(record: Trajectory, database: Database, strict: bool = True) -> list[float]:
    """What each transition of a scored rollout did right, 1 or 0.

    A write or rewrite: whether its query matches the gold one. A check: whether it called the query what it is. What
    made the next prompt too long did nothing right.
    """
    right: dict[int, bool] = {}
    for execution in record.executions:
        verdict = await ascore(record.gold, execution.sql, database, strict=strict)
        right[execution.turn] = verdict.match == 1
    rewards = [
        float(parse_verdict(t.completion.text) == right[t.turn] if t.agent == "check" else right[t.turn])
        for t in record.transitions
    ]
    return [*rewards[:-1], 0.0] if record.reason == OVERLONG else rewards
