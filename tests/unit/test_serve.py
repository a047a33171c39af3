"""A served policy answers as the same policy in this process does, and what cannot be served is refused in one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from huggingface_hub.utils import validate_repo_id
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from pocket import NANO_PATH
from sqlbench.agent.trajectory import Trajectory
from sqlbench.cli import main
from sqlbench.data.tasks import DataSet
from sqlbench.evaluation import evaluate
from sqlbench.runs import RunFolder
from sqlbench_train.serve import find_policy

SQLBENCH = [sys.executable, "-c", "from sqlbench.cli import main; main()"]
SPLIT = "dev_unseen_pretrain"


def processes_with(text: str) -> list[str]:
    """Command lines that contain a text."""
    lines = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    return [line for line in lines if text in line]


@contextmanager
def served(log: Path, *options: str) -> Iterator[str]:
    """The line that a ``sqlbench serve`` printed, once it answers."""
    command = [*SQLBENCH, "serve", "--port", "0", "--engine", "transformers", *options]
    environment = os.environ | {"HF_HOME": str(log.parent / "no-hub"), "TMPDIR": str(log.parent)}
    with (
        log.open("w") as err,
        subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=err, env=environment) as process,
    ):
        try:
            line = process.stdout.readline()
            while line and process.poll() is None:
                health = re.search(r"http://127\.0\.0\.1:\d+", line)[0] + "/health"
                with suppress(httpx.HTTPError):
                    if httpx.get(health, trust_env=False, timeout=5).is_success:
                        break
                time.sleep(0.2)
            assert line and process.poll() is None, log.read_text()
            yield line
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=200)


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(tmp_path_factory.mktemp("serve") / "log", "--model", "nano") as text:
        yield text
    port = re.search(r"127\.0\.0\.1:(\d+)/v1", text)[1]
    assert not processes_with(f"--port {port}")
    with socket.create_server(("127.0.0.1", int(port))):
        pass


@pytest.fixture
def address(line: str, monkeypatch) -> str:
    found = re.search(r"Serving nano as 'nano' at (\S+) .*OPENAI_BASE_URL=\1 sqlbench eval --model openai:nano ", line)
    monkeypatch.setenv("OPENAI_BASE_URL", found[1])
    return found[1]


def test_its_models_are_listed_on_a_machine_without_a_hub_cache(address: str) -> None:
    with openai.OpenAI(base_url=address, api_key="none") as client:
        assert [model.id for model in client.models.list()] == ["nano"]


def test_any_openai_client_can_call_it(address: str) -> None:
    with openai.OpenAI(base_url=address, api_key="none") as client:
        answer = client.chat.completions.create(
            model="nano", messages=[{"role": "user", "content": "How many?"}], max_tokens=5, temperature=0
        )
    assert answer.choices[0].message.content and answer.usage.completion_tokens <= 5


def test_the_agent_predicts_the_same_through_it_as_in_this_process(
    address: str, line: str, pocket: DataSet, tmp_path: Path
) -> None:
    """As far as it is greedy: rewrites that are sampled again have other seeds there."""
    options = ["--data", str(pocket.root), "--results", str(tmp_path), "--split", SPLIT, "--limit", "12"]
    printed = line.split("sqlbench eval ")[1].split()
    with pytest.raises(SystemExit) as end:
        main(["eval", *printed, *options])
    assert end.value.code == 0
    evaluate(pocket.root, SPLIT, "nano", "here", results=tmp_path, limit=12)

    def greedy(rollout: Trajectory) -> list[str]:
        answers = [transition.completion for transition in rollout.transitions]
        return [answer.text for answer in takewhile(lambda answer: answer.temperature is None, answers)]

    served, here = (list(RunFolder(tmp_path / "laptop" / run).trajectories()) for run in ("nano-served", "here"))
    assert len(served) == 12 and not any(t.error for t in served)
    assert {t.task_key: greedy(t) for t in served} == {t.task_key: greedy(t) for t in here}


def test_the_newest_policy_of_a_training_run_is_served(tmp_path: Path) -> None:
    """A run that was killed after a checkpoint, as verl leaves it: no policy has been exported yet."""
    run = tmp_path / "my run"
    for step in (2, 10):
        shutil.copytree(NANO_PATH, run / f"checkpoints/global_step_{step}/actor/huggingface")
    (run / "checkpoints/global_step_2/actor/huggingface/model.safetensors").write_bytes(b"not the newest")
    (run / "checkpoints/latest_checkpointed_iteration.txt").write_text("10")
    config = {"config": {"sqlbench": {"model": str(NANO_PATH)}}, "model_files": "some"}
    (run / "config.json").write_text(json.dumps(config))
    with served(tmp_path / "log", "--model", str(run)) as text:
        address = re.search(rf"Serving {run} as 'my-run' at (http://127\.0\.0\.1:\d+/v1)", text)[1]
        with openai.OpenAI(base_url=address, api_key="none") as client:
            assert [model.id for model in client.models.list()] == ["my-run"]
    assert (run / "policy/model.safetensors").read_bytes() == (NANO_PATH / "model.safetensors").read_bytes()


def test_what_is_decoded_token_by_token_is_what_all_tokens_decode_to(pocket: DataSet) -> None:
    """Servers that stream decode that way, and cannot take back what they have sent."""
    core = Tokenizer.from_file(str(NANO_PATH / "tokenizer.json"))
    for task in pocket.load("train"):
        ids, stream = core.encode(task.gold).ids, DecodeStream(skip_special_tokens=True)
        assert "".join(stream.step(core, i) or "" for i in ids) == core.decode(ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "missing"], "No checkpoint folder: missing"),
        (["--model", "openai:gpt"], "Cannot serve an endpoint: openai:gpt"),
        (["--model", "nano", "--engine", "magic"], "Unknown engine: magic. Choose one of: vllm, transformers"),
        (["--model", "nano", "--host", "203.0.113.7"], "Cannot listen on 203.0.113.7:8000: Cannot assign"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(options: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(["serve", *options])
    out, err = capsys.readouterr()
    assert end.value.code == 1 and out == "" and err.startswith(f"error: {message}") and err.count("\n") == 1


def test_a_taken_port_is_refused_before_anything_is_loaded(capsys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as end:
        main(["serve", "--model", "nano", "--port", str(taken.getsockname()[1])])
    err = capsys.readouterr().err
    assert end.value.code == 1 and "already in use. Choose another --port" in err and err.count("\n") == 1


def test_weights_that_cannot_be_loaded_end_it(tmp_path: Path) -> None:
    shutil.copytree(NANO_PATH, tmp_path / "broken")
    (tmp_path / "broken/model.safetensors").write_bytes(b"garbage")
    options = ["serve", "--model", str(tmp_path / "broken"), "--port", "0", "--engine", "transformers"]
    ended = subprocess.run([*SQLBENCH, *options], capture_output=True, text=True, timeout=300)
    assert ended.returncode != 0 and "Error" in ended.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("first", "first"),
        ("qwen2.5-0.5B", "qwen2.5-0.5B"),
        ("my run", "my-run"),
        ("-a--b..c-", "a-b-c"),
        ("ü", "policy"),
    ],
)
def test_the_name_is_one_that_a_hub_would_take(tmp_path: Path, folder: str, name: str) -> None:
    shutil.copytree(NANO_PATH, tmp_path / folder)
    assert find_policy(str(tmp_path / folder)) == (tmp_path / folder, name)
    validate_repo_id(name)
