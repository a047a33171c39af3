"""Evolution of prompts by trial: GEPA rewrites named prompt components, and held-out questions decide.

A reflecting model reads failed rollouts and rewrites one component, and the rewrite is tried. Deciding questions are
never reflected on, unless nothing else is known of a right answer. GEPA keeps its candidates and their Pareto front in
a folder, from which a killed run resumes. ``sqlbench evolve`` does this over a split of a data set; the chat does it
with its user's feedback (`sqlbench_chat.generations`). With few deciding questions one lucky answer can decide.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pandas as pd

from sqlbench.agent.prompts import CORRECT, INCORRECT, Prompts, prompts_for
from sqlbench.agent.repair import RepairPolicy
from sqlbench.agent.trajectory import Message, Record, Trajectory
from sqlbench.config import RolloutConfig, takes
from sqlbench.data.tasks import Task, open_dataset
from sqlbench.database.engine import cached_database
from sqlbench.errors import DataError, ModelError
from sqlbench.evaluation import dataset_name, run_sync
from sqlbench.interfaces import Agent, Database, Model, load_plugin
from sqlbench.models import open_model, trained_with
from sqlbench.results import Score, difference
from sqlbench.rollout import rollout
from sqlbench.runs import RunFolder, run_path, write_whole
from sqlbench_train.settings import EvolveConfig

CONCURRENCY = 8
STOPPED = "Prompt evolution stopped"
RETRY = "Fix this and try again; it resumes from there."
PROMPTS = "prompts.toml"
"""File of the evolved prompts in the folder of a run."""
REFLECTION = """\
An agent answers questions about databases with SQL. This is the part `{name}` of its prompts:
```
<curr_param>
```

This is how it went with that part, and what is known about the right answers:

<side_info>

