"""A training run from its first call to its last: verl's own trainer on a run folder, watched and resumed.

Guarantees: the configuration in ``config.json`` is complete and is the one that ran. Faults that can be detected
beforehand are refused in one line before anything starts. The same call again resumes from the last checkpoint. Nothing
is left running when the call returns, however it returns. verl runs in a process of its own
(`verl_cpu.forkserver`) with its output in ``logs/train.log``; call from a thread that lives as long as the
training.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from sqlbench.agent.prompts import prompts_for
from sqlbench.config import takes
from sqlbench.data.tasks import Task
from sqlbench.errors import TrainingError
from sqlbench.interfaces import is_plugin, load_plugin
from sqlbench.models import policy, policy_folder
from sqlbench.models.checkpoint import check_checkpoint
from sqlbench.models.hub import is_hub_name
from sqlbench.profiles import Profile, find_profile
from sqlbench.runs import METRICS, TRAJECTORIES, RunFolder, append_line, lock, read_trajectories, run_path
from sqlbench_train import processes
from sqlbench_train.compose import compose, quoted, tracking
from sqlbench_train.metrics import read_rows, step_metrics, write_rows
from sqlbench_train.preflight import ask_verl, check, needs, planned_steps, preflight, too_small
from sqlbench_train.settings import TrainConfig
from verl_cpu.forkserver import RAY_LATE

if TYPE_CHECKING:
    from omegaconf import DictConfig

VERL_CONFIG = "data/verl.yaml"
"""verl's configuration of an attempt, in the run folder; its path identifies the attempt's processes."""
FULL = 1 << 20
"""Free bytes below which a disk counts as full."""
RAY_STARTS = 3
"""Maximum number of starts of Ray, on a machine where that takes too long."""


@takes(TrainConfig, "profile", "run", "data", "model", "overrides")
def train(settings: TrainConfig) -> Path:
    """Train, or resume training, and return the run folder ``<results>/<profile>/<run>``.

    With `track`, metrics go to one of `sqlbench_train.compose.TRACKERS` too, as its own environment variables say.
    Without them, tensorboard and mlflow write into the run folder. Keys belong in the environment and are never
    written.

    Raises:
        TrainingError: the run cannot be composed or started, or had to be stopped; the message names the reason.
        SqlbenchError: data set, checkpoint or run folder are missing or unusable.
    """
    from omegaconf import OmegaConf

    chosen = find_profile(settings.profile)
    short = {"seed": settings.seed, "query_timeout": settings.query_timeout}
    overrides = [*(tracking(settings.track) if settings.track else ()), *settings.overrides]
    overrides += [f"sqlbench.{key}={value}" for key, value in short.items() if value is not None]
    overrides += [f"sqlbench.prompts={quoted(settings.prompts)}"] if settings.prompts else []
    folder = run_path(settings.results, settings.profile, settings.run).absolute()
    data = settings.data or Path(chosen.data)
    config = compose(
        chosen,
        run=settings.run,
        folder=folder,
        data=str(data) if is_plugin(data) else data.absolute(),
        model=_policy(settings.model or chosen.model, chosen),
        overrides=overrides,
        recipe=settings.recipe,
        control=settings.control,
    )
    if str(config.sqlbench.prompts).endswith(".toml"):  # processes of the training may have another working directory
        config.sqlbench.prompts = str(Path(config.sqlbench.prompts).absolute())
    chosen = chosen.on(config.trainer.device)
    if settings.dry_run:
        check(chosen, config)
        if warning := too_small(config):
            print(f"# warning: {warning}")
        ask_verl(config)
        print(OmegaConf.to_yaml(config, resolve=True))
        print("\n".join(f"# needs {line}" for line in needs(chosen, config)))
        return folder
    trainer = load_plugin("trainer", config.sqlbench.trainer)
    tasks, validation = preflight(chosen, config)
    if is_hub_name(config.sqlbench.model):
        check_checkpoint(policy_folder(config.sqlbench.model))  # downloaded here, with its progress shown
    record = {
        "kind": "training",
        "profile": chosen.name,
        "recipe": settings.recipe,
        "overrides": overrides,
        "tasks": _digest(t.key for t in tasks),
        "validation_tasks": _digest(t.key for t in validation),
        "model_files": _model_digest(config.sqlbench.model),
        "config": _portable(OmegaConf.to_container(config, resolve=True)),
    }
    if config.sqlbench.prompts:
        record["prompts"] = prompts_for(config.sqlbench.prompts).components
    run_folder = RunFolder(folder)
    with lock(folder):  # an earlier attempt may still run and write, and nobody waits for it any more
        processes.end_earlier(folder / VERL_CONFIG)
    with run_folder.open(record, overwrite=settings.overwrite):
        try:
            run_folder.finish(trainer.fit(run_folder, config, tasks, validation))
        except OSError as error:
            raise TrainingError(
                f"Training stopped: {error.strerror}: {error.filename or folder}. Fix this and rerun the command; it "
                "resumes from the last checkpoint."
            ) from error
    return folder


def _policy(model: str, profile: Profile) -> str:
    """Find the checkpoint folder to train; on a GPU, a name on the Hugging Face hub stays a name."""
    if is_hub_name(model) and profile.device != "cpu":
        return model
    return str(check_checkpoint(policy_folder(model)).absolute())


class VerlTrainer:
    """verl's GRPO, with what `sqlbench_train` registers there: the built-in trainer."""

    def fit(
        self, run: RunFolder, config: DictConfig, tasks: Sequence[Task], validation: Sequence[Task]
    ) -> dict[str, Any]:
        """Train from the last checkpoint on (`sqlbench.interfaces.Trainer`)."""
        profile = find_profile(run.config()["profile"]).on(config.trainer.device)
        return _Verl(profile, config, run.root, tasks, validation).train()


