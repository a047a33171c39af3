"""Makes the small form of a training's run folder, which `results/gpu/` keeps of a run and `gpu_report.py` reads.

    python benchmarks/compact_run.py RUN OUT [--data data/spider] [--model NAME] [--sample 40]

It writes into OUT:

- ``config.json``, ``metrics.jsonl`` and ``summary.json`` as they are, with ``data/NAME`` for the place of the data, and
  ``--model`` for that of the model;
- ``validation.jsonl.gz``: a line for each validation rollout, with each query, whether it ran and was right, and each
  model call with its tokens and, of a check, its verdict. Prompts, questions and results are left out;
- ``training.jsonl``: a line for each step, with counts over its training rollouts;
- ``trajectories.jsonl``: some whole rollouts, without the ids of their prompts, for the inspector.

Queries before the last one are judged by running them again, which needs ``--data``. Without it, only those that are
the same as the last one have a verdict.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sqlbench.agent.prompts import parse_verdict
from sqlbench.agent.trajectory import OVERLONG

VALIDATION, TRAINING, SAMPLE = "validation.jsonl.gz", "training.jsonl", "trajectories.jsonl"
Right = Callable[[dict[str, Any], str], bool | None]


def records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rollouts of a ``trajectories.jsonl`` with the offset of each; a torn last line is dropped."""
    offset = 0
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield offset, json.loads(line)
            offset += len(line)


def matched(record: dict[str, Any]) -> bool | None:
    """Return whether a rollout's last query was right; None if it has no verdict."""
    verdict = record["reward"] if record.get("match") is None else record["match"]
    return None if verdict is None else verdict == 1


def judge(data: Path) -> Right:
    """Return a judge of the queries of a rollout, which runs them on the databases of a data set."""
    from sqlbench.data.tasks import open_dataset
    from sqlbench.database.engine import cached_database
    from sqlbench.reward import score

    dataset = open_dataset(data)

    def right(record: dict[str, Any], sql: str) -> bool | None:
        verdict = score(record["gold"], sql, cached_database(dataset.database(record["db_id"]))).match
        return None if verdict is None else verdict == 1

    return right


def compacted(record: dict[str, Any], right: Right | None) -> dict[str, Any]:
    """Return the small form of a validation rollout."""
    final = matched(record)
    queries = []
    for execution in record["executions"]:
        judged = execution["sql"] == record["pred"] and record["reason"] != OVERLONG
        verdict = final if judged else right(record, execution["sql"]) if right else None
        queries.append({"sql": execution["sql"], "status": execution["status"], "right": verdict})
    calls = []
    for transition in record["transitions"]:
        answer = transition["completion"]
        call = {"agent": transition["agent"], "prompt": answer["prompt_tokens"], "response": answer["response_tokens"]}
        if answer["finish_reason"] == "length":
            call["cut"] = True
        if transition["agent"] == "check":
            call |= {"turn": transition["turn"], "correct": parse_verdict(answer["text"])}
        calls.append(call)
    fields = {key: record[key] for key in ("step", "task_key", "task_id", "hardness", "reason", "error")}
    return fields | {"right": final, "queries": queries, "calls": calls}


def count(record: dict[str, Any]) -> Counter[str]:
    """Return the counts of a training rollout."""
    executions, answers = record["executions"], record["transitions"]
    checks = [t["completion"]["text"] for t in answers if t["agent"] == "check"]
    return Counter(
        rollouts=1,
        failed=record["error"] is not None,
        right=matched(record) is True,
        answers=len(answers),
        cut=sum(t["completion"]["finish_reason"] == "length" for t in answers),
        response_tokens=sum(t["completion"]["response_tokens"] or 0 for t in answers),
        rewrites=max(0, len(executions) - 1),
        repeated=sum(a["sql"] == b["sql"] for a, b in pairwise(executions)),
        checks=len(checks),
        said_incorrect=sum(not parse_verdict(text) for text in checks),
    )


