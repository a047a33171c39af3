"""Answers to questions without gold on one database, for ``sqlbench ask`` and ``sqlbench api``."""

from __future__ import annotations

from textwrap import indent

from sqlbench.agent.prompts import prompts_for
from sqlbench.config import RolloutConfig
from sqlbench.data.tasks import Task
from sqlbench.errors import ModelError
from sqlbench.evaluation import run_sync
from sqlbench.interfaces import load_plugin
from sqlbench.models import open_model, trained_with
from sqlbench.rollout import RolloutCallback, RolloutContext, run_agent
from sqlbench.text import clean
from sqlbench_chat.connection import BUDGETS, LARGE, connect
from sqlbench_chat.settings import AskConfig, QuestionConfig
from sqlbench_lab.terminal import Printer


class Answerer:
    """A database, a model and an agent, opened once. Several questions can be answered concurrently.

    Raises:
        DatabaseError: the database cannot be opened.
        ModelError: the model cannot be used.
    """

    def __init__(self, settings: QuestionConfig) -> None:
        self.connection = connect(settings.db)
        self.model = open_model(settings.model)
        self.agent = load_plugin("agent", settings.agent)
        self.prompts = prompts_for(settings.prompts or self.model.family)
        self.config: RolloutConfig = settings.decided(self.prompts.family, settings.agent, trained_with(settings.model))
        if not {"table_info_truncate", "schema_tokens"} & settings.model_fields_set:
            budget = BUDGETS.get(self.prompts.family, {"table_info_truncate": LARGE})
            self.config = self.config.model_copy(update=budget)

    async def answer(self, question: str, observer: RolloutCallback) -> RolloutContext:
        """Answer one question; the answer is the `sql` of the returned context, a query that ran.

        Raises:
            ModelError: the rollout failed, or no query ran.
        """
        task = Task(task_id="ask", db_id=self.connection.name, question=clean(question), gold="", split="")
        database, model, prompts = self.connection.database, self.model, self.prompts
        context = await run_agent(task, database, model, prompts, self.config, observer=observer, agent=self.agent)
        if context.error is not None:
            raise ModelError(f"No answer: {context.error.rstrip('.')}. Try another model or database.")
        if not context.executions[-1].answered:
            small = " nano knows the embedded databases only." if prompts.family == "nano" else ""
            raise ModelError(
                f"No query that runs after {len(context.executions)} of them. Try a larger --model.{small}"
            )
        return context


def ask(settings: AskConfig) -> None:
    """Answer one question on a database and print each step.

    Raises:
        DatabaseError: the database cannot be opened.
        ModelError: the model cannot be used, the rollout failed, or no query ran.
    """
    answerer = Answerer(settings)
    if notice := answerer.connection.notice:
        print(f"Note: {notice}.")
    context = run_sync(lambda: answerer.answer(settings.question, Printer(settings.verbose)))
    print(f"\nanswer\n{indent(context.sql or '(no query)', '  ')}")
