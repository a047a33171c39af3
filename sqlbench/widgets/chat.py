"""The chat: a question in, every attempt visible while it is made, a verdict back; what was learned stands beside it.

One question at a time a view. Work runs as tasks on the kernel's event loop and sets values of widgets, so it shows
wherever the view is displayed. Whatever goes wrong is one line in the view, which stays usable. Text of users, models
and databases is escaped.
"""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ipywidgets as w
from markupsafe import Markup

from sqlbench.agent.prompts import DIALECTS
from sqlbench.agent.trajectory import Trajectory
from sqlbench.connection import Connection, Example, connect, model_examples
from sqlbench.data.tasks import Task
from sqlbench.database.engine import in_thread
from sqlbench.database.schema import mermaid_er
from sqlbench.errors import SqlbenchError
from sqlbench.interfaces import load_plugin
from sqlbench.models import open_model
from sqlbench.text import clean
from sqlbench.widgets import view
from sqlbench.widgets.diagram import er_svg
from sqlbench.widgets.session import HTML, LEVELS, BuiltIn, ChatSession, Exchange, Transcript, benchmark_html

SHOWN_CARDS = 30
_WIDE = {"width": "100%"}


def _html(*parts: Markup) -> str:
    return str(view.box(*parts))


class Card(w.VBox):
    """One question: its transcript, and what the user thinks of the answer."""

    def __init__(self, chat: ChatView, question: str, database: str) -> None:
        self._chat = chat
        self._body = w.HTML(layout=_WIDE)
        self.transcript = Transcript(question, database, self._render)
        self.exchange: Exchange | None = None
        self._right = w.Button(description="Correct", icon="check", layout=w.Layout(width="110px"))
        self._wrong = w.Button(description="Wrong", icon="times", layout=w.Layout(width="110px"))
        again = w.Button(description="Retry differently", icon="refresh", layout=w.Layout(width="160px"))
        self._remark = w.Text(placeholder="What is wrong with it? (may stay empty)", layout=w.Layout(flex="1 1 auto"))
        send = w.Button(description="Send", layout=w.Layout(width="80px"))
        self._buttons = w.HBox([self._right, self._wrong, again])
        self._remarks = w.HBox([self._remark, send], layout=_WIDE)
        self._verdict = w.HTML()
        self._right.on_click(lambda _: self.judge(True))
        self._wrong.on_click(lambda _: self._show(self._remarks))
        send.on_click(lambda _: self.judge(False, self._remark.value))
        self._remark.on_submit(lambda _: self.judge(False, self._remark.value))
        again.on_click(lambda _: self.exchange and chat.ask(self.exchange.question, self.exchange))
        super().__init__([self._body])
        self.add_class("sqlbench-card")
        self._render()

    @property
    def sql(self) -> str:
        """The query that answers; empty where there is none."""
        return self.exchange.answer[0] if self.exchange and self.exchange.answer else ""

    def html(self) -> Markup:
        """Transcript and verdict."""
        return self.transcript.html() + Markup(self._verdict.value)

    def _render(self) -> None:
        self._body.value = _html(self.transcript.html())

    def _show(self, *rows: w.Widget) -> None:
        self.children = (self._body, self._buttons, *rows)

    def ready(self, exchange: Exchange) -> None:
        """The answer is there: ask for a verdict."""
        self.exchange = exchange
        self._show()

    def judge(self, right: bool, remark: str = "") -> None:
        """Give the verdict on the answer, once, with a remark on what is wrong with it."""
        if self.exchange is None or self.exchange.verdict:
            return
        if self._chat.judge(self.exchange, right, remark):
            self._verdict.value = _html(HTML.verdict(self.exchange))
            self._right.disabled = self._wrong.disabled = True
            self._show(self._verdict)


