"""Prompt evolution against a real endpoint on localhost, whose SQL depends on the rules in its prompt."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from gepa.core.state import GEPAState

from sqlbench.agent.prompts import CORRECT, INCORRECT, Prompts, prompts_for
from sqlbench.agent.repair import FixedRepair
from sqlbench.config import RolloutConfig
from sqlbench.data.tasks import DataSet, Task, write_split
from sqlbench.database.engine import Database, cached_database
from sqlbench.errors import DataError, ModelError, RunError
from sqlbench.models import open_model
from sqlbench.rollout import rollout
from sqlbench_chat.generations import HELD_OUT, PROPOSALS, Evolution, Feedback, FeedbackStore
from sqlbench_chat.session import ChatSession
from sqlbench_train.evolve import evolve, needs

CHAT = prompts_for("chat")
ONE_QUERY = RolloutConfig(max_turns=1)
FIRST, SECOND, HARMFUL = "Name every table you need.", "Count with care.", "Answer only what was asked before."
USELESS = "Try harder."
WRONG = "SELECT 'wrong'"


class Endpoint(ThreadingHTTPServer):
    """A model that knows every gold query and gives it away only where the prompt holds the rule for its question.

    Tasks fall into three groups, by number: one is always right, two need a rule each. A reflection gets what `reflect`
    says, given the prompt and the part of the agent's prompt that it is about.
    """

    daemon_threads = True

    def __init__(self, tasks: list[Task]) -> None:
        self.group = {task.question: i % 3 for i, task in enumerate(tasks)}
        self.gold = {task.question: task.gold for task in tasks}
        self.reflect: Callable[[str, str], str] = lambda prompt, part: f"{part}\n- {FIRST}"
        self.reflections: list[str] = []
        self.form, self.finish = "Here it is.\n```\n{}\n```", "stop"
        self.answered = 0
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                messages = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"]
                text = owner.answer([m["content"] for m in messages])
                finish = owner.finish if len(messages) == 1 else "stop"
                body = {"id": "1", "object": "chat.completion", "created": 1, "model": "m"}
                answer = {"role": "assistant", "content": text}
                body |= {"choices": [{"index": 0, "finish_reason": finish, "message": answer}]}
                raw = json.dumps(body).encode()
                self.send_response(200 if text else 400)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_: object) -> None: ...

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, messages: list[str]) -> str:
        if len(messages) == 1:
            self.reflections.append(messages[0])
            part = re.search(r"of its prompts:\n```\n(.*?)\n```\n\nThis is how", messages[0], re.S)[1]
            proposal = self.reflect(messages[0], part)
            return proposal and self.form.replace("{}", proposal)
        system, user = messages
        if "You review" in system:
            return "THE QUERY IS INCORRECT"
        self.answered += 1
        question = re.search(r"^Question: (.*)$", user, re.M)[1]
        prompt = system + user
        rules = {0: HARMFUL not in prompt, 1: FIRST in prompt, 2: SECOND in prompt}
        return f"```sql\n{self.gold[question] if rules[self.group[question]] else WRONG}\n```"


@pytest.fixture
def world(pocket: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """An endpoint, 90 questions on one database (the user's, held out, and unseen), and ways to evolve and measure."""
    every = {t.question: t for t in pocket.load("dev")}.values()
    ((db, _),) = Counter(t.db_id for t in every).most_common(1)
    tasks = [t for t in every if t.db_id == db][:90]
    assert len(tasks) == 90
    endpoint = Endpoint(tasks)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{endpoint.server_address[1]}/v1")
    monkeypatch.setenv("NO_PROXY", "*")

    def database(name: str) -> Database:
        return cached_database(pocket.database(name))

    def evolution(folder: str = "evolution", reflection: str | None = "openai:m", **options) -> Evolution:
        options = {"tasks": tasks[30:60], "config": ONE_QUERY, "database": database} | options
        return Evolution(tmp_path / folder, CHAT, reflection, **options)

    def asked(evolution: Evolution, group: int, count: int = 4, **fields) -> list[Task]:
        """The user asks questions of one group and is told something wrong."""
        some = [t for t in tasks[:30] if endpoint.group[t.question] == group][:count]
        for task in some:
            feedback = {
                "sql": WRONG,
                "execution": "1 row\nwrong",
                "verdict": "wrong",
                "generation": evolution.generation,
            }
            evolution.record(Feedback(question=task.question, db=db, **feedback | fields))
        return some

    def accuracy(prompts: Prompts) -> float:
        """Execution match on tasks that evolution never saw."""
        model = open_model("openai:m")

        async def run() -> list[float | None]:
            runs = [rollout(t, database(db), model, prompts, ONE_QUERY) for t in tasks[60:90]]
            return [t.reward for t in await asyncio.gather(*runs)]

        rewards = asyncio.run(run())
        return sum(r or 0 for r in rewards) / len(rewards)

    yield SimpleNamespace(
        db=db, tasks=tasks, endpoint=endpoint, database=database, evolution=evolution, asked=asked, accuracy=accuracy
    )
    endpoint.shutdown()
    endpoint.server_close()


def test_a_better_prompt_is_found_and_answers_more_unseen_questions(world):
    evolution = world.evolution()
    assert (evolution.generation, evolution.progress, evolution.due) == (0, (0, 4), False)
    world.asked(evolution, 1, 3)
    assert (evolution.progress, evolution.due) == ((3, 4), False)
    world.asked(evolution, 1, 4)  # the first three once more: they count once
    assert (evolution.progress, evolution.due) == ((4, 4), True)
    made = evolution.evolve()
    assert made is not None and made == evolution.history[1]
    assert (made.number, made.parent, evolution.generation, made.held_out) == (1, 0, 1, HELD_OUT)
    assert made.score > made.baseline > 0
    assert FIRST in made.components["write.system"] and evolution.prompts.components == made.components
    assert evolution.outcome == f"generation 1: {made.baseline:.1%} -> {made.score:.1%} of 20 held-out questions"
    assert (evolution.progress, evolution.due) == ((0, 4), False)
    groups = [world.endpoint.group[t.question] for t in world.tasks[60:]]
    assert world.accuracy(CHAT) == pytest.approx(groups.count(0) / len(groups))
    assert world.accuracy(evolution.prompts) == pytest.approx((groups.count(0) + groups.count(1)) / len(groups))
    again = world.evolution()
    assert (again.generation, again.history, again.progress) == (1, evolution.history, (0, 4))


def test_the_next_cycle_goes_on_from_the_same_candidates_and_their_pareto_front(world):
    evolution = world.evolution()
    world.asked(evolution, 1)
    evolution.evolve()
    world.endpoint.reflect = lambda prompt, part: f"{part}\n- {SECOND}"
    world.asked(evolution, 2)
    second = evolution.evolve()
    assert second.parent == 1 and second.baseline == evolution.history[1].score and second.score == 1
    assert FIRST in second.components["write.system"] and SECOND in "".join(second.components.values())
    assert world.accuracy(evolution.prompts) == 1
    (run,) = evolution.folder.glob("run-*")
    state = GEPAState.load(str(run))
    assert state.i + 1 == 2 * PROPOSALS and state.program_candidates[0] == CHAT.components
    best = state.program_candidates.index(second.components)
    assert len(state.program_at_pareto_front_valset) == HELD_OUT
    assert all(best in front for front in state.program_at_pareto_front_valset.values())


def test_a_cycle_that_cannot_be_read_is_begun_anew(world):
    evolution = world.evolution()
    world.asked(evolution, 1)
    (evolution.folder / "cycle.json").write_text('{"after": 1}')
    assert evolution.evolve() is not None and evolution.generation == 1


def test_a_useless_rewrite_leaves_the_prompts_as_they_are(world):
    evolution = world.evolution()
    world.endpoint.reflect = lambda prompt, part: f"{part}\n- {USELESS}"
    world.asked(evolution, 1)
    assert evolution.evolve() is None
    assert (evolution.generation, len(evolution.history), evolution.prompts) == (0, 1, CHAT)
    assert len(world.endpoint.reflections) == PROPOSALS
    assert re.fullmatch(r"no rewrite answered more than \d+\.\d% of 20 held-out questions", evolution.outcome)
    assert evolution.progress == (0, 4)


def test_a_rewrite_that_helps_only_where_it_was_reflected_on_is_rejected_on_held_out_questions(world):
    evolution = world.evolution()
    failed = world.asked(evolution, 1)
    # All but what the user asked is right as it stands, and would be wrong with the rule that helps the user.
    world.endpoint.group |= {t.question: 0 for t in world.tasks if t not in failed}
    world.endpoint.reflect = lambda prompt, part: f"{part}\n- {FIRST}\n- {HARMFUL}"
    assert evolution.evolve() is None
    assert evolution.prompts == CHAT and evolution.outcome.startswith("no rewrite answered more than 100.0%")
    (run,) = evolution.folder.glob("run-*")
    state = GEPAState.load(str(run))  # it did look better on what was reflected on
    assert len(state.program_candidates) > 1 and max(state.program_full_scores_val_set[1:]) == 0


def test_held_out_questions_are_never_reflected_on(world):
    evolution = world.evolution(tasks=world.tasks[:60])
    cycles = []

    def reflect(prompt: str, part: str) -> str:
        cycles.append(json.loads((evolution.folder / "cycle.json").read_text()))
        return f"{part}\n- {FIRST}"

    world.endpoint.reflect = reflect
    failed = {t.question for t in world.asked(evolution, 1, 10)}
    evolution.evolve()
    reflected = {
        t.question for t in world.tasks for p in world.endpoint.reflections if f"Question: {t.question}\n" in p
    }
    held_out = {x["question"] for x in cycles[0]["held_out"]}
    assert reflected and reflected <= failed and len(held_out) == HELD_OUT and not held_out & failed


def test_remarks_and_right_queries_reach_the_reflection(world):
    evolution = world.evolution(tasks=world.tasks[:60])
    (task, *_) = world.asked(evolution, 1, 3, remark="we never count the closed ones")
    evolution.evolve()
    prompt = next(p for p in world.endpoint.reflections if task.question in p)
    assert "The user's remark: we never count the closed ones" in prompt
    assert f"A right query is: {task.gold}" in prompt and WRONG in prompt and "`write.system`" in prompt


def test_a_rewrite_without_a_needed_field_is_refused_with_the_reason(world):
    evolution = world.evolution()
    world.endpoint.reflect = lambda prompt, part: f"{FIRST}"
    world.asked(evolution, 1)
    before = world.endpoint.answered
    assert evolution.evolve() is None and evolution.prompts == CHAT
    assert "refused: a rewrite of write.system without {dialect}" in evolution.outcome
    assert "refused: a rewrite of write.user without {dialect}, {schema}, {question}" in evolution.outcome
    assert all("Keep {dialect}" in p for p in world.endpoint.reflections)
    assert world.endpoint.answered - before <= HELD_OUT + 3 * PROPOSALS, "a refused rewrite must not be tried"


@pytest.mark.parametrize(
    ("form", "finish", "reason"),
    [
        ("```\n{}\n```", "length", "was cut"),
        ("```\n{}\n", "stop", "was cut"),
        ("{}\nmore\n```", "stop", "was cut"),
        ("```\n{}\n</think>\n{}\n```", "stop", "was cut"),
        ("<think>\n```\n{}\n```", "stop", "holds the model's thoughts"),
        ("{} <think>", "stop", "holds the model's thoughts"),
        ("```\n<think>hm</think>\n{}</think>\n```", "stop", "was cut"),
        ("<think>hm</think>\n```\n{}\n</think>\n```", "stop", "holds the model's thoughts"),
        ("```\n{}\n```\n</think>", "stop", "is empty"),
        ("<think>hm</think>", "stop", "is empty"),
        ("``````", "stop", "is empty"),
    ],
)
def test_a_reflection_that_was_cut_or_holds_thoughts_is_not_adopted(world, form, finish, reason):
    evolution = world.evolution()
    world.endpoint.form, world.endpoint.finish = form, finish
    world.asked(evolution, 1)
    before = world.endpoint.answered
    assert evolution.evolve() is None and evolution.prompts == CHAT
    assert f"refused: a rewrite of write.system {reason}" in evolution.outcome
    assert world.endpoint.answered - before <= HELD_OUT + 3 * PROPOSALS, "a refused rewrite must not be tried"


@pytest.mark.parametrize("thoughts", ["<think>\nIt needs ```tables```\n</think>\n", "It needs more.\n</think>"])
def test_what_a_model_thinks_before_its_reflection_is_left_out(world, thoughts):
    evolution = world.evolution()
    world.endpoint.form = thoughts + "Here it is.\n```\n{}\n```"
    world.asked(evolution, 1)
    generation = evolution.evolve()
    assert generation is not None and FIRST in generation.components["write.system"]
    assert "think" not in generation.components["write.system"] and "It needs" not in str(generation.components)


def test_what_a_component_needs_is_its_fields_and_verdicts():
    assert needs(CHAT.components["check.system"]) == ["{dialect}", CORRECT, INCORRECT]
    assert needs(CHAT.components["rewrite.history"]) == ["{sql}", "{execution}"]
    assert needs(CHAT.components["repair.rewrite_full"]) == []


def test_every_component_that_was_used_has_its_turn_and_keeps_the_white_space_around_it(world):
    evolution = world.evolution(config=RolloutConfig(max_turns=2), repair=FixedRepair("fix_column"))
    world.endpoint.reflect = lambda prompt, part: f"{part.strip()}\n{USELESS}"
    for _ in range(2):
        world.asked(evolution, 1, generation=len(evolution.store.all()))
        assert evolution.evolve() is None
    named = [re.search(r"part `(.*?)`", p)[1] for p in world.endpoint.reflections]
    assert named == ["write.system", "check.system", "rewrite.system", "repair.fix_column", "write.user", "check.user"]
    (run,) = evolution.folder.glob("run-*")
    old = CHAT.components["repair.fix_column"]
    assert old.startswith("\n\n")
    assert f"Proposed new text for repair.fix_column: {old}\n{USELESS}\n" in (run / "log.txt").read_text()


def test_rollback_brings_the_old_prompts_back_and_the_next_cycle_starts_there(world):
    evolution = world.evolution()
    world.asked(evolution, 1)
    evolution.evolve()
    evolution.rollback(0)
    assert (evolution.generation, evolution.prompts, len(evolution.history)) == (0, CHAT, 2)
    assert evolution.outcome == "rolled back from generation 1 to 0"
    assert world.evolution().generation == 0, "a rollback outlives the process"
    world.endpoint.reflect = lambda prompt, part: f"{part}\n- {SECOND}"
    world.asked(evolution, 2)
    made = evolution.evolve()
    assert (made.number, made.parent) == (2, 0)
    assert FIRST not in made.components["write.system"] and SECOND in made.components["write.system"]
    with pytest.raises(DataError, match=r"Unknown generation: 3. Choose one from 0 to 2"):
        evolution.rollback(3)


def test_a_killed_cycle_goes_on_where_it_was(world, tmp_path, pocket):
    evolution = world.evolution()
    world.asked(evolution, 1)
    hang, reached = threading.Event(), threading.Event()

    def reflect(prompt: str, part: str) -> str:
        if len(world.endpoint.reflections) == 1:
            return f"{part}\n- {USELESS}"
        reached.set()
        hang.wait(100)
        return f"{part}\n- {FIRST}"

    world.endpoint.reflect = reflect
    code = """if True:
        import sys
        from sqlbench.agent.prompts import prompts_for
        from sqlbench.config import RolloutConfig
        from sqlbench.data.tasks import DataSet
        from sqlbench.database.engine import cached_database
        from sqlbench_chat.generations import Evolution
        folder, data, db, questions = sys.argv[1:]
        tasks = [t for t in DataSet(data).load("dev") if t.db_id == db and t.question in questions.splitlines()]
        Evolution(folder, prompts_for("chat"), "openai:m", tasks=tasks, config=RolloutConfig(max_turns=1),
                  database=lambda name: cached_database(DataSet(data).database(name))).evolve()
        """
    questions = "\n".join(t.question for t in world.tasks[30:60])
    command = [sys.executable, "-c", code, str(tmp_path / "evolution"), str(pocket.root), world.db, questions]
    process = subprocess.Popen(command)
    try:
        assert reached.wait(200), "the second rewrite was never asked for"
        with pytest.raises(RunError, match="are evolving already"):
            evolution.rollback(0)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        hang.set()
    assert evolution.generation == 0 and (evolution.folder / "cycle.json").is_file()
    answered = world.endpoint.answered
    again = world.evolution()
    world.asked(again, 2, remark="said after the crash")  # changes nothing in the cycle that is under way
    made = again.evolve()
    assert made is not None and FIRST in made.components["write.user"] and 0 < made.baseline < made.score
    assert len(world.endpoint.reflections) == 3, "only the rewrite that was lost must be asked for again"
    assert "said after the crash" not in "".join(world.endpoint.reflections)
    # Two rewrites are left, each measured on three failures; the starting prompts are not measured again.
    assert world.endpoint.answered - answered <= 2 * (3 + 3) + HELD_OUT
    assert not (again.folder / "cycle.json").exists() and again.progress == (4, 4)


def test_an_endpoint_that_breaks_ends_the_cycle_with_one_line_and_loses_nothing(world):
    evolution = world.evolution()
    world.asked(evolution, 1)
    world.endpoint.reflect = lambda prompt, part: ""  # answered with HTTP 400
    with pytest.raises(
        ModelError, match=r"^Prompt evolution stopped: Request refused by model 'm' at .*400.* it resumes from there\.$"
    ):
        evolution.evolve()
    assert evolution.due and evolution.prompts == CHAT
    world.endpoint.reflect = lambda prompt, part: f"{part}\n- {FIRST}"
    assert evolution.evolve().number == 1


def test_answers_marked_right_are_the_held_out_questions_of_a_database_without_tasks(world):
    evolution = world.evolution(tasks=())
    failed = world.asked(evolution, 1, remark="not these")
    right = [t for t in world.tasks[:60] if world.endpoint.group[t.question] < 2 and t not in failed][:6]
    for task in right:
        evolution.record(Feedback(question=task.question, db=world.db, sql=task.gold, verdict="right"))
    assert evolution.unavailable is None and evolution.due
    made = evolution.evolve()
    assert (made.held_out, made.score) == (6, 1.0) and made.baseline < 1
    judged = "and on 4 rejected queries, where another result counts (0 -> 4)"
    assert evolution.outcome == f"generation 1: {made.baseline:.1%} -> 100.0% of 6 held-out questions, {judged}"
    assert "which the user rejected: SELECT 'wrong'" in world.endpoint.reflections[0]
    assert not [t for t in right if f"Question: {t.question}\n" in "".join(world.endpoint.reflections)]


def test_remarks_alone_are_learned_from_and_the_outcome_says_what_decided(world):
    evolution = world.evolution(tasks=())
    world.asked(evolution, 1, remark="name the tables")
    assert evolution.unavailable is None and evolution.due
    made = evolution.evolve()
    assert "The user's remark: name the tables" in world.endpoint.reflections[0]
    assert (made.number, made.held_out, made.score) == (1, 0, None) and FIRST in made.components["write.system"]
    assert evolution.outcome == "generation 1: judged on 4 rejected queries, where another result counts (0 -> 4)"
    world.endpoint.reflect = lambda prompt, part: f"{part}\n- {USELESS}"
    world.asked(evolution, 2, remark="count with care")
    assert evolution.evolve() is None
    assert evolution.outcome == "no rewrite did better on 8 rejected queries, where another result counts"


def test_answers_marked_right_stop_a_rewrite_that_harms_them_even_if_it_helps_with_remarks(world):
    evolution = world.evolution(tasks=())
    world.asked(evolution, 1, remark="name the tables")
    for task in [t for t in world.tasks[:60] if world.endpoint.group[t.question] == 0][:2]:
        evolution.record(Feedback(question=task.question, db=world.db, sql=task.gold, verdict="right"))
    world.endpoint.reflect = lambda prompt, part: f"{part}\n- {FIRST}\n- {HARMFUL}"
    assert evolution.evolve() is None and evolution.prompts == CHAT
    assert "answered more than 100.0% of 2 held-out questions, and on 4 rejected queries" in evolution.outcome
    world.endpoint.reflect = lambda prompt, part: f"{part}\n- {FIRST}"
    world.asked(evolution, 1, remark="name the tables, please")
    made = evolution.evolve()
    assert (made.held_out, made.baseline, made.score) == (2, 1.0, 1.0), "as right as before, and of use to the user"


def test_where_a_database_has_tasks_the_users_own_verdicts_are_no_gold(world):
    evolution = world.evolution(tasks=world.tasks[30:32])
    for task in [t for t in world.tasks[:30] if world.endpoint.group[t.question] == 0]:
        evolution.record(Feedback(question=task.question, db=world.db, sql=WRONG, verdict="right"))
    world.asked(evolution, 1)
    evolution.evolve()
    assert "of 2 held-out questions, and on 4 rejected queries" in evolution.outcome


def test_a_cycle_reflects_on_the_newest_failures(world):
    evolution = world.evolution()
    for task in world.tasks[:25]:
        evolution.record(Feedback(question=task.question, db=world.db, sql=WRONG, verdict="wrong"))
    cycles = []

    def reflect(prompt: str, part: str) -> str:
        cycles.append(json.loads((evolution.folder / "cycle.json").read_text()))
        return f"{part}\n- {USELESS}"

    world.endpoint.reflect = reflect
    evolution.evolve()
    assert [x["question"] for x in cycles[0]["train"]] == [t.question for t in world.tasks[5:25]]


def test_answers_that_did_not_even_run_can_be_learned_from(world, monkeypatch):
    monkeypatch.setitem(globals(), "WRONG", "SELECT nothing FROM nowhere")
    evolution = world.evolution(tasks=())
    failed = world.asked(evolution, 1)
    for task in [t for t in world.tasks[:60] if world.endpoint.group[t.question] < 2 and t not in failed][:6]:
        evolution.record(Feedback(question=task.question, db=world.db, sql=task.gold, verdict="right"))
    assert evolution.evolve().number == 1


def test_a_rejected_answer_given_again_counts_as_wrong(world):
    evolution = world.evolution(tasks=())
    right = [t for t in world.tasks[:60] if world.endpoint.group[t.question] == 0][:4]
    for task in right:
        evolution.record(Feedback(question=task.question, db=world.db, sql=task.gold, verdict="right"))
    world.asked(evolution, 1)
    world.endpoint.reflect = lambda prompt, part: f"{part}\n- {USELESS}"
    assert evolution.evolve() is None
    (run,) = evolution.folder.glob("run-*")
    tried = json.loads((run / "run_log.json").read_text())
    assert [t["new_subsample_scores"] for t in tried] == [[0.0] * 3] * PROPOSALS


def test_without_failures_there_is_nothing_to_try(world):
    evolution = world.evolution()
    world.asked(evolution, 0, sql="SELECT 1", verdict="right")
    assert evolution.due and evolution.evolve() is None
    assert evolution.outcome == "nothing has failed, so nothing was tried" and not world.endpoint.reflections
    assert evolution.progress == (0, 4)


@pytest.mark.parametrize(
    ("reflection", "address", "message"),
    [
        (None, "http://x", "it takes a capable model behind an OpenAI-compatible endpoint, and none was given"),
        ("nano", "http://x", "and 'nano' is not one; name one as openai:NAME"),
        ("openai:m", "", "Set OPENAI_API_KEY, or OPENAI_BASE_URL"),
    ],
)
def test_without_an_endpoint_one_line_says_so_and_the_rest_works(world, monkeypatch, reflection, address, message):
    monkeypatch.setenv("OPENAI_BASE_URL", address)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    evolution = world.evolution(reflection=reflection)
    assert message in evolution.unavailable and "\n" not in evolution.unavailable
    world.asked(evolution, 1)
    assert (evolution.progress, evolution.due, evolution.prompts) == ((4, 4), False, CHAT)
    with pytest.raises(ModelError, match="prompt evolution is off"):
        evolution.evolve()


def test_a_database_that_is_gone_is_left_out(world, tmp_path):
    def one_only(name: str) -> Database:
        return {world.db: world.database(world.db)}[name]

    evolution = world.evolution(database=one_only)
    world.asked(evolution, 1)
    evolution.record(Feedback(question="Who?", db="gone", sql=WRONG, verdict="wrong", remark="about what is gone"))
    assert evolution.evolve().number == 1
    assert "about what is gone" not in "".join(world.endpoint.reflections)


def test_feedback_is_kept_once_a_query_and_a_torn_line_is_dropped(tmp_path):
    store = FeedbackStore(tmp_path / "feedback.jsonl")
    first = Feedback(question="Wie viele Sänger?", db="concert", sql="SELECT 1", execution="1 row")
    second = Feedback(question="Who?", db="concert", sql="SELECT 2", execution="error: no such table: x")
    store.append(first)
    store.append(second)
    judged = first.model_copy(update={"verdict": "wrong", "remark": "all of them"})
    store.append(judged)
    assert store.all() == [judged, second] and [f.failed for f in store.all()] == [True, True]
    with open(store.path, "ab") as file:
        file.write(b'{"question": "torn')
    store.append(second.model_copy(update={"verdict": "right"}))
    assert [f.failed for f in store.all()] == [True, False]


def test_a_damaged_file_is_one_line(tmp_path, world):
    (tmp_path / "evolution").mkdir()
    (tmp_path / "evolution" / "feedback.jsonl").write_text('{"question": 1}\n')
    with pytest.raises(DataError, match=r"Damaged file .*feedback\.jsonl: .* Move it away"):
        world.evolution()


def test_other_prompts_to_start_from_have_a_history_of_their_own(world, tmp_path):
    evolution = world.evolution()
    world.asked(evolution, 1)
    evolution.evolve()
    other = Evolution(tmp_path / "evolution", prompts_for("nano"), "openai:m", database=world.database)
    assert (other.generation, other.prompts, other.progress) == (0, prompts_for("nano"), (0, 4))
    assert world.evolution().generation == 1


def test_a_crash_after_the_end_of_a_cycle_does_not_run_it_again(world, tmp_path):
    evolution = world.evolution()

    def reflect(prompt: str, part: str) -> str:
        shutil.copy(evolution.folder / "cycle.json", tmp_path / "left")
        return f"{part}\n- {FIRST}"

    world.endpoint.reflect = reflect
    world.asked(evolution, 1)
    first = evolution.evolve()
    shutil.copy(tmp_path / "left", evolution.folder / "cycle.json")
    again = world.evolution()
    assert again.generation == 1 and again.evolve() is None
    assert (
        again.generation == 1
        and again.outcome == f"no rewrite answered more than {first.score:.1%} of 20 held-out questions"
    )


def test_nano_answers_while_an_endpoint_reflects(world, tmp_path):
    options = {"model": "nano", "database": world.database, "tasks": world.tasks[30:60], "config": ONE_QUERY}
    evolution = Evolution(tmp_path / "evolution", prompts_for("nano"), "openai:m", **options)
    world.asked(evolution, 1)
    evolution.evolve()
    assert "of 20 held-out questions" in evolution.outcome and evolution.progress == (0, 4)
    assert world.endpoint.answered == 0


def test_the_command_evolves_prompts_on_a_split_and_every_command_takes_them(world, pocket, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "database").symlink_to(pocket.root / "database")
    (data / "dataset.json").write_text('{"name": "t", "headline": "train"}')
    write_split(data, "train", world.tasks[:60])

    def run(name: str = "evolved", **more) -> str:
        options = {"budget": 100, "held_out": 12, "max_turns": 1, "results": tmp_path / "results"}
        return evolve(data, "train", "openai:m", name, **options | more)

    # The second reflection is answered with HTTP 400.
    world.endpoint.reflect = lambda prompt, part: "" if world.endpoint.reflections[1:] else f"{part}\n- {USELESS}"
    with pytest.raises(ModelError, match="it resumes from there"):
        run()
    answered = world.endpoint.answered
    world.endpoint.reflect = lambda prompt, part: f"{part}\n- {FIRST if 'write.system' in prompt else SECOND}"
    text = run()
    folder = tmp_path / "results/laptop/evolved"
    # The last rewrite may take 18 more; of what was tried before the failure only its three examples are tried again.
    assert world.endpoint.answered <= 100 + 18 + 3
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["baseline"]["n"] == summary["score"]["n"] == 12 and summary["rollouts"] >= 100 > answered
    assert summary["score"]["ex"] > summary["baseline"]["ex"] and "write.system" in summary["changed"]
    assert "of 12 tasks of train" in text and "sqlbench eval --prompts" in text
    config = json.loads((folder / "config.json").read_text())  # the prompts were tried on what an evaluation shows
    assert (config["schema_linking"], config["sample_rows"], config["value_hints"]) == (True, 3, True)
    evolved = prompts_for(str(folder / "prompts.toml"))
    assert FIRST in evolved.components["write.system"] and evolved.family == "chat"
    assert world.accuracy(evolved) > world.accuracy(CHAT)
    chat = ChatSession(open_model("openai:m"), tmp_path / "chat", prompts=str(folder / "prompts.toml"))
    assert chat.evolution.prompts == evolved
    with pytest.raises(RunError, match="already finished"):
        run()
    with pytest.raises(DataError, match=r"Too few scorable tasks to hold out 60: 60 in train"):
        run("other", held_out=60)
    with pytest.raises(ModelError, match="Cannot reflect on prompts: nano"):
        evolve(data, "train", "nano", "other", results=tmp_path / "results")
