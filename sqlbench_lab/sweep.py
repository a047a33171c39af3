"""The cells of an ablation, and the named grids for demo, tests and tables."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import model_validator

from sqlbench.config import CUT, RolloutConfig, Settings

AGENTS, AGENTS_CHECK = "write|rewrite", "write|rewrite|check"


_CONTROLS = {"coin": "random reward", "permuted": "permuted reward"}


class Experiment(Settings):
    """One training configuration; every default is that of the headline experiment."""

    turns: int = 3
    context: int = 2048
    """`table_info_truncate` and `execution_truncate`, in characters, as in the seed experiment."""
    agents: str = AGENTS
    """Regular expression over sub-agent names that selects the transitions to train on and to count."""
    model: str = "nano"
    seed: int = 1
    control: Literal["coin", "permuted"] | None = None
    """Rewards from which nothing can be learned (`sqlbench_train.credit.CONTROLS`)."""
    credit: str = "rollout"
    """Credit for a transition, one of `sqlbench_train.credit.CREDITS`."""
    steps: int = 40

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, given: Any) -> Any:
        """Read cells that were stored when the coin was the only control."""
        if not isinstance(given, dict) or "random_reward" not in given:
            return given
        fields = {key: value for key, value in given.items() if key != "random_reward"}
        return fields | {"control": "coin" if given["random_reward"] else None}

    @property
    def name(self) -> str:
        """Return the folder name, unique among cells that differ."""
        parts = [f"t{self.turns}", f"c{self.context}", self.agents.replace("|", "-")]
        parts += [] if self.model == "nano" else [slug(self.model)]
        parts += [] if self.steps == 40 else [f"{self.steps}steps"]
        parts += [] if self.seed == 1 else [f"seed{self.seed}"]
        parts += [_CONTROLS[self.control].replace(" ", "-")] if self.control else []
        parts += {"rollout": [], "transition": ["credit"]}.get(self.credit, [self.credit])
        return "_".join(parts)

    @property
    def label(self) -> str:
        """Return the text of the tables' model column."""
        model = "nano" if self.model == "nano" else re.sub(r"-[\d.]+B.*", "", self.model.split("/")[-1])
        notes = [f"seed {self.seed}"] * (self.seed != 1) + ([_CONTROLS[self.control]] if self.control else [])
        notes += self._credit
        return f"{model} ({', '.join(notes)})" if notes else model

    @property
    def title(self) -> str:
        """Describe the cell in words, without its seed."""
        words = [] if self.model == "nano" else [self.model.split("/")[-1]]
        words += [f"{self.turns} turn{'s' * (self.turns > 1)}", f"context {self.context}", self.agents]
        words += [] if self.steps == 40 else [f"{self.steps} step{'s' * (self.steps > 1)}"]
        words += [_CONTROLS[self.control]] if self.control else []
        return ", ".join([*words, *self._credit])

    @property
    def _credit(self) -> list[str]:
        return {"rollout": [], "published": ["as published"]}.get(self.credit, [f"credit by {self.credit}"])

    @property
    def mini_batch(self) -> int:
        """Number of tasks per optimizer step, so that a batch of 32 takes about as many steps as the seed experiment.

        It counted 32 rows, not tasks: one step with a single turn, two with three turns, three to four with the check.
        """
        return 32 if self.turns == 1 else 16 if self.agents == AGENTS else 8

    @property
    def rollout(self) -> RolloutConfig:
        """Return the settings of every rollout of this cell, in training and in evaluation."""
        context = {"table_info_truncate": self.context, "execution_truncate": self.context}
        return RolloutConfig(max_turns=self.turns, **context, **CUT)


@dataclass(frozen=True)
class Sweep:
    """Cells to run, and the tasks on which each is measured before and after."""

    cells: tuple[Experiment, ...]
    split: str = "headline"
    limit: int | None = None
    overrides: tuple[str, ...] = ()
    recipe: str | None = None
    """Recipe of every training (`sqlbench_train.launch.train`)."""
    names: tuple[str, ...] = ()
    """Short names of the cells, in their order; their own names if empty."""

    @property
    def rows(self) -> dict[str, Experiment]:
        """Cells by the name that chooses one of them."""
        return dict(zip(self.names or [cell.name for cell in self.cells], self.cells, strict=True))


def _factorial(contexts: Iterable[int], **common: object) -> tuple[Experiment, ...]:
    return tuple(
        Experiment(turns=turns, context=context, agents=agents, **common)
        for context in contexts
        for turns in (1, 3)
        for agents in (AGENTS, AGENTS_CHECK)
    )


LAPTOP_CONTEXTS = (192, 2048)
"""Context lengths in characters. The schemas of the embedded data set take 160 to 290: the first length cuts most of
them, the second none."""
_QWEN, _LLAMA = "Qwen/Qwen2.5-Coder-{}-Instruct", "meta-llama/Llama-3.2-{}-Instruct"
_SEED = Experiment(model=_QWEN.format("3B"), credit="published", steps=436)
_SEED_ROWS = {
    "llama-1b": _SEED.model_copy(update={"model": _LLAMA.format("1B")}),
    "llama-3b": _SEED.model_copy(update={"model": _LLAMA.format("3B")}),
    "qwen-1.5b": _SEED.model_copy(update={"model": _QWEN.format("1.5B")}),
    "qwen-3b-1turn": _SEED.model_copy(update={"turns": 1}),
    "qwen-3b": _SEED,
    "qwen-3b-check": _SEED.model_copy(update={"agents": AGENTS_CHECK}),
    "qwen-3b-4096-1turn": _SEED.model_copy(update={"context": 4096, "turns": 1}),
    "qwen-3b-4096": _SEED.model_copy(update={"context": 4096}),
}

SMALLEST = (
    "data.train_batch_size=2",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "actor_rollout_ref.rollout.n=2",
    "sqlbench.validation_tasks=8",
    "sqlbench.sampling=uniform",
)
"""Overrides for the smallest training."""

GRIDS: dict[str, Sweep] = {
    "smoke": Sweep((Experiment(steps=2), Experiment(turns=1, steps=1)), limit=8, overrides=SMALLEST),
    "short": Sweep((Experiment(), Experiment(turns=1), Experiment(agents=AGENTS_CHECK, steps=10))),
    "full": Sweep(
        (
            *_factorial(LAPTOP_CONTEXTS),
            Experiment(seed=2),
            Experiment(seed=3),
            Experiment(control="coin"),
        )
    ),
    "seed": Sweep(
        tuple(_SEED_ROWS.values()),
        split="dev_500",
        # 436 steps of 32 are 2 epochs of train_spider.json, 7,000 tasks. A release with train_others.json has more. If
        # databases are missing, the gold audit leaves fewer tasks, and a third epoch begins.
        overrides=("data.train_max_samples=7000", "trainer.total_epochs=3"),
        recipe="seed",
        names=tuple(_SEED_ROWS),
    ),
}
"""Named grids: ``smoke`` for tests, ``short`` for the demo, ``full`` for the laptop's whole grid with two more seeds of
the headline cell and its random-reward control, ``seed`` for the eight rows of the seed experiment (GPU)."""


def slug(model: str) -> str:
    """Turn a model's name into a part of a folder name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", model.split("/")[-1])
