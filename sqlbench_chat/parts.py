"""Shared elements of the page's parts: HTML, a download, and commands sent by the HTML."""

from __future__ import annotations

import base64
from collections.abc import Callable

import ipywidgets as w
from markupsafe import Markup

from sqlbench_chat.turn import HTML
from sqlbench_lab import view

WIDE = {"width": "100%"}


def html(*parts: Markup) -> str:
    """Wrap parts in the frame that the style sheet formats."""
    return str(view.box(*parts))


def download(name: str, text: str, kind: str) -> Markup:
    """Return a link that saves a text as a file; the page follows it automatically."""
    data = base64.b64encode(text.encode()).decode()
    return HTML.download(name, f"data:{kind};base64,{data}")


def button(text: str, act: Callable[[], object], **options: str) -> w.Button:
    """Create a button that calls a function."""
    widget = w.Button(description=text, layout={"width": "auto"}, **options)
    widget.on_click(lambda _: act())
    return widget


def close_tree(*widgets: w.Widget) -> None:
    """Close widgets that are no longer shown, with all below them; browser and kernel keep every open widget."""
    for widget in widgets:
        close_tree(*getattr(widget, "children", ()))
        for part in (getattr(widget, "layout", None), getattr(widget, "style", None), widget):
            if part is not None:
                part.close()


class Panel(w.VBox):
    """A part of the page. A click on an element with ``data-do="action:argument"`` in its HTML calls `do`."""

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
        action, _, argument = text.rpartition("#")[0].partition(":")  # the part after the last # makes the call unique
        if action:
            do(action, argument)
