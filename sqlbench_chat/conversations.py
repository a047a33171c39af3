"""Row of controls for conversations: choose, create, rename, delete and export them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import ipywidgets as w

from sqlbench_chat.conversation import Conversation, conversations
from sqlbench_chat.parts import button, download, html
from sqlbench_chat.turn import HTML, Turn

if TYPE_CHECKING:
    from sqlbench_chat.view import ChatView


class Conversations(w.HBox):
    """The row of controls."""

    def __init__(self, chat: ChatView) -> None:
        self._chat, self._folder = chat, Path()
        self.conversation: Conversation | None = None
        self.chosen = w.Dropdown(tooltip="Conversation", layout=w.Layout(flex="1 1 200px", max_width="420px"))
        self.chosen.observe(self._choose, "value")
        self._name = w.Text(placeholder="New name, then Enter", layout=w.Layout(display="none", width="220px"))
        self._name.on_submit(lambda _: self.rename(self._name.value))
        self._sure = button("Really delete?", self.delete, button_style="danger")
        self._sure.layout.display = "none"
        self._link, self._mark = w.HTML(), w.HTML(layout={"display": "none"})
        buttons = [
            button("New", lambda: self.turn_to("")),
            button("Rename", lambda: self._toggle(self._name)),
            button("Delete", lambda: self._toggle(self._sure)),
            button("Markdown", lambda: self.export("md"), tooltip="Save the conversation as Markdown"),
            button("JSONL", lambda: self.export("jsonl"), tooltip="Save the conversation as JSON lines"),
        ]
        super().__init__([self.chosen, *buttons, self._name, self._sure, self._link, self._mark])
        self.layout = w.Layout(flex_flow="row wrap", width="100%")

    @staticmethod
    def _toggle(widget: w.Widget) -> None:
        widget.layout.display = "" if widget.layout.display == "none" else "none"

    def turn_to(self, name: str, folder: Path | None = None) -> None:
        """Open a conversation; an empty name starts a new one."""
        self._folder = folder or self._folder
        self.conversation = Conversation(self._folder, name)
        self._list()
        self._chat.show_turns(self.conversation.turns)

    def _choose(self, change: dict) -> None:
        if self.conversation and change["new"] and change["new"] != self.conversation.name:
            self._chat.guarded(lambda: self.turn_to(change["new"]))

    def _list(self) -> None:
        assert self.conversation is not None
        name = self.conversation.name
        titles = {name: self.conversation.title} | conversations(self._folder)
        self._mark.value = html(HTML.conversation(name))
        self._link.value = ""
        self.chosen.options = [(title, key) for key, title in titles.items()]
        self.chosen.value = name
        self._name.layout.display = self._sure.layout.display = "none"

    def keep(self, turn: Turn) -> None:
        """Store a turn in the open conversation."""
        assert self.conversation is not None
        self.conversation.keep(turn)
        if len(self.conversation.turns) == 1:
            self._list()

    def rename(self, title: str) -> None:
        """Rename the open conversation."""
        if (conversation := self.conversation) and title.strip():
            self._chat.guarded(lambda: conversation.rename(title))
            self._name.value = ""
            self._list()

    def delete(self) -> None:
        """Delete the open conversation."""
        if self.conversation:
            self.conversation.delete()
            self.turn_to("")

    def export(self, kind: str) -> None:
        """Offer the open conversation as a download."""
        if self.conversation:
            text = self.conversation.markdown() if kind == "md" else self.conversation.jsonl()
            media = "text/markdown" if kind == "md" else "application/jsonl"
            self._link.value = html(download(f"{self.conversation.name}.{kind}", text, f"{media};charset=utf-8"))
