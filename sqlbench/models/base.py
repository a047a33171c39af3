"""Preparation of a prompt, shared by models of this process and endpoints."""

from __future__ import annotations

from collections.abc import Sequence

from sqlbench.agent.trajectory import Message


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
