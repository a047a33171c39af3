"""Conditions for self-correction to correct: trains the arms of an experiment and measures their repair loops.

    python benchmarks/self_correction.py --out DIR [--data DATA_SET] [--seeds N] [--only ARM]

Every arm is trained by GRPO with three turns from one of two policies and measured on the headline split:

- ``baseline``: nano, the reward of the last query for every trained transition of a rollout, `check` not trained.
- ``credit``: nano, `check` trained, a query rewarded for its own match and a check for its verdict.
- ``warm-up``: as the baseline, from a policy that has seen its own mistakes.
- ``warm-up and credit``: both.

The warm-up is supervised and uses the material of pretraining only, no task of the data set: nano answers questions in
which words were replaced by words that do not exist, so that it fails about as often as on wording it does not know;
then it learns to rewrite those wrong queries, to tell them from right ones, and to keep the right answers it gave.

Everything is written below DIR and can be resumed: ``mistakes.jsonl``, the policy ``warm``, the cells as
`sqlbench_lab.ablation` lays them out, and the table as Markdown and JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import sys
from contextlib import closing
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from pocket import NANO_PATH
from pocket.domains import Domain
from pocket.nano import END, answer_loss, prompt_text, word_pieces
from pocket.pretraining import Example, Examples, connect, execute, same_result, schema_of
from sqlbench.agent.prompts import CORRECT, INCORRECT, prompts_for, render_execution
from sqlbench.agent.trajectory import Message
from sqlbench.errors import SqlbenchError
from sqlbench.models.local import encode_chat
from sqlbench.runs import RunFolder
from sqlbench_lab.ablation import Workspace, run_cell
from sqlbench_lab.self_correction import correction, row
from sqlbench_lab.sweep import AGENTS, AGENTS_CHECK, Experiment, Sweep
from sqlbench_lab.tables import markdown
from verl_cpu.engine import GenerationRequest, LocalEngine

QUESTIONS, STEPS, RATE, BATCH_TOKENS = 8000, 900, 3e-4, 4096
REPLACED = 0.35
"""Probability that a word that names nothing is replaced or, one time in five, left out."""

ARMS: dict[str, dict[str, Any]] = {
    "baseline": {"agents": AGENTS},
    "credit": {"agents": AGENTS_CHECK, "credit": "transition"},
    "warm-up": {"agents": AGENTS, "model": "warm"},
    "warm-up and credit": {"agents": AGENTS_CHECK, "credit": "transition", "model": "warm"},
}


def disturb(question: str, domain: Domain, sql: str, words: list[str], rng: random.Random) -> str:
    """Replace words of a question by words that do not exist; names of the schema and values of the query stay."""
    keep = {part for table, fields in domain.tables.items() for name in (table, *(f.name for f in fields))
            for part in name.split("_")}  # fmt: skip
    keep |= {word.lower() for value in re.findall(r"'[^']*'|\d[\d.]*", sql) for word in re.findall(r"\w+", value)}
    kept_words = []
    for word in question.split():
        core = re.sub(r"\W", "", word)
        idle = core and not core[0].isdigit() and not {core.lower(), core.lower().rstrip("s")} & keep
        if idle and rng.random() < REPLACED:
            if rng.random() < 0.2:
                continue
            word = word.replace(core, rng.choice(words))
        kept_words.append(word)
    return " ".join(kept_words)


def write_mistakes(path: Path, seed: int) -> None:
    """Let nano answer disturbed questions, greedily and sampled once, and write down its answers."""
    engine = LocalEngine(str(NANO_PATH))
    tokenizer, prompts, rng = engine.tokenizer, prompts_for("nano"), random.Random(f"mistakes {seed}")
    source = Examples(seed + 77, *word_pieces(tokenizer))
    words = [source.inventor.word(rng) for _ in range(400)]
    drawn, requests = [], []
    for number in range(QUESTIONS):
        domain = source.inventor.domain(source.rng, 2) if rng.random() < 0.7 else rng.choice(source.seen)
        question = source.question(domain, 2, True)
        text = disturb(question.text, domain, question.sql, words, rng)
        schema = source.shown_schema(domain, question.sql, 0.4)
        drawn.append((text, schema, question.sql, domain))
        ids = tuple(encode_chat(tokenizer, [m.model_dump() for m in prompts.write(text, schema, "sqlite")]))
        requests += [GenerationRequest(ids, 128, float(k), seed=2 * number + k) for k in (0, 1)]
    rows = []
    for start in tqdm(range(0, len(requests), 256), desc="answers", unit="batch"):
        for offset, answer in enumerate(engine.generate(requests[start : start + 256])):
            text, schema, gold, domain = drawn[(start + offset) // 2]
            sql = tokenizer.decode(answer.token_ids, skip_special_tokens=True).strip()
            with closing(connect(domain)) as connection:
                result = render_execution(execute(connection, sql), "nano", 2048, schema_of(domain))
                right = sql == gold or same_result(connection, sql, gold)
            rows.append(
                {"question": text, "schema": schema, "sql": sql, "gold": gold, "result": result, "right": right}
            )
    building = path.with_suffix(".new")
    building.write_text("".join(json.dumps(r) + "\n" for r in {(r["question"], r["sql"]): r for r in rows}.values()))
    building.replace(path)


def warm_up(mistakes: Path, out: Path, seed: int) -> None:
    """Train nano on its wrong and right answers, and write the policy."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    rng, prompts = random.Random(seed), prompts_for("nano")
    tokenizer = AutoTokenizer.from_pretrained(NANO_PATH)
    examples: list[tuple[list[int], list[int]]] = []

    def learn(agent: str, messages: list[Message], answer: str) -> None:
        prompt = prompt_text(Example(agent, messages, answer))
        ids = tokenizer([prompt, answer + END], add_special_tokens=False)["input_ids"]
        examples.append((ids[0], ids[1]))

    for r in map(json.loads, mistakes.read_text().splitlines()):
        place = (r["question"], r["schema"], "sqlite")
        learn("check", prompts.check(*place, r["sql"], r["result"]), CORRECT if r["right"] else INCORRECT)
        if r["right"]:
            learn("write", prompts.write(*place), r["sql"])
        else:
            learn("rewrite", prompts.rewrite(*place, r["sql"], r["result"], INCORRECT), r["gold"])
    model = AutoModelForCausalLM.from_pretrained(NANO_PATH, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)
    pool: list[list] = []
    for step in tqdm(range(STEPS), desc="warm-up", unit="step"):
        if not pool:
            pool = [[]]
            for pair in sorted(examples, key=lambda p: len(p[0]) + len(p[1]) + rng.random() * 4):
                if pool[-1] and (len(pair[0]) + len(pair[1])) * (len(pool[-1]) + 1) > BATCH_TOKENS:
                    pool.append([])
                pool[-1].append(pair)
            rng.shuffle(pool)
        answer_loss(model, pool.pop()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 20) * (1 + math.cos(math.pi * step / STEPS)) / 2
        optimizer.step()
        optimizer.zero_grad()
    building = out.with_name(out.name + ".new")
    rmtree(building, ignore_errors=True)
    copytree(NANO_PATH, building)
    model.save_pretrained(building)
    note = json.loads((NANO_PATH / "sqlbench.json").read_text())
    note["warm_up"] = {"questions": QUESTIONS, "examples": len(examples), "steps": STEPS, "rate": RATE, "seed": seed}
    (building / "sqlbench.json").write_text(json.dumps(note, indent=1, sort_keys=True) + "\n")
    building.rename(out)


