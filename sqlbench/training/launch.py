"""Compose a training run from a profile and overrides, check it, run verl's own trainer, and resume it.

Guarantees: the configuration in ``config.json`` is complete and is what ran; whatever would fail for a reason known
beforehand is refused in one line before anything starts; the same call again goes on at the last checkpoint; nothing
is left running when the call returns, however it returns. verl runs in a process of its own
(`sqlbench.training.worker`) with its output in ``logs/train.log``; call from a thread that lives as long as the
training.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import psutil
from tqdm.auto import tqdm

from sqlbench.data.tasks import DataSet, Task
from sqlbench.errors import SqlbenchError, TrainingError
from sqlbench.estimate import GPU_BYTES, estimate
from sqlbench.models.local import check_checkpoint, checkpoint_family
from sqlbench.profiles import PROFILES, Profile, merged
from sqlbench.runs import METRICS, TRAJECTORIES, RunFolder, append_line, read_trajectories
from sqlbench.training.metrics import StepRecord, read_rows

if TYPE_CHECKING:
    from omegaconf import DictConfig

AGENTS = ("write", "rewrite", "check")
RAY_FOLDER = "sqlbench-ray-"
"""Prefix of Ray's temporary folders; the number of the launching process follows."""
TRACKERS = ("wandb", "mlflow", "tensorboard")
"""Backends of verl that can be chosen beside its console and file; each needs the package of its name."""
FULL = 1 << 20
"""A disk with fewer free bytes is full."""
STOP_SECONDS = 3
"""How long a stopped training may take to end before it is killed; nothing is lost by it."""


def train(
    profile: str,
    run: str,
    data: str | Path | None = None,
    model: str | None = None,
    overrides: list[str] | tuple[str, ...] = (),
    *,
    results: str | Path = "results",
    random_reward: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    track: str | None = None,
) -> Path:
    """Train, or go on training, and return the run folder ``<results>/<profile>/<run>``.

    Args:
        profile: ``laptop`` or ``gpu``.
        run: name of the run; the same name with the same settings resumes.
        data: data set folder; the profile's own by default.
        model: policy to start from: ``nano``, a checkpoint folder, or a hub name on the GPU.
        overrides: ``key=value`` for verl's configuration, unchanged; ``sqlbench.key=value`` for ours.
        results: where run folders are.
        random_reward: control: rewards are coin flips, so nothing can be learned.
        overwrite: start again where the run exists.
        dry_run: print the resolved configuration and what it needs; run nothing.
        track: one of `TRACKERS`, to send metrics there too, with what its own environment variables say; without them
            tensorboard and mlflow write into the run folder. Keys belong into the environment and are never written.

    Raises:
        TrainingError: the run cannot be composed or started, or had to be stopped; the message names the reason.
        SqlbenchError: data set, checkpoint or run folder are missing or unusable.
    """
    chosen = PROFILES.get(profile)
    if chosen is None:
        raise TrainingError(f"no profile '{profile}'; there are: {', '.join(PROFILES)}")
    if track:
        overrides = [*tracking(track), *overrides]
    folder = (Path(results) / profile / run).absolute()
    config = compose(
        chosen,
        run=run,
        folder=folder,
        data=Path(data or chosen.data).absolute(),
        model=_policy(model or chosen.model, chosen),
        overrides=overrides,
        random_reward=random_reward,
    )
    if dry_run:
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(config, resolve=True))
        print("\n".join(f"# needs {line}" for line in needs(chosen, config)))
        return folder
    train_tasks, validation = _preflight(chosen, config)
    return _Run(chosen, config, folder, list(overrides), train_tasks, validation).run(overwrite)


