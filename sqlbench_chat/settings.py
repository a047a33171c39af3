"""Settings of questions, the chat and its HTTP interface."""

from __future__ import annotations

from pydantic import Field

from sqlbench.config import POCKET, RESULTS, Agent, Data, Host, Model, Port, Results, RolloutConfig, Run, Settings


class QuestionConfig(RolloutConfig):
    """Database, model and agent for questions."""

    db: str = Field(description="A SQLite, DuckDB, Parquet or CSV file, a folder, or postgresql://...; only ever read.")
    model: Model = "nano"
    agent: Agent = "self-correcting"
    prompts: str | None = Field(None, description="Prompt family or TOML file, if not the model's own.")


class AskConfig(QuestionConfig):
    """Answer one question on a database, step by step."""

    question: str = Field(description="The question.", json_schema_extra={"flags": []})
    verbose: bool = Field(False, description="Show prompts and whole answers.")


class ApiConfig(QuestionConfig):
    """Answer questions on a database over HTTP, as events; SQLBENCH_TOKEN is the token that clients send."""

    port: Port = 8001
    host: Host = "127.0.0.1"
    concurrency: int = Field(4, ge=1, description="Questions at a time.")
    per_client: int = Field(2, ge=1, description="Questions at a time from one address.")
    seconds: float = Field(120.0, gt=0, description="Seconds that a question may take.")
    origin: list[str] = Field([], description="A web page's origin that may ask, as https://example.org; repeatable.")


class ChatConfig(Settings):
    """Serve the chat as a web page."""

    data: Data = POCKET
    model: Model = "nano"
    port: Port = 8866
    host: Host = "127.0.0.1"
    token: str | None = Field(None, description="Token that browsers must send; random if others reach --host.")
    pages: int = Field(20, ge=1, description="Pages open at a time, each with a process of its own.")
    shared: bool = Field(
        False,
        description="Share conversations and what is learned where others reach --host; else each browser has its own.",
    )
    hourly: int = Field(
        100,
        ge=1,
        description="Questions per hour, including a benchmark's, of a browser that has its own conversations.",
    )
    run: Run = "chat"
    results: Results = RESULTS
    reflection: str | None = Field(None, description="Endpoint for prompt evolution, openai:NAME, if not --model's.")
    every: int = Field(4, ge=1, description="Questions between two evolutions of the prompt.")
    agent: Agent = "self-correcting"
    prompts: str | None = Field(None, description="Prompts if not the model's own: nano, chat or a .toml file.")
