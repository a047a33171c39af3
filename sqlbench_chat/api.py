"""HTTP interface for third-party front ends: one request per question, its rollout streamed as events.

The database, the model and the agent are set when the server starts. A request is refused before any work if it lacks
the token, is too long, or exceeds the limits on concurrent questions. A client that disconnects ends its rollout: no
further model call or query starts.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import re
import secrets
import sys
from collections import Counter
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.datastructures import Headers
from fastapi.exceptions import RequestValidationError, StarletteHTTPException
from fastapi.middleware.cors import CORSMiddleware
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel, ConfigDict, Field

import sqlbench
from sqlbench.agent.prompts import extract_sql, parse_verdict
from sqlbench.agent.trajectory import Execution, Transition
from sqlbench.errors import ModelError
from sqlbench.models.chat import load_env
from sqlbench_chat.answer import Answerer
from sqlbench_chat.settings import ApiConfig
from sqlbench_train.serve import LOCAL, listen

TOKEN = "SQLBENCH_TOKEN"
LONGEST, LARGEST = 2000, 16_384
"""Maximum length of a question in characters, and of a request in bytes."""
EVENTS = """Answers a question on the server's database. The answer is a stream of events, each with JSON as its data:

| event | when | data |
|---|---|---|
| `text` | a piece of a model's answer was generated | `agent`, `turn`, `text` |
| `query` | a query was written | `agent`, `turn`, `sql`, `strategy` |
| `result` | it was executed | `turn`, `sql`, `status`, `error`, `columns`, `rows` (20 at most), `n_rows`, `seconds` |
| `verdict` | the check judged it | `turn`, `correct`, `text` |
| `done` | last: the answer | `sql`, `result` (as above), `turns`, `calls` |
| `error` | last: there is no answer | `error` |

`agent` is `write`, `check`, `rewrite`, or what an agent of your own calls it. Comment lines keep a silent stream open.
"""
PROBLEM = {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]}


class Question(BaseModel):
    """A question in plain language."""

    model_config = ConfigDict(extra="forbid")
    question: Annotated[str, Field(min_length=1, max_length=LONGEST)]


class _Stream:
    """Turns a rollout into events (`sqlbench.rollout.RolloutCallback`)."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[ServerSentEvent | None] = asyncio.Queue()

    def put(self, event: str, **data: Any) -> None:
        self.events.put_nowait(ServerSentEvent(event=event, data=data))

    def text(self, agent: str, turn: int, piece: str) -> None:
        self.put("text", agent=agent, turn=turn, text=piece)

    def transition(self, transition: Transition) -> None:
        text = transition.completion.text
        if transition.agent == "check":
            self.put("verdict", turn=transition.turn, correct=parse_verdict(text), text=text)
        else:
            about = {"turn": transition.turn, "strategy": transition.strategy}
            self.put("query", agent=transition.agent, sql=extract_sql(text), **about)

    def execution(self, execution: Execution, execution_text: str) -> None:
        self.put("result", **_shown(execution))


def _shown(execution: Execution) -> dict[str, Any]:
    return execution.model_dump(exclude={"match"})


class _Guard:
    """Middleware that refuses requests by their headers, before the body is read."""

    def __init__(self, app: Any, token: str | None) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        refused = self.refuse(scope, Headers(scope=scope)) if scope["type"] == "http" else None
        await (self.app if refused is None else _problem(*refused))(scope, receive, send)

    def refuse(self, scope: Any, headers: Headers) -> tuple[int, str] | None:
        length = headers.get("content-length", "0" if scope["method"] in ("GET", "HEAD", "OPTIONS") else "none")
        host = re.sub(r":\d+$", "", headers.get("host", "")).strip("[]")
        if self.token is None and host not in LOCAL:
            # DNS rebinding: a page elsewhere whose name resolves to this machine.
            return 403, f"Not a name of this machine: {host[:80]}. Use 127.0.0.1, or start the server with {TOKEN} set."
        if scope["path"].startswith("/api/") and self.token is not None:
            authorization = headers.get("authorization", "").encode()
            if not hmac.compare_digest(authorization, f"Bearer {self.token}".encode()):
                return 401, "No valid token. Send the header Authorization: Bearer TOKEN."
        if not length.isdecimal():
            return 411, "Request of unknown length. Send Content-Length."
        if len(length) > 9 or int(length) > LARGEST:
            return 413, f"Request too long: {length[:20]} bytes. Send at most {LARGEST}."
        return None