def compose(
    profile: Profile,
    *,
    run: str,
    folder: Path,
    data: Path,
    model: str,
    overrides: list[str] | tuple[str, ...] = (),
    random_reward: bool = False,
) -> DictConfig:
    """The resolved configuration of a run: verl's defaults, the profile, the arguments, the overrides.

    Raises:
        TrainingError: an override is no ``key=value``, or names a key that does not exist.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    arguments = {
        "data": {
            "train_files": str(folder / "data/train.parquet"),
            "val_files": str(folder / "data/validation.parquet"),
        },
        "actor_rollout_ref": {
            "model": {"path": model},
            "rollout": {"agent": {"agent_loop_config_path": str(folder / "data/agent_loop.yaml")}}
            | ({"router_config_path": str(folder / "data/router.yaml")} if profile.device == "cpu" else {}),
        },
        "trainer": {
            "project_name": "sqlbench",
            "experiment_name": run,
            "default_local_dir": str(folder / "checkpoints"),
        },
        "sqlbench": {
            "run_folder": str(folder),
            "data": str(data),
            "model": model,
            "family": checkpoint_family(model),
            "random_reward": random_reward,
        },
    }
    spec = importlib.util.find_spec("verl")
    if spec is None or not spec.submodule_search_locations:
        raise TrainingError("verl is not installed; install sqlbench with the extra 'train'")
    defaults = Path(spec.submodule_search_locations[0]) / "trainer/config"
    base = [f"++{key}={_literal(value)}" for key, value in _leaves(merged(profile.config, arguments))]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(defaults), version_base=None):
            config = hydra_compose("ppo_trainer", overrides=[*base, *overrides])
        OmegaConf.resolve(config)
    except (HydraException, OmegaConfBaseException) as error:
        message = str(error).strip().splitlines()[0]
        raise TrainingError(f"cannot compose the training configuration: {message}") from error
    return config


def needs(profile: Profile, config: DictConfig) -> list[str]:
    """What this configuration needs, with whether it is there; for people."""
    batch, model = config.data.train_batch_size, config.actor_rollout_ref.model.path
    lines, cluster = [], config.ray_kwargs.ray_init.get("address")
    if profile.device == "cuda":
        count = f"{config.trainer.nnodes * config.trainer.n_gpus_per_node} GPU(s) with CUDA"
        if cluster == "local":
            lines.append(f"{count}: {'found' if _gpu_bytes() else 'NOT found on this machine'}")
            vllm = importlib.util.find_spec("vllm")
            lines.append(f"vllm: {'installed' if vllm else 'NOT installed (environment.yml)'}")
        else:
            lines.append(f"{count} and vllm on the {config.trainer.nnodes} node(s) of the Ray cluster at {cluster}")
    lines.append(f"model {model}: {'a folder' if Path(model).is_dir() else 'downloaded from the Hugging Face hub'}")
    tasks, source = profile.published_tasks, "as published"
    try:
        tasks, source = sum(t.scorable for t in DataSet(config.sqlbench.data).load("train")), "that can be scored"
        lines.append(f"data {config.sqlbench.data}: found")
    except SqlbenchError as error:
        lines.append(f"data: {error}")
    work = f"steps of {batch} tasks x {config.actor_rollout_ref.rollout.n} rollouts"
    if not tasks:
        return [*lines, f"unknown number of {work}"]
    epoch, steps = _steps(config, tasks)
    lines.append(f"{steps} {work}: {steps / max(epoch, 1):.4g} epochs of {epoch} steps ({tasks:,} tasks {source})")
    if profile.device == "cuda":
        plan = estimate(config, steps, _gpu_bytes() or GPU_BYTES)
        lines += plan.lines() if plan else [f"memory and disk: unknown for {model}; give the folder of the model"]
    return lines


def tracking(backend: str) -> list[str]:
    """The override that sends metrics to one of `TRACKERS` too.

    Raises:
        TrainingError: there is no such backend, or its package is not installed.
    """
    if backend not in TRACKERS:
        raise TrainingError(f"cannot track with '{backend}'; choose one of {', '.join(TRACKERS)}")
    if importlib.util.find_spec(backend) is None:
        raise TrainingError(f"cannot track with {backend}: it is not installed; run 'pip install {backend}'")
    return [f"trainer.logger=[console,file,{backend}]"]


def _steps(config: DictConfig, tasks: int) -> tuple[int, int]:
    """Steps of an epoch and of the whole run, as verl counts them."""
    limit = config.data.train_max_samples
    epoch = (min(tasks, limit) if limit > 0 else tasks) // config.data.train_batch_size
    return epoch, config.trainer.total_training_steps or epoch * config.trainer.total_epochs


def export_policy(run: str | Path, start: str | Path | None = None) -> Path:
    """Copy the newest checkpoint of a run to ``<run>/policy`` as a complete Hugging Face folder, and return it.

    Tokenizer and family files come from the policy that training started from, byte by byte.

    Args:
        run: run folder.
        start: that policy; as the run's configuration names it by default.

    Raises:
        TrainingError: the run has no checkpoint yet, or the policy it started from is gone.
    """
    run = Path(run)
    saved = run / f"checkpoints/global_step_{checkpointed(run)}/actor/huggingface"
    if not saved.is_dir():
        raise TrainingError(f"{run} has no checkpoint; train it to its first one (trainer.save_freq) first")
    target, building = run / "policy", run / ".policy.new"
    shutil.rmtree(building, ignore_errors=True)
    shutil.copytree(saved, building)
    record = RunFolder(run).config()
    start = Path(start or record["config"]["sqlbench"]["model"])
    if record["model_files"] and not start.is_dir():
        raise TrainingError(
            f"{run} started from the policy {start}, which is not there; run this in the project's folder"
        )
    if start.is_dir():
        for file in start.iterdir():
            if file.is_file() and ("token" in file.name or file.name in ("sqlbench.json", "chat_template.jinja")):
                shutil.copy2(file, building / file.name)
    shutil.rmtree(target, ignore_errors=True)
    building.rename(target)
    return target


def checkpointed(run: str | Path) -> int:
    """Step of a run's newest whole checkpoint, 0 where there is none; verl's note of it is mended where a kill tore it.

    verl writes the note last and not in one piece: where it is there without a number, the newest checkpoint is whole.
    """
    folder = Path(run) / "checkpoints"
    note = folder / "latest_checkpointed_iteration.txt"
    if not note.is_file():
        return 0
    if not (text := note.read_text()).isdigit():
        text = str(max(map(_step_of, folder.glob("global_step_*/data.pt")), default=0))
        new = note.with_suffix(".new")
        new.write_text(text)
        new.replace(note)
    return int(text)


def latest_checkpoint(run: str | Path) -> Path:
    """Folder of a run's newest policy, ready for `sqlbench.models.local`."""
    policy = Path(run) / "policy"
    return policy if policy.is_dir() else export_policy(run)


