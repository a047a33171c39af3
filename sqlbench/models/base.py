"""The one thing the agent asks of a model: an answer to a list of messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

    async def complete(self, messages: list[Message], on_text: Callable[[str], None] | None = None) -> Completion:
        """Answer one prompt.

        Args:
            messages: the prompt.
            on_text: called on the event loop with each piece of the answer as it is generated; the pieces together
                are the answer's text.

        Raises:
            sqlbench.errors.ModelError: the model could not be reached or gave no usable answer. The rollout is
                then recorded as failed.
        """
        ...


def merge_messages(messages: Sequence[Message], roles: Sequence[str] = ("system", "user")) -> list[Message]:
    """Join neighbouring messages of one role, for models that demand alternation.

    Args:
        messages: the prompt.
        roles: roles that count as the user's; without ``system`` a system message stays as it is.
    """
    merged: list[Message] = []
    for message in messages:
        role = "user" if message.role in roles else message.role
        if merged and merged[-1].role == role:
            message = Message(role=role, content=f"{merged.pop().content}\n\n{message.content}")
        merged.append(Message(role=role, content=message.content))
    return merged
