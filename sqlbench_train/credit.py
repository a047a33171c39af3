"""Credit for each transition of a rollout, as an alternative to one reward for all of them.

``sqlbench.credit=rollout``: every transition of a rollout has the advantage of its last query, as in the seed
experiment. A check that calls a right query wrong is rewarded where the rewrite happens to keep it, and a first query
that is wrong is rewarded where a rewrite fixes it.

``sqlbench.credit=transition``: a query is rewarded for its own execution match and a check for its verdict, and each is
compared with the transitions of the same sub-agent in the rollouts of the same task. A rewrite that only repeats gets
0, but a check that calls everything wrong still gets most of the reward.

``sqlbench.credit=change``: each transition is rewarded for its change.

- A first query: its execution match, compared within its task.
- A rewrite: its change from wrong (0) to right (1), plus `RAN` times its change from failing (0) to running (1). It is
  compared with all rewrites of the step that began in the same situation (the query before failed, ran wrong, or ran
  right). Few rollouts of one task rewrite in the same situation, and a rewrite alone in its group teaches nothing; the
  mean over the step is an equally unbiased baseline.
- Any query that repeats an earlier one: 0 where the query before failed, which is the lowest reward there.
  Elsewhere it has no reward and is not trained on: changing a right query mostly loses reward, so that doing nothing
  would pay, and a policy does not see whether the query was right. The remaining gradient is that of the policy that
  does not repeat.
- A check: 1 if its verdict is right, minus the mean of all checks of the step on queries of the same kind (right or
  wrong). Both kinds have the same total weight (`balanced`). A check that always gives the same verdict earns 0.

``sqlbench.credit=published``: every transition has its rollout's reward, and is compared with all transitions of the
same task, so that a rollout counts as often as it has transitions, as in the published run.

``sqlbench.control`` replaces the rewards of a training, and never of a validation, by rewards that say nothing about a
rollout: ``coin`` flips one for each; ``permuted`` shuffles those of a task's rollouts among them (`permuted`), so that
groups, variances and the tasks that divide stay the same.

With ``change`` the rewards of rewrites and checks are small and rare. Divided by their standard deviation, single ones
would outweigh all first queries: give ``algorithm.norm_adv_by_std_in_grpo=False`` too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from random import Random

from sqlbench.agent.prompts import parse_verdict
from sqlbench.agent.repair import repeated
from sqlbench.agent.trajectory import OVERLONG, Execution, Trajectory, Transition
from sqlbench.interfaces import Database
from sqlbench.reward import score_async

CREDITS = ("rollout", "transition", "change", "published")
OWN_REWARDS = ("transition", "change")
"""Credits that give each transition its own reward."""
CONTROLS = ("coin", "permuted")
RAN = 0.2
"""Reward of a rewrite for running, in units of being right."""
MOST_TRANSITIONS = 1000
"""Bound above the number of transitions of any rollout."""
_STEP = "@"
"""Separator before the situation in the name of a group that holds rows of all tasks of a step."""


def group_and_key(task: str, session: int, index: int, agent: str, credit: str, situation: str = "") -> tuple[str, str]:
    """Return the group whose mean reward a transition is compared with, and verl's key of its row.

    verl reads a key as ``<group>_<session>_<index>`` and broadcasts the advantage of a session's last row to the
    others; the part before the first underscore is the task. With credit by transition a group holds the
    transitions of one sub-agent, each a session of its own; with a situation, those of all tasks; as published, those
    of all sub-agents.

    Args:
        task: verl's id of the task in this step.
        session: number of the rollout in the task's group.
        index: number of the transition in the rollout.
        agent: name of the sub-agent.
        credit: one of `CREDITS`.
        situation: situation in which the transition began (`situations`).
    """
    if credit == "rollout":
        return task, f"{task}_{session}_{index}"
    if credit == "published":
        return task, f"{task}_{session * MOST_TRANSITIONS + index}_0"
    name = f"{agent}{_STEP}{situation}" if situation else agent
    key = f"{task}_{name}_{session * MOST_TRANSITIONS + index}_0"
    return group_of(key), key


def group_of(key: str) -> str:
    """Return the group of the row with this key."""
    head = key.rsplit("_", 2)[0]
    name = head.partition("_")[2]
    if _STEP not in name:
        return head
    return "check" if name.startswith(f"check{_STEP}") else name


def permuted(earned: Sequence[float], seed: int) -> list[float]:
    """Return the rewards of a task's rollouts in an order that depends on nothing but the seed."""
    return Random(seed).sample(earned, len(earned))


