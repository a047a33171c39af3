"""Prompt panel: the generation in use, its components, their changes, and the scores of all generations."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence

import ipywidgets as w
from markupsafe import Markup

from sqlbench_chat.generations import Generation
from sqlbench_chat.parts import WIDE, button, html
from sqlbench_chat.session import ChatSession
from sqlbench_chat.turn import HTML

MOST_WORDS = 4000
"""Maximum number of words compared; longer texts are shown without marks, as difflib can take cubic time."""
_WORD = re.compile(r"\s+|\w+|.", re.DOTALL)


def text_diff(before: str, after: str) -> Markup:
    """Mark the deleted and the inserted words of a text; show both versions in full if they are too long."""
    old, new = _WORD.findall(before), _WORD.findall(after)
    if max(len(old), len(new)) > MOST_WORDS:
        return HTML.words([("delete", before), ("insert", after)])
    parts: list[tuple[str, str]] = []
    for kind, low, high, start, end in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind == "equal":
            parts.append((kind, "".join(new[start:end])))
        else:
            parts += [("delete", "".join(old[low:high])), ("insert", "".join(new[start:end]))]
    return HTML.words([part for part in parts if part[1]])


def diff_html(before: Mapping[str, str], after: Mapping[str, str]) -> Markup:
    """Render the prompt components that differ."""
    changed = [
        (name, text_diff(before.get(name, ""), text)) for name, text in after.items() if before.get(name) != text
    ]
    return HTML.diff(changed)


def curve_html(history: Sequence[Generation]) -> Markup:
    """Render the generations' scores on held-out questions as a small curve; empty before the first score."""
    scored = [(g.number, g.score) for g in history if g.score is not None]
    if not scored:
        return Markup("")
    first = next(g for g in history if g.score is not None)
    if first.baseline is not None:
        scored.insert(0, (first.parent or 0, first.baseline))
    step = 184 / max(1, len(scored) - 1)
    return HTML.curve([(number, 8 + step * i, 52 - 44 * score, score) for i, (number, score) in enumerate(scored)])


class PromptPanel(w.VBox):
    """The panel beside the tabs."""

    def __init__(self, back: Callable[[], object]) -> None:
        self.head, self._components, self._diff, self.learned = (w.HTML(layout=WIDE) for _ in range(4))
        self._progress = w.IntProgress(layout={"width": "auto"})
        self._back = button("Go back to the previous prompt", back)
        super().__init__([self.head, self._progress, self._components, self._diff, self._back, self.learned])
        self.layout = w.Layout(flex="1 1 300px", min_width="0")
        self.add_class("sqlbench-side")

    def show(self, session: ChatSession, dialect: str) -> None:
        """Show a session's generation, progress and lessons, with the prompts for a dialect of SQL."""
        evolution = session.evolution
        seen, every = evolution.progress
        now = evolution.history[evolution.generation]
        self.head.value = html(HTML.generation(now, seen, every, evolution.unavailable), curve_html(evolution.history))
        self._progress.max, self._progress.value = every, min(seen, every)
        self._back.layout.display = "" if evolution.generation else "none"
        texts = {name: text.replace("{dialect}", dialect).strip("\n") for name, text in now.components.items()}
        self._components.value = html(HTML.components(texts))
        before = None if now.parent is None else evolution.history[now.parent].components
        self._diff.value = html(HTML.changed(now.parent, diff_html(before, now.components))) if before else ""
        self.learned.value = html(HTML.learned(session.learned_html()))
