"""Figures of training runs, drawn from run folders alone: curves with a band over seeds, time split, initial -> final.

Colours are the Okabe-Ito set and every line also differs in dash and marker, so that figures survive colour blindness
and greyscale print.
"""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sqlbench.errors import DataError
from sqlbench.results import Score
from sqlbench.runs import METRICS
from sqlbench_train.metrics import read_rows

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "axes.titlesize": 10,
    "legend.frameon": False,
    "figure.dpi": 110,
    "svg.hashsalt": "sqlbench",
    "svg.fonttype": "none",
}
WIDTH = 9.9
"""Width in inches of a figure of several panels."""
_drawing = threading.RLock()


@contextmanager
def _style() -> Iterator[None]:
    """Set the look of all figures, one at a time: matplotlib's settings are shared by all threads."""
    with _drawing, plt.rc_context(STYLE):
        yield


@dataclass(frozen=True)
class Series:
    """One quantity of a training run: its name here, the key it is logged under, and how to show it."""

    name: str
    key: str
    title: str
    scale: float = 1.0
    each_step: bool = True
    """Flag of a quantity logged at every step: it is noisy, so a running mean is drawn through it."""
    older: str = ""
    """The key in older runs, which lack `key`."""


SERIES = {
    s.name: s
    for s in (
        Series("val_ex", "sqlbench/val_ex", "Validation EX, greedy (%)", 100, each_step=False),
        Series("reward", "sqlbench/reward", "Training reward, sampled (%)", 100, older="sqlbench/ex"),
        Series("entropy", "actor/entropy", "Policy entropy (nats per token)"),
        Series("transitions", "sqlbench/transitions", "Trained transitions per rollout"),
        Series("response", "sqlbench/response_tokens", "Response length (tokens)"),
        Series("zero_variance", "sqlbench/zero_variance_groups", "Groups without variance (%)", 100),
        Series("clip", "actor/pg_clipfrac", "Clipped tokens (%)", 100),
        Series("failed", "sqlbench/failed_rollouts", "Failed rollouts per step"),
        Series("step_s", "timing_s/step", "Time per step (s)"),
        Series("rollout_s", "timing_s/gen", "Rollout (s)"),
        Series("update_s", "timing_s/update_actor", "Update actor (s)"),
    )
}
PANELS = ("val_ex", "reward", "entropy", "transitions", "response", "zero_variance")


def read_metrics(run: Path | str) -> pd.DataFrame:
    """Read all metrics of a training run folder: one row per step, columns as the trainer names them.

    Raises:
        DataError: the run has no metrics.
    """
    rows = read_rows(Path(run) / METRICS)
    if not rows:
        raise DataError(f"No training metrics in {run}. Train there first, or wait for the first step.")
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("step").sort_index()


def series(metrics: pd.DataFrame, name: str) -> pd.Series:
    """Return one quantity over steps in the units of its title; empty if the run did not log it."""
    spec = SERIES[name]
    key = spec.key if spec.key in metrics else spec.older
    if key not in metrics:
        return pd.Series(dtype=float, name=name)
    return metrics[key].dropna().mul(spec.scale).rename(name)


def time_shares(metrics: pd.DataFrame) -> dict[str, float]:
    """Compute steps, seconds per step, and the percentages spent in rollout, actor update and the rest.

    The trainer's step timer leaves validation out, and so does this function.
    """
    parts = pd.concat([series(metrics, n) for n in ("step_s", "rollout_s", "update_s")], axis=1).dropna()
    if parts.empty:
        return {"steps": 0, "step_s": math.nan, "rollout": math.nan, "update": math.nan, "other": math.nan}
    total, rollout, update = parts.sum()
    rollout, update = 100 * rollout / total, 100 * update / total
    other = 100 - rollout - update
    return {"steps": len(parts), "step_s": total / len(parts), "rollout": rollout, "update": update, "other": other}