Write a better version of the part. Turn what went wrong into rules that also help with other questions and other
databases, heed every remark of the user, and keep what works. {keep}Answer with the whole new
part between two lines of ```."""


class Example(Record):
    """A question to try prompts on, with what is known of its answer."""

    question: str
    db: str
    gold: str | None = None
    rejected: str = ""
    remark: str = ""


@dataclass(frozen=True)
class Trial:
    """Models, databases and settings that prompts are tried with."""

    model: Model
    reflection: Model
    database: Callable[[str], Database]
    config: RolloutConfig
    agent: Agent | None = None
    repair: RepairPolicy | None = None


class Improved(NamedTuple):
    """Outcome of GEPA."""

    components: dict[str, str]
    """The best candidate, or the starting prompts if none is better."""
    before: list[float]
    """Scores of the deciding examples with the starting prompts."""
    after: list[float]
    refused: list[str]
    """Rewrites that could not be tried, with the reason."""
    calls: int
    """Rollouts so far, including those of earlier calls on the same folder."""


def improve(
    folder: Path,
    start: Prompts,
    components: dict[str, str],
    train: list[Example],
    deciding: list[Example],
    trial: Trial,
    *,
    proposals: int | None = None,
    calls: int | None = None,
    seed: int = 0,
) -> Improved:
    """Run GEPA up to a number of rewrites or rollouts in the folder; resume from what the folder holds.

    A candidate is better if it scores higher on the deciding examples and no lower on those of them with gold.

    Args:
        folder: GEPA's folder.
        start: prompts whose fields and family every rewrite must still fit.
        components: candidate to improve.
        train: examples to reflect on.
        deciding: examples to compare candidates on.
        trial: models, databases and settings to try candidates with.
        proposals: maximum number of rewrites.
        calls: maximum number of rollouts; the last rewrite is finished.
        seed: seed of GEPA's choices.

    Raises:
        ModelError: an endpoint broke; call again to resume.
    """
    import gepa
    from gepa.utils.stop_condition import MaxCandidateProposalsStopper

    folder.mkdir(parents=True, exist_ok=True)
    adapter: Any = _Adapter(trial, start, folder)
    selector: Any = _component
    try:
        # GEPA's own logger would take over the standard output of the process.
        with open(folder / "log.txt", "a", encoding="utf-8") as log:
            result: Any = gepa.optimize(
                seed_candidate=components,
                trainset=train,
                valset=deciding,
                adapter=adapter,
                candidate_selection_strategy="pareto",
                reflection_minibatch_size=min(3, len(train)),
                module_selector=selector,
                max_metric_calls=calls,
                stop_callbacks=None if proposals is None else MaxCandidateProposalsStopper(proposals),
                display_progress_bar=calls is not None,
                run_dir=str(folder),
                logger=SimpleNamespace(log=partial(print, file=log, flush=True)),
                track_best_outputs=False,
                seed=seed,
            )
    except _ReflectionFailed as stop:
        raise ModelError(f"{STOPPED}: {str(stop.__cause__).rstrip('.')}. {RETRY}") from stop
    scores = [[subscores[i] for i in range(len(deciding))] for subscores in result.val_subscores]
    base = result.candidates.index(components)

    def right(one: list[float]) -> float:
        return sum(score for score, x in zip(one, deciding, strict=True) if x.gold)

    fit = [k for k, one in enumerate(scores) if right(one) >= right(scores[base])]
    best = max(fit, key=lambda k: (sum(scores[k]), k == base))
    return Improved(
        result.candidates[best], scores[base], scores[best], adapter.refused, result.total_metric_calls or 0
    )


@takes(EvolveConfig, "data", "split", "model", "run")
def evolve(settings: EvolveConfig) -> str:
    """Evolve the prompts of a model on a split and write ``prompts.toml`` into the run folder; return the outcome.

    Part of the split decides and is never reflected on. The same call resumes a run that was interrupted.

    Raises:
        DataError: the split has too few scorable tasks.
        ModelError: a model cannot be used, or broke; call again to resume.
        RunError: the run folder cannot be written, is in use, finished, or belongs to other settings.
    """
    folder = RunFolder(run_path(settings.results, settings.profile, settings.run))
    dataset = open_dataset(settings.data)
    tasks = sorted((t for t in dataset.load(settings.split) if t.scorable), key=lambda t: digest(settings.seed, t.key))
    if len(tasks) <= settings.held_out:
        raise DataError(
            f"Too few scorable tasks to hold out {settings.held_out}: {len(tasks)} in {settings.split} of "
            f"{settings.data}. Lower --held-out."
        )
    name = settings.reflection or settings.model
    if name == "nano":
        raise ModelError("Cannot reflect on prompts: nano. Give --reflection openai:NAME.")
    caches = [settings.cache if one.startswith("openai:") else None for one in (settings.model, name)]
    model, reflection = open_model(settings.model, cache=caches[0]), open_reflection(name, caches[1])
    start = prompts_for(settings.prompts or model.family)
    settings = settings.decided(start.family, settings.agent, trained_with(settings.model))
    trial = Trial(
        model,
        reflection,
        lambda db: cached_database(dataset.database(db), settings.limits),
        settings,
        load_plugin("agent", settings.agent),
    )
    examples = [Example(question=t.question, db=t.db_id, gold=t.gold) for t in tasks]
    config = {
        "kind": "evolve",
        **settings.model_dump(mode="json"),
        "data": dataset_name(settings.data),
        "prompts": start.components,
        "family": start.family,
        "tasks": digest(*(t.key for t in tasks)),
    }
    with folder.open(config, overwrite=settings.overwrite):
        held_out, train = examples[: settings.held_out], examples[settings.held_out :]
        improved = improve(
            folder.root / "gepa",
            start,
            start.components,
            train,
            held_out,
            trial,
            calls=settings.budget,
            seed=settings.seed,
        )
        best = Prompts(family=start.family, components=improved.components)
        write_whole(folder.root / PROMPTS, [best.toml()])
        before, after = (pd.Series(scores) for scores in (improved.before, improved.after))
        changed = [name for name, text in best.components.items() if text != start.components[name]]
        summary = {
            "score": Score.of(after, after.index).model_dump(),
            "baseline": Score.of(before, before.index).model_dump(),
            "changed": changed,
            "rollouts": improved.calls,
            "refused": improved.refused,
        }
        folder.finish(summary)
    return (
        f"held-out EX {before.mean():.1%} -> {after.mean():.1%} of {len(held_out)} tasks of {settings.split}: "
        f"{difference(before, after)}\n"
        f"changed: {', '.join(changed) or 'nothing, no rewrite answered more'}; {improved.calls} rollouts\n"
        "These tasks chose the prompts: measure them on another split with sqlbench eval --prompts."
    )


def open_reflection(name: str, cache: Path | None = None) -> Model:
    """Open a reflecting model."""
    return open_model(name, temperature=1.0, max_tokens=4096, cache=cache)


def digest(*parts: Any) -> str:
    """Hash parts to eight characters."""
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()[:8]


class _Trace(NamedTuple):
    example: Example
    trajectory: Trajectory
    score: float


class _ReflectionFailed(BaseException):
    """Failure of a reflection. GEPA skips a rewrite on any Exception, but a dead endpoint must end the cycle."""


class _Unfit(Exception):
    """Rewrite that cannot be adopted; the message says why."""


class _Adapter:
    """Lets GEPA run and read the agent: see ``gepa.core.adapter``."""

    def __init__(self, trial: Trial, start: Prompts, folder: Path) -> None:
        self.trial, self.start, self.folder = trial, start, folder
        self.refused: list[str] = []

    def evaluate(self, batch: list[Example], candidate: dict[str, str], capture_traces: bool = False) -> Any:
        from gepa.core.adapter import EvaluationBatch

        if not capture_traces and (self.folder / "gepa_state.bin").is_file():
            # A resumed GEPA scores the first candidate once more, then takes all scores from its saved state.
            return EvaluationBatch([""] * len(batch), [0.0] * len(batch))
        prompts = Prompts(family=self.start.family, components=candidate)
        traces = run_sync(lambda: self._rollouts(batch, prompts))
        return EvaluationBatch([t.trajectory.pred or "" for t in traces], [t.score for t in traces], traces)

    async def _rollouts(self, batch: list[Example], prompts: Prompts) -> list[_Trace]:
        places = asyncio.Semaphore(CONCURRENCY)

        async def one(x: Example) -> _Trace:
            fields = {"question": x.question, "gold": x.gold or x.rejected, "split": "feedback"}
            task = Task(task_id="", db_id=x.db, scorable=bool(x.gold), **fields)  # a rejected query need not run
            t = self.trial
            async with places:
                done = await rollout(task, t.database(x.db), t.model, prompts, t.config, t.repair, agent=t.agent)
            if done.error is not None:  # not the candidate's fault, so no score
                raise ModelError(f"{STOPPED}: {done.error.rstrip('.')}. {RETRY}")
            if x.gold:
                return _Trace(x, done, done.reward or 0.0)
            # Without gold, a query is right if it runs and its answer is not the rejected one.
            return _Trace(x, done, float(done.executions[-1].status == "ok" and done.reward != 1))

        return await asyncio.gather(*map(one, batch))

    def make_reflective_dataset(
        self, candidate: dict[str, str], eval_batch: Any, components_to_update: list[str]
    ) -> dict[str, list[dict[str, Any]]]:
        records = [_reflective(trace) for trace in eval_batch.trajectories]
        return {name: records for name in components_to_update}

    def propose_new_texts(
        self,
        candidate: dict[str, str],
        reflective_dataset: Mapping[str, Sequence[Mapping[str, Any]]],
        components_to_update: list[str],
    ) -> dict[str, str]:
        from gepa.strategies.instruction_proposal import InstructionProposalSignature

        texts = {}
        for name in components_to_update:
            old, needed = candidate[name], needs(self.start.components[name])
            keep = f"Keep {', '.join(needed)} in it, letter for letter: a program needs them. " if needed else ""
            inputs = {
                "current_instruction_doc": old,
                "dataset_with_feedback": reflective_dataset[name],
                "prompt_template": REFLECTION.replace("{name}", name).replace("{keep}", keep),
            }
            try:
                new = InstructionProposalSignature.run(self._reflect, inputs)["new_instruction"].strip()
                if not new:
                    raise _Unfit("is empty")
                if missing := [text for text in needed if text not in new]:
                    raise _Unfit(f"without {', '.join(missing)}")
            except _Unfit as reason:
                self.refused.append(f"a rewrite of {name} {reason}")
            else:  # components are put together as they are, so the white space around them counts
                texts[name] = old[: len(old) - len(old.lstrip())] + new + old[len(old.rstrip()) :]
        return texts

    def _reflect(self, prompt: Any) -> str:
        try:
            answer = run_sync(lambda: self.trial.reflection.complete([Message(role="user", content=prompt)]))
        except Exception as error:
            raise _ReflectionFailed from error
        text = answer.text.split("</think>", 1)[-1]  # the thoughts before it are not part of the answer
        if answer.finish_reason == "length" or text.count("```") % 2:
            raise _Unfit("was cut")
        if re.search(r"</?think\b", text):
            raise _Unfit("holds the model's thoughts")
        return text


