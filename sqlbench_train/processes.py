"""The processes of a training: their environment, their end, the remains of killed ones, the reason for a failure."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from sqlbench.profiles import Profile
from verl_cpu.forkserver import RAY_LATE

RAY_FOLDER = "sqlbench-ray-"
"""Prefix of Ray's temporary folders; the number of the launching process follows."""
WORKER = "verl_cpu.forkserver"
MODULES = ("sqlbench_train.trainer",)
"""Modules that register our trainer mode with verl."""
STOP_SECONDS = 3
"""Grace period between SIGTERM and SIGKILL; killing is safe because runs resume from checkpoints."""


@contextlib.contextmanager
def training(
    profile: Profile,
    run: Path,
    config_file: Path,
    metrics_file: Path,
    log: Path,
    *,
    own_cluster: bool,
    plain: bool = False,
) -> Iterator[subprocess.Popen[bytes]]:
    """Start verl's process with its output in `log`; leave nothing of it running at the end, however it ends.

    Args:
        config_file: verl's resolved configuration.
        metrics_file: file for verl's metrics.
        own_cluster: true if the training starts its own Ray cluster.
        plain: true if every process starts by itself (`verl_cpu.forkserver`).
    """
    _clear_abandoned()
    ray_folder = Path(tempfile.mkdtemp(prefix=f"{RAY_FOLDER}{os.getpid()}-", dir=_temporary()))
    environment = _environment(profile, run, metrics_file)
    environment["TMPDIR"] = str(ray_folder)  # verl leaves a file there for every checkpoint
    if own_cluster:
        # Ray's own default for a new cluster, but with a token of this run instead of one in the home directory.
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    if plain:
        environment["VERL_PLAIN_START"] = "1"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", WORKER, str(config_file), str(os.getpid()), str(ray_folder), *MODULES],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        _stop(process)
        _clear(ray_folder)


def end_earlier(config_file: Path) -> None:
    """End the processes that a killed attempt left running; the run's lock says that nobody waits for them."""
    remaining = []
    for process in psutil.process_iter(["cmdline"]):
        if {WORKER, str(config_file)} <= set(process.info["cmdline"] or ()):
            with contextlib.suppress(psutil.Error):
                remaining += [process, *process.children(recursive=True)]
    for process in remaining:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(remaining, timeout=10)


def _environment(profile: Profile, run: Path, metrics_file: Path) -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "VERL_FILE_LOGGER_PATH")}
    if not environment.get("CUDA_VISIBLE_DEVICES", "unset"):
        del environment["CUDA_VISIBLE_DEVICES"]  # Ray refuses an empty one
    defaults = {
        **profile.environment,
        "TENSORBOARD_DIR": str(run / "tensorboard"),
        "WANDB_DIR": str(run),
        "MLFLOW_TRACKING_URI": f"sqlite:///{run}/mlflow.db",
        "HYDRA_FULL_ERROR": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    here = Path(__file__).resolve().parent
    paths = [str(here.parents[1]), *filter(None, [environment.get("PYTHONPATH")])]
    if profile.device == "cpu":
        paths.insert(0, str(here.parents[1] / "verl_cpu/startup"))
    return {
        **defaults,
        **environment,
        "VERL_FILE_LOGGER_PATH": str(metrics_file),
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
    }


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the training processes in any state."""
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
    """Return the parent of Ray's folders: not a long TMPDIR, because a socket's name has at most 107 characters."""
    usual = Path(tempfile.gettempdir())
    return usual if len(str(usual)) <= 14 else Path("/tmp")


def _clear_abandoned() -> None:
    """Clear the folders of trainings whose launching process is gone."""
    for folder in _temporary().glob(f"{RAY_FOLDER}*"):
        owner = folder.name.removeprefix(RAY_FOLDER).split("-")[0]
        with contextlib.suppress(FileNotFoundError):  # another training that starts now clears it too
            if owner.isdigit() and not _was_running(int(owner), folder.stat().st_mtime):
                _clear(folder)


def _was_running(number: int, moment: float) -> bool:
    """Return whether the process of this number is the one that had it at a moment in the past."""
    try:
        return psutil.Process(number).create_time() <= moment
    except psutil.NoSuchProcess:
        return False


def reason(log: Path, status: int) -> str:
    """Read the error that ended a training from the end of its log."""
    if status == -signal.SIGKILL:
        return "killed by signal 9, perhaps for memory"
    if status == RAY_LATE:
        return "Ray did not start in time, perhaps because the machine is busy. Rerun the command"
    lines = _tail(log)
    if any("InvalidAuthToken" in line for line in lines):  # Ray only says that it could not connect
        return "the Ray cluster did not take the token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN as on its nodes"
    errors = [line for line in lines if re.match(r"(?:[\w.]+\.)?\w*(?:Error|Exception|Interrupt|Exit)\b: ?", line)]
    ray = [line for line in lines if "Raylet is terminated" in line]  # followed by the end of its own log
    text = (errors or ray or lines or ["no output"])[-1]
    return re.sub(r"^[\w.]*\.(?=\w+:)", "", text)[:500]


def _tail(log: Path, size: int = 65536) -> list[str]:
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - size))
        text = file.read().decode(errors="replace")
    return [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines() if line.strip()]
