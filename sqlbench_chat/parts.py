"""What the parts of the page share: HTML, a download, and commands that come from its HTML."""

from __future__ import annotations

import base64
from collections.abc import Callable

import ipywidgets as w
from markupsafe import Markup

from sqlbench_chat.turn import HTML
from sqlbench_lab import view

WIDE = {"width": "100%"}


def html(*parts: Markup) -> str:
    """Put parts into the frame that the style sheet knows."""
    return str(view.box(*parts))


def download(name: str, text: str, kind: str) -> Markup:
    """A link that saves a text as a file; the page follows it by itself."""
    data = base64.b64encode(text.encode()).decode()
    return HTML.download(name, f"data:{kind};base64,{data}")


def button(text: str, act: Callable[[], object], **options: str) -> w.Button:
    """A button that does one thing."""
    made = w.Button(description=text, layout={"width": "auto"}, **options)
    made.on_click(lambda _: act())
    return made


class Panel(w.VBox):
    """A part of the page whose HTML has elements with ``data-do="action:argument"``; clicked, they call `do`."""

    def __init__(self, children: list[w.Widget], do: Callable[[str, str], None], name: str = "") -> None:
        self._bridge = w.Text(layout={"display": "none"})
        self._bridge.add_class("sqlbench-bridge")
        self._bridge.observe(lambda change: self._called(change["new"], do), "value")
        super().__init__([*children, self._bridge], layout={"min_width": "0"})
        self.add_class("sqlbench-panel")
        if name:
            self.add_class(name)

    @staticmethod
    def _called(text: str, do: Callable[[str, str], None]) -> None:
        action, _, argument = text.rpartition("#")[0].partition(":")  # what follows the last # makes the call unique
        if action:
            do(action, argument)
