"""Figures read run folders, show every seed, and are the same when drawn again."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest

from sqlbench.errors import DataError
from sqlbench_lab.figures import (
    COLOURS,
    before_after,
    curve_table,
    read_metrics,
    reward_curves,
    save_figure,
    series,
    time_shares,
    time_split,
)
from sqlbench_train.metrics import write_rows


def training_run(folder: Path, steps: int = 30, lift: float = 0.3, seed: int = 0) -> Path:
    """A run folder as the trainer writes it: validation at step 0 and every tenth, everything else at each step."""
    folder.mkdir(parents=True)
    rows: dict[int, dict[str, float]] = {0: {"sqlbench/val_ex": 0.45}}
    for step in range(1, steps + 1):
        wave = 0.05 * math.sin(step * 1.7 + seed)
        rows[step] = {
            "sqlbench/ex": 0.45 + lift * step / steps + wave,
            "actor/entropy": 0.4 - 0.005 * step,
            "sqlbench/transitions": 1.9 - 0.01 * step,
            "sqlbench/response_tokens": 31 + wave,
            "sqlbench/zero_variance_groups": 0.3 + 0.01 * step,
            "timing_s/step": 4.0,
            "timing_s/gen": 2.5,
            "timing_s/update_actor": 1.0,
        }
        if step % 10 == 0:
            rows[step] |= {"sqlbench/val_ex": 0.45 + lift * step / steps, "timing_s/testing": 20.0}
    write_rows(folder / "metrics.jsonl", rows)
    return folder


def test_series_are_in_the_units_of_their_title(tmp_path: Path) -> None:
    metrics = read_metrics(training_run(tmp_path / "run"))
    values = series(metrics, "val_ex")
    assert values.round(6).to_dict() == {0: 45.0, 10: 55.0, 20: 65.0, 30: 75.0}
    assert series(metrics.drop(columns="actor/entropy"), "entropy").empty


def test_time_shares_leave_validation_out_and_sum_to_100(tmp_path: Path) -> None:
    shares = time_shares(read_metrics(training_run(tmp_path / "run")))
    assert shares == pytest.approx({"steps": 30, "step_s": 4.0, "rollout": 62.5, "update": 25.0, "other": 12.5})


def test_time_shares_of_a_run_without_steps_are_unknown_not_zero() -> None:
    shares = time_shares(pd.DataFrame({"sqlbench/val_ex": [0.4]}, index=[0]))
    assert math.isnan(shares["rollout"])


def test_several_seeds_give_a_mean_inside_a_band(tmp_path: Path) -> None:
    runs = [training_run(tmp_path / str(s), lift=lift, seed=s) for s, lift in enumerate((0.1, 0.3))]
    axis = reward_curves({"nano": runs}, names=("val_ex",)).axes[0]
    (line,) = axis.lines
    (band,) = axis.collections
    edge = band.get_paths()[0].vertices[:, 1]
    assert line.get_ydata()[-1] == pytest.approx(65.0)
    assert (edge.min(), edge.max()) == (pytest.approx(45.0), pytest.approx(75.0))
    assert "2 seeds" in line.get_label()


def test_lines_differ_in_colour_dash_and_marker(tmp_path: Path) -> None:
    runs = {f"run {n}": [training_run(tmp_path / str(n))] for n in range(4)}
    lines = reward_curves(runs, names=("val_ex",)).axes[0].lines
    for look in ("get_color", "get_linestyle", "get_marker"):
        assert len({getattr(line, look)() for line in lines}) == 4, look
    assert {line.get_color() for line in lines} <= set(COLOURS)


def test_a_series_that_was_not_logged_is_said_so(tmp_path: Path) -> None:
    figure = reward_curves({"nano": [training_run(tmp_path / "run")]}, names=("val_ex", "clip"))
    assert [t.get_text() for t in figure.axes[1].texts] == ["not logged"]


def test_a_folder_without_metrics_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No training metrics"):
        reward_curves({"nano": [tmp_path]})


def test_figures_are_written_twice_the_same(tmp_path: Path) -> None:
    runs = {"nano": [training_run(tmp_path / "a"), training_run(tmp_path / "b", seed=1)]}
    frame = pd.DataFrame(
        {
            "label": ["one", "two"],
            "initial": [45.0, 46.0], "initial_low": [41.0, 42.0], "initial_high": [49.0, 50.0],
            "final": [56.0, 100.0], "final_low": [52.0, 96.0], "final_high": [60.0, 100.0 - 1e-12],
        }
    )  # fmt: skip
    for draw in (lambda: reward_curves(runs), lambda: time_split(runs), lambda: before_after(frame)):
        one, two = (save_figure(draw(), tmp_path / name, "figure") for name in ("first", "second"))
        assert one.read_bytes() == two.read_bytes()
        assert one.with_suffix(".svg").read_bytes() == two.with_suffix(".svg").read_bytes()
        assert one.stat().st_size > 10_000


def test_the_curve_table_gives_first_and_last_values(tmp_path: Path) -> None:
    runs = {"nano": [training_run(tmp_path / str(s), lift=lift, seed=s) for s, lift in enumerate((0.1, 0.3))]}
    (row,) = curve_table(runs).to_dict("records")
    assert row["Validation EX, greedy (%)"] == "45.00 → 65.00"
    assert row["Trained transitions per rollout"] == "1.88 → 1.61"
    assert row["seeds"] == 2
