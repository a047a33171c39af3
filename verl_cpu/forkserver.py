"""The process that runs verl: ``python -m verl_cpu.forkserver CONFIG PARENT FOLDER [MODULE...]``.

Everything that runs below it dies with it, and it dies with its parent. verl and Ray use about ten Python processes,
each of which would import torch, transformers, Ray and verl for 7 s of processor time; on a laptop those imports were
most of a short training. So, on a CPU, this process imports them once and forks: the driver, and through Ray's
``py_executable`` setting (`forkserver_stub`) the Ray workers. It starts no thread before it forks and holds no state
but modules. verl's task runner runs in the driver instead of in an actor of its own, for the same reason.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

PRELOAD = (
    "ray._private.workers.default_worker",
    "transfer_queue",
    "verl.trainer.main_ppo",
    "verl.workers.engine_workers",
    "verl_cpu.replica",
)
BORN_AS = {"RAY_JOB_ID": os.getpid().to_bytes(4, "little").hex()}
"""Ray's library reads its worker settings when it is loaded, which is before they exist: the job has the number of this
process (`_number_job`), and a worker lives as long as this process, which therefore stands for its raylet."""
PR_SET_PDEATHSIG = 1


def main(config_file: str, parent: int, folder: str, modules: list[str]) -> None:
    """Train as the resolved configuration says.

    Args:
        config_file: verl's resolved configuration.
        parent: process whose end ends this one.
        folder: where Ray writes everything.
        modules: what registers the caller's own parts with verl; imported before the training starts.
    """
    from omegaconf import OmegaConf

    _die_with(parent, signal.SIGTERM)
    config = OmegaConf.load(config_file)
    options = config.ray_kwargs.ray_init
    if options.get("address") == "local":
        options["_temp_dir"] = folder
    if config.trainer.device != "cpu" or options.get("address") != "local":  # a cluster starts its own workers
        if options.get("address") == "local":
            _number_job()
        _drive(config, modules)
        return
    # The ranks meet at a file: verl would pick a free port, which another program may take before they listen on it.
    os.environ["DIST_INIT_METHOD"] = f"file://{folder}/ranks"
    os.environ.update(BORN_AS, RAY_RAYLET_PID=str(os.getpid()))
    kind = json.loads(Path(config.actor_rollout_ref.model.path, "config.json").read_text())["model_type"]
    for name in (*PRELOAD, *modules, f"transformers.models.{kind}.modeling_{kind}"):
        importlib.import_module(name)
    for name in (*BORN_AS, "RAY_RAYLET_PID"):
        del os.environ[name]
    _number_job()
    server = socket.socket(socket.AF_UNIX)
    server.bind(f"{folder}/fork")
    server.listen(64)
    client = Path(__file__).with_name("forkserver_stub.py")
    options.runtime_env = {"py_executable": f"{sys.executable} -S -E {client} {folder}/fork"}
    gc.freeze()
    driver = _fork()
    if driver == 0:
        server.close()
        _die_with(os.getppid(), signal.SIGTERM)
        _leave(lambda: _drive(config, modules))
    status = _serve(server, driver)
    if os.getppid() != parent:  # nobody is left to do it
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(status)


def _drive(config: Any, modules: list[str]) -> None:
    """verl's own main, after its command line."""
    import ray
    from verl.trainer.main_ppo import TaskRunnerV1, run_ppo
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    for name in modules:
        importlib.import_module(name)
    signal.signal(signal.SIGTERM, _end)
    validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    try:
        run_ppo(config, task_runner_class=_InThisProcess(TaskRunnerV1.__ray_metadata__.modified_class))
    finally:
        ray.shutdown()


def _number_job() -> None:
    """Give the job of a new cluster the number of this process instead of 1.

    verl sends the weights to vLLM through ``/tmp/rl-colocate-zmq-<job>-...``. Two trainings on one machine, both of them
    job 1, would share that socket, and one could sample from the weights of the other.
    """
    import ray

    number = ray.JobID.from_hex(BORN_AS["RAY_JOB_ID"])
    ray._private.state.next_job_id = lambda: number


class _InThisProcess:
    """Has the shape of a Ray actor class with a method ``run``, but makes and calls the object right here."""

    def __init__(self, cls: type) -> None:
        self._cls = cls

    @property
    def run(self) -> _InThisProcess:
        return self

    def remote(self, *arguments: Any) -> Any:
        import ray

        return ray.put(self._cls().run(*arguments)) if arguments else self


def _serve(server: socket.socket, driver: int) -> int:
    """Fork a Ray worker at every request until the driver ends; its exit status."""
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
                    if pid := _start_worker(connection):
                        clients[pid] = connection
                else:
                    os.read(wakeup, 4096)


def _start_worker(connection: socket.socket) -> int:
    """Fork what the client asks for; 0 where it was killed before it had asked."""
    message, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 2)
    while not message.endswith(b"\0"):
        if not (more := connection.recv(1 << 20)):
            return 0
        message += more
    pid = _fork()
    if pid == 0:
        request = json.loads(message[:-1])
        for target, descriptor in enumerate(descriptors, 1):
            os.dup2(descriptor, target)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        sys.argv = request["arguments"]
        _leave(lambda: runpy.run_path(sys.argv[0], run_name="__main__"))
    for descriptor in descriptors:
        os.close(descriptor)
    return pid


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
    """Leave by way of Ray's shutdown, so that its servers end too; if that hangs, leave anyway."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.alarm(10)
    sys.exit(128 + signal.SIGTERM)


def _leave(function: Any) -> NoReturn:
    """Call and end the process, without going back up the stack of the process that was forked."""
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