async def judged(record: Trajectory, database: Database, strict: bool = True) -> Trajectory:
    """Record the execution match of each query of a scored rollout."""
    executions = []
    for execution in record.executions:
        verdict = await score_async(record.gold, execution.sql, database, strict=strict)
        executions.append(execution.model_copy(update={"match": verdict.match}))
    return record.model_copy(update={"executions": executions})


def rewards(record: Trajectory, credit: str) -> list[float | None]:
    """Return the reward of each transition of a judged rollout; None if it is not trained on.

    A check gets 1 for a right verdict and 0 for a wrong one. The transition that made the next prompt too long gets 0.
    """
    values: list[float | None] = []
    for transition, again in zip(record.transitions, repeated(record.transitions, record.executions), strict=True):
        if again:
            failed = not _ran(_query(record, transition.turn - 1))
            values.append(0.0 if failed or credit != "change" else None)
        else:
            values.append(_reward(transition, record, credit))
    if record.reason == OVERLONG and values[-1] is not None:
        values[-1] = min(0.0, values[-1])
    return values


def _reward(transition: Transition, record: Trajectory, credit: str) -> float:
    execution = _query(record, transition.turn)
    if transition.agent == "check":
        return float(parse_verdict(transition.completion.text) == _right(execution))
    if transition.agent != "rewrite" or credit != "change":
        return float(_right(execution))
    if execution is None:  # it led to no query
        return 0.0
    before = _query(record, transition.turn - 1)
    return _right(execution) - _right(before) + RAN * (_ran(execution) - _ran(before))


def situations(record: Trajectory) -> list[str]:
    """Return the situation in which each transition of a judged rollout began; empty if compared within its task."""
    names = []
    for transition in record.transitions:
        if transition.agent == "check":
            names.append("right" if _right(_query(record, transition.turn)) else "wrong")
        elif transition.agent == "rewrite":
            before = _query(record, transition.turn - 1)
            names.append("failed" if not _ran(before) else "ran-right" if _right(before) else "ran-wrong")
        else:
            names.append("")
    return names


def balanced(scores: Mapping[str, float]) -> dict[str, float]:
    """Compute the rewards of a step's checks by the keys of their rows, from scores of 1 for right verdicts.

    A reward is the score minus the mean score on queries of the same kind; the more frequent kind is then scaled
    down to the weight of the rarer one. This rewards balanced accuracy. A check that always says the same
    gets 0 everywhere, and so does every check of a step in which all queries were of one kind.
    """
    kinds: dict[str, dict[str, float]] = defaultdict(dict)
    for key, score in scores.items():
        head = key.rsplit("_", 2)[0].partition("_")[2]
        if head.startswith(f"check{_STEP}"):
            kinds[head][key] = score
    rarest = min(map(len, kinds.values())) if len(kinds) == 2 else 0
    return {
        key: (score - sum(group.values()) / len(group)) * rarest / len(group)
        for group in kinds.values()
        for key, score in group.items()
    }


def _query(record: Trajectory, turn: int) -> Execution | None:
    return next((execution for execution in record.executions if execution.turn == turn), None)


def _right(execution: Execution | None) -> bool:
    return execution is not None and execution.match == 1


def _ran(execution: Execution | None) -> bool:
    return execution is not None and execution.answered
