"""Watches a training run from its folder alone, also in another process or, by a shared drive, on another machine.

During the run a thread checks the folder every few seconds and redraws after a change; it ends with the run. A killed
run looks like one between two steps, so the age of its last sign of life is shown.
"""

from __future__ import annotations

import base64
import contextlib
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import ipywidgets as w
import pandas as pd
from markupsafe import Markup
from pyarrow.parquet import read_metadata

from sqlbench.errors import DataError
from sqlbench.runs import CONFIG, METRICS, TRAJECTORIES, RunFolder
from sqlbench_lab import view
from sqlbench_lab.figures import PANELS, SERIES, png, read_metrics, reward_curves, series, time_split

WATCHED = (*PANELS[:3], "clip", *PANELS[3:], "step_s", "failed")
RECENT = 10
"""Number of latest steps whose mean time gives the remaining time."""


class Monitor(w.VBox):
    """Curves, latest values, time split and remaining time of a training run, live until it is finished.

    Args:
        folder: run folder; it may not exist yet.
        every: seconds between two checks.

    Raises:
        DataError: the folder holds a run that is not a training.
    """

    def __init__(self, folder: Path | str, every: float = 3.0) -> None:
        self.folder, self.every = Path(folder), every
        self._status, self._body = w.HTML(), w.HTML()
        self._seen: tuple = ()
        self._ended = threading.Event()
        super().__init__([self._status, self._body])
        self.refresh()
        if not self._ended.is_set():
            threading.Thread(target=self._watch, daemon=True, name=f"monitor-{self.folder.name}").start()

    def refresh(self) -> None:
        """Check the folder now."""
        if self._config().get("kind", "training") != "training":
            raise DataError(f"{self.folder} is not a training run. Open it with the inspector.")
        finished = RunFolder(self.folder).finished  # checked first, so that the data read next is complete
        file = self.folder / METRICS
        seen = (finished, *((file.stat().st_size, file.stat().st_mtime_ns) if file.is_file() else ()))
        if seen != self._seen:
            self._body.value = view.page(self._body_html())
            self._seen = seen
        self._status.value = view.page(Markup("<b>{}</b>: {}").format(self.folder, self.status()))
        if finished:
            self._ended.set()

    def stop(self) -> None:
        """Stop watching, and keep the view."""
        self._ended.set()

    def close(self) -> None:
        """Stop watching and remove the view."""
        self.stop()
        super().close()

    def status(self) -> str:
        """Describe the progress of the run and its remaining time, in words."""
        metrics, total = self._metrics(), self.total_steps()
        step = int(metrics.index.max()) if len(metrics) else 0
        if RunFolder(self.folder).finished:
            return f"finished after {step} step{'s' * (step != 1)}"
        if not self.folder.is_dir():
            return "not started yet, waiting for it"
        words = [f"step {step} of {total or 'an unknown number'}"]
        if (remaining := self.seconds_left()) is not None:
            words.append(f"about {timedelta(seconds=round(remaining))} left")
        files = [self.folder / name for name in (METRICS, TRAJECTORIES, "logs/train.log")]
        times = [file.stat().st_mtime for file in files if file.is_file()]
        if times:
            words.append(f"last sign of life {timedelta(seconds=round(max(0.0, time.time() - max(times))))} ago")
        return ", ".join(words)

    def total_steps(self) -> int | None:
        """Return the number of steps requested; None if the run's folder does not say."""
        tasks = self.folder / "data/train.parquet"
        try:
            config = self._config()["config"]
            if steps := config["trainer"]["total_training_steps"]:
                return int(steps)
            if not tasks.is_file():
                return None
            epoch = read_metadata(tasks).num_rows // config["data"]["train_batch_size"]
            return int(epoch * config["trainer"]["total_epochs"])
        except KeyError:
            return None

    def seconds_left(self) -> float | None:
        """Estimate from the time of the latest steps and the mean time of validation and saving; None before a step."""
        metrics, total = self._metrics(), self.total_steps()
        trained = metrics[metrics.index > 0]
        steps = series(trained, "step_s")
        if total is None or steps.empty:
            return None
        extra = trained.filter(["timing_s/testing", "timing_s/save_checkpoint"]).sum().sum() / len(trained)
        return float((steps.tail(RECENT).mean() + extra) * (total - trained.index.max()))

    def _config(self) -> dict[str, Any]:
        return RunFolder(self.folder).config() if (self.folder / CONFIG).is_file() else {}

    def _metrics(self) -> pd.DataFrame:
        try:
            return read_metrics(self.folder)
        except DataError:  # nothing logged yet
            return pd.DataFrame()

    def _body_html(self) -> Markup:
        metrics = self._metrics()
        if metrics.empty:
            return Markup("<i>no step is on record yet</i>")
        run = {"/".join(self.folder.parts[-2:]): [self.folder]}
        figures = [reward_curves(run, WATCHED)]
        if len(series(metrics, "step_s")):
            figures.append(time_split(run))
        images = Markup("").join(
            Markup('<img style="width: {:.0f}px; max-width: 100%" alt="{}" src="data:image/png;base64,{}"><br>').format(
                96 * figure.get_figwidth(), alt, base64.b64encode(png(figure, dpi=100)).decode()
            )
            for figure, alt in zip(figures, ("training curves", "time split"), strict=False)
        )
        rows = []
        for name in WATCHED:
            values = series(metrics, name)
            if len(values):
                rows.append([SERIES[name].title, f"{values.iloc[0]:.3g}", f"{values.iloc[-1]:.3g}", values.index[-1]])
        return images + view.folded("first and latest values", view.table(["", "first", "latest", "at step"], rows))

    def _watch(self) -> None:
        while not self._ended.wait(self.every):
            with contextlib.suppress(OSError, ValueError):  # a file is being written or replaced: try again
                self.refresh()

    def __repr__(self) -> str:
        return f"{self.folder}: {self.status()}"

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        static = str(self._status.value) + str(self._body.value)
        return super()._repr_mimebundle_(**options) | {"text/plain": repr(self), "text/html": static}
