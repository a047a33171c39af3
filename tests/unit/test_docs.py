"""README and docs: examples run, links lead somewhere, and every number comes from a stored result.

A fenced block runs where `<!-- run -->` stands above it (sh or python), and is written to a file where
`<!-- file: NAME -->` does. The blocks of a page run in order, in a folder with pocket, nano and the stored results.
"""

from __future__ import annotations

import html
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent.parent
PAGES = {path.name: path for path in [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]}
LINKED = [*PAGES.values(), REPO / "CHANGELOG.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "results").rglob("*.md"))]
LINKED += sorted(REPO.glob("*/README.md"))
EXAMPLES = {"api", "bring-your-own", "deployment", "getting-started", "gpu", "reliability", "results", "reward"}
BLOCK = re.compile(r"^<!-- (run|file: (?P<file>[\w.]+)) -->\n```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S)


def with_examples() -> list[str]:
    return [name for name, path in PAGES.items() if BLOCK.search(path.read_text(encoding="utf-8"))]


def test_every_page_has_an_example_that_runs() -> None:
    assert {f"{name}.md" for name in EXAMPLES} <= set(with_examples())
    marks = sum(len(re.findall(r"^<!-- (?:run|file:)", p.read_text(encoding="utf-8"), re.M)) for p in PAGES.values())
    assert marks == sum(len(BLOCK.findall(p.read_text(encoding="utf-8"))) for p in PAGES.values()), (
        "a mark without a block"
    )


@pytest.fixture
def place(pocket, repo: Path, tmp_path: Path) -> Path:
    """A folder as a reader has it: the data set, the stored results, and `sqlbench` on the path."""
    (tmp_path / "data").mkdir()
    shutil.copytree(pocket.root, tmp_path / "data/pocket")
    (tmp_path / "results/laptop").mkdir(parents=True)
    for name in ("baselines", "demo", "reproduce"):
        shutil.copytree(repo / "results/laptop" / name, tmp_path / "results/laptop" / name)
    (tmp_path / "bin").mkdir()
    for name, call in {"sqlbench": "-m sqlbench", "python": ""}.items():
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {call} "$@"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", with_examples())
def test_the_examples_of_a_page_run(place: Path, page: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {"PATH": f"{place / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1"}
    for block in BLOCK.finditer(PAGES[page].read_text(encoding="utf-8")):
        code = block["code"].replace("8001", port)
        if block["file"]:
            (place / block["file"]).write_text(code)
            continue
        code = f"trap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n{code}" if block["language"] == "sh" else code
        command = ["bash", "-euc", code] if block["language"] == "sh" else [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
        assert done.stdout.strip() or "write(" in code, f"nothing to see:\n{code}"
        if page == "deployment.md":
            assert "event: done" in done.stdout


def prose(text: str) -> str:
    """The page without code."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "") for title in titles)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in plain}


def links(path: Path) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path.read_text(encoding="utf-8"))):
        if not re.match(r"[a-z]+:", target):
            yield html.unescape(target)


@pytest.mark.parametrize("path", LINKED, ids=lambda path: str(path.relative_to(REPO)))
def test_links_lead_to_files_and_headings(path: Path) -> None:
    broken = []
    for target in links(path):
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            broken.append(target)
    assert not broken, f"{path.name}: {broken}"


def test_readme_is_read_in_a_minute_and_leads_to_every_page() -> None:
    text = PAGES["README.md"].read_text(encoding="utf-8")
    assert len(text.split()) <= 900
    assert {f"docs/{name}" for name in PAGES if name != "README.md"} <= set(links(PAGES["README.md"]))


def test_every_page_says_first_what_it_is_for() -> None:
    for name in sorted(f"{example}.md" for example in EXAMPLES):
        first = PAGES[name].read_text(encoding="utf-8").split("\n\n")[1]
        assert first.startswith("This page "), f"{name}: {first}"


# ---- numbers


@pytest.fixture
def quotes(repo: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(repo / "benchmarks"))
    import quotes

    return quotes


def test_quoted_numbers_are_those_of_the_stored_results(quotes) -> None:
    import gpu_report

    tables, sentences = quotes.tables(), quotes.sentences()
    filled = set()
    for page, path in PAGES.items():
        text = path.read_text(encoding="utf-8")
        assert gpu_report.fill(text, tables) == text, f"{page}: run python benchmarks/quotes.py"
        filled |= {name for name in tables if f"<!-- table:{name} -->\n{tables[name]}<!-- /table:{name} -->" in text}
    assert filled == {"summary", "laptop", "ablation", "reward", "gpu-accuracy", "gpu-time"}
    for page, expected in sentences.items():
        text = " ".join((quotes.REPO / page).read_text(encoding="utf-8").split())
        assert not [sentence for sentence in expected if sentence not in text], page


@pytest.mark.parametrize("page", ["README.md", "results.md", "gpu.md", "reward.md", "bring-your-own.md"])
def test_no_other_measurement_is_quoted(quotes, page: str) -> None:
    """What is left of a page without its generated tables and its checked sentences has no measured number."""
    text = re.sub(r"<!-- table:(\S+) -->.*?<!-- /table:\1 -->", "", PAGES[page].read_text(encoding="utf-8"), flags=re.S)
    text = " ".join(prose(text).split())
    for sentence in quotes.sentences().get(str(PAGES[page].relative_to(quotes.REPO)), []):
        text = text.replace(sentence, "")
    text = text.replace("95% interval", "interval")
    assert not re.findall(r".{30}\b\d[\d.,]*(?:%| points\b(?!\.)| s per| minutes| times the).{20}", text)


def test_a_wrong_number_is_noticed(quotes) -> None:
    import gpu_report

    text = PAGES["README.md"].read_text(encoding="utf-8")
    number = re.search(r"\d\d\.\d%", quotes.summary_table())
    assert number is not None
    assert gpu_report.fill(text.replace(number[0], "99.9%"), quotes.tables()) == text


def test_every_folder_of_results_says_how_it_was_made(repo: Path) -> None:
    listed = (repo / "results/README.md").read_text(encoding="utf-8")
    folders = {
        path.relative_to(repo / "results").as_posix() for path in (repo / "results").glob("*/*") if path.is_dir()
    }
    tracked = subprocess.run(["git", "ls-files", "results"], cwd=repo, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    kept = {"/".join(line.split("/")[1:3]) for line in tracked.stdout.splitlines()} & folders
    rows = {m[1]: m[2] for m in re.finditer(r"^\| \[?`([\w./-]+)/`.*?\|(.*)\|$", listed, re.M)}
    assert kept == set(rows)
    for folder, row in rows.items():
        command, commit, machine = (part.strip() for part in row.split("|"))
        assert "`" in command and re.search(r"[0-9a-f]{7}", commit) and machine, folder