def _step_of(path: Path) -> int:
    found = re.search(r"global_step_(\d+)", str(path))
    return int(found[1]) if found else -1


def _policy(model: str, profile: Profile) -> str:
    if model == "nano":
        from sqlbench.models.nano import NANO_PATH

        model = str(NANO_PATH)
    if Path(model).is_dir() or profile.device == "cpu" or model.startswith((".", "/")):
        return str(check_checkpoint(model).absolute())
    return model


def _leaves(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        found += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return found


def _literal(value: Any) -> str:
    """A value in Hydra's override grammar."""
    if isinstance(value, list):
        return "[" + ",".join(map(_literal, value)) + "]"
    if isinstance(value, str) and not value.startswith("${"):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return str(value) if isinstance(value, str) else json.dumps(value)


def _portable(value: Any) -> Any:
    """A configuration with paths below the working directory made relative, so that it can be shared."""
    if isinstance(value, dict):
        return {key: _portable(below) for key, below in value.items()}
    if isinstance(value, list):
        return [_portable(below) for below in value]
    return value.replace(f"{Path.cwd()}/", "") if isinstance(value, str) else value


def _gpu_bytes() -> int:
    """Memory of this machine's first GPU; 0 where there is none."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0


def _preflight(profile: Profile, config: DictConfig) -> tuple[list[Task], list[Task]]:
    """Tasks to train and to validate on; refuses what cannot work."""
    from sqlbench.training.tasks import validation_tasks

    settings = config.sqlbench
    try:
        matched = [a for a in AGENTS if re.search(settings.trained_agents, a)]
    except re.error as error:
        raise TrainingError(
            f"sqlbench.trained_agents={settings.trained_agents} is no regular expression: {error}"
        ) from error
    if not matched or ((matched == ["rewrite"] or matched == ["check"]) and settings.max_turns == 1):
        raise TrainingError(
            f"sqlbench.trained_agents={settings.trained_agents} with {settings.max_turns} turn(s) trains nothing; "
            f"the sub-agents are {', '.join(AGENTS)}"
        )
    if settings.credit not in ("rollout", "transition"):
        raise TrainingError(f"sqlbench.credit={settings.credit} is neither 'rollout' nor 'transition'")
    _reach(str(config.ray_kwargs.ray_init.get("address")))
    if profile.device == "cuda":
        missing = [line for line in needs(profile, config) if "NOT" in line]
        if missing:
            raise TrainingError(f"this machine cannot run the profile: {'; '.join(missing)}; see --dry-run")
    dataset = DataSet(settings.data)
    tasks = [t for t in dataset.load("train") if t.scorable]
    if len(tasks) < config.data.train_batch_size:
        raise TrainingError(
            f"{dataset.root} has {len(tasks)} training tasks, a batch takes {config.data.train_batch_size}"
        )
    epoch, steps = _steps(config, len(tasks))
    if steps > epoch * config.trainer.total_epochs:  # verl would end early, after hours
        raise TrainingError(
            f"{steps} steps do not fit into trainer.total_epochs={config.trainer.total_epochs} of {epoch} steps; "
            f"ask for {-(-steps // epoch)} epochs or fewer steps"
        )
    headline = json.loads((dataset.root / "dataset.json").read_text()).get("headline", "dev")
    for task in {t.db_id: t for t in tasks}.values():
        dataset.database(task.db_id)
    return tasks, validation_tasks(dataset, headline, settings.validation_tasks)


def _reach(address: str) -> None:
    """Refuse a Ray cluster that does not answer: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise TrainingError(
                f"no Ray cluster answers at {address}: {error.strerror or error}; start one with 'ray start --head'"
            ) from error


class _Run:
    """One call of `train` on its run folder."""

    def __init__(
        self,
        profile: Profile,
        config: DictConfig,
        folder: Path,
        overrides: list[str],
        tasks: list[Task],
        validation: list[Task],
    ) -> None:
        self.profile, self.config, self.folder, self.overrides = profile, config, folder, overrides
        self.tasks, self.validation = tasks, validation
        _, self.total = _steps(config, len(tasks))

    def run(self, overwrite: bool) -> Path:
        from omegaconf import OmegaConf

        record = {
            "kind": "training",
            "profile": self.profile.name,
            "overrides": self.overrides,
            "tasks": _digest(t.key for t in self.tasks),
            "validation_tasks": _digest(t.key for t in self.validation),
            "model_files": _model_digest(self.config.sqlbench.model),
            "config": _portable(OmegaConf.to_container(self.config, resolve=True)),
        }
        folder = RunFolder(self.folder)
        with folder.open(record, overwrite=overwrite):
            try:
                self._train(folder)
            except OSError as error:
                raise TrainingError(
                    f"training stopped: {error.strerror}: {error.filename or self.folder}; see to it and give the same "
                    "command again: it goes on at the last checkpoint"
                ) from error
        return self.folder

    def _train(self, folder: RunFolder) -> None:
        started = time.time()
        self._end_earlier()
        done, validate = self._rewind()
        self._write_data()
        if done < self.total or validate:
            self._follow(self._prepare_attempt(validate), done)
        rows = read_rows(self.folder / METRICS)
        if max(rows, default=0) < self.total:
            raise TrainingError(f"verl ended at step {max(rows, default=0)} of {self.total}; see {self._log()}")
        self._write_rows(rows)
        export_policy(self.folder, self.config.sqlbench.model)
        validated = [row["sqlbench/val_ex"] for row in rows.values() if "sqlbench/val_ex" in row]
        folder.finish(
            {
                "steps": self.total,
                "seconds": round(time.time() - started, 1),
                "resumed_at": done,
                "val_ex_first": validated[0] if validated else None,
                "val_ex_last": validated[-1] if validated else None,
                "failed_rollouts": int(sum(row.get("sqlbench/failed_rollouts", 0) for row in rows.values())),
                "policy": "policy",
            }
        )

    def _log(self) -> Path:
        return self.folder / "logs/train.log"

    def _attempt(self) -> Path:
        """Where verl writes its metrics, from the beginning at each attempt."""
        return self.folder / "logs/attempt.jsonl"

    def _end_earlier(self) -> None:
        """End what a killed attempt left running; the run's lock says that nobody waits for it any more."""
        left = []
        for process in psutil.process_iter(["cmdline"]):
            if str(self._config_file()) in (process.info["cmdline"] or ()):
                with contextlib.suppress(psutil.Error):
                    left += [process, *process.children(recursive=True)]
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=10)

    def _rewind(self) -> tuple[int, bool]:
        """Step of the last checkpoint, and whether to validate it first; what was logged after it is dropped.

        verl saves a step before it validates and logs it. After a kill in between, its row is made from the rollouts on
        record, and its validation is run again.
        """
        done = checkpointed(self.folder)
        every, keep = self.config.trainer.test_freq, self.config.trainer.max_actor_ckpt_to_keep
        known = read_rows(self.folder / METRICS)
        for step, row in read_rows(self._attempt()).items():  # not all of it may have been taken over
            known.setdefault(step, {}).update(row)
        rows = {step: row for step, row in known.items() if done and step <= done}
        kept = [t for t in read_trajectories(self.folder) if done and (t.step or 0) <= done]
        validate = not done and self.config.trainer.val_before_train
        if done:
            here = StepRecord([t for t in kept if t.step == done and not t.validation])
            rows.setdefault(done, here.metrics("sqlbench/"))
            due = every > 0 and (done % every == 0 or done >= self.total)
            if due and "sqlbench/val_ex" not in rows[done]:
                validate, kept = True, [t for t in kept if t.step != done or not t.validation]
        RunFolder(self.folder).rewrite(TRAJECTORIES, kept)
        self._write_rows(rows)
        self._attempt().unlink(missing_ok=True)
        # verl forgets the checkpoints of earlier attempts, and of one that a kill cut short it knows nothing.
        saved = sorted((self.folder / "checkpoints").glob("global_step_*"), key=_step_of)
        whole = [path for path in saved if _step_of(path) <= done]
        for path in saved[len(whole) :] + (whole[:-keep] if keep else []):
            shutil.rmtree(path)
        return done, validate

    def _write_rows(self, rows: dict[int, dict[str, float]]) -> None:
        lines: list[dict[str, Any]] = [{"step": step, "data": rows[step]} for step in sorted(rows)]
        RunFolder(self.folder).rewrite(METRICS, lines)

    def _config_file(self) -> Path:
        return self.folder / "data/verl.yaml"

    def _write_data(self) -> None:
        from sqlbench.training.tasks import write_rows as write_tasks

        source = Path(self.config.sqlbench.data).name
        write_tasks(Path(self.config.data.train_files), source, self.tasks, validation=False)
        write_tasks(Path(self.config.data.val_files), source, self.validation, validation=True)
        (self.folder / "data/agent_loop.yaml").write_text(
            "- name: sqlbench\n  _target_: sqlbench.training.agent_loop.SqlAgentLoop\n"
        )
        (self.folder / "data/router.yaml").write_text("router_class: sqlbench.training.local_server.Router\n")

    def _prepare_attempt(self, validate: bool) -> Path:
        """Write the configuration of this attempt: a resumed one has been validated at its first step already."""
        from omegaconf import OmegaConf, open_dict

        config = self.config.copy()
        with open_dict(config):
            config.trainer.val_before_train = validate
            ray = config.ray_kwargs.ray_init
            if ray.get("address") != "local":  # a cluster has its own resources, and not this process's environment
                for name in ("num_cpus", "num_gpus", "include_dashboard"):
                    ray.pop(name, None)
                ray.runtime_env = {"env_vars": self.profile.environment}
        OmegaConf.save(config, self._config_file())
        return self._config_file()

    def _follow(self, config_file: Path, done: int) -> None:
        """Run verl, showing its progress; returns when it ended well."""
        self._log().parent.mkdir(exist_ok=True)
        _clear_abandoned()
        ray_folder = Path(tempfile.mkdtemp(prefix=f"{RAY_FOLDER}{os.getpid()}-", dir=_temporary()))
        environment = _environment(self.profile, self._attempt(), self.folder)
        environment["TMPDIR"] = str(ray_folder)  # verl leaves a file there for every checkpoint
        if self.config.ray_kwargs.ray_init.get("address") == "local":
            # Ray's own default for a new cluster, but with a token of this run instead of one in the home directory.
            environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        with self._log().open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "sqlbench.training.worker", str(config_file), str(os.getpid()), str(ray_folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        bar = tqdm(
            total=self.total, initial=done, desc="starting verl", unit="step", mininterval=1, miniters=0, smoothing=0
        )
        try:
            position = 0
            while True:
                ended = process.poll() is not None
                position = self._take(position, bar)
                if ended:
                    break
                bar.update(0)
                time.sleep(0.2)
        finally:
            _stop(process)
            bar.close()
            _clear(ray_folder)
        if process.returncode != 0:
            reason = _reason(self._log(), process.returncode)
            if shutil.disk_usage(self.folder).free < FULL:  # whatever broke then broke of it, and the log may end early
                reason = (
                    f"No space left on device for {self.folder}; make room and give the same command again ({reason})"
                )
            raise TrainingError(f"training stopped: {reason} (see {self._log()})")

    def _take(self, position: int, bar: Any) -> int:
        """Put new metric lines into the run folder's metrics and onto the screen."""
        if not self._attempt().is_file():
            return position
        with self._attempt().open("rb") as file:
            file.seek(position)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        for line in whole.splitlines():
            record = json.loads(line)
            append_line(self.folder / METRICS, record)
            if position == 0:  # the rate is that of training, not of the start
                bar.start_t, bar.initial = time.time(), record["step"]
            bar.set_description("training", refresh=False)
            bar.update(max(0, record["step"] - bar.n))
            bar.write(describe(record["step"], record["data"]))
        return position + len(whole)


def describe(step: int, data: dict[str, float]) -> str:
    """One step in one line."""
    parts = [f"step {step:3d}"]
    for name, label, scale in (("sqlbench/ex", "EX", 100), ("sqlbench/val_ex", "validation EX", 100)):
        if name in data:
            parts.append(f"{label} {scale * data[name]:.1f}%")
    if "sqlbench/rows" in data:
        parts.append(f"rows {data['sqlbench/rows']:.0f}")
        parts.append(f"failed {data['sqlbench/failed_rollouts']:.0f}")
        parts.append(f"no signal {100 * data['sqlbench/zero_variance_groups']:.0f}%")
        parts.append(f"{data['sqlbench/seconds']:.1f} s (rollout {data['sqlbench/rollout_percent']:.0f}%")
        parts[-1] += f", update {data['sqlbench/update_percent']:.0f}%)"
    return "  ".join(parts)


def _environment(profile: Profile, metrics_file: Path, folder: Path) -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "VERL_FILE_LOGGER_PATH")}
    if not environment.get("CUDA_VISIBLE_DEVICES", "unset"):
        del environment["CUDA_VISIBLE_DEVICES"]  # Ray refuses an empty one
    defaults = {
        **profile.environment,
        "TENSORBOARD_DIR": str(folder / "tensorboard"),
        "WANDB_DIR": str(folder),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "HYDRA_FULL_ERROR": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    here = Path(__file__).resolve().parent
    paths = [str(here.parents[1]), *filter(None, [environment.get("PYTHONPATH")])]
    if profile.device == "cpu":
        paths.insert(0, str(here / "startup"))
    return {
        **defaults,
        **environment,
        "VERL_FILE_LOGGER_PATH": str(metrics_file),
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
    }


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the training processes, whatever state they are in."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _clear(ray_folder: Path) -> None:
    """End what Ray left running for a folder, and remove the folder. Ray names it in every command line."""
    for process in psutil.process_iter(["cmdline"]):
        if any(str(ray_folder) in part for part in process.info["cmdline"] or ()):
            with contextlib.suppress(psutil.Error):
                process.kill()
    shutil.rmtree(ray_folder, ignore_errors=True)


def _temporary() -> Path:
    """Where Ray's folders lie: not below a long TMPDIR, for the name of a socket has 107 characters at most."""
    usual = Path(tempfile.gettempdir())
    return usual if len(str(usual)) <= 14 else Path("/tmp")


def _clear_abandoned() -> None:
    """Clear the folders of trainings whose launching process is gone."""
    for folder in _temporary().glob(f"{RAY_FOLDER}*"):
        owner = folder.name.removeprefix(RAY_FOLDER).split("-")[0]
        if owner.isdigit() and not _was_running(int(owner), folder.stat().st_mtime):
            _clear(folder)


def _was_running(number: int, moment: float) -> bool:
    """Whether the process of this number is the one that had it at a moment in the past."""
    try:
        return psutil.Process(number).create_time() <= moment
    except psutil.NoSuchProcess:
        return False


def _reason(log: Path, status: int) -> str:
    """The error that ended a training, from the end of its log."""
    if status == -signal.SIGKILL:
        return "it was killed (signal 9); was the memory used up?"
    lines = _tail(log.open("rb"))
    errors = [line for line in lines if re.match(r"(?:[\w.]+\.)?\w*(?:Error|Exception|Interrupt|Exit)\b: ?", line)]
    text = errors[-1] if errors else (lines[-1] if lines else "no output")
    return re.sub(r"^[\w.]*\.(?=\w+:)", "", text)[:500]


def _tail(file: IO[bytes], size: int = 65536) -> list[str]:
    with file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - size))
        text = file.read().decode(errors="replace")
    return [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines() if line.strip()]


def _digest(keys: Any) -> str:
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16]


def _model_digest(model: str) -> str | None:
    """Hash of the weights a local policy starts from."""
    files = sorted(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16] if files else None