def needs(component: str) -> list[str]:
    """Return the texts that a rewrite of a component must keep: its fields, and verdicts that the program looks for."""
    verdicts = [line for line in (CORRECT, INCORRECT) if line in component]
    return [*dict.fromkeys(re.findall(r"\{[a-z]+\}", component)), *verdicts]


def _component(
    state: Any, traces: list[_Trace], scores: list[float], index: int, candidate: dict[str, str]
) -> list[str]:
    """Choose the component to rewrite: those of the failed rollouts take turns, instructions before templates."""
    used = [t for trace in traces if trace.score < 1 for t in trace.trajectory.transitions]
    agents = dict.fromkeys(t.agent for t in used)
    repairs = dict.fromkeys(f"repair.{t.strategy}" for t in used if t.strategy)
    names = [*(f"{a}.system" for a in agents), *repairs, *(f"{a}.user" for a in agents)]
    names = [name for name in names if name in candidate] or list(candidate)
    return [names[state.i % len(names)]]


def _reflective(trace: _Trace) -> dict[str, Any]:
    """Describe one rollout to the reflecting model."""
    x, done = trace.example, trace.trajectory
    outputs = {f"{t.agent} {t.turn}": t.completion.text for t in done.transitions}
    results = {f"result {e.turn}": e.error or f"{e.n_rows} rows, such as {e.rows[:3]}" for e in done.executions}
    if trace.score >= 1:
        feedback = "The answer is right." if x.gold else "This is not the answer that the user rejected."
    elif x.gold:
        feedback = f"The answer is wrong. A right query is: {x.gold}"
    else:
        feedback = f"The answer is wrong, as was this query, which the user rejected: {x.rejected}"
    if x.remark:
        feedback += f"\nThe user's remark: {x.remark}"
    return {
        "Inputs": done.transitions[0].messages[-1].content,
        "Generated Outputs": outputs | results,
        "Feedback": feedback,
    }