def table(bench: Workspace, cells: dict[str, list[Experiment]]) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """Return one row per measured policy: the two before training, and every trained cell."""
    rows, records = [], []

    def add(arm: str, seed: int | str, folder: Path) -> None:
        if not (folder / "summary.json").is_file():
            return
        result = correction(RunFolder(folder).trajectories(), bench.data)
        rows.append({"Arm": arm, "Seed": seed} | row(result))
        records.append({"arm": arm, "seed": seed} | result.model_dump())

    add("nano, before training", "", bench.folder / "cells/before_t3_c2048")
    add("warm-up, before training", "", bench.folder / "cells/before_t3_c2048_warm")
    for arm, trained in cells.items():
        for cell in trained:
            add(arm, cell.seed, bench.cell(cell) / "after")
    return pd.DataFrame(rows), records


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that is written")
    parser.add_argument("--data", type=Path, default=Path("data/pocket"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=list(ARMS), help="train only this arm")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--override", action="append", default=[], help="key=value for every training")
    options = parser.parse_args()
    out: Path = options.out
    try:
        out.mkdir(parents=True, exist_ok=True)
        mistakes, warm = out / "mistakes.jsonl", out / "warm"
        if not mistakes.is_file():
            write_mistakes(mistakes, seed=0)
        if not warm.is_dir():
            warm_up(mistakes, warm, seed=0)
        bench = Workspace(run="runs", data=str(options.data), results=str(out))
        cells = {
            arm: [
                Experiment(
                    **fields | ({"model": str(warm)} if "model" in fields else {}), seed=seed, steps=options.steps
                )
                for seed in range(1, options.seeds + 1)
            ]
            for arm, fields in ARMS.items()
        }
        for seed in range(options.seeds):  # one seed of every arm before the next
            for arm, trained in cells.items():
                if options.only in (None, arm):
                    run_cell(trained[seed], bench, Sweep((trained[seed],), overrides=tuple(options.override)))
        frame, records = table(bench, cells)
        (out / "self_correction.md").write_text(markdown(frame) + "\n")
        (out / "self_correction.json").write_text(json.dumps(records, indent=1) + "\n")
        print(frame.to_string(index=False))
    except (SqlbenchError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted. Run the same command again to resume.")


if __name__ == "__main__":
    main()
