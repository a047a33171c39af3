"""Usage of the model calls of rollouts: tokens, seconds and cost, by sub-agent.

Every recorded call counts, including those of failed rollouts, because they were paid for. An answer from a cache
(`sqlbench.models.cache`) cost nothing and took no time: it counts only as a call. Prices are per million tokens, in the
currency of the file, by the name of the model with or without ``openai:``:

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
        """Compute the percentiles of some measurements; None where nothing was measured."""
        positive = seconds[seconds > 0]
        return None if positive.empty else cls(p50=positive.quantile(0.5), p95=positive.quantile(0.95))


class Calls(Record):
    """Totals of some calls."""

    calls: int
    prompt: int
    """Known tokens, like the next field."""
    response: int
    seconds: Latency | None
    cost: float | None
    """Cost in the currency of the price; None without a price."""

    @classmethod
    def of(cls, calls: pd.DataFrame, price: Price | None) -> Calls:
        """Add up some calls."""
        paid = calls[~calls["cached"]]
        prompt, response = int(paid["prompt"].sum()), int(paid["response"].sum())
        cost = None if price is None else (prompt * price.prompt + response * price.response) / 1e6
        return cls(calls=len(calls), prompt=prompt, response=response, seconds=Latency.of(paid["seconds"]), cost=cost)


class Usage(Record):
    """Usage of an evaluation."""

    calls: dict[str, Calls]
    """Totals by sub-agent, and under ``all``."""
    rollout: Latency | None
    """Seconds of the rollouts that did not fail and had no answer from a cache."""
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
            model: name of the model.
            prices: file of prices.

        Raises:
            DataError: the file cannot be read.
        """
        priced = {} if prices is None else read_prices(prices)
        price = priced.get(model) or priced.get(model.removeprefix("openai:"))
        calls, rows = found.calls, found.rollouts
        groups = {"all": calls} | {str(k): v for k, v in calls.groupby("agent", sort=False)}
        complete = rows[~rows["failed"] & ~rows.index.isin(calls.loc[calls["cached"], "rollout"])]
        return cls(
            calls={name: Calls.of(group, price) for name, group in groups.items()},
            rollout=Latency.of(complete["seconds"]),
            cached=int(calls["cached"].sum()),
            uncounted=int((calls["prompt"].isna() | calls["response"].isna()).sum()),
            note="" if prices is None or price else f"no cost: {model or 'the model'} is not in {prices}",
        )

    def table(self) -> pd.DataFrame:
        """Tabulate the usage, one row per sub-agent."""
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
        """Write the usage in lines for the command line."""
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
        DataError: it cannot be read, or is not a file of prices.
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
