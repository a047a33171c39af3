"""The banner over a database that the model was not made for, and the way to another model."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING

import httpx
import ipywidgets as w

from sqlbench_chat.parts import button, html
from sqlbench_chat.turn import HTML

if TYPE_CHECKING:
    from sqlbench_chat.view import ChatView

OLLAMA = "http://127.0.0.1:11434"


async def ollama_models(address: str = OLLAMA) -> list[str]:
    """The models of the Ollama of this machine; none where it does not run."""
    try:
        async with httpx.AsyncClient(timeout=1.0, trust_env=False) as client:
            found = (await client.get(f"{address}/api/tags")).raise_for_status().json()
        return [str(model["name"]) for model in found["models"]]
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return []


class Offer(w.VBox):
    """The banner; empty where the model fits."""

    def __init__(self, chat: ChatView) -> None:
        self._chat = chat
        self._text, self._found = w.HTML(), w.HTML()
        self.model = w.Text(placeholder="owner/name or openai:NAME", layout={"flex": "1 1 220px", "max_width": "420px"})
        self.model.on_submit(lambda _: self.use(self.model.value))
        self.ollama = w.HBox(layout=w.Layout(flex_flow="row wrap"))
        self._row = w.HBox([self.model, button("Use this model", lambda: self.use(self.model.value))])
        self._parts = [self._text, self._row, self._found, self.ollama]
        super().__init__()

    async def show(self, model: str, database: str) -> None:
        """Say that the model does not know the database, and offer others."""
        self._text.value = html(HTML.foreign(model, database))
        self._found.value = ""
        self.children = self._parts
        found = await ollama_models()
        self._found.value = html(HTML.ollama(len(found)))
        self.ollama.children = [button(name, partial(self.use_ollama, name)) for name in found[:12]]

    def hide(self) -> None:
        """The model fits."""
        self.children = []

    def use(self, model: str) -> None:
        """Turn to another model."""
        if model.strip():
            self._chat.use_model(model.strip())

    def use_ollama(self, name: str) -> None:
        """Turn to a model of the Ollama of this machine."""
        os.environ["OPENAI_BASE_URL"] = f"{OLLAMA}/v1"  # of this page alone: each has a process of its own
        self.use(f"openai:{name}")
