"""Banner for a database that the model was not trained for, with a choice of other models."""

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
    """Return the models of this machine's Ollama; empty if it does not run."""
    try:
        async with httpx.AsyncClient(timeout=1.0, trust_env=False) as client:
            reply = (await client.get(f"{address}/api/tags")).raise_for_status().json()
        return [str(model["name"]) for model in reply["models"]]
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return []


class Offer(w.VBox):
    """The banner; empty if the model fits."""

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
        """Say that the model does not know the database, and offer other models."""
        self._text.value = html(HTML.foreign(model, database))
        self._found.value = ""
        self.children = self._parts
        names = await ollama_models()
        self._found.value = html(HTML.ollama(len(names)))
        self.ollama.children = [button(name, partial(self.use_ollama, name)) for name in names[:12]]

    def hide(self) -> None:
        """Hide the banner, because the model fits."""
        self.children = []

    def use(self, model: str) -> None:
        """Switch to another model."""
        if model.strip():
            self._chat.use_model(model.strip())

    def use_ollama(self, name: str) -> None:
        """Switch to a model of this machine's Ollama."""
        os.environ["OPENAI_BASE_URL"] = f"{OLLAMA}/v1"  # for this page alone: each page has its own process
        self.use(f"openai:{name}")
