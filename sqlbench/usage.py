"""What the model calls of rollouts took: tokens, seconds and cost, by sub-agent.

Every call on record counts, those of failed rollouts included, for they were paid for. An answer from a cache
(`sqlbench.models.cache`) cost nothing and took no time: it counts as a call alone. Prices are in whatever currency the
file has, for a million tokens, by the name of the model with or without ``openai:``:

    [prices.my-model]
    prompt = 0.15
    response = 0.60
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from pydantic import Field, TypeAdapter, ValidationError

from sqlbench.agent.trajectory import Record
from sqlbench.errors import DataError

if TYPE_CHECKING:
    from sqlbench.results import Rollouts


class Price(Record):
    """Price of a million tokens."""

    prompt: float = Field(ge=0, allow_inf_nan=False)
    response: float = Field(ge=0, allow_inf_nan=False)


class Latency(Record):
    """Seconds, as the median and the 95th percentile."""

    p50: float
    p95: float

    @classmethod
    def of(cls, seconds: pd.Series) -> Latency | None:
        """Read them off some measurements; None where nothing was measured."""
        known = seconds[seconds > 0]
        return None if known.empty else cls(p50=known.quantile(0.5), p95=known.quantile(0.95))


class Calls(Record):
    """Some calls together."""

    calls: int
    prompt: int
    """Tokens that are known, as the next."""
    response: int
    seconds: Latency | None
    cost: float | None
    """None without a price."""

    @classmethod
    def of(cls, calls: pd.DataFrame, price: Price | None) -> Calls:
        """Add some calls up."""
        made = calls[~calls["cached"]]
        prompt, response = int(made["prompt"].sum()), int(made["response"].sum())
        cost = None if price is None else (prompt * price.prompt + response * price.response) / 1e6
        return cls(calls=len(calls), prompt=prompt, response=response, seconds=Latency.of(made["seconds"]), cost=cost)


class Usage(Record):
    """What an evaluation took."""

    calls: dict[str, Calls]
    """By sub-agent, and ``all``."""
    rollout: Latency | None
    """Of rollouts that did not fail and of which no answer came from a cache."""
    cached: int
    """Answers that came from a cache."""
    uncounted: int
    """Answers whose tokens the model did not count; a cost leaves them out."""
    note: str
    """Reason for a missing cost; empty if there is a cost, or no prices were given."""

    @classmethod
    def of(cls, found: Rollouts, model: str = "", prices: Path | None = None) -> Usage:
        """Add up the calls of rollouts.

        Args:
            found: the rollouts.
            model: whose calls they are.
            prices: file of prices.

        Raises:
            DataError: the file cannot be read.
        """
        known = {} if prices is None else read_prices(prices)
        price = known.get(model) or known.get(model.removeprefix("openai:"))
        calls, rows = found.calls, found.rollouts
        groups = {"all": calls} | {str(k): v for k, v in calls.groupby("agent", sort=False)}
        whole = rows[~rows["failed"] & ~rows.index.isin(calls.loc[calls["cached"], "rollout"])]
        return cls(
            calls={name: Calls.of(group, price) for name, group in groups.items()},
            rollout=Latency.of(whole["seconds"]),
            cached=int(calls["cached"].sum()),
            uncounted=int((calls["prompt"].isna() | calls["response"].isna()).sum()),
            note="" if prices is None or price else f"no cost: {model or 'the model'} is not in {prices}",
        )

    def table(self) -> pd.DataFrame:
        """Tabulate it, one row per sub-agent."""
        rows = [
            {
                "calls of": name,
                "calls": c.calls,
                "prompt tokens": c.prompt,
                "response tokens": c.response,
                "p50 (s)": "-" if c.seconds is None else f"{c.seconds.p50:.2f}",
                "p95 (s)": "-" if c.seconds is None else f"{c.seconds.p95:.2f}",
                "cost": "-" if c.cost is None else f"{c.cost:.4g}",
            }
            for name, c in self.calls.items()
        ]
        return pd.DataFrame(rows)

    def text(self) -> str:
        """Write it in lines, for the command line."""
        lines = [self.table().to_string(index=False)]
        if self.rollout is not None:
            lines.append(f"a rollout took {self.rollout.p50:.2f} s (p50), {self.rollout.p95:.2f} s (p95)")
        if self.cached:
            lines.append(f"{self.cached} answers came from the cache: no tokens, seconds or cost")
        if self.uncounted:
            lines.append(f"{self.uncounted} answers have no token counts")
        return "\n".join([*lines, self.note] if self.note else lines)


def read_prices(file: Path) -> dict[str, Price]:
    """Read a file of prices.

    Raises:
        DataError: it cannot be read, or is not one.
    """
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
        return TypeAdapter(dict[str, Price]).validate_python(tables.get("prices", tables))
    except ValidationError as error:
        first = error.errors()[0]
        why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except (OSError, ValueError) as error:
        why = str(error)
    raise DataError(f"Cannot read prices from {file}: {why}. Write [prices.MODEL] with prompt and response.")