class _Verl:
    """verl on one run folder."""

    def __init__(
        self,
        profile: Profile,
        config: DictConfig,
        folder: Path,
        tasks: Sequence[Task],
        validation: Sequence[Task],
    ) -> None:
        self.profile, self.config, self.folder = profile, config, folder
        self.tasks, self.validation = list(tasks), list(validation)
        _, self.total = planned_steps(config, len(tasks))
        self.log = folder / "logs/train.log"
        self.attempt = folder / "logs/attempt.jsonl"  # verl's metrics of this attempt
        self.config_file = folder / VERL_CONFIG
        self.began = 0.0  # time at which the first rollout was on record

    def train(self) -> dict[str, Any]:
        """Train the rest of the run and return its summary."""
        started = time.time()
        done, validate = self._rewind()
        self._write_data()
        if done < self.total or validate:
            self._write_config(validate)
            self._follow(done)
        rows = read_rows(self.folder / METRICS)
        if max(rows, default=0) < self.total:
            raise TrainingError(f"verl ended at step {max(rows, default=0)} of {self.total}. See {self.log}.")
        write_rows(self.folder / METRICS, rows)
        policy.drop_others(self.folder, self.total, self.config.trainer.max_actor_ckpt_to_keep)
        policy.export_policy(self.folder, self.config.sqlbench.model)
        validated = [row["sqlbench/val_ex"] for row in rows.values() if "sqlbench/val_ex" in row]
        return {
            "steps": self.total,
            "seconds": round(time.time() - started, 1),
            "startup_seconds": round(self.began - started, 1) if self.began else None,
            "resumed_at": done,
            "val_ex_first": validated[0] if validated else None,
            "val_ex_last": validated[-1] if validated else None,
            "failed_rollouts": int(sum(row.get("sqlbench/failed_rollouts", 0) for row in rows.values())),
            "policy": "policy",
        }

    def _rewind(self) -> tuple[int, bool]:
        """Drop the log after the last checkpoint; return its step, and whether to validate it first.

        verl saves a step before it validates and logs it. After a kill in between, its row is made from the rollouts on
        record, and its validation is run again.
        """
        done = policy.checkpointed(self.folder)
        every, keep = self.config.trainer.test_freq, self.config.trainer.max_actor_ckpt_to_keep
        logged = read_rows(self.folder / METRICS)
        for step, row in read_rows(self.attempt).items():  # some of it may not have been taken over
            logged.setdefault(step, {}).update(row)
        rows = {step: row for step, row in logged.items() if done and step <= done}
        trajectories = [t for t in read_trajectories(self.folder) if done and (t.step or 0) <= done]
        validate = not done and self.config.trainer.val_before_train
        if done:
            here = [t for t in trajectories if t.step == done and not t.validation]
            rows.setdefault(done, step_metrics(here, "sqlbench/"))
            due = every > 0 and (done % every == 0 or done >= self.total)
            if due and "sqlbench/val_ex" not in rows[done]:
                validate, trajectories = True, [t for t in trajectories if t.step != done or not t.validation]
        RunFolder(self.folder).rewrite(TRAJECTORIES, trajectories)
        write_rows(self.folder / METRICS, rows)
        self.attempt.unlink(missing_ok=True)
        policy.drop_others(self.folder, done, keep)
        return done, validate

    def _write_data(self) -> None:
        from sqlbench_train.tasks import write_tasks

        source = Path(self.config.sqlbench.data).name
        write_tasks(Path(self.config.data.train_files), source, self.tasks, validation=False)
        write_tasks(Path(self.config.data.val_files), source, self.validation, validation=True)
        (self.folder / "data/agent_loop.yaml").write_text(
            "- name: sqlbench\n  _target_: sqlbench_train.agent_loop.SqlAgentLoop\n"
        )
        (self.folder / "data/router.yaml").write_text("router_class: verl_cpu.server.Router\n")

    def _write_config(self, validate: bool) -> None:
        """Write the configuration of this attempt; a resumed one has already been validated at its first step."""
        from omegaconf import OmegaConf, open_dict

        config = self.config.copy()
        with open_dict(config):
            config.trainer.val_before_train = validate
            ray = config.ray_kwargs.ray_init
            if ray.get("address") != "local":  # a cluster has its own resources, and not this process's environment
                for name in ("num_cpus", "num_gpus", "include_dashboard"):
                    ray.pop(name, None)
                ray.runtime_env = {"env_vars": self.profile.environment}
        OmegaConf.save(config, self.config_file)

    def _follow(self, done: int) -> None:
        """Run verl and show its progress; return when it ended well.

        A start for which Ray was too slow is repeated.

        On a GPU, a start that fails before the first rollout is repeated without forks, as the
        fault may lie in the fork of a process that had imported everything.
        """
        self.log.parent.mkdir(exist_ok=True)
        for _ in range(RAY_STARTS):
            status = self._attempt(done, plain=False)
            if status != RAY_LATE:
                break
            self._note("Ray did not start in time.")
        if status > 0 and status != RAY_LATE and self.profile.device == "cuda" and not self.began:
            self._note("verl ended before its first rollout. Starting it again without forks.")
            status = self._attempt(done, plain=True)
        if status != 0:
            reason = processes.reason(self.log, status)
            if shutil.disk_usage(self.folder).free < FULL:  # the cause of any failure then; the log may end early
                reason = f"No space left on device: {self.folder}. Free some and rerun the command ({reason})"
            raise TrainingError(f"Training stopped: {reason.rstrip('.')}. See {self.log}.")

    def _note(self, text: str) -> None:
        """Log why verl is started again, and drop the metrics of the attempt before."""
        with self.log.open("a") as log:
            print(f"sqlbench: {text}", file=log)
        self.attempt.unlink(missing_ok=True)

    def _attempt(self, done: int, *, plain: bool) -> int:
        """Run verl to its end and return its exit status."""
        own_cluster = self.config.ray_kwargs.ray_init.get("address") == "local"
        verl = processes.training(
            self.profile, self.folder, self.config_file, self.attempt, self.log, own_cluster=own_cluster, plain=plain
        )
        bar = tqdm(
            total=self.total, initial=done, desc="starting verl", unit="step", mininterval=1, miniters=0, smoothing=0
        )
        before = self._recorded()
        with bar, verl as process:
            position = 0
            while True:
                ended = process.poll() is not None
                position = self._take(position, bar)
                if not self.began and self._recorded() > before:
                    self.began = time.time()
                if ended:
                    return process.returncode
                bar.update(0)
                time.sleep(0.2)

    def _recorded(self) -> int:
        """Count the bytes of rollouts on record."""
        file = self.folder / TRAJECTORIES
        return file.stat().st_size if file.is_file() else 0

    def _take(self, position: int, bar: Any) -> int:
        """Put new metric lines into the run folder's metrics and onto the screen."""
        if not self.attempt.is_file():
            return position
        with self.attempt.open("rb") as file:
            file.seek(position)
            data = file.read()
        chunk = data[: data.rfind(b"\n") + 1]
        for line in chunk.splitlines():
            record = json.loads(line)
            append_line(self.folder / METRICS, record)
            if position == 0:  # the rate is that of training, not of the start
                bar.start_t, bar.initial = time.time(), record["step"]
            bar.set_description("training", refresh=False)
            bar.update(max(0, record["step"] - bar.n))
            bar.write(describe(record["step"], record["data"]))
        return position + len(chunk)


