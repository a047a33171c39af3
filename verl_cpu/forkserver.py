"""The process that runs verl: ``python -m verl_cpu.forkserver CONFIG PARENT FOLDER [MODULE...]``.

Everything that runs below it dies with it, and it dies with its parent. verl, Ray and vLLM use about fifteen Python
processes, each of which would import torch, transformers, Ray and verl for 7 s of processor time, or Ray alone for 2 s,
and some of them vLLM for as much again; those imports were most of a short training. So this process imports them once
and forks: the driver, through Ray's ``py_executable`` setting (`forkserver_stub`) the Ray workers, through the driver's
``sys.executable`` Ray's own servers, and through that of `multiprocessing` the processes of vLLM's engine. It starts no
thread before it forks and holds no state but modules. verl's task runner runs in the driver instead of in an actor of
its own, for the same reason.

On a GPU it must not start CUDA either, or no fork could use it; a fork tests this first. If it cannot, or if an import
fails, or where the environment variable VERL_PLAIN_START is set, every process starts by itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import selectors
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import psutil

PRELOAD = (
    "ray._private.workers.default_worker",
    "ray._private.log_monitor",
    "ray.autoscaler._private.monitor",
    "ray.dashboard.dashboard",
    *(
        f"ray.dashboard.modules.{name}"
        for name in (
            "aggregator.aggregator_agent",
            "event.event_agent",
            "job.job_agent",
            "log.log_agent",
            "reporter.healthz_agent",
            "reporter.reporter_agent",
        )
    ),
    "transfer_queue",
    "verl.trainer.main_ppo",
    "verl.workers.engine_workers",
    "verl_cpu.replica",
)
PRELOAD_VLLM = (
    "vllm.entrypoints.cli.serve",
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
)
"""Modules that vLLM has imported when it forks its engine; its models, and verl's modules for it, start CUDA."""
PLAIN = "VERL_PLAIN_START"
"""Environment variable that makes verl start without forks."""
PROBE_SECONDS = 120
STARTED = time.monotonic()
BORN_AS = {"RAY_JOB_ID": os.getpid().to_bytes(4, "little").hex()}
"""Worker settings that Ray's library reads when it is loaded, before they exist. The job has the number of this process
(`_number_job`), and a worker lives as long as this process, which therefore takes the place of its raylet."""
RAY_LATE = 75
"""Exit status where Ray did not start in time; the same command may be given again."""
PR_SET_PDEATHSIG = 1


def main(config_file: str, parent: int, folder: str, modules: list[str]) -> None:
    """Train by the resolved configuration.

    Args:
        config_file: verl's resolved configuration.
        parent: process whose end ends this one.
        folder: folder for everything that Ray writes.
        modules: modules that register the caller's own parts with verl; imported before the training starts.
    """
    from omegaconf import OmegaConf

    _die_with(parent, signal.SIGTERM)
    config = OmegaConf.load(config_file)
    options = config.ray_kwargs.ray_init
    if options.get("address") == "local":
        options["_temp_dir"] = folder
    local = options.get("address") == "local"
    if local and PLAIN not in os.environ:  # a cluster starts its own workers
        before = dict(os.environ)
        os.environ.update(BORN_AS, RAY_RAYLET_PID=str(os.getpid()))
        ready = _preload_without_cuda(config, modules)
        for name in (*BORN_AS, "RAY_RAYLET_PID"):
            del os.environ[name]
        if ready:
            _fork_from_here(config, parent, folder, modules, before)
        _say("starting the plain way")
        os.environ[PLAIN] = "1"
        os.execv(sys.executable, sys.orig_argv)
    if local:
        _number_job()
    _drive(config, modules)


def _fork_from_here(config: Any, parent: int, folder: str, modules: list[str], before: dict[str, str]) -> NoReturn:
    """Run the driver in a fork, and serve it until it ends.

    Args:
        before: the environment before the imports.
    """
    _number_job()
    if config.trainer.device == "cpu":
        # The ranks meet at a file: verl would pick a free port, which another program may take before they listen.
        os.environ["DIST_INIT_METHOD"] = f"file://{folder}/ranks"
    imported = {name: value for name, value in os.environ.items() if before.get(name) != value}
    server = socket.socket(socket.AF_UNIX)
    server.bind(f"{folder}/fork")
    server.listen(64)
    client = Path(__file__).with_name("forkserver_stub.py")
    config.ray_kwargs.ray_init.runtime_env = {"py_executable": f"{sys.executable} -S -E {client} {folder}/fork"}
    python = f"{folder}/python"  # a script, for multiprocessing takes no arguments
    Path(python).write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "{client}" "{folder}/fork" "$@"\n')
    os.chmod(python, 0o700)
    gc.freeze()
    driver = _fork()
    if driver == 0:
        server.close()
        _die_with(os.getppid(), signal.SIGTERM)
        sys.executable = python
        _leave(lambda: _drive(config, modules))
    status = _serve(server, driver, imported, python if config.actor_rollout_ref.rollout.name == "vllm" else "")
    if os.getppid() != parent:  # nobody is left to do it
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(status)


