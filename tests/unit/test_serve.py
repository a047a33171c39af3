"""A served policy answers as the same policy in this process does, and a server that cannot work ends in one line."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import psutil
import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from pocket import NANO_PATH
from sqlbench.cli import main
from sqlbench.data.tasks import DataSet
from sqlbench.evaluation import evaluate
from sqlbench.runs import RunFolder

SQLBENCH = [sys.executable, "-c", "from sqlbench.cli import main; main()"]
SPLIT = "dev_unseen_pretrain"


def processes_with(text: str) -> list[str]:
    """Command lines that contain a text."""
    lines = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    return [line for line in lines if text in line]


@contextmanager
def served(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running ``sqlbench serve`` and the line that it prints once it answers."""
    command = [*SQLBENCH, "serve", "--port", "0", "--engine", "transformers", *options]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            yield process, line
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)


@pytest.fixture(scope="module")
def line() -> Iterator[str]:
    with served("--model", "nano") as (process, text):
        yield text
    port = re.search(r"127\.0\.0\.1:(\d+)/v1", text)[1]
    assert process.returncode == 0 and not processes_with(f"--port {port}")
    with socket.create_server(("127.0.0.1", int(port))):
        pass


@pytest.fixture
def address(line: str, monkeypatch) -> str:
    found = re.search(r"serving nano as 'nano' at (\S+) .*OPENAI_BASE_URL=\1 sqlbench eval --model openai:nano ", line)
    monkeypatch.setenv("OPENAI_BASE_URL", found[1])
    return found[1]


def test_any_openai_client_can_call_it(address: str) -> None:
    with openai.OpenAI(base_url=address, api_key="none") as client:
        answer = client.chat.completions.create(
            model="nano", messages=[{"role": "user", "content": "How many?"}], max_tokens=5, temperature=0
        )
    assert answer.choices[0].message.content and answer.usage.completion_tokens <= 5


def test_the_agent_predicts_the_same_through_it_as_in_this_process(
    address: str, line: str, pocket: DataSet, tmp_path: Path
) -> None:
    options = ["--data", str(pocket.root), "--results", str(tmp_path), "--split", SPLIT, "--limit", "12"]
    printed = line.split("sqlbench eval ")[1].split()
    with pytest.raises(SystemExit) as end:
        main(["eval", *printed, *options])
    assert end.value.code == 0
    evaluate(pocket.root, SPLIT, "nano", "here", results=tmp_path, limit=12)
    predictions = [
        {
            t.task_key: (t.error, [e.sql for e in t.executions])
            for t in RunFolder(tmp_path / "laptop" / run).trajectories()
        }
        for run in ("nano-served", "here")
    ]
    assert len(predictions[0]) == 12 and predictions[0] == predictions[1]


def test_the_newest_policy_of_a_training_run_is_served(tmp_path: Path, monkeypatch) -> None:
    """A run that was killed after a checkpoint, as verl leaves it: no policy has been exported yet."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # a killed process leaves its log
    run = tmp_path / "my run"
    for step in (2, 10):
        shutil.copytree(NANO_PATH, run / f"checkpoints/global_step_{step}/actor/huggingface")
    (run / "checkpoints/global_step_2/actor/huggingface/model.safetensors").write_bytes(b"not the newest")
    (run / "checkpoints/latest_checkpointed_iteration.txt").write_text("10")
    config = {"config": {"sqlbench": {"model": str(NANO_PATH)}}, "model_files": "some"}
    (run / "config.json").write_text(json.dumps(config))
    with served("--model", str(run)) as (process, text):
        assert f"serving {run} as 'my-run' at http://127.0.0.1:" in text
        port = "--port " + re.search(r"127\.0\.0\.1:(\d+)/v1", text)[1]
        assert processes_with(port)
        process.kill()
        deadline = time.time() + 20
        while processes_with(port) and time.time() < deadline:
            time.sleep(0.1)
        assert not processes_with(port), "the server outlives a killed sqlbench"
    assert (run / "policy/model.safetensors").read_bytes() == (NANO_PATH / "model.safetensors").read_bytes()


def broken(folder: Path) -> Path:
    """A checkpoint whose weights are no weights."""
    shutil.copytree(NANO_PATH, folder)
    (folder / "model.safetensors").write_bytes(b"garbage")
    return folder


def test_what_is_decoded_token_by_token_is_what_all_tokens_decode_to(pocket: DataSet) -> None:
    """Servers that stream decode that way, and cannot take back what they have sent."""
    core = Tokenizer.from_file(str(NANO_PATH / "tokenizer.json"))
    for task in pocket.load("train"):
        ids, stream = core.encode(task.gold).ids, DecodeStream(skip_special_tokens=True)
        assert "".join(stream.step(core, i) or "" for i in ids) == core.decode(ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "missing"], "no checkpoint folder 'missing'"),
        (["--model", "openai:gpt"], "cannot serve openai:gpt"),
        (["--model", "nano", "--engine", "magic"], "no engine 'magic'; there are: vllm, transformers"),
        (["--model", "nano", "--host", "203.0.113.7"], "cannot listen on 203.0.113.7:8000: Cannot assign"),
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
    assert end.value.code == 1 and "already in use; choose another --port" in err and err.count("\n") == 1


def test_a_server_that_dies_ends_in_one_line_with_its_reason(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(["serve", "--model", str(broken(tmp_path / "broken")), "--port", "0", "--engine", "transformers"])
    last = capsys.readouterr().err.splitlines()[-1]
    log = Path(last.rpartition(" ")[2])
    assert end.value.code == 1 and re.match(r"error: the server ended \(status 1\): .*Error", last)
    assert "Traceback" in log.read_text()
    shutil.rmtree(log.parent)


def test_it_says_so_when_the_server_dies_later() -> None:
    with served("--model", "nano") as (process, _):
        psutil.Process(process.pid).children()[0].kill()
        assert process.wait(30) == 1
        last = process.stderr.read().splitlines()[-1]
        assert last.startswith("error: the server ended (status -9)")
        shutil.rmtree(Path(last.rpartition(" ")[2]).parent)
