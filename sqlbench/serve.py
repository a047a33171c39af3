"""Serve a checkpoint with an OpenAI-compatible endpoint, by a server that others wrote.

Guarantees: what is announced answers; whatever goes wrong before or after is one `ServerError`; no process is left when
`serve` returns, however it returns. The endpoint asks for no key, so it listens on this machine alone unless told
otherwise.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from sqlbench.errors import ModelError, ServerError
from sqlbench.models import policy_folder
from sqlbench.models.checkpoint import check_checkpoint, checkpoint_family

ENGINES = {"vllm": "vllm.entrypoints.cli.main", "transformers": "transformers.cli.transformers"}
"""The module of each server's command line."""
NEEDS = {"vllm": ["vllm"], "transformers": ["transformers", "torch", "fastapi", "uvicorn"]}
START_SECONDS = 900
"""How long a server may take to answer: large weights are read, and compiled for a GPU."""
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PR_SET_PDEATHSIG = 1  # the server ends also where this process is killed


def serve(model: str, port: int = 8000, host: str = "127.0.0.1", engine: str | None = None) -> None:
    """Serve until interrupted; one line on standard output says where, under which name, and how to use it.

    Args:
        model: ``nano``, a checkpoint folder, or the folder of a training run (its newest policy).
        port: 0 takes a free one.
        engine: one of `ENGINES`; vLLM by default where it is installed.

    Raises:
        ServerError: the engine is missing, the address cannot be used, or the server ended; the message says why.
        ModelError, TrainingError: there is no such checkpoint.
    """
    folder, name = find_policy(model)
    engine = engine or ("vllm" if importlib.util.find_spec("vllm") else "transformers")
    if engine not in ENGINES:
        raise ServerError(f"no engine '{engine}'; there are: {', '.join(ENGINES)}")
    if missing := " ".join(package for package in NEEDS[engine] if importlib.util.find_spec(package) is None):
        raise ServerError(f"the engine {engine} needs what is not installed; run 'pip install {missing}'")
    with listen(host, port) as free:
        port = free.getsockname()[1]
    url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    options = " --prompts nano --max-tokens 128" if checkpoint_family(folder) == "nano" else ""
    with _running(engine, folder, name, host, port) as (server, log):
        print(f"loading {model} with {engine} ...", file=sys.stderr, flush=True)
        _wait_until_ready(server, f"{url}/health", log)
        print(
            f"serving {model} as '{name}' at {url}/v1 (Ctrl-C stops); to evaluate it: "
            f"OPENAI_BASE_URL={url}/v1 sqlbench eval --model openai:{name}{options} --run {name}-served",
            flush=True,
        )
        server.wait()
        raise _ended(server, log)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.

    Raises:
        ServerError: the address is in use or no address of this machine.
    """
    try:
        return socket.create_server((host, port))
    except OSError as error:
        why = str(error.strerror).split(" (")[0]
        raise ServerError(f"cannot listen on {host}:{port}: {why}; choose another --port or --host") from error


def find_policy(model: str) -> tuple[Path, str]:
    """The checkpoint folder that `model` means, and the name to serve it under."""
    if model.startswith("openai:"):
        raise ModelError(f"cannot serve {model}, an endpoint; give 'nano', a checkpoint folder or a run folder")
    name = re.sub(r"[^\w.-]+", "-", Path(model).resolve().name)
    return check_checkpoint(policy_folder(model)).resolve(), name


@contextlib.contextmanager
def _running(
    engine: str, folder: Path, name: str, host: str, port: int
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """The server's process and log, to the end of the block or an interruption; the log of a failure is kept."""
    import torch

    home = Path(tempfile.mkdtemp(prefix="sqlbench-serve-"))
    (home / name).symlink_to(folder)  # both servers know a model by the path that it was given by
    command = [sys.executable, "-P", "-m", ENGINES[engine], "serve", name, "--host", host, "--port", str(port)]
    variables = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "VLLM_NO_USAGE_STATS": "1"}
    if not torch.cuda.is_available():
        command += ["--dtype", "float32"]  # as `sqlbench.models.local` has it
        if engine == "vllm":  # compiling for a CPU takes minutes, and gigabytes are reserved unless told otherwise
            command += ["--enforce-eager"]
            variables |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    before = {number: signal.signal(number, signal.default_int_handler) for number in STOPPING}
    with (home / "server.log").open("wb") as log:
        server = subprocess.Popen(
            command, cwd=home, env=variables | os.environ, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=lambda: ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM),
        )  # fmt: skip
    try:
        yield server, home / "server.log"
    except KeyboardInterrupt:
        shutil.rmtree(home)
    finally:
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait_until_ready(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    import httpx

    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise _ended(server, log)
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, trust_env=False, timeout=5).is_success:
                return
        time.sleep(0.2)
    raise ServerError(f"the server did not answer within {START_SECONDS} s; its log is {log}")


def _ended(server: subprocess.Popen[bytes], log: Path) -> ServerError:
    """The error of a server that ended by itself, with the last line of its log, or the last that names an error."""
    lines = [s for s in re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(errors="replace")).splitlines() if s.strip()]
    named = [line for line in lines if re.search(r"(?:Error|Exception)\b: ?\S", line)]
    reason = (named or lines or ["it wrote nothing"])[-1].strip()[:300]
    return ServerError(f"the server ended (status {server.returncode}): {reason}; its log is {log}")
