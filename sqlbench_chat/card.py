"""One turn on the page: its transcript, its rows, and the actions on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ipywidgets as w
from markupsafe import Markup

from sqlbench.database.engine import in_thread
from sqlbench.database.types import QueryResult
from sqlbench_chat.parts import WIDE, button, close_tree, html
from sqlbench_chat.result import ResultView
from sqlbench_chat.session import ChatTurn
from sqlbench_chat.turn import HTML, Turn
from sqlbench_lab import view

if TYPE_CHECKING:
    from sqlbench_chat.view import ChatView


class TurnCard(w.VBox):
    """Card of one turn: in progress, answered, or from an earlier conversation."""

    def __init__(self, chat: ChatView, turn: Turn) -> None:
        self._chat, self.turn = chat, turn
        self.chat_turn: ChatTurn | None = None
        self._body, self._verdict = w.HTML(layout=WIDE), w.HTML()
        self.result = ResultView()
        self.sql = w.Textarea(placeholder="SQL to run, read-only", layout=w.Layout(width="100%", height="90px"))
        self._by_hand = w.VBox([self.sql, button("Run SQL", self.run)], layout={"display": "none", "width": "100%"})
        self._right = button("Correct", lambda: self.judge(True))
        self._wrong = button("Wrong", lambda: self.judge(False, self.remark.value))
        self.remark = w.Text(placeholder="What is wrong with it? (may stay empty)", layout=w.Layout(flex="1 1 220px"))
        self.remark.on_submit(lambda _: self.judge(False, self.remark.value))
        row = w.Layout(flex_flow="row wrap", width="100%")
        self._judging = w.HBox([self._right, self._wrong, self.remark], layout=row)
        words = [button("In words", self.say)] if chat.session and chat.session.model.family == "chat" else []
        again = button("Retry differently", self.retry)
        self._tools = w.HBox([again, button("Edit SQL", self.edit), *words], layout=row)
        self._stop = button("Stop", chat.stop, button_style="warning")
        self._retry = button("Retry", self.retry)
        super().__init__([self._body, self._stop])
        self.add_class("sqlbench-card")
        self.draw()

    def discard(self) -> None:
        """Close the card with all its parts, shown or not."""
        parts = (self._stop, self._retry, self.result, self._tools, self._by_hand, self._judging, self._verdict)
        close_tree(self, self._body, *parts)

    def html(self) -> Markup:
        """Render the transcript, first rows and verdict for display without a kernel."""
        final = self.turn.found
        rows = view.HTML.values(final.columns, final.rows) if final and final.answered else Markup("")
        return self.turn.html() + rows + HTML.verdict(self.turn)

    def draw(self) -> None:
        """Show the transcript so far."""
        self._body.value = html(self.turn.html())

    async def ready(self, chat_turn: ChatTurn | None = None) -> None:
        """Show the rows of the finished turn, and offer the actions that fit."""
        self.chat_turn = chat_turn
        self.draw()
        if not self.turn.sql:
            self.children = (self._body, self._retry)
            return
        self.sql.value = view.pretty(self.turn.sql)
        result, final = chat_turn.result if chat_turn else None, self.turn.found
        if result is None and final is not None:  # from an earlier conversation, which kept the first rows
            result = QueryResult(final.status, tuple(final.columns), [tuple(r) for r in final.rows], final.error)
            more = final.n_rows > len(final.rows)
            note = f"kept from {final.n_rows} rows; run the query again for all" if more else ""
            await self.result.show(result, note)
        elif result is not None:
            await self.result.show(result)
        self._show_verdict()

    def _show_verdict(self) -> None:
        self._verdict.value = html(HTML.verdict(self.turn))
        self._right.disabled = self._wrong.disabled = self.turn.verdict is not None
        judged = (self._verdict,) if self.turn.verdict else ()
        self.children = (self._body, self.result, self._tools, self._by_hand, self._judging, *judged)

    def judge(self, right: bool, remark: str = "") -> None:
        """Record the verdict on the answer, once; a remark on a wrong answer may follow."""
        turn = self.turn
        if not turn.sql or (turn.verdict and (right or turn.verdict == "right" or turn.remark or not remark.strip())):
            return
        if self._chat.judge(self, right, remark):
            self._show_verdict()

    def retry(self) -> None:
        """Ask again, showing the model the earlier queries with the user's remark."""
        remark = self.remark.value.strip()
        if self.turn.sql and remark:
            self.judge(False, remark)
        history = list(self.turn.history)
        if history and remark:
            history[-1] = (history[-1][0], f"{history[-1][1]}\nThe user says about this query: {remark}")
        self._chat.ask(self.turn.question, history, self.turn.database, remark)

    def edit(self) -> None:
        """Show or hide the query editor."""
        layout = self._by_hand.layout
        layout.display = "" if layout.display == "none" else "none"

    def run(self) -> None:
        """Run the edited query, read-only like the model's queries."""
        self._chat.in_background(self._run(self.sql.value))

    async def _run(self, sql: str) -> None:
        database = self._chat.opened(self.turn.database).database
        await self.result.show(await in_thread(database.execute, sql), "of the query as edited by hand")

    def say(self) -> None:
        """Let the model put the answer into words."""
        if self._chat.may_ask(1):
            self._chat.in_background(self._say())

    async def _say(self) -> None:
        assert self._chat.session is not None
        summary, self.turn.summary = self.turn.summary, "..."
        self.draw()
        try:
            summary = await self._chat.session.summarise(self.turn)
        finally:
            self.turn.summary = summary
            self.draw()
        self._chat.keep(self.turn)