def describe(step: int, data: dict[str, float]) -> str:
    """Describe one step in one line."""
    parts = [f"step {step:3d}"]
    for name, label in (("", ""), ("val_", "validation ")):
        if f"sqlbench/{name}ex" in data:
            parts.append(f"{label}EX {100 * data[f'sqlbench/{name}ex']:.1f}%")
            reward = data.get(f"sqlbench/{name}reward", data[f"sqlbench/{name}ex"])
            if reward != data[f"sqlbench/{name}ex"]:
                parts.append(f"{label}reward {reward:.3f}")
    if "sqlbench/rows" in data:
        parts.append(f"rows {data['sqlbench/rows']:.0f}")
        parts.append(f"failed {data['sqlbench/failed_rollouts']:.0f}")
        parts.append(f"zero variance {100 * data['sqlbench/zero_variance_groups']:.0f}%")
        parts.append(f"{data['sqlbench/seconds']:.1f} s (rollout {data['sqlbench/rollout_percent']:.0f}%")
        parts[-1] += f", update {data['sqlbench/update_percent']:.0f}%)"
    return "  ".join(parts)


def _portable(value: Any) -> Any:
    """Make the paths of a configuration below the working directory relative, so that it can be shared."""
    if isinstance(value, dict):
        return {key: _portable(below) for key, below in value.items()}
    if isinstance(value, list):
        return [_portable(below) for below in value]
    return value.replace(f"{Path.cwd()}/", "") if isinstance(value, str) else value


def _digest(keys: Any) -> str:
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16]


def _model_digest(model: str) -> str | None:
    """Hash the weights that a local policy starts from."""
    files = sorted(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()[:16] if files else None