def chosen(index: list[tuple[int, bool, str, int, bool | None]], size: int) -> list[int]:
    """Return the offsets of the rollouts of the sample, in the order of the file.

    Half are the same validation tasks at the first and the last validation, half whole groups of the first and the last
    training step, first those whose rewards differ. Tasks come in the order of their keys, which are hashes.

    Args:
        index: step, validation flag, task, offset and verdict of each rollout.
        size: number of rollouts.
    """
    groups: dict[tuple[bool, int, str], list[tuple[int, bool | None]]] = defaultdict(list)
    for step, validation, task, offset, verdict in index:
        groups[validation, step, task].append((offset, verdict))
    sample: list[int] = []
    for validation, room in ((True, size // 2), (False, size - size // 2)):
        steps = sorted({step for part, step, _ in groups if part == validation})
        ends = steps if len(steps) < 2 else [steps[0], steps[-1]]
        for step in ends:
            ordered = sorted(
                (len({v for _, v in members}) < 2 and not validation, task, [offset for offset, _ in members])
                for (part, at, task), members in groups.items()
                if (part, at) == (validation, step)
            )
            free = room // len(ends)
            for *_, offsets in ordered:
                if len(offsets) <= free:
                    sample += offsets
                    free -= len(offsets)
    return sorted(sample)


def compact(run: Path, out: Path, data: Path | None = None, model: str | None = None, size: int = 40) -> dict[str, int]:
    """Write the small form of a run folder, and return the numbers of rollouts that it was made from."""
    out.mkdir(parents=True, exist_ok=True)
    right, index = judge(data) if data else None, []
    logged_steps = {json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()}
    training: dict[int, Counter[str]] = defaultdict(Counter)
    with gzip.GzipFile(out / VALIDATION, "wb", mtime=0) as file:
        for offset, record in records(run / "trajectories.jsonl"):
            step = record["step"] or 0
            if step not in logged_steps:  # the training was stopped within it
                continue
            index.append((step, record["validation"], record["task_key"], offset, matched(record)))
            if record["validation"]:
                line = json.dumps(compacted(record, right), ensure_ascii=False, separators=(",", ":"))
                file.write(line.encode() + b"\n")
            else:
                training[step] += count(record)
    names = ("rollouts", "failed", "right", "answers", "cut", "response_tokens", "rewrites", "repeated")
    names += ("checks", "said_incorrect")
    with (out / TRAINING).open("w") as lines:
        for step, counts in sorted(training.items()):
            lines.write(json.dumps({"step": step} | {name: counts[name] for name in names}) + "\n")
    with (run / "trajectories.jsonl").open("rb") as file, (out / SAMPLE).open("w", encoding="utf-8") as lines:
        for offset in chosen(index, size):
            file.seek(offset)
            record = json.loads(file.readline())
            for transition in record["transitions"]:
                transition["completion"]["prompt_ids"] = None
            lines.write(json.dumps(record, ensure_ascii=False) + "\n")
    config = (run / "config.json").read_text(encoding="utf-8")
    settings = json.loads(config)["config"]["sqlbench"]
    for folder, name in ((settings["data"], f"data/{Path(settings['data']).name}"), (settings["model"], model)):
        config = config.replace(json.dumps(folder)[1:-1], name) if name else config
    (out / "config.json").write_text(config, encoding="utf-8")
    for name in ("metrics.jsonl", "summary.json"):  # the second exists if the training ended by itself
        if (run / name).is_file():
            (out / name).write_bytes((run / name).read_bytes())
    validated = sum(validation for _, validation, *_ in index)
    return {"validation": validated, "training": len(index) - validated}


def main() -> None:
    """Make the small form of one run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, help="run folder of a training")
    parser.add_argument("out", type=Path, help="folder for its small form")
    parser.add_argument("--data", type=Path, help="data set of the run; the queries before the last are judged on it")
    parser.add_argument("--model", help="name of the model, instead of the folder that config.json names")
    parser.add_argument("--sample", type=int, default=40, help="whole rollouts that are kept")
    options = parser.parse_args()
    for name in ("config.json", "metrics.jsonl", "trajectories.jsonl"):
        if not (options.run / name).is_file():
            parser.error(f"{options.run} has no {name}; name the run folder of a training")
    totals = compact(options.run, options.out, options.data, options.model, options.sample)
    size = sum(file.stat().st_size for file in options.out.iterdir())
    rollouts = f"{totals['validation']} validation and {totals['training']} training rollouts"
    print(f"{rollouts}: {size / 1e6:.2f} MB in {options.out}")


if __name__ == "__main__":
    main()
