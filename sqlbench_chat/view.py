"""The whole chat page: conversation, diagram, benchmark, and the learned state beside them.

A view answers one question at a time. Work runs as tasks on the kernel's event loop and sets values of widgets, so it
shows wherever the view is displayed. Every failure becomes a message in the view, which stays usable. Text of users,
models and databases is escaped.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ipywidgets as w
from markupsafe import Markup

from sqlbench.agent.prompts import DIALECTS
from sqlbench.database.engine import in_thread
from sqlbench.errors import DatabaseError, SqlbenchError
from sqlbench.interfaces import Model, is_plugin, load_plugin
from sqlbench.models import open_model
from sqlbench.text import clean
from sqlbench_chat.allowance import spend
from sqlbench_chat.benchmark import Benchmark
from sqlbench_chat.builtin import BuiltIn
from sqlbench_chat.card import TurnCard
from sqlbench_chat.connection import Connection, Example, connect
from sqlbench_chat.conversations import Conversations
from sqlbench_chat.er import Diagram
from sqlbench_chat.offer import Offer
from sqlbench_chat.parts import WIDE, Panel, button, close_tree, html
from sqlbench_chat.prompts import PromptPanel
from sqlbench_chat.session import ChatSession
from sqlbench_chat.turn import HTML, LiveTranscript, Turn
from sqlbench_lab import view

SHOWN_CARDS = 30
BROWSERS = "browsers"
TABS = ("Chat", "ER diagram", "Benchmark")


class ChatView(Panel):
    """The chat page; it needs a running event loop, as every notebook has.

    Args:
        data: data set folder whose databases are offered; None for the user's own databases only.
        model: as in `sqlbench.models.open_model`, or a model object.
        folder: folder of conversations, feedback, bandit and prompt generations.
        reflection: endpoint for prompt evolution; by default the model itself, if it is one.
        every: number of questions between two evolutions.
        agent: the built-in one, or ``module:attribute``.
        prompts: family or TOML file to start from, if not the model's own.
        private: keep each browser's conversations and lessons in its own folder, for a page that several people reach.
        hourly: maximum number of questions per hour and browser; None for no limit.
        session: an open session, in place of all the above.
    """

    def __init__(
        self,
        data: Path | str | None = None,
        model: str | Model = "nano",
        folder: Path | str = "results/laptop/chat",
        *,
        reflection: str | None = None,
        every: int = 4,
        agent: str = "self-correcting",
        prompts: str | None = None,
        private: bool = False,
        hourly: int | None = None,
        session: ChatSession | None = None,
    ) -> None:
        self.session = session
        self._private, self._hourly, self._greeting = private, hourly, ""
        self._offered: Sequence[Example] = ()
        self.connection: Connection | None = None
        self._opened: dict[str, Connection] = {}
        self._task: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        super().__init__([], self._do, "sqlbench-chat")
        self._make_widgets()
        self.in_background(self._open(data, model, folder, reflection, every, agent, prompts))

    def _make_widgets(self) -> None:
        self._title, self._message = w.HTML(layout=WIDE), w.HTML(layout=WIDE)
        self._databases = w.Dropdown(description="database", layout=w.Layout(width="280px"))
        self._target = w.Text(
            placeholder="path.sqlite, :memory: or postgresql://user:password@host:5432/name",
            layout=w.Layout(flex="1 1 260px"),
        )
        self._connect = button("Connect", lambda: self.connect(self._target.value))
        self._question = w.Text(placeholder="Ask a question about this database", layout=w.Layout(flex="1 1 auto"))
        self._question.add_class("sqlbench-question")
        self._ask = w.Button(layout=w.Layout(width="90px"))
        self._examples, self._cards = w.HBox(layout=w.Layout(flex_flow="row wrap")), w.VBox()
        self._examples.add_class("sqlbench-examples")
        self._cards.add_class("sqlbench-turns")
        self.conversations, self.offer, self.diagram = Conversations(self), Offer(self), Diagram()
        self.bench, self.prompts = Benchmark(self), PromptPanel(lambda: self.in_background(self._go_back()))

        self._databases.observe(lambda change: change["new"] and self.in_background(self._use(change["new"])), "value")
        self._target.on_submit(lambda _: self.connect(self._target.value))
        self._ask.on_click(lambda _: self.stop() if self.busy else self.ask(self._question.value))
        self._question.on_submit(lambda _: self.ask(self._question.value))

        asking = w.HBox([self._question, self._ask], layout=WIDE)
        asking.add_class("sqlbench-ask")
        chat = w.VBox([self.conversations, self._cards, self._examples, asking])
        self._tabs = w.Tab([chat, self.diagram, self.bench], layout=w.Layout(flex="1 1 600px", min_width="0"))
        self._tabs.titles = TABS
        row = w.Layout(flex_flow="row wrap", width="100%")
        bar = w.HBox([self._databases, self._target, self._connect], layout=row)
        main = w.HBox([self._tabs, self.prompts], layout=row)
        style = w.HTML(str(view.HTML.style() + HTML.style()), layout=w.Layout(display="none"))
        script = {"output_type": "display_data", "data": {"text/html": str(HTML.script())}, "metadata": {}}
        parts = [style, w.Output(outputs=(script,)), self._title, bar, self._message, self.offer, main]
        self.children = [*parts, self._bridge]
        self._enable()

    # -- tasks

    @property
    def busy(self) -> bool:
        """Return whether a question or the benchmark is running."""
        return self._task is not None and not self._task.done()

    async def wait(self, seconds: float | None = None) -> None:
        """Wait until all tasks are over, at most the given seconds; tasks that still run are not stopped."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._tasks:
                    await asyncio.wait(self._tasks)
                    await asyncio.sleep(0)

    @property
    def cards(self) -> tuple[TurnCard, ...]:
        """Cards of the turns shown, newest last."""
        return self._cards.children

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        """Return the view, and its turns and learned state as HTML for display without a kernel."""
        learned = [Markup(part.value) for part in (self.prompts.head, self.prompts.learned)]
        static = str(view.page(HTML.style(), *(HTML.card(card.html()) for card in self.cards), *learned))
        return super()._repr_mimebundle_(**options) | {"text/plain": "chat", "text/html": static}

    def _do(self, action: str, argument: str) -> None:
        if action == "open":  # a browser has loaded the page: stored state may be newer
            self._greeting = argument
            self.guarded(self._greet)

    def _greet(self) -> None:
        """Open the conversation that the browser names as ``browser/conversation``, once there is a session."""
        browser, _, name = self._greeting.rpartition("/")
        if self.session is None or not self._ready:
            return
        folder = self.session.folder
        if self._private and folder.parent.name != BROWSERS:
            folder = folder / BROWSERS / browser
        self.session.move_to(folder)
        self.conversations.turn_to(name, folder / "conversations")
        self._show_model()
        self._offer(self._offered)
        for part in _leaves(self):  # changes while the browser loaded the page may not have reached it
            if not isinstance(part, w.Text):  # the user may be typing into it already
                part.send_state()

    @property
    def _ready(self) -> bool:
        """Return whether the owner of the conversations is known; a browser's name for itself is secret."""
        return not self._private or re.match(r"[0-9a-f]{32}/", self._greeting) is not None

    def stop(self) -> None:
        """Cancel the running question or benchmark."""
        if self._task is not None:
            self._task.cancel()

    def guarded(self, act: Callable[[], object]) -> bool:
        """Call a function, show its failure in the view, and return whether it succeeded."""
        try:
            act()
        except SqlbenchError as error:
            self.say(str(error), bad=True)
            return False
        return True

    def in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine as a task, and show its failure in the view."""

        async def safe() -> None:
            try:
                await work
            except asyncio.CancelledError:
                self.say("stopped")
            except SqlbenchError as error:
                self.say(str(error), bad=True)
            except Exception as error:
                self.say(f"internal error: {type(error).__name__}: {error}; please report it", bad=True)

        def over(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            self._enable()

        task = asyncio.get_running_loop().create_task(safe())
        self._tasks.add(task)
        task.add_done_callback(over)
        return task

    def say(self, text: str, bad: bool = False) -> None:
        """Show a one-line message above the tabs."""
        self._message.value = html(HTML.message(" ".join(text.split()), bad))

    def _enable(self) -> None:
        for control in (self._databases, self._connect):
            control.disabled = self.session is None or self.busy
        self._ask.disabled = self.session is None or self.connection is None or not self._ready
        self._ask.description, self._ask.button_style = ("Stop", "warning") if self.busy else ("Ask", "primary")
        run = self.bench.run
        run.disabled = self.session is None or not self._ready
        run.description, run.button_style = ("Cancel", "warning") if self.busy else ("Run the benchmark", "")
        for example in self._examples.children:
            example.disabled = self.busy

    async def _open(self, data: Path | str | None, model: str | Model, *how: Any) -> None:
        if self.session is None:
            self._title.value = html(HTML.title(f"loading {getattr(model, 'name', model)} ..."))
            self.session = await in_thread(_open_session, data, model, *how)
        self.conversations.turn_to("", self.session.folder / "conversations")
        self._show_model()
        if self._greeting:
            self._greet()
        if self.session.builtin is not None:
            self._databases.options = self.session.builtin.names
            self._databases.value = self.session.builtin.names[0]

    def _show_model(self) -> None:
        assert self.session is not None
        self._title.value = html(HTML.title(f"model {self.session.model.name}, kept in {self.session.folder}"))
        self._show_learned()

    def use_model(self, name: str) -> None:
        """Switch to another model, with the same databases and conversations."""
        if not self.busy and self.session is not None:
            self._task = self.in_background(self._use_model(name, self.session))
            self._enable()

    async def _use_model(self, name: str, old: ChatSession) -> None:
        _refuse_code(name, "model")
        self.say(f"loading {name} ...")
        model = await in_thread(open_model, name)
        reflection = name if name.startswith("openai:") else old.reflection
        self.session = ChatSession(model, old.folder, old.builtin, reflection, old.every, old.agent, old.start)
        self._show_model()
        if self.connection is not None:
            await self._fit(self.connection)
        self.say(f"{name} answers from now on")

    # -- databases

    def choose(self, name: str) -> None:
        """Switch to another database of the list."""
        self._databases.value = name

    def opened(self, name: str) -> Connection:
        """Return the connection to a database of this view.

        Raises:
            DatabaseError: the database was not opened here.
        """
        if name not in self._opened:
            raise DatabaseError(f"Not connected: {name}. Connect that database first.")
        return self._opened[name]

    def connect(self, target: str) -> None:
        """Connect to one of the user's own databases."""
        from sqlbench.database.target import without_password

        self._target.value = without_password(target)  # a saved notebook keeps the contents of fields
        self.say("connecting ...")
        self.in_background(self._connect_to(target))

    async def _connect_to(self, target: str) -> None:
        _refuse_code(target, "database")
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
            self.connection = None  # no question goes to the previous one, even if this one cannot be opened
            self._offer(())
            self._opened[name] = await in_thread(builtin.connect, name)
        if self._databases.value != name:  # another one was chosen meanwhile
            return
        self.connection = opened = self._opened[name]
        tables = len(opened.schema.tables)
        what = f"{DIALECTS[opened.schema.dialect]}, {tables} table{'s' * (tables != 1)}, read-only"
        self.say(opened.notice or f"connected to {name}: {what}")
        self.bench.clear()
        tabs = [*self._tabs.children[:2], *([self.bench] if builtin else [])]
        if len(tabs) != len(self._tabs.children):
            self._tabs.selected_index = 0  # first, because a page that loses its open tab opens another one
            self._tabs.children = tabs
            self._tabs.titles = TABS[: len(tabs)]
        self._show_learned()
        self._offer(())
        self.diagram.show(opened.schema)
        await self._fit(opened)

    async def _fit(self, opened: Connection) -> None:
        """Show whether the model fits a database, and offer questions that it has just answered."""
        session = self.session
        assert session is not None
        if session.foreign(opened):
            self.in_background(self.offer.show(session.model.name, opened.name))
        else:
            self.offer.hide()
        examples = await session.examples(opened)
        if self.connection is opened and self.session is session:
            self._offer(examples)

    def _offer(self, examples: Sequence[Example]) -> None:
        self._offered = examples
        buttons = [w.Button(description=example.question, tooltip="Ask this") for example in examples]
        for widget in buttons:
            widget.on_click(lambda pressed: self.ask(pressed.description))
        gone, self._examples.children = self._examples.children, buttons
        close_tree(*gone)
        self._enable()

    # -- questions

    def ask(
        self, question: str, earlier: Sequence[tuple[str, str]] = (), database: str | None = None, remark: str = ""
    ) -> None:
        """Ask a question, unless one is being answered.

        Args:
            question: question in words.
            earlier: queries that did not answer it, each with the text of its result.
            database: name of the database; the chosen one by default.
            remark: the user's remark on the last of these queries.
        """
        question = " ".join(clean(question).split())
        if self.busy or self.session is None or not self._ready or (database is None and self.connection is None):
            return
        if not self.guarded(lambda: database and self.opened(database)):
            return
        connection = self.opened(database) if database else self.connection
        assert connection is not None
        if not question or not connection.schema.tables:
            self.say(connection.notice if question else "type a question first", bad=True)
            return
        if not self.may_ask(1):
            return
        if self.session.evolution.due:
            self.in_background(self._evolve())
        self._question.value = ""
        self._tabs.selected_index = 0
        turn = Turn(question=question, database=connection.name, earlier=list(earlier), remark=remark)
        card = TurnCard(self, turn)
        cards = self._cards.children
        if (
            len(cards) >= SHOWN_CARDS
        ):  # many at a time, because the browser draws all others anew, and keeps a part of that
            cards = cards[-SHOWN_CARDS // 2 :]
        self._show_cards((*cards, card))
        self._task = self.in_background(self._answer(card, connection))
        self._enable()

    def may_ask(self, questions: int) -> bool:
        """Count questions that the model is about to answer; return whether the hourly limit allows them."""
        session, hourly = self.session, self._hourly
        return hourly is None or (
            session is not None and self.guarded(lambda: spend(session.folder, questions, hourly))
        )

    async def _answer(self, card: TurnCard, connection: Connection) -> None:
        assert self.session is not None
        turn, conversation = card.turn, self.conversations.conversation
        try:
            chat_turn = await self.session.ask(turn, connection, card.draw)
        except BaseException as error:
            stopped = isinstance(error, asyncio.CancelledError)
            LiveTranscript(turn).conclude("stopped", "" if stopped else str(error))
            await card.ready()
            raise
        await card.ready(chat_turn)
        if conversation is self.conversations.conversation:
            self.keep(turn)
        self._show_learned()

    def keep(self, turn: Turn) -> None:
        """Store a turn in the open conversation."""
        self.guarded(lambda: self.conversations.keep(turn))

    def _show_cards(self, cards: Sequence[TurnCard]) -> None:
        gone = [card for card in self._cards.children if card not in cards]
        self._cards.children = cards
        for card in gone:
            card.discard()

    def show_turns(self, turns: Sequence[Turn]) -> None:
        """Show the turns of a stored conversation."""
        cards = [TurnCard(self, turn) for turn in turns[-SHOWN_CARDS:]]
        self._show_cards(cards)
        for card in cards:
            self.in_background(card.ready())

    def judge(self, card: TurnCard, right: bool, remark: str) -> bool:
        """Record a verdict; return whether that succeeded."""
        assert self.session is not None
        session, turn = self.session, card.turn
        if not self.guarded(lambda: session.judge(turn, right, remark, card.chat_turn)):
            return False
        self.keep(turn)
        self._show_learned()
        if session.evolution.due:
            self.in_background(self._evolve())
        return True

    # -- benchmark

    def benchmark(self) -> None:
        """Measure the agent on the database's own questions of the chosen level."""
        if (
            self.busy
            or self.session is None
            or self.session.builtin is None
            or self.connection is None
            or not self._ready
        ):
            return
        questions = self.session.builtin.benchmark(self.connection.name)
        chosen = [task for task in questions if self.bench.level.value in (task.hardness, "all")]
        if not self.may_ask(len(chosen)):
            return
        self._task = self.in_background(self.bench.measure(chosen))
        self._enable()

    # -- learning

    async def _evolve(self) -> None:
        assert self.session is not None
        self.say("reflecting on the last answers to improve the prompt ...")
        await in_thread(self.session.evolution.evolve)
        self.say(f"prompt evolution: {self.session.evolution.outcome}")
        self._show_learned()

    async def _go_back(self) -> None:
        assert self.session is not None
        evolution = self.session.evolution
        evolution.rollback(evolution.history[evolution.generation].parent or 0)
        self.say(f"prompt evolution: {evolution.outcome}")
        self._show_learned()

    def _show_learned(self) -> None:
        assert self.session is not None
        dialect = DIALECTS[self.connection.schema.dialect] if self.connection else "SQL"
        self.prompts.show(self.session, dialect)


def _leaves(widget: w.Widget) -> Iterator[w.Widget]:
    children = getattr(widget, "children", ())
    for child in children:
        yield from _leaves(child)
    if not children:
        yield widget


def _refuse_code(name: str, what: str) -> None:
    """Refuse ``module:attribute`` in the fields of the page, because its users may not be those who started it."""
    if is_plugin(name.strip()):
        raise DatabaseError(f"Not a {what} that can be named here: {name}. Start the chat with it, or use ChatView.")


def _open_session(
    data: Path | str | None,
    model: str | Model,
    folder: Path | str,
    reflection: str | None,
    every: int,
    agent: str,
    prompts: str | None,
) -> ChatSession:
    if reflection is None and isinstance(model, str) and model.startswith("openai:"):
        reflection = model
    builtin = BuiltIn(data) if data is not None else None
    opened = open_model(model) if isinstance(model, str) else model
    return ChatSession(opened, folder, builtin, reflection, every, agent=load_plugin("agent", agent), prompts=prompts)
