"""One rollout: task in, trajectory with a reward out. Evaluation, training, environment and chat all run this one.

A broken model, database or verdict never raises: it becomes `Trajectory.error` with reward None, which is counted and
is not the same as a wrong answer (reward 0). A task that was known to be unscorable has reward None and a reason, and
did not fail; a gold query that fails though it ran when the data set was audited is a broken database.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from sqlbench.agent.graph import AgentContext, AgentState, Observer, failure, run_agent
from sqlbench.agent.prompts import Prompts, schema_style
from sqlbench.agent.repair import RepairPolicy
from sqlbench.agent.trajectory import Trajectory
from sqlbench.config import RolloutConfig
from sqlbench.data.tasks import Task
from sqlbench.database.engine import Database
from sqlbench.database.schema import introspect, schema_text
from sqlbench.errors import DatabaseError, ModelError
from sqlbench.models.base import ChatModel
from sqlbench.reward import ascore

__all__ = ["RolloutConfig", "answer", "failed_rollout", "rollout"]

NO_TEXT = "allow it more tokens, or turn its thinking off with a request field"


async def rollout(
    task: Task,
    database: Database,
    model: ChatModel,
    prompts: Prompts,
    config: RolloutConfig,
    repair: RepairPolicy | None = None,
    observer: Observer | None = None,
) -> Trajectory:
    """Let the agent answer one task and score its last query against the gold one.

    A completion that was cut at the token limit is executed as it is; its `finish_reason` says so.
    """
    started = time.perf_counter()
    reward, reason = None, ""
    state = await answer(task.question, database, model, prompts, config, repair, observer)
    error = state.get("error")
    if error is None:
        try:
            verdict = await ascore(task.gold, state["sql"], database, strict=config.strict)
        except Exception as problem:
            error = failure("reward", problem)
        else:
            reward, reason = None if verdict.match is None else float(verdict.match), verdict.reason
            if verdict.match is None and task.scorable:
                hint = f"was {database.target} changed?"
                if reason == "gold_timeout":
                    hint = f"it may take {config.query_timeout:g} s (--query-timeout)"
                broken = f"the gold query of a scorable task fails ({reason}); {hint}"
                error = failure("reward", DatabaseError(broken))
    return Trajectory(
        **_of(task),
        transitions=state.get("transitions", []),
        executions=state.get("executions", []),
        pred=state.get("sql"),
        reward=reward,
        reason=reason,
        error=error,
        seconds=time.perf_counter() - started,
    )


async def answer(
    question: str,
    database: Database,
    model: ChatModel,
    prompts: Prompts,
    config: RolloutConfig,
    repair: RepairPolicy | None = None,
    observer: Observer | None = None,
    start: Sequence[tuple[str, str]] | None = None,
) -> AgentState:
    """Let the agent answer a question that has no gold query; `error` in the state says what broke, if anything did.

    Args:
        repair: chooses the strategy of each rewrite (`sqlbench.agent.repair`).
        observer: is told of everything as it happens.
        start: queries that did not answer it, oldest first, each with the text of its result: the first call is then a
            rewrite of the last one.
    """
    try:
        schema = introspect(database)
        text = schema_text(schema, schema_style(prompts.family), config.table_info_truncate)
    except Exception as problem:
        return {"error": failure("schema", problem)}
    context = AgentContext(model, database, schema, prompts, config, repair, observer)
    state = await run_agent(question, text, context, start or ())
    answers = [transition.completion for transition in state.get("transitions", [])]
    # A policy in this process that says nothing is wrong; an endpoint that says nothing was not measured.
    if "error" not in state and answers and all(a.empty and a.sent is not None for a in answers):
        flaws = ", ".join(sorted({a.flaw.removeprefix("empty: ") for a in answers}))
        state["error"] = failure("model", ModelError(f"{model.name} gave no text at all ({flaws}); {NO_TEXT}"))
    return state


def failed_rollout(task: Task, where: str, error: Exception) -> Trajectory:
    """The record of a rollout that could not even start."""
    return Trajectory(**_of(task), error=failure(where, error))


def _of(task: Task) -> dict[str, str]:
    copied = ("task_id", "db_id", "question", "gold", "hardness", "split")
    return {"task_key": task.key, **{name: str(getattr(task, name)) for name in copied}}