class ChatView(w.VBox):
    """The chat page; it needs a running event loop, as every notebook has.

    Args:
        data: data set folder whose databases are offered; None for own databases only.
        model: as in `sqlbench.models.open_model`.
        folder: where feedback, bandit and prompt generations are kept.
        reflection: endpoint for prompt evolution; by default the model itself, where it is one.
        agent: the built-in one, or ``module:attribute``.
        prompts: family or TOML file to start from, if not the model's own.
        session: a session that is already open, in place of all the above.
    """

    def __init__(
        self,
        data: Path | str | None = None,
        model: str = "nano",
        folder: Path | str = "results/laptop/chat",
        *,
        reflection: str | None = None,
        agent: str = "self-correcting",
        prompts: str | None = None,
        session: ChatSession | None = None,
    ) -> None:
        self.session = session
        self.connection: Connection | None = None
        self._opened: dict[str, Connection] = {}
        self._task: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._make_widgets()
        self._in_background(self._open(data, model, folder, reflection, agent, prompts))

    def _make_widgets(self) -> None:
        self._title, self._message, self._scores = (w.HTML(layout=_WIDE) for _ in range(3))
        self._databases = w.Dropdown(description="database", layout=w.Layout(width="280px"))
        self._target = w.Text(
            placeholder="path.sqlite, :memory: or postgresql://user:password@host:5432/name",
            layout=w.Layout(flex="1 1 300px"),
        )
        self._connect = w.Button(description="Connect", icon="plug", layout=w.Layout(width="110px"))
        self._question = w.Text(placeholder="Ask a question about this database", layout=w.Layout(flex="1 1 auto"))
        self._ask = w.Button(layout=w.Layout(width="90px"))
        self._examples = w.HBox(layout=w.Layout(flex_flow="row wrap"))
        self._examples.add_class("sqlbench-examples")
        self._cards = w.VBox()
        self._diagram = w.HTML(layout=w.Layout(overflow="auto"))
        self._level = w.ToggleButtons(options=["all", *LEVELS], style={"button_width": "80px"})
        self._run = w.Button(description="Run the benchmark", layout=w.Layout(width="180px"))
        self._generation, self._prompt, self._diff, self._learned = (w.HTML(layout=_WIDE) for _ in range(4))
        self._progress = w.IntProgress(layout={"width": "auto"})
        self._component = w.Dropdown(layout={"width": "auto"})
        self._back = w.Button(description="Go back to the previous prompt", layout={"width": "auto"})

        self._databases.observe(lambda change: change["new"] and self._in_background(self._use(change["new"])), "value")
        self._connect.on_click(lambda _: self.connect(self._target.value))
        self._target.on_submit(lambda _: self.connect(self._target.value))
        self._ask.on_click(lambda _: self.stop() if self.busy else self.ask(self._question.value))
        self._question.on_submit(lambda _: self.ask(self._question.value))
        self._run.on_click(lambda _: self.benchmark())
        self._component.observe(lambda _: self._show_prompt(), "value")
        self._back.on_click(lambda _: self._in_background(self._go_back()))

        chat = w.VBox([w.HBox([self._question, self._ask]), self._examples, self._cards])
        self._bench = w.VBox([w.HBox([self._level, self._run]), self._scores])
        self._tabs = w.Tab([chat, self._diagram, self._bench], layout=w.Layout(flex="1 1 64%", min_width="0"))
        self._tabs.titles = ("Chat", "ER diagram", "Benchmark")
        prompt = [self._generation, self._progress, self._component, self._prompt, self._diff, self._back]
        side = w.VBox([*prompt, self._learned], layout=w.Layout(flex="1 1 32%", min_width="0"))
        side.add_class("sqlbench-side")
        bar = w.HBox(
            [self._databases, self._target, self._connect], layout=w.Layout(flex_flow="row wrap", width="100%")
        )
        style = w.HTML(str(view.HTML.style() + HTML.style()), layout=w.Layout(display="none"))
        super().__init__([style, self._title, bar, self._message, w.HBox([self._tabs, side], layout=_WIDE)])
        self._enable()

    # -- what runs

    @property
    def busy(self) -> bool:
        """Whether a question or the benchmark is running."""
        return self._task is not None and not self._task.done()

    async def wait(self) -> None:
        """Until everything that was started is over."""
        while self._tasks:
            await asyncio.wait(self._tasks)
            await asyncio.sleep(0)

    @property
    def cards(self) -> tuple[Card, ...]:
        """What was asked in this view, the newest first."""
        return self._cards.children

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        """The view, and for places without a kernel what was asked in it and the state of learning."""
        learned = [Markup(part.value) for part in (self._generation, self._learned)]
        static = str(view.page(HTML.style(), *(HTML.card(card.html()) for card in self.cards), *learned))
        return super()._repr_mimebundle_(**options) | {"text/plain": "chat", "text/html": static}

    def stop(self) -> None:
        """Give up the question or benchmark that is running."""
        if self._task is not None:
            self._task.cancel()

    def _in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run something whose failure is one line in the view."""

        async def guarded() -> None:
            try:
                await work
            except asyncio.CancelledError:
                self._say("stopped")
            except SqlbenchError as error:
                self._say(str(error), bad=True)
            except Exception as error:
                self._say(f"internal error: {type(error).__name__}: {error}; please report it", bad=True)

        def over(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            self._enable()

        task = asyncio.get_running_loop().create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(over)
        return task

    def _say(self, text: str, bad: bool = False) -> None:
        self._message.value = _html(HTML.message(" ".join(text.split()), bad))

    def _enable(self) -> None:
        for control in (self._databases, self._connect, self._run):
            control.disabled = self.session is None or self.busy
        self._ask.disabled = self.session is None or self.connection is None
        self._ask.description, self._ask.button_style = ("Stop", "warning") if self.busy else ("Ask", "primary")
        for button in self._examples.children:
            button.disabled = self.busy

    async def _open(self, data: Path | str | None, model: str, *how: Any) -> None:
        self._title.value = _html(HTML.title(f"loading {model} ..."))
        if self.session is None:
            self.session = await in_thread(_open_session, data, model, *how)
        session = self.session
        self._title.value = _html(HTML.title(f"model {session.model.name}, learned state in {session.folder}"))
        self._component.options = list(session.evolution.prompts.components)
        self._component.value = "write.system"
        self._show_learned()
        if session.builtin is not None:
            self._databases.options = session.builtin.names
            self._databases.value = session.builtin.names[0]

    # -- databases

    def choose(self, name: str) -> None:
        """Turn to another database of the list."""
        self._databases.value = name

    def connect(self, target: str) -> None:
        """Connect a database of the user's own."""
        from sqlbench.database.target import without_password

        self._target.value = without_password(target)  # a saved notebook keeps what stands in fields
        self._say("connecting ...")
        self._in_background(self._connect_to(target))

    async def _connect_to(self, target: str) -> None:
        opened = await in_thread(connect, target)
        name, number = opened.name, 2
        while name in self._databases.options:
            name, number = f"{opened.name} ({number})", number + 1
        self._opened[name] = replace(opened, name=name)
        self._target.value = ""
        self._databases.options = [*self._databases.options, name]
        self._databases.value = name

    async def _use(self, name: str) -> None:
        assert self.session is not None
        builtin = self.session.builtin if self.session.builtin and name in self.session.builtin.names else None
        if builtin and name not in self._opened:
            self.connection = None  # no question goes to the one before, now or where this one cannot be opened
            self._offer(())
            self._opened[name] = await in_thread(builtin.connect, name)
        if self._databases.value != name:  # another one was chosen meanwhile
            return
        self.connection = opened = self._opened[name]
        tables = len(opened.schema.tables)
        what = f"{DIALECTS[opened.schema.dialect]}, {tables} table{'s' * (tables != 1)}, read-only"
        self._say(opened.notice or f"connected to {name}: {what}")
        source = view.folded("as mermaid text", view.HTML.pre(mermaid_er(opened.schema)))
        self._diagram.value = er_svg(opened.schema) + _html(source)
        self._scores.value = ""
        tabs = [*self._tabs.children[:2], *([self._bench] if builtin else [])]
        if len(tabs) != len(self._tabs.children):
            self._tabs.selected_index = 0  # first: a page that loses its open tab opens another by itself
            self._tabs.children = tabs
            self._tabs.titles = ("Chat", "ER diagram", "Benchmark")[: len(tabs)]
        self._show_prompt()
        self._offer(opened.examples)
        if not builtin and opened.schema.tables and self.session.model.name.startswith("openai:"):
            self._opened[name] = replace(opened, examples=tuple(await model_examples(opened, self.session.model)))
            if self.connection is opened:
                self.connection = self._opened[name]
                self._offer(self.connection.examples)

    def _offer(self, examples: Sequence[Example]) -> None:
        buttons = [w.Button(description=example.question, tooltip="Ask this") for example in examples]
        for button in buttons:
            button.on_click(lambda pressed: self.ask(pressed.description))
        self._examples.children = buttons
        self._enable()

    # -- questions

    def ask(self, question: str, again: Exchange | None = None) -> None:
        """Ask a question, unless one is being answered; `again` is an exchange whose queries were not the answer."""
        question, connection = " ".join(clean(question).split()), again.connection if again else self.connection
        if self.busy or self.session is None or connection is None:
            return
        if not question or not connection.schema.tables:
            self._say(connection.notice if question else "type a question first", bad=True)
            return
        if self.session.evolution.due:
            self._in_background(self._evolve())
        self._question.value = ""
        self._tabs.selected_index = 0
        card = Card(self, question, connection.name)
        self._cards.children = (card, *self._cards.children[: SHOWN_CARDS - 1])
        self._task = self._in_background(self._answer(card, connection, again.history if again else ()))
        self._enable()

    async def _answer(self, card: Card, connection: Connection, earlier: Sequence[tuple[str, str]]) -> None:
        assert self.session is not None
        try:
            card.ready(await self.session.ask(card.transcript.question, connection, card.transcript, earlier))
        except BaseException:
            card.transcript.conclude("stopped")
            raise
        self._show_learned()

    def judge(self, exchange: Exchange, right: bool, remark: str) -> bool:
        """Take in a verdict; says whether that went well."""
        assert self.session is not None
        try:
            self.session.judge(exchange, right, remark)
            self._show_learned()
        except SqlbenchError as error:
            self._say(str(error), bad=True)
            return False
        if self.session.evolution.due:
            self._in_background(self._evolve())
        return True

    # -- benchmark

    def benchmark(self) -> None:
        """Measure the agent on the database's own questions of the chosen level."""
        if self.busy or self.session is None or self.session.builtin is None or self.connection is None:
            return
        questions = self.session.builtin.benchmark(self.connection.name)
        chosen = [task for task in questions if self._level.value in (task.hardness, "all")]
        self._task = self._in_background(self._measure(self.session, self.connection, chosen))
        self._enable()

    async def _measure(self, session: ChatSession, connection: Connection, tasks: Sequence[Task]) -> None:
        def show(rollouts: Sequence[Trajectory]) -> None:
            self._scores.value = _html(benchmark_html(rollouts, len(tasks)))

        show([])
        await session.benchmark(connection, tasks, show)

    # -- what was learned

    async def _evolve(self) -> None:
        assert self.session is not None
        self._say("reflecting on the last answers to improve the prompt ...")
        await in_thread(self.session.evolution.evolve)
        self._say(f"prompt evolution: {self.session.evolution.outcome}")
        self._show_learned()

    async def _go_back(self) -> None:
        assert self.session is not None
        evolution = self.session.evolution
        evolution.rollback(evolution.history[evolution.generation].parent or 0)
        self._say(f"prompt evolution: {evolution.outcome}")
        self._show_learned()

    def _show_learned(self) -> None:
        assert self.session is not None
        evolution = self.session.evolution
        seen, every = evolution.progress
        self._generation.value = _html(HTML.generation(evolution.generation, seen, every, evolution.unavailable))
        self._progress.max, self._progress.value = every, min(seen, every)
        self._back.layout.display = "" if evolution.generation else "none"
        self._learned.value = _html(HTML.learned(self.session.learned_html()))
        self._show_prompt()

    def _show_prompt(self) -> None:
        if self.session is None or not self._component.value:
            return
        evolution = self.session.evolution
        now = evolution.history[evolution.generation]
        dialect = DIALECTS[self.connection.schema.dialect] if self.connection else "SQL"
        text = now.components[self._component.value].replace("{dialect}", dialect)
        self._prompt.value = _html(view.HTML.pre(text.strip("\n")))
        before = None if now.parent is None else evolution.history[now.parent].components
        self._diff.value = _html(HTML.changed(now.parent, diff_html(before, now.components)) if before else Markup(""))


def diff_html(before: Mapping[str, str], after: Mapping[str, str]) -> Markup:
    """The lines of each prompt component that differ."""
    parts = []
    for name, text in after.items():
        lines = difflib.ndiff(before.get(name, "").splitlines(), text.splitlines())
        if changed := [line for line in lines if line[0] in "+-"]:
            parts.append((name, changed))
    return HTML.diff(parts)


def _open_session(
    data: Path | str | None,
    model: str,
    folder: Path | str,
    reflection: str | None,
    agent: str,
    prompts: str | None,
) -> ChatSession:
    if reflection is None and model.startswith("openai:"):
        reflection = model
    builtin = BuiltIn(data) if data is not None else None
    return ChatSession(
        open_model(model), folder, builtin, reflection, agent=load_plugin("agent", agent), prompts=prompts
    )
