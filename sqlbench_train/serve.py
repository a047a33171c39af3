"""Serves a checkpoint at an OpenAI-compatible endpoint, by a third-party server.

The server replaces this process: its log is shown from then on, and it ends with this process. It
asks for no key, so it listens on this machine alone unless told otherwise.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import socket
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

from sqlbench.errors import ModelError, ServerError
from sqlbench.models import policy_folder
from sqlbench.models.checkpoint import check_checkpoint, checkpoint_family
from sqlbench_train.settings import ServeConfig

LOCAL = ("127.0.0.1", "localhost", "::1")
"""Addresses that no other machine reaches."""
ENGINES = {"vllm": "vllm.entrypoints.cli.main", "transformers": "transformers.cli.transformers"}
"""The module of each server's command line."""
NEEDS = {"vllm": ["vllm"], "transformers": ["transformers", "torch", "fastapi", "uvicorn"]}


def serve(settings: ServeConfig) -> NoReturn:
    """Replace this process by a server; print its address, its name and how to use it in one line.

    Raises:
        ServerError: the engine is missing, or the address cannot be used.
        ModelError, TrainingError: the checkpoint does not exist.
    """
    model, host = settings.model, settings.host
    folder, name = find_policy(model)
    engine = settings.engine or ("vllm" if importlib.util.find_spec("vllm") else "transformers")
    if engine not in ENGINES:
        raise ServerError(f"Unknown engine: {engine}. Choose one of: {', '.join(ENGINES)}.")
    if missing := " ".join(package for package in NEEDS[engine] if importlib.util.find_spec(package) is None):
        raise ServerError(f"Not installed for the engine {engine}: {missing}. Run 'pip install {missing}'.")
    with listen(host, settings.port) as free:
        port = free.getsockname()[1]
    import torch

    options = ["--host", host, "--port", str(port)]
    environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "VLLM_NO_USAGE_STATS": "1"} | os.environ
    if not torch.cuda.is_available():
        options += ["--dtype", "float32"]  # as in `sqlbench.models.local`
    if engine == "vllm":
        options = [str(folder), "--served-model-name", name, *options]
        if not torch.cuda.is_available():  # compiling takes minutes, and gigabytes are reserved unless told otherwise
            options += ["--enforce-eager"]
            environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"} | environment
    else:
        cache = hub_cache(folder, name)
        options = [name, *options]
        environment |= {"HF_HUB_CACHE": str(cache)}
        os.chdir(cache)  # elsewhere a folder of the model's name would be taken for it
    url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}/v1"
    fitting = " --prompts nano --max-tokens 128" if checkpoint_family(folder) == "nano" else ""
    print(
        f"Serving {model} as '{name}' at {url} once {engine} has loaded it. Press Ctrl-C to stop. Evaluate it with: "
        f"OPENAI_BASE_URL={shlex.quote(url)} sqlbench eval --model openai:{name}{fitting} --run {name}-served",
        flush=True,
    )
    os.execve(sys.executable, [sys.executable, "-P", "-m", ENGINES[engine], "serve", *options], environment)


def listen(host: str, port: int) -> socket.socket:
    """Open a socket that listens; port 0 takes a free one.

    Raises:
        ServerError: the address is in use or does not belong to this machine.
    """
    try:
        return socket.create_server((host, port))
    except OSError as error:
        why = str(error.strerror).split(" (")[0]
        raise ServerError(f"Cannot listen on {host}:{port}: {why}. Choose another --port or --host.") from error


def find_policy(model: str) -> tuple[Path, str]:
    """Return the checkpoint folder that `model` means, and a name to serve it under that a hub would accept."""
    if model.startswith("openai:"):
        raise ModelError(f"Cannot serve an endpoint: {model}. Give 'nano', a checkpoint folder or a run folder.")
    name = re.sub(r"[^\w.]+|[.-]{2,}", "-", Path(model).resolve().name, flags=re.ASCII).strip("-.")
    return check_checkpoint(policy_folder(model)).resolve(), name or "policy"


def hub_cache(folder: Path, name: str) -> Path:
    """Lay out a Hugging Face cache with the checkpoint as its one model, so that servers know and list it by name."""
    cache = Path(tempfile.mkdtemp(prefix="sqlbench-serve-"))
    model = cache / f"models--{name}"
    for part in ("blobs", "refs", "snapshots"):
        (model / part).mkdir(parents=True)
    (model / "refs" / "main").write_text("0" * 40)
    (model / "snapshots" / ("0" * 40)).symlink_to(folder)
    return cache
