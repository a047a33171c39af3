"""The server of the environment. It has no login: every client that reaches the port can spend the model's time.

The default address is therefore this machine alone.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from contextvars import ContextVar
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response, WebSocketDisconnect
from fastapi.exceptions import RequestValidationError
from openenv.core.env_server import create_app
from pydantic import ValidationError

import sqlbench
from sql_env.models import MAX_ATTEMPTS, SqlAction, SqlObservation, SqlState
from sql_env.server.episodes import Episodes, RequestError
from sql_env.server.sql_environment import DESCRIPTION, SqlEnvironment
from sql_env.settings import EnvConfig
from sqlbench.agent.prompts import STRATEGIES
from sqlbench.agent.repair import GENERATE
from sqlbench.models.chat import load_env
from sqlbench_train.serve import listen

MAX_SESSIONS = 100
"""Maximum number of WebSocket sessions at a time."""

CLIENT: ContextVar[str | None] = ContextVar("client", default=None)
"""Client address of the HTTP request being answered."""


class _Clients:
    """Middleware that sets `CLIENT`: OpenEnv makes an environment for a request without showing it the request."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope.get("client"):
            CLIENT.set(scope["client"][0])
        await self.app(scope, receive, send)


def create(episodes: Episodes) -> FastAPI:
    """Make the server's application: OpenEnv's routes, ``/env/tasks`` and ``/env/info``."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # the page of ENABLE_WEB_INTERFACE=true reports home
    app = create_app(
        lambda: SqlEnvironment(episodes, CLIENT.get()),  # the page would take a `partial` for an environment
        SqlAction,
        SqlObservation,
        env_name="sqlbench",
        max_concurrent_envs=MAX_SESSIONS,
    )
    app.add_middleware(_Clients)
    # OpenEnv's own /state takes no episode_id.
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") != "/state"]

    @app.get("/state", tags=["State Management"])
    async def state(episode_id: str | None = None) -> SqlState:
        return (episodes.latest(CLIENT.get()) if episode_id is None else episodes.find(episode_id)).state()

    @app.get("/env/tasks", tags=["Environment Info"])
    async def tasks() -> list[dict[str, str]]:
        shown = ("task_id", "db_id", "question", "hardness")
        return [{name: getattr(task, name) for name in shown} for task in episodes.tasks.values()]

    @app.get("/env/info", tags=["Environment Info"])
    async def info() -> dict[str, Any]:
        return {
            "name": "sqlbench",
            "version": sqlbench.__version__,
            "description": DESCRIPTION,
            "split": episodes.split,
            "tasks": len(episodes.tasks),
            "model": episodes.model.name,
            "max_attempts": MAX_ATTEMPTS,
            "actions": [GENERATE, *STRATEGIES],
            "action": SqlAction.model_json_schema(),
            "observation": SqlObservation.model_json_schema(),
            "state": SqlState.model_json_schema(),
        }

    async def refuse(request: Request, error: Any) -> Response:
        """Say what is wrong without repeating the request: FastAPI's own answer breaks on text that is not Unicode."""
        if isinstance(error, RequestError):
            status, detail = error.status, str(error)
        elif isinstance(error, HTTPException):
            status, detail = error.status_code, error.detail
        else:
            status, detail = 422, error.errors()
        if isinstance(detail, list):
            detail = [{name: one[name] for name in ("type", "loc", "msg")} for one in detail]
        return Response(json.dumps({"detail": detail}), status, media_type="application/json")

    for kind in (RequestError, HTTPException, RequestValidationError, ValidationError):
        app.add_exception_handler(kind, refuse)
    return app


def _settings() -> dict[str, str]:
    """Read settings from the environment and ``.env``."""
    load_env()
    named = {
        "data": os.environ.get("SQLBENCH_DATA"),
        "split": os.environ.get("SQLBENCH_SPLIT"),
        "model": os.environ.get("SQLBENCH_MODEL"),
        "reward": os.environ.get("SQLBENCH_REWARD"),
    }
    return {name: value for name, value in named.items() if value}


def _create(settings: EnvConfig) -> FastAPI:
    return create(Episodes(**settings.model_dump(exclude={"host", "port"})))


def __getattr__(name: str) -> FastAPI:
    """Make ``sql_env.server.app:app``, for ``openenv.yaml``, with settings from the environment."""
    if name != "app":
        raise AttributeError(name)
    return _create(EnvConfig.model_validate(_settings()))


def serve(settings: EnvConfig) -> None:
    """Serve until interrupted. Standard output carries the episodes' lines and nothing else.

    Raises:
        ServerError: the address is in use or does not belong to this machine.
        DataError: the data set or split does not exist.
        ModelError: the model does not exist.
    """
    data, host = settings.data, settings.host
    with listen(host, settings.port) as listener:
        app = _create(settings)
        line = f"Serving {data} on http://{host}:{listener.getsockname()[1]}. Press Ctrl-C to stop."
        print(line, file=sys.stderr, flush=True)
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=3)
        # OpenEnv also closes sockets that the client has closed already, which is not an error.
        logging.getLogger("uvicorn.error").addFilter(
            lambda r: not (r.exc_info and r.exc_info[0] is WebSocketDisconnect)
        )
        uvicorn.Server(config).run(sockets=[listener])


def main() -> None:
    """Run ``sqlbench env`` with settings from the environment: the command ``server`` of this folder's project."""
    from sqlbench.cli import main as sqlbench

    sqlbench(["env", *(f"--{name}={value}" for name, value in _settings().items()), *sys.argv[1:]])


if __name__ == "__main__":
    main()
