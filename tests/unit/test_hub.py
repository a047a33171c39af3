"""A model by its Hugging Face name: downloaded from a hub (a small one of this machine), found again, missing."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from pocket import NANO_PATH
from sqlbench.cli import main
from sqlbench.data.tasks import DataSet
from sqlbench.errors import ModelError
from sqlbench.models import policy_folder
from sqlbench.models.hub import is_hub_name

NAME, SHA = "mine/nano", "1" * 40
FILES = {file.name: file.read_bytes() for file in NANO_PATH.iterdir() if file.is_file()} | {"onnx/model.json": b"{}"}


class Hub(BaseHTTPRequestHandler):
    """What the client of the hub asks for, of one model; another one is not found, a third needs a licence."""

    def do_GET(self) -> None:
        path, revision, name = self.path.split("?")[0], f"/api/models/{NAME}/revision/main", self.path.split("/")[-1]
        if path == revision:
            self.answer(json.dumps({"id": NAME, "sha": SHA}).encode())
        elif path == f"/api/models/{NAME}/tree/{SHA}":
            listed = [{"type": "file", "path": file, "size": len(FILES[file]), "oid": file} for file in FILES]
            self.answer(json.dumps(listed).encode())
        elif path.startswith(f"/{NAME}/resolve/{SHA}/") and name in FILES:
            self.answer(FILES[name])
        elif "gated" in path:
            self.answer(b"", 403, "GatedRepo")
        else:
            self.answer(b"", 401, "RepoNotFound")

    do_HEAD = do_GET

    def answer(self, body: bytes, status: int = 200, error: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", SHA)
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A hub that can be reached, and its empty cache."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", here)
        files = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", here + files)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        yield tmp_path / "hub"
        server.shutdown()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds one model, on a machine without network."""
    model = tmp_path / f"hub/models--{NAME.replace('/', '--')}"
    (model / "refs").mkdir(parents=True)
    (model / "refs/main").write_text(SHA)
    (model / "snapshots").mkdir()
    (model / "snapshots" / SHA).symlink_to(NANO_PATH)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return model / "snapshots" / SHA


def test_a_name_is_downloaded_with_progress_once_and_then_found_without_the_hub(
    hub: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = policy_folder(NAME)
    assert folder.is_relative_to(hub)
    wanted = {name for name in FILES if name.endswith((".json", ".safetensors", ".jinja")) and "/" not in name}
    assert {file.name for file in folder.iterdir()} == wanted  # nothing for other programs
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert "%" in capfd.readouterr().err
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert policy_folder(NAME) == folder


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("mine/unknown", "Neither a folder here nor the hub has this name: check it"),
        ("mine/gated", "Accept its terms at https://huggingface.co/mine/gated, then run 'hf auth login'."),
    ],
)
def test_what_the_hub_refuses_is_one_line(hub: Path, name: str, why: str) -> None:
    with pytest.raises(ModelError) as refused:
        policy_folder(name)
    assert str(refused.value).startswith(f"Cannot download the model: {name}. {why}")
    assert "\n" not in str(refused.value)


def test_a_hub_that_cannot_be_reached_is_one_line(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match=r"the hub cannot be reached: connect to the network, or run 'hf download"):
        policy_folder(NAME)


@pytest.mark.parametrize("command", ["eval", "chat", "serve", "train"])
def test_every_command_says_in_one_line_what_to_do_without_a_network(
    cache: Path, pocket: DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    options = [] if command == "serve" else ["--data", str(pocket.root), "--results", str(tmp_path)]
    options += ["--run", "run"] if command in ("eval", "train") else []
    with pytest.raises(SystemExit) as ended:
        main([command, "--model", "mine/other", *options])
    err = capsys.readouterr().err
    assert ended.value.code == 1
    assert "error: Cannot download the model: mine/other. No folder here has this name and the hub cannot be" in err
    assert err.count("\n") == 1 and not (tmp_path / "laptop/run").exists()


def test_a_name_in_the_cache_is_evaluated_and_trained_as_its_folder_is(
    cache: Path, pocket: DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", NAME, "--data", str(pocket.root), "--results", str(tmp_path)]
    for more in (["eval", "--run", "r", "--limit", "2"], ["train", "--run", "t", "--dry-run"]):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([*more, *options])
        assert not ended.value.code
    assert json.loads((tmp_path / "laptop/r/config.json").read_text())["model"] == NAME
    assert f"model: {cache}" in capsys.readouterr().out


def test_a_folder_goes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("mine/nano")
    (tmp_path / "mine/nano").mkdir(parents=True)
    assert not any(map(is_hub_name, ("mine/nano", "nano", "./mine/other", "/mine/other", "a/b/c", "../other")))
