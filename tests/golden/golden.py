"""What the library does today, as plain values: 60 greedy rollouts and their summary, configurations, stored tables.

``python tests/golden/golden.py`` writes them again; look at the difference before it is committed. A model plays the
answers of ``tasks.json``: ``!`` before an answer raises it, ``~`` marks one that was cut at the token limit.
"""

from __future__ import annotations

import asyncio
import builtins
import hashlib
import json
import sqlite3
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

from sqlbench import errors
from sqlbench.agent.prompts import prompts_for
from sqlbench.agent.trajectory import Completion, Trajectory
from sqlbench.config import RolloutConfig
from sqlbench.data.tasks import DataSet, Task, write_split
from sqlbench.database.engine import cached_database
from sqlbench.evaluation import evaluate
from sqlbench.profiles import find_profile
from sqlbench.rollout import rollout
from sqlbench.runs import RunFolder, flat
from sqlbench_lab import tables
from sqlbench_lab.figures import curve_table
from sqlbench_train.compose import compose

HERE = Path(__file__).parent
REPO = HERE.parents[1]
CHAT = 12
"""So many tasks are answered with the prompts of the chat family too."""


class Player:
    """Plays the answers of each question in their order."""

    name = "player"

    def __init__(self, family: str) -> None:
        self.family = family
        self.answers = {row["question"]: row["answers"] for row in read("tasks.json")}
        self.asked = Counter[str]()

    async def complete(self, messages, on_text=None) -> Completion:
        await asyncio.sleep(0)
        prompt = messages[-1].content
        question = next(q for q in self.answers if q in prompt)
        answer = self.answers[question][self.asked[question]]
        self.asked[question] += 1
        if answer.startswith("!"):
            kind, text = answer[1:].split(": ")
            raise getattr(errors, kind, getattr(builtins, kind, None))(text)
        words = len(prompt.split()), len(answer.split())
        reason = "length" if answer.startswith("~") else "stop"
        text = answer.removeprefix("~")
        return Completion(text=text, prompt_tokens=words[0], response_tokens=words[1], finish_reason=reason)


def read(name: str) -> Any:
    """A stored value."""
    return json.loads((HERE / name).read_text(encoding="utf-8"))


def data_set(root: Path) -> Path:
    """The tasks as a data set in a folder."""
    (root / "database/shop").mkdir(parents=True)
    with sqlite3.connect(root / "database/shop/shop.sqlite") as connection:
        connection.executescript((HERE / "shop.sql").read_text(encoding="utf-8"))
    tasks = [Task(**{k: v for k, v in row.items() if k != "answers"}) for row in read("tasks.json")]
    write_split(root, "dev", tasks)
    (root / "dataset.json").write_text(json.dumps({"name": "golden", "headline": "dev"}))
    return root


def shape(record: Trajectory) -> dict[str, Any]:
    """A rollout without times, its prompts as hashes: the text differs exactly where the hash does."""
    shown = record.model_dump(
        mode="json",
        exclude={"seconds": True, "transitions": {"__all__": {"messages": True, "completion": {"seconds"}}}}
        | {"executions": {"__all__": {"seconds"}}},
        exclude_defaults=True,
    )
    for kept, transition in zip(shown.get("transitions", []), record.transitions, strict=True):
        text = json.dumps([m.model_dump() for m in transition.messages])
        kept["prompt"] = hashlib.sha256(text.encode()).hexdigest()[:12]
    if record.error:  # the wording may change
        shown["error"] = ": ".join(record.error.split(": ")[:2])
    return shown


def rollouts(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All tasks evaluated with the nano prompts and some with the chat prompts; and the summary of the former."""
    data = data_set(folder / "data")
    summary = evaluate(data, "dev", Player("nano"), "golden", results=folder / "results", concurrency=1)
    records = list(RunFolder(folder / "results/laptop/golden").trajectories())
    records.sort(key=lambda t: int(t.task_id))
    model, dataset = Player("chat"), DataSet(data)
    database = cached_database(dataset.database("shop"))
    prompts, config = prompts_for("chat"), RolloutConfig(max_turns=2, table_info_truncate=300, strict=False)
    for task in dataset.load("dev")[:CHAT]:
        records.append(asyncio.run(rollout(task, database, model, prompts, config)))
    facts = summary.model_dump(mode="json", exclude={"data", "seconds", "rollout_seconds", "usage"})
    return [shape(t) for t in records], facts


def configuration(profile: str) -> dict[str, Any]:
    """Every key of a resolved training configuration."""
    chosen = find_profile(profile)
    config = compose(chosen, run="golden", folder=Path("/run"), data=Path("/data"), model="/model")
    return dict(sorted(flat(OmegaConf.to_container(config)).items()))


def stored_tables() -> dict[str, Any]:
    """All tables and texts that are made from the stored cells."""
    found: dict[str, Any] = {}
    for name in ("reproduce", "self_correction"):
        results = tables.load_results(REPO / "results/laptop" / name)
        frames = {
            "accuracy": tables.accuracy_table(results),
            "efficiency": tables.efficiency_table(results),
            "bars": tables.accuracy_rows(results),
            "differences": tables.difference_table(results),
            "seed_accuracy": tables.seed_comparison(REPO / "results/laptop" / name)[0],
        }
        found[name] = {key: tables.markdown(frame).splitlines() for key, frame in frames.items()}
        found[name]["headline"] = tables.headline(results)
    curves = curve_table(tables.training_runs(REPO / "results/laptop/reproduce"))
    found["curves"] = tables.markdown(curves).splitlines()
    return found


def main() -> None:
    """Write everything again."""
    pd.set_option("display.max_colwidth", None)
    with tempfile.TemporaryDirectory() as folder:
        records, summary = rollouts(Path(folder))
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    (HERE / "rollouts.jsonl").write_text("".join(lines), encoding="utf-8")
    write("summary.json", summary)
    for profile in ("laptop", "gpu"):
        write(f"{profile}.json", configuration(profile))
    write("tables.json", stored_tables())


def write(name: str, value: Any) -> None:
    """Store a value, a line for each part."""
    (HERE / name).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
