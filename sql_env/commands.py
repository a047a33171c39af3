"""The command that serves the environment."""

from __future__ import annotations

from sql_env.settings import EnvConfig
from sqlbench.config import Request
from sqlbench.options import command, send_request


@command("env")
def _env(settings: EnvConfig, request: Request = None) -> None:
    from sql_env.server.app import serve

    send_request(request)
    serve(settings)