def _problem(status: int, error: str) -> Response:
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    return Response(json.dumps({"error": error}), status, headers, "application/json")


def create(answerer: Answerer, settings: ApiConfig, token: str | None) -> FastAPI:
    """Create the application: ``POST /api/ask`` and ``GET /api/info``, described at ``/openapi.json`` and ``/docs``."""
    app = FastAPI(title="sqlbench", version=sqlbench.__version__, description="Questions on one database.")
    app.add_middleware(_Guard, token=token)
    app.add_middleware(  # outside the guard: a browser's preflight request carries no token
        CORSMiddleware, allow_origins=settings.origin, allow_methods=["POST"], allow_headers=["*"]
    )
    running = Counter[str]()

    async def place(request: Request) -> AsyncIterator[None]:
        client = request.client.host if request.client else ""
        if running[client] >= settings.per_client:
            raise HTTPException(429, f"Too many questions of yours at a time: {running[client]}. Wait for an answer.")
        if running.total() >= settings.concurrency:
            raise HTTPException(503, f"Too many questions at a time: {running.total()}. Try again soon.")
        running[client] += 1
        try:
            yield
        finally:
            running[client] -= 1
            if not running[client]:
                del running[client]

    problems: Any = {
        status: {"description": HTTPStatus(status).phrase, "content": {"application/json": {"schema": PROBLEM}}}
        for status in (401, 403, 411, 413, 422, 429, 503)
    }

    @app.post(
        "/api/ask",
        response_class=EventSourceResponse,
        description=EVENTS,
        responses=problems,
        dependencies=[Depends(place)],
    )
    async def ask(body: Question) -> AsyncIterator[ServerSentEvent]:
        stream = _Stream()
        rollout = asyncio.create_task(asyncio.wait_for(answerer.answer(body.question, stream), settings.seconds))
        rollout.add_done_callback(lambda _: stream.events.put_nowait(None))
        try:
            while (event := await stream.events.get()) is not None:
                yield event
            context = rollout.result()
            result = next(_shown(e) for e in reversed(context.executions) if e.sql == context.sql)
            counts = {"turns": len(context.executions), "calls": len(context.transitions)}
            yield ServerSentEvent(event="done", data={"sql": context.sql, "result": result, **counts})
        except ModelError as error:
            yield ServerSentEvent(event="error", data={"error": str(error)})
        except TimeoutError:
            why = f"No answer in {settings.seconds:g} s. Ask something simpler, or raise --seconds."
            yield ServerSentEvent(event="error", data={"error": why})
        finally:
            rollout.cancel()

    @app.get("/api/info", responses=problems)
    async def info() -> dict[str, Any]:
        """Describe the database and the model, with example questions."""
        connection = answerer.connection
        about = {"database": connection.name, "dialect": connection.database.dialect, "model": answerer.model.name}
        tables = {table.label: [column.name for column in table.columns] for table in connection.schema.tables}
        return (
            about
            | {"notice": connection.notice, "tables": tables}
            | {"examples": [example.question for example in connection.examples]}
        )

    async def refuse(request: Request, error: Any) -> Response:
        if isinstance(error, RequestValidationError):
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            return _problem(422, f'Invalid request: {where}: {first["msg"]}. Send {{"question": "..."}}.')
        return _problem(error.status_code, str(error.detail))

    app.add_exception_handler(RequestValidationError, refuse)
    app.add_exception_handler(StarletteHTTPException, refuse)
    return app


def serve(settings: ApiConfig) -> None:
    """Serve until interrupted.

    Raises:
        ServerError: the address is in use or does not belong to this machine.
        DatabaseError, ModelError: the database or the model cannot be opened.
    """
    load_env()
    token, host = os.environ.get(TOKEN) or None, settings.host
    with listen(host, settings.port) as listener:
        answerer = Answerer(settings)
        if token is None and host not in LOCAL:
            token = secrets.token_urlsafe(24)
            print(f"Token of this start: {token}. Set {TOKEN} for one of your own.", file=sys.stderr)
        app = create(answerer, settings, token)
        url = f"http://{host}:{listener.getsockname()[1]}"
        what = f"Serving questions on {answerer.connection.name} at {url}/api/ask (described at {url}/docs)"
        print(f"{what}. Press Ctrl-C to stop.", file=sys.stderr, flush=True)
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=3)
        uvicorn.Server(config).run(sockets=[listener])
