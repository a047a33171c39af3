"""The client of the environment, for programs elsewhere."""

from __future__ import annotations

from typing import Any

from openenv.core.client_types import StepResult
from openenv.core.env_client import EnvClient

from sql_env.models import SqlAction, SqlObservation, SqlState


class SqlEnvClient(EnvClient[SqlAction, SqlObservation, SqlState]):
    """Typed client of one WebSocket session: ``async with SqlEnvClient(url)``, or ``with SqlEnvClient(url).sync()``."""

    def _step_payload(self, action: SqlAction) -> dict[str, Any]:
        return action.model_dump()

    def _parse_result(self, payload: dict[str, Any]) -> StepResult[SqlObservation]:
        outcome = {"reward": payload["reward"], "done": payload["done"]}
        return StepResult(observation=SqlObservation(**payload["observation"], **outcome), **outcome)

    def _parse_state(self, payload: dict[str, Any]) -> SqlState:
        return SqlState(**payload)