def _preload(config: Any, modules: list[str]) -> None:
    """Import what the driver and the workers will need."""
    settings = Path(config.actor_rollout_ref.model.path, "config.json")  # not there yet where it comes from the hub
    kind = json.loads(settings.read_text())["model_type"] if settings.is_file() else None
    for name in (*PRELOAD, *modules, *([f"transformers.models.{kind}.modeling_{kind}"] if kind else [])):
        importlib.import_module(name)
    _say("imported torch, Ray, transformers and verl")
    if config.actor_rollout_ref.rollout.name == "vllm":
        for name in PRELOAD_VLLM:
            importlib.import_module(name)
        # To keep CUDA out of the server, vLLM would inspect the model's class in a new Python that imports vLLM. But
        # verl's own imports have started CUDA there already, and the engine is a process of its own.
        registry: Any = importlib.import_module("vllm.model_executor.models.registry")
        registry._run_in_subprocess = lambda function: function()
        _say("imported vLLM")


def _preload_without_cuda(config: Any, modules: list[str]) -> bool:
    """Import it all without starting CUDA; return whether a fork can then compute on the training's device."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as Ray sets it for its workers
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # otherwise a search for GPUs would start CUDA
    try:
        import torch

        usual = torch.cuda.get_device_capability
        torch.cuda.get_device_capability = lambda *arguments: tuple(_in_a_fork(lambda: bytes(usual(*arguments))))
        with _ray_draws_no_ids():
            _preload(config, modules)
        torch.cuda.get_device_capability = usual
        device = config.trainer.device
        return _in_a_fork(lambda: bytes(torch.ones(8, device=device).int().tolist())) == bytes([1] * 8)
    except Exception:
        traceback.print_exc()
        return False


@contextlib.contextmanager
def _ray_draws_no_ids() -> Iterator[None]:
    """Give the actor classes that a block defines ids from the system's random numbers.

    Ray draws ids from a generator that a fork inherits. Once it is in use here, all forks draw the same ids, and an
    actor that two of them call at once dies of two tasks with one id.
    """
    import ray.actor

    module: Any = ray.actor
    usual: Any = module.ActorClassID

    class FromSystem(usual):
        @classmethod
        def from_random(cls) -> Any:
            return usual(os.urandom(usual.size()))

    module.ActorClassID = FromSystem
    try:
        yield
    finally:
        module.ActorClassID = usual


def _in_a_fork(function: Callable[[], bytes]) -> bytes:
    """Call a function in a fork of this process and return its result; empty if it fails there."""
    reader, writer = os.pipe()
    pid = _fork()
    if pid == 0:
        signal.alarm(PROBE_SECONDS)
        _leave(lambda: os.write(writer, function()))
    os.close(writer)
    with open(reader, "rb") as pipe:
        result = pipe.read()
    os.waitpid(pid, 0)
    return result


def _say(text: str) -> None:
    print(f"[start-up {time.monotonic() - STARTED:6.1f} s] {text}", flush=True)


def _drive(config: Any, modules: list[str]) -> None:
    """Run verl's own main, after its command line."""
    import ray
    from verl.trainer.main_ppo import TaskRunnerV1, run_ppo
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    for name in modules:
        importlib.import_module(name)
    signal.signal(signal.SIGTERM, _end)
    validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    try:
        with exit_if_ray_is_late():
            run_ppo(config, task_runner_class=_InThisProcess(TaskRunnerV1.__ray_metadata__.modified_class))
    finally:
        ray.shutdown()


@contextlib.contextmanager
def exit_if_ray_is_late() -> Iterator[None]:
    """End the process with `RAY_LATE` if the Ray that the block starts does not start in time.

    Ray gives its own processes 15 and 30 seconds to answer, which cannot be set and is too little on a busy machine
    (ray-project/ray#65983). If its raylet has ended for this reason, `ray.init` may wait for it forever.
    """
    threading.Thread(target=_watch_raylet, daemon=True).start()
    try:
        yield
    except Exception as error:
        if "timed out during startup" in str(error):
            sys.exit(RAY_LATE)
        raise