def curve_table(runs: Mapping[str, Sequence[Path]]) -> pd.DataFrame:
    """List the first -> last value of each curve, the mean over seeds.

    Curves logged at every step show the means of the first and the last tenth of the steps.
    """
    rows = []
    for label, folders in runs.items():
        frames = [read_metrics(folder) for folder in folders]
        row = {"training run": label, "seeds": len(frames)}
        for name in PANELS:
            ends = []
            for values in (series(metrics, name) for metrics in frames):
                tenth = max(1, len(values) // 10) if SERIES[name].each_step else 1
                ends.append((values.head(tenth).mean(), values.tail(tenth).mean()))
            first, last = pd.DataFrame(ends).mean()
            row[SERIES[name].title] = "-" if math.isnan(first) else f"{first:.2f} → {last:.2f}"
        rows.append(row)
    return pd.DataFrame(rows)


def reward_curves(
    runs: Mapping[str, Sequence[Path]], names: Sequence[str] = PANELS, *, smooth: int = 5, columns: int = 3
) -> Figure:
    """Draw curves of training runs, one panel for each of `names`.

    Args:
        runs: label -> the run folders of its seeds. One folder gives a line; several give their mean and a band from
            the lowest to the highest.
        names: names in `SERIES` to show.
        smooth: steps of the running mean drawn through values logged at every step; raw values stay
            visible behind it if the runs are few.
        columns: panels per row.
    """
    frames = {label: [read_metrics(folder) for folder in folders] for label, folders in runs.items() if folders}
    raw = len(frames) <= 4 and any(len(seeds) == 1 for seeds in frames.values())
    raw = raw and smooth > 1 and any(SERIES[name].each_step for name in names)
    entries = len(frames) + raw
    columns = min(columns, len(names))
    panel = min(WIDTH / columns, WIDTH / 2)
    rows = -(-len(names) // columns)
    longest = max((len(label) + 24 * (len(seeds) > 1) for label, seeds in frames.items()), default=0)
    longest = max(longest, 42 * raw) + 8
    abreast = max(1, min(int(panel * columns * 14) // longest, entries))  # legend entries that fit side by side
    size = (panel * columns, rows * 0.75 * panel + 0.22 * -(-entries // abreast))
    with _style():
        figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
        for axis, name in zip(axes.flat, names, strict=False):
            for number, (label, metrics) in enumerate(frames.items()):
                window = smooth if SERIES[name].each_step else 1
                _curve(axis, [series(m, name) for m in metrics], window, number, label, raw)
            axis.set_title(SERIES[name].title, loc="left")
            axis.set_xlabel("step")
            axis.xaxis.get_major_locator().set_params(integer=True)
            low, high = axis.dataLim.intervaly
            if low == high:  # a constant curve: show it flat and at its size
                axis.set_ylim(0, 2 * high or 1)
            elif axis.get_ylim()[0] < 0 <= low:  # none of the quantities can be negative
                axis.set_ylim(bottom=0)
            if not axis.lines:
                axis.text(0.5, 0.5, "not logged", transform=axis.transAxes, ha="center", color="0.5")
                axis.set(xticks=[], yticks=[])
        for axis in axes.flat[len(names) :]:
            axis.remove()
        handles, _ = axes.flat[0].get_legend_handles_labels()
        if handles and raw:
            handles.append(
                Line2D([], [], color="0.6", linewidth=0.8, label=f"thin: each step; thick: mean of {smooth} steps")
            )
        if handles:
            figure.legend(handles=handles, loc="outside lower center", ncols=abreast)
        plt.close(figure)
    return figure


def _curve(axis: Axes, seeds: list[pd.Series], smooth: int, number: int, label: str, raw: bool) -> None:
    frame = pd.concat(seeds, axis=1)
    if frame.empty:
        return
    colour, dash, marker = (kind[number % len(kind)] for kind in (COLOURS, DASHES, MARKERS))
    mean = frame.mean(axis=1)
    several = frame.shape[1] > 1
    if several:
        name = f"{label} ({frame.shape[1]} seeds: mean, range)"
        low, high = (_smoothed(edge, smooth) for edge in (frame.min(axis=1), frame.max(axis=1)))
        axis.fill_between(frame.index, low, high, color=colour, alpha=0.18, linewidth=0)
    else:
        name = label
        if smooth > 1 and raw:
            axis.plot(mean.index, mean, color=colour, alpha=0.3, linewidth=0.8)
    sparse = len(mean) <= 25
    axis.plot(
        mean.index,
        _smoothed(mean, smooth),
        color=colour,
        linestyle=dash,
        linewidth=1.8,
        marker=marker if sparse else None,
        markersize=4,
        label=name,
    )


def _smoothed(values: pd.Series, window: int) -> pd.Series:
    return values.rolling(window, min_periods=1, center=True).mean() if window > 1 else values


def time_split(runs: Mapping[str, Sequence[Path]]) -> Figure:
    """Draw the split of a step's time, one bar per label (the mean over its seeds)."""
    shares = {
        label: pd.DataFrame([time_shares(read_metrics(folder)) for folder in folders]).mean()
        for label, folders in runs.items()
        if folders
    }
    parts = (("rollout", "rollout", ""), ("update", "update actor", "//"), ("other", "other", ".."))
    with _style():
        figure, axis = plt.subplots(figsize=(7.0, 0.9 + 0.42 * len(shares)), layout="constrained")
        for number, share in enumerate(shares.values()):
            start = 0.0
            for (key, _, hatch), colour in zip(parts, ("#56B4E9", "#E69F00", "#BBBBBB"), strict=True):
                axis.barh(number, share[key], left=start, color=colour, hatch=hatch, edgecolor="white", height=0.62)
                if share[key] >= 7:
                    middle = start + share[key] / 2
                    box = {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 1}
                    axis.text(middle, number, f"{share[key]:.0f}%", ha="center", va="center", fontsize=8, bbox=box)
                start += share[key]
            axis.text(101, number, f"{share['step_s']:.1f} s per step", va="center", fontsize=8)
        axis.set_yticks(range(len(shares)), list(shares))
        axis.invert_yaxis()
        axis.set_xlim(0, 118)
        axis.set_xticks(range(0, 101, 20))
        axis.set_xlabel("share of step time without validation (%)")
        axis.grid(False)
        swatches = [
            plt.Rectangle((0, 0), 1, 1, facecolor=colour, hatch=hatch, edgecolor="white", label=text)
            for (_, text, hatch), colour in zip(parts, ("#56B4E9", "#E69F00", "#BBBBBB"), strict=True)
        ]
        figure.legend(handles=swatches, loc="outside upper center", ncols=3)
        plt.close(figure)
    return figure


def before_after(rows: pd.DataFrame) -> Figure:
    """Draw initial -> final accuracy with 95% intervals, one pair of bars per row.

    Args:
        rows: columns ``label``, ``initial``, ``initial_low``, ``initial_high``, ``final``, ``final_low``,
            ``final_high``, in percent (`sqlbench_lab.tables.accuracy_rows` gives them).
    """
    with _style():
        figure, axis = plt.subplots(figsize=(7.0, 1.1 + 0.55 * len(rows)), layout="constrained")
        for offset, which, colour, hatch in ((-0.19, "initial", "#BBBBBB", ""), (0.19, "final", "#0072B2", "")):
            places = [number + offset for number in range(len(rows))]
            values = rows[which]
            ends = (values - rows[f"{which}_low"], rows[f"{which}_high"] - values)
            spread = [end.clip(lower=0.0) for end in ends]  # rounding puts the end of 100% slightly below it
            axis.barh(places, values, 0.36, color=colour, hatch=hatch, label=which)
            axis.errorbar(values, places, xerr=spread, fmt="none", ecolor="black", elinewidth=1, capsize=2.5)
            for place, value, high in zip(places, values, rows[f"{which}_high"], strict=True):
                axis.text(high + 1, place, f"{value:.1f}", va="center", fontsize=8)
        axis.set_yticks(range(len(rows)), list(rows["label"]))
        axis.invert_yaxis()
        axis.set_xlim(0, min(108.0, float(rows[["initial_high", "final_high"]].max().max()) + 10))
        axis.set_xlabel("execution accuracy (%), with 95% intervals")
        axis.grid(axis="y", visible=False)
        figure.legend(loc="outside upper center", ncols=2)
        plt.close(figure)
    return figure


def accuracy_and_causes(scores: Mapping[str, Score], causes: Mapping[str, int], most: int = 10) -> Figure:
    """Draw accuracies with 95% intervals, and beside them the number of wrong answers by cause.

    Args:
        scores: scores by level.
        causes: number of wrong answers by cause, the most frequent first.
        most: maximum number of causes to draw.
    """
    shown = dict(list(causes.items())[:most])
    with _style():
        size = (WIDTH, 1.2 + 0.24 * max(len(scores), len(shown), 4))
        figure, (left, right) = plt.subplots(1, 2, figsize=size, layout="constrained")
        values = [score.percent for score in scores.values()]
        ends = [score.interval for score in scores.values()]
        spread = [[max(0.0, abs(v - end[side])) for v, end in zip(values, ends, strict=True)] for side in (0, 1)]
        left.bar(list(scores), values, color=COLOURS[0], width=0.6)
        left.errorbar(range(len(values)), values, yerr=spread, fmt="none", ecolor="black", elinewidth=1, capsize=2.5)
        for place, score in enumerate(scores.values()):
            left.text(place, 1, f"{score.percent:.0f}%\nn={score.n}", ha="center", color="white", fontsize=8)
        left.set(ylabel="execution accuracy (%)", ylim=(0, 100))
        left.set_title("Accuracy by hardness, 95% intervals", loc="left")
        left.grid(axis="x", visible=False)
        bars = right.barh(list(shown), list(shown.values()), color=COLOURS[1], height=0.65)
        right.bar_label(bars, padding=3, fontsize=8)
        right.invert_yaxis()
        right.set_xlabel("wrong answers")
        right.set_title("Why answers are wrong", loc="left")
        right.grid(axis="y", visible=False)
        plt.close(figure)
    return figure


def group_rewards(rollouts: pd.DataFrame) -> Figure:
    """Draw the distribution of right rollouts per group, for a training's first and last quarter of steps.

    Args:
        rollouts: `sqlbench_lab.rollouts.rollout_table` of a training.

    Raises:
        DataError: none of its rollouts was scored.
    """
    part = rollouts[(rollouts["part"] == "training") & rollouts["correct"].notna()]
    if part.empty:
        raise DataError("No scored training rollouts: the groups cannot be drawn. Choose a run that trained a step.")
    groups = part.groupby(["step", "key"])["correct"].sum().astype(int).reset_index()
    steps = sorted(groups["step"].unique())
    quarter = max(1, len(steps) // 4)
    size = int(part.groupby(["step", "key"]).size().max())
    with _style():
        figure, axis = plt.subplots(figsize=(7.0, 2.8), layout="constrained")
        for offset, chosen, colour, hatch in (
            (-0.2, steps[:quarter], "#BBBBBB", ""),
            (0.2, steps[-quarter:], "#0072B2", "//"),
        ):
            counts = groups.loc[groups["step"].isin(chosen), "correct"].value_counts(normalize=True).mul(100)
            shares = counts.reindex(range(size + 1), fill_value=0.0)
            label = f"steps {chosen[0]} to {chosen[-1]}"
            places = [n + offset for n in shares.index]
            axis.bar(places, shares, 0.38, color=colour, hatch=hatch, edgecolor="white", label=label)
        axis.set_xticks(range(size + 1))
        axis.set_xlabel(f"right rollouts in a group of {size}")
        axis.set_ylabel("groups (%)")
        axis.grid(axis="x", visible=False)
        axis.legend()
        plt.close(figure)
    return figure


def png(figure: Figure, dpi: int = 160) -> bytes:
    """Encode a figure as PNG; the same figure always gives the same bytes."""
    file = io.BytesIO()
    with _style():
        figure.savefig(file, format="png", dpi=dpi, metadata={"Software": None})
    return file.getvalue()


def save_figure(figure: Figure, folder: Path | str, name: str) -> Path:
    """Write ``<name>.png`` and ``<name>.svg`` and return the PNG's path; equal figures give equal SVGs."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _style():
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    (folder / f"{name}.png").write_bytes(png(figure))
    return folder / f"{name}.png"
