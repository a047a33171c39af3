"""The one thing the agent asks of a model: an answer to a list of messages."""

from __future__ import annotations

from typing import Protocol

from sqlbench.agent.trajectory import Completion, Message


class ChatModel(Protocol):
    """A policy as the agent sees it.

    Attributes:
        name: shown in tables and stored in run configs.
        family: which prompt components fit it (`sqlbench.agent.prompts.prompts_for`): ``nano`` or ``chat``.
    """

    name: str
    family: str

    async def complete(self, messages: list[Message]) -> Completion:
        """Answer one prompt.

        Raises:
            sqlbench.errors.ModelError: the model could not be reached or gave no usable answer. The rollout is
                then recorded as failed.
        """
        ...
