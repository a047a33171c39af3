"""Tokens, seconds and cost of model calls, on rollouts whose sums are known."""

from __future__ import annotations

from pathlib import Path

import pytest

from sqlbench.agent.trajectory import Completion, Trajectory, Transition
from sqlbench.errors import DataError
from sqlbench.results import Rollouts, summarise
from sqlbench.usage import Latency, Price, Usage, read_prices


def call(agent: str, prompt: int | None, response: int | None, seconds: float, cached: bool = False) -> Transition:
    sent = {"temperature": 0.0} | ({"cached": True} if cached else {})
    answer = Completion(text="x", prompt_tokens=prompt, response_tokens=response, seconds=seconds, sent=sent)
    return Transition(agent=agent, turn=1, messages=[], completion=answer)


def rollouts(*calls: list[Transition], failed: int | None = None) -> Rollouts:
    return Rollouts.of(
        Trajectory(
            task_key=str(i),
            task_id=str(i),
            db_id="d",
            question="q",
            gold="SELECT 1",
            transitions=some,
            reward=None if i == failed else 1.0,
            error="model: ModelError: gone" if i == failed else None,
            seconds=10.0 * (i + 1),
        )
        for i, some in enumerate(calls)
    )


FOUND = rollouts(
    [call("write", 1000, 100, 1.0), call("check", 2000, 10, 3.0)],
    [call("write", 1000, 100, 2.0), call("check", 2000, 10, 5.0, cached=True)],
    [call("write", 3000, None, 4.0)],
    failed=2,
)


@pytest.fixture
def prices(tmp_path: Path) -> Path:
    file = tmp_path / "prices.toml"
    file.write_text('[prices.m]\nprompt = 1.0\nresponse = 10\n[prices."openai:n"]\nprompt = 2\nresponse = 0\n')
    return file


def test_calls_are_added_up_by_sub_agent_those_of_failed_rollouts_too(prices: Path) -> None:
    usage = Usage.of(FOUND, "openai:m", prices)
    assert {name: (c.calls, c.prompt, c.response) for name, c in usage.calls.items()} == {
        "all": (5, 7000, 210),
        "write": (3, 5000, 200),
        "check": (2, 2000, 10),
    }
    assert usage.calls["all"].cost == pytest.approx((7000 * 1 + 210 * 10) / 1e6)
    assert usage.calls["check"].cost == pytest.approx((2000 + 100) / 1e6)
    assert usage.calls["write"].seconds.model_dump() == pytest.approx({"p50": 2.0, "p95": 3.8})
    assert usage.rollout == Latency(p50=10.0, p95=10.0), "not of failed rollouts, nor of those with a cached answer"
    assert (usage.cached, usage.uncounted, usage.note) == (1, 1, "")
    text = usage.text()
    assert "a rollout took 10.00 s (p50), 10.00 s (p95)" in text and "1 answers came from the cache" in text
    assert text.splitlines()[2].split() == ["write", "3", "5000", "200", "2.00", "3.80", "0.007"]


def test_a_model_without_a_price_has_no_cost_and_that_is_said(prices: Path) -> None:
    unknown, known, without = (Usage.of(FOUND, *about) for about in (("x", prices), ("openai:n", prices), ("m",)))
    assert unknown.calls["all"].cost is None and unknown.note == f"no cost: x is not in {prices}"
    assert unknown.text().splitlines()[-1] == unknown.note
    assert known.calls["all"].cost == pytest.approx(0.014)
    assert without.calls["all"].cost is None and without.note == ""


def test_rollouts_of_an_earlier_version_have_no_seconds_and_may_have_no_tokens() -> None:
    old = Transition.model_validate({"agent": "write", "turn": 1, "messages": [], "completion": {"text": "x"}})
    usage = Usage.of(rollouts([old]))
    assert usage.calls["all"].seconds is None and usage.calls["all"].prompt == 0 and usage.uncounted == 1
    assert usage.table().to_numpy().tolist()[0] == ["all", 1, 0, 0, "-", "-", "-"]
    assert Usage.of(Rollouts.of([])).calls["all"].calls == 0


def test_a_summary_holds_it_and_one_without_it_can_still_be_read(prices: Path) -> None:
    summary = summarise(FOUND, model="m", prices=prices)
    assert summary.usage == Usage.of(FOUND, "m", prices) and summary.usage.text() in summary.text()
    old = summary.model_dump(mode="json", exclude={"usage"})
    assert type(summary).model_validate(old).usage is None


def test_prices_are_tables_by_model_with_or_without_a_heading(tmp_path: Path, prices: Path) -> None:
    assert read_prices(prices)["m"] == Price(prompt=1, response=10)
    bare = tmp_path / "bare.toml"
    bare.write_text("[m]\nprompt = 1\nresponse = 10\n")
    assert read_prices(bare) == {"m": Price(prompt=1, response=10)}


@pytest.mark.parametrize(
    "text",
    ["[prices", "[prices.m]\nprompt = 1", "[prices.m]\nprompt = -1\nresponse = 1", "prices = 3", "m = 1",
     "[m]\nprompt = 1\nresponse = 1\ninput = 2", "[m]\nprompt = inf\nresponse = 1", "\udcff"],
)  # fmt: skip
def test_what_is_no_price_list_is_one_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "prices.toml"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(
        DataError, match=r"^Cannot read prices from .*prices\.toml: .*Write \[prices\.MODEL\]"
    ) as caught:
        read_prices(file)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError):
        read_prices(tmp_path / "none.toml")
