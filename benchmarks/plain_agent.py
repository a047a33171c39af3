"""A text-to-SQL agent as one usually writes it with LangGraph, and a model that answers at once.

Used in `benchmarks/rollout.py` for comparison. Each rollout copies the database for itself and once more for scoring,
opens a SQLAlchemy engine, reflects the schema with three rows of every table, and calls its model through langchain.
The graph and the client are made once per process.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any, TypedDict

from langchain_core.language_models.chat_models import SimpleChatModel
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from sqlalchemy import MetaData, create_engine, select, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.schema import CreateTable

from sqlbench.data.tasks import DataSet, Task

CORRECT = "THE QUERY IS CORRECT"
OVER_HTTP, IN_PROCESS = FORMS = ("over HTTP", "in the process")


# ---- the model


@cache
def answers(data: Path) -> dict[str, str]:
    """Return the answer to every question of the data set."""
    return {task.question: f"```sql\n{task.gold}\n```" for task in DataSet(data).load("train")}


def reply(data: Path, prompt: str) -> str:
    """Return the model's reply to a prompt of either agent."""
    if CORRECT in prompt:
        return CORRECT
    question = re.search(r"^Question: (.*)$", prompt, re.MULTILINE)
    assert question is not None, f"no question in the prompt: {prompt}"
    return answers(data)[question[1]]


def serve(data: Path, port: Any) -> None:
    """Run an OpenAI-compatible server that answers at once; send its port."""
    from aiohttp import web

    async def complete(request: web.Request) -> web.Response:
        text = reply(data, "\n".join(m["content"] for m in (await request.json())["messages"]))
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        body = {"id": "1", "object": "chat.completion", "created": 0, "model": "at-once", "choices": [choice]}
        return web.json_response(body | {"usage": usage})

    async def run() -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", complete)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port.send(runner.addresses[0][1])
        await asyncio.Event().wait()

    asyncio.run(run())


# ---- the plain agent

WRITE = "You write one {dialect} query that answers a question. Use only these tables:\n{schema}\nGive only the query."
CHECK = (
    "You are a careful reviewer of {dialect} queries. Look for mistakes in joins, conditions, grouping, types and "
    "missing values. Tables:\n{schema}\nSay what is wrong with the query, then end with 'THE QUERY IS INCORRECT' or, "
    f"if nothing is, with '{CORRECT}'."
)
REWRITE = "Correct this {dialect} query with the help of the remarks. Tables:\n{schema}\nGive only the query."


class PlainState(TypedDict, total=False):
    """State of the plain agent."""

    question: str
    db: Any
    query: str
    result: str
    feedback: str
    turns: int


@cache
def plain_agent(data: Path, form: str) -> Any:
    """Return the compiled graph."""

    class AtOnce(SimpleChatModel):
        def _call(self, messages: list[Any], *_: Any, **__: Any) -> str:
            return reply(data, "\n".join(str(m.content) for m in messages))

        @property
        def _llm_type(self) -> str:
            return "at-once"

    at = os.environ.get("OPENAI_BASE_URL")
    llm: Any = ChatOpenAI(model="at-once", base_url=at, api_key="none") if form == OVER_HTTP else AtOnce()
    review = "Question: {question}\nQuery: {query}\nResult: {result}\nRemarks: {feedback}"
    templates = {
        name: ChatPromptTemplate.from_messages([("system", system), ("user", user)])
        for name, system, user in (
            ("write", WRITE, "Question: {question}"),
            ("check", CHECK, review.removesuffix("\nRemarks: {feedback}")),
            ("rewrite", REWRITE, review),
        )
    }

    def ask(name: str, state: PlainState) -> str:
        prompt = templates[name].invoke({**state, "dialect": "sqlite", "schema": table_info(state["db"])})
        return str(llm.invoke(prompt).content)

    def query_of(answer: str) -> str:
        block = re.search(r"```(?:sql)?\s*(.*?)```", answer, re.DOTALL)
        return (block[1] if block else answer).strip()

    def write(state: PlainState) -> PlainState:
        return {"query": query_of(ask("write", state)), "turns": 1}

    def execute(state: PlainState) -> PlainState:
        try:
            with state["db"].connect() as connection:
                rows = connection.execute(text(state["query"])).fetchall()
        except SQLAlchemyError as error:
            return {"result": f"Error: {error}"}
        return {"result": str(rows)[:2048]}

    def check(state: PlainState) -> PlainState:
        return {"feedback": ask("check", state)}

    def rewrite(state: PlainState) -> PlainState:
        return {"query": query_of(ask("rewrite", state)), "turns": state["turns"] + 1}

    def after(state: PlainState) -> str:
        return END if CORRECT in state["feedback"] or state["turns"] >= 3 else "rewrite"

    graph = StateGraph(PlainState)
    for name, node in (("write", write), ("execute", execute), ("check", check), ("rewrite", rewrite)):
        graph.add_node(name, node)
    for start, end in ((START, "write"), ("write", "execute"), ("execute", "check"), ("rewrite", "execute")):
        graph.add_edge(start, end)
    graph.add_conditional_edges("check", after, ["rewrite", END])
    return graph.compile()


def table_info(engine: Any) -> str:
    """Return the CREATE TABLE of every table with its first rows."""
    schema = MetaData()
    schema.reflect(engine)
    parts = []
    with engine.connect() as connection:
        for table in schema.sorted_tables:
            rows = connection.execute(select(table).limit(3)).fetchall()
            parts.append(f"{CreateTable(table).compile(engine)}\n/*\n" + "\n".join(map(str, rows)) + "\n*/")
    return "\n".join(parts)[:2048]


def plain_rollout(data: Path, task: Task, form: str) -> int:
    """Run one rollout; return 1 if it was right, else 0."""
    with tempfile.TemporaryDirectory() as folder:
        database = DataSet(data).database(task.db_id)
        copies = [shutil.copy(database, f"{folder}/{name}.sqlite") for name in ("own", "gold")]
        engine, other = (create_engine(f"sqlite:///{copy}") for copy in copies)
        state = plain_agent(data, form).invoke({"question": task.question, "db": engine})
        with other.connect() as connection:
            got, wanted = (Counter(connection.execute(text(q)).fetchall()) for q in (state["query"], task.gold))
        engine.dispose()
        other.dispose()
    return int(got == wanted)


def plain_chunk(data: Path, form: str, tasks: list[Task]) -> tuple[int, float]:
    """Run some rollouts one after another; return how many were right, and the CPU seconds of this process."""
    start = time.process_time()
    right = sum(plain_rollout(data, task, form) for task in tasks)
    return right, time.process_time() - start