def _watch_raylet() -> None:
    import ray

    seen: set[int] = set()
    while not ray.is_initialized():
        alive: set[int] = set()
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if child.name() == "raylet":
                    (seen if child.status() == psutil.STATUS_ZOMBIE else alive).add(child.pid)
        if seen - alive:
            _say("Ray's raylet ended before Ray had started")
            os._exit(RAY_LATE)
        seen |= alive
        time.sleep(1)


def _number_job() -> None:
    """Give the job of a new cluster the number of this process instead of 1.

    verl sends the weights to vLLM through ``/tmp/rl-colocate-zmq-<job>-...``. Two trainings on one machine, both job 1,
    would share that socket, and one could sample from the weights of the other.
    """
    import ray

    number = ray.JobID.from_hex(BORN_AS["RAY_JOB_ID"])
    ray._private.state.next_job_id = lambda: number


class _InThisProcess:
    """Stand-in for a Ray actor class with a method ``run``; makes and calls the object in this process."""

    def __init__(self, cls: type) -> None:
        self._cls = cls

    @property
    def run(self) -> _InThisProcess:
        return self

    def remote(self, *arguments: Any) -> Any:
        import ray

        return ray.put(self._cls().run(*arguments)) if arguments else self


def _serve(server: socket.socket, driver: int, imported: dict[str, str] | None = None, python: str = "") -> int:
    """Fork at every request until the driver ends, and return its exit status.

    Args:
        imported: environment variables that the imports have set.
        python: replacement for the Python interpreter that `multiprocessing` starts.
    """
    wakeup, signalled = os.pipe()
    os.set_blocking(signalled, False)
    signal.set_wakeup_fd(signalled)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(driver, signal.SIGTERM))
    clients: dict[int, socket.socket] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        selector.register(wakeup, selectors.EVENT_READ)
        while True:
            with contextlib.suppress(ChildProcessError):
                while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                    pid, status = ended[0], os.waitstatus_to_exitcode(ended[1])
                    if pid == driver:
                        return status if status >= 0 else 128 - status
                    if pid in clients:
                        connection = clients.pop(pid)
                        with contextlib.suppress(OSError):
                            connection.sendall(str(abs(status)).encode())
                        connection.close()
            for key, _ in selector.select():
                if key.fileobj is server:
                    connection, _ = server.accept()
                    if pid := _start_worker(connection, imported or {}, python):
                        clients[pid] = connection
                else:
                    os.read(wakeup, 4096)


def _start_worker(connection: socket.socket, imported: dict[str, str], python: str) -> int:
    """Fork for a client's request and return the process id; 0 if the client was killed before it asked."""
    message, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 64)
    while not message.endswith(b"\0"):
        if not (more := connection.recv(1 << 20)):
            return 0
        message += more
    request = json.loads(message[:-1])
    pid = _fork()
    if pid == 0:
        # Out of the way first: a descriptor may lie where another one belongs.
        apart = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 1000) for descriptor in descriptors]
        for target, descriptor in zip(request["descriptors"], apart, strict=True):
            os.dup2(descriptor, target)
            os.close(descriptor)
        os.environ.clear()
        os.environ.update(imported | request["environment"])
        if "RAY_RAYLET_PID" in os.environ:  # Ray's servers end with their parent, which is this server
            os.environ["RAY_RAYLET_PID"] = str(os.getppid())
        os.chdir(request["folder"])
        if python:
            multiprocessing.set_executable(python)
        _leave(lambda: _run(request["arguments"]))
    for descriptor in descriptors:
        os.close(descriptor)
    script, *options = request["arguments"]
    _say(f"forked {pid}: {options[0][:40] if script == '-c' else Path(script).name}")
    return pid


def _run(arguments: list[str]) -> None:
    """Run these arguments as the Python interpreter would: a script, or ``-c CODE``."""
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(arguments[1], {"__name__": "__main__"})
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def _fork() -> int:
    """Fork; the child starts with default signal handling and dies with this process."""
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _die_with(parent)
    return pid


def _end(*_: Any) -> NoReturn:
    """Exit through Ray's shutdown, so that its servers end too; if that hangs, exit anyway."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.alarm(10)
    sys.exit(128 + signal.SIGTERM)


def _leave(function: Any) -> NoReturn:
    """Run `function` in the forked child and exit without unwinding the parent's stack."""
    status = 1
    try:
        function()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _die_with(parent: int, sign: signal.Signals = signal.SIGKILL) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, sign)
    if os.getppid() != parent:
        sys.exit("the launching process is gone")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:])
