"""The ``sqlbench`` command: every sub-command calls one function of the library.

The options of a sub-command are the fields of its settings (`sqlbench.config`). Whatever goes wrong ends in one line on
standard error: ``error: ...`` and status 1 for what a user can act on (2 for an option that is wrong in itself), status
130 for an interruption, and for a defect of sqlbench the place where its traceback was written. ``SQLBENCH_DEBUG=1``
shows tracebacks instead. Heavy libraries are imported by the command that needs them.
"""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Annotated

from pydantic import Field

from sqlbench.config import (
    POCKET,
    AblateConfig,
    ApiConfig,
    AskConfig,
    ChatConfig,
    CompareConfig,
    Data,
    EnvConfig,
    EvalConfig,
    EvolveConfig,
    ExportConfig,
    NotebooksConfig,
    QueryTimeout,
    RunsConfig,
    ScoreConfig,
    Seed,
    ServeConfig,
    SftConfig,
    ShowConfig,
    TrainConfig,
)
from sqlbench.database.types import LONGEST_QUERY
from sqlbench.errors import DataError, SqlbenchError
from sqlbench.interrupt import leave, stop_when_told
from sqlbench.options import command, run_command
from sqlbench.streams import harden

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
"""A disk on which nothing can be written, for one reason or another."""
GROUPS = {
    "": "Train and evaluate a self-correcting text-to-SQL agent.",
    "data": "Make data sets.",
    "nano": "Train the embedded policy.",
}
SECTIONS = {
    "Data": ["data"],
    "Evaluate": ["eval", "score", "export", "runs", "show", "compare"],
    "Train": ["train", "sft", "evolve", "ablate", "nano"],
    "Use": ["ask", "chat", "serve", "api", "env"],
    "Look around": ["notebooks", "graph", "checks"],
}
"""The help lists commands under these titles."""
Request = Annotated[
    str | None,
    Field(description="Request fields for an endpoint, a JSON object; null leaves one out. Also SQLBENCH_REQUEST."),
]

Source = Annotated[Path, Field(description="The release, zipped or unpacked.", json_schema_extra={"flags": ["--from"]})]
Out = Annotated[Path, Field(description="Folder to write.")]
Column = Annotated[str | None, Field(description="Its column, if it has another name.")]
AuditTimeout = Annotated[
    float | None,
    Field(ge=0.01, le=LONGEST_QUERY, description="Seconds a gold query may take; the import's, or 5, by default."),
]


@command("data pocket")
def data_pocket(
    out: Annotated[Path | None, Field(description="Folder to write; by default data/pocket or data/sealed.")] = None,
    seed: Seed = 1,
    sealed: Annotated[bool, Field(description="Write the sealed split instead; open it once.")] = False,
) -> None:
    """Write the embedded data set: generated databases, questions, splits, gold audit."""
    from pocket.dataset import write_pocket
    from sqlbench.data.audit import audit_dataset

    out = out or (Path("data/sealed") if sealed else POCKET)
    write_pocket(out, seed=seed, sealed=sealed)
    print(f"{audit_dataset(out).summary()}\nwrote {out}")


@command("data spider")
def data_spider(
    source: Annotated[
        Path | None,
        Field(description="A Spider release, zipped or unpacked.", json_schema_extra={"flags": ["--from"]}),
    ] = None,
    download: Annotated[bool, Field(description="Fetch the public archive first.")] = False,
    out: Out = Path("data/spider"),
    seed: Seed = 0,
    query_timeout: QueryTimeout = 5.0,
) -> None:
    """Import a Spider release: splits, databases, tables.json, gold audit."""
    from sqlbench.data.imports import import_release
    from sqlbench.data.spider import download_spider

    if download == (source is not None):
        raise DataError("say where the release is: either --from ZIP_OR_FOLDER or --download")
    source = source or download_spider(out.parent)
    found = import_release("spider", source, out, seed=seed, query_timeout=query_timeout)
    print(f"{found.summary()}\nwrote {out}")


def _release(name: str, text: str, seconds: float) -> None:
    """Add the command that imports a release of one layout."""

    def run(source: Source, out: Out = Path("data") / name, query_timeout: QueryTimeout = seconds) -> None:
        from sqlbench.data.imports import import_release

        print(f"{import_release(name, source, out, query_timeout=query_timeout).summary()}\nwrote {out}")

    run.__doc__ = text
    command(f"data {name}")(run)


_release("bird", "Import BIRD: train, dev or mini-dev, zipped or unpacked.", 30.0)
_release("spider2-lite", "Import the part of Spider 2.0-lite that is on SQLite and has gold queries.", 30.0)
_release("agent-lightning", "Import the Spider folder of Agent Lightning: Parquet files and databases.", 5.0)


@command("data import")
def data_import(
    file: Annotated[Path, Field(description="CSV, TSV, JSON, JSON lines or Parquet.", json_schema_extra={"flags": []})],
    db: Annotated[str, Field(description="SQLite file, address, or folder or zip archive of <db_id>.sqlite.")],
    out: Annotated[Path | None, Field(description="Folder to write; by default data/ and the file's name.")] = None,
    split: Annotated[str, Field(description="Name of the split, without a column of that name.")] = "dev",
    question: Column = None,
    gold: Column = None,
    db_id: Column = None,
    evidence: Column = None,
    hardness: Column = None,
    query_timeout: QueryTimeout = 5.0,
) -> None:
    """Import questions with gold queries from a file of your own; usual names of columns are recognised."""
    from sqlbench.data.imports import import_table

    out = out or Path("data") / file.stem
    columns = {"question": question, "gold": gold, "db_id": db_id, "evidence": evidence, "hardness": hardness}
    found = import_table(file, db, out, split=split, query_timeout=query_timeout, **columns)
    print(f"{found.summary()}\nwrote {out}")


@command("data audit")
def data_audit(data: Data = POCKET, query_timeout: AuditTimeout = None) -> None:
    """Run every gold query of a data set and list the tasks that cannot be scored."""
    from sqlbench.data.audit import audit_dataset

    print(audit_dataset(data, query_timeout).summary())


@command("nano train")
def nano_train(
    out: Annotated[Path, Field(description="Checkpoint folder to write.")],
    minutes: Annotated[float, Field(ge=0.01, description="Time budget, as if --threads processors were free.")] = 10.0,
    seed: Seed = 0,
    threads: Annotated[int, Field(ge=1, le=256, description="Processors to use.")] = 2,
    device: Annotated[str, Field(description="cpu or cuda.")] = "cpu",
) -> None:
    """Train the embedded policy from nothing."""
    from pocket.nano import train_nano

    train_nano(out, minutes=minutes, seed=seed, threads=threads, device=device)
    print(f"wrote {out}")


@command("eval")
def _eval(settings: EvalConfig, request: Request = None) -> None:
    from sqlbench.evaluation import evaluate
    from sqlbench.profiles import find_profile

    find_profile(settings.profile)
    _send(request)
    print(f"{evaluate(settings).text()}\nwrote {settings.results / settings.profile / settings.run}")


@command("train")
def _train(settings: TrainConfig) -> None:
    from sqlbench.training.launch import train

    folder = train(settings)
    if not settings.dry_run:
        print(f"wrote {folder}")


@command("sft")
def _sft(settings: SftConfig) -> None:
    from sqlbench.training.sft import sft

    print(f"wrote {sft(settings)}")


@command("evolve")
def _evolve(settings: EvolveConfig, request: Request = None) -> None:
    from sqlbench.evolve import PROMPTS, evolve

    _send(request)
    print(f"{evolve(settings)}\nwrote {settings.results / settings.profile / settings.run / PROMPTS}")


@command("score")
def _score(settings: ScoreConfig) -> None:
    from sqlbench.scoring import score_pairs

    counts = score_pairs(settings)
    print(", ".join(f"{what} {n:.1%}" if isinstance(n, float) else f"{n} {what}" for what, n in counts.items()))
    print(f"wrote {settings.out}")


@command("export")
def _export(settings: ExportConfig) -> None:
    from sqlbench.predictions import export_predictions

    print(f"{export_predictions(settings)}\nwrote {settings.out}")


@command("ablate")
def _ablate(settings: AblateConfig) -> None:
    from sqlbench.ablation import ablate

    print(ablate(settings).to_string(index=False))


@command("notebooks")
def _notebooks(settings: NotebooksConfig) -> None:
    from sqlbench.notebooks import run_notebooks

    print(run_notebooks(settings).text())


@command("ask")
def _ask(settings: AskConfig, request: Request = None) -> None:
    from sqlbench.terminal import ask

    _send(request)
    ask(settings)


@command("api")
def _api(settings: ApiConfig, request: Request = None) -> None:
    from sqlbench.api import serve

    _send(request)
    serve(settings)


@command("runs")
def _runs(settings: RunsConfig) -> None:
    from sqlbench.terminal import runs

    print(runs(settings).to_string(index=False))


@command("show")
def _show(settings: ShowConfig) -> None:
    from sqlbench.terminal import show

    show(settings)


@command("compare")
def _compare(settings: CompareConfig) -> None:
    from sqlbench.terminal import compare

    compare(settings)


@command("env")
def _env(settings: EnvConfig, request: Request = None) -> None:
    from sql_env.server.app import serve

    _send(request)
    serve(settings)


@command("serve")
def _serve(settings: ServeConfig) -> None:
    from sqlbench.serve import serve

    serve(settings)


@command("chat")
def _chat(settings: ChatConfig, request: Request = None) -> None:
    from sqlbench.data.tasks import open_dataset
    from sqlbench.interfaces import is_plugin, load_plugin
    from sqlbench.models import open_model, policy_folder
    from sqlbench.models.checkpoint import check_checkpoint
    from sqlbench.runs import run_path
    from sqlbench.widgets.page import serve_chat

    _send(request)
    if settings.data == POCKET and not POCKET.exists():
        data_pocket()
    open_dataset(settings.data)
    load_plugin("agent", settings.agent)
    if settings.model.startswith("openai:") or is_plugin(settings.model):
        open_model(settings.model)
    else:  # the page loads it; whether it is there can be said now
        check_checkpoint(policy_folder(settings.model))
    folder = run_path(settings.results, "laptop", settings.run)
    folder.mkdir(parents=True, exist_ok=True)
    serve_chat(settings, folder)


def _send(request: str | None) -> None:
    """Hand request fields to the models of this process and of those it starts, as the environment would."""
    if request is not None:
        from sqlbench.models.chat import REQUEST, read_request

        read_request(request)
        os.environ[REQUEST] = request


@command("graph")
def graph() -> None:
    """Print the agent's state machine as mermaid text."""
    from sqlbench.agent.graph import draw

    print(draw())


@command("checks")
def checks() -> None:
    """Print what can run on this machine."""
    from sqlbench.checks import capabilities, versions

    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    for what, runs, missing in capabilities().itertuples(index=False):
        print(f"{what:<35}{runs:<5}{missing}".rstrip())


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the ``sqlbench`` command."""
    debug = os.environ.get("SQLBENCH_DEBUG") == "1"
    harden()
    stop_when_told()
    try:
        run_command(GROUPS, arguments, SECTIONS)
        sys.stdout.flush()  # a disk that is full shows here
        sys.exit(0)
    except KeyboardInterrupt:
        leave()
    except SqlbenchError as error:
        if debug:
            raise
        _say(f"error: {error}")
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        # An error without the name of a file is that of a full disk, or of a machine without a temporary folder.
        if isinstance(error, OSError) and (error.filename or error.errno in (*FULL, errno.ENOENT)):
            where = f"{error.filename or 'a file'}: {error.strerror}"
            what = "write" if error.errno in FULL else "use"
            _say(f"error: Cannot {what} {where}. Fix this and rerun the command.")
            sys.exit(1)
        with tempfile.NamedTemporaryFile("w", prefix="sqlbench-error-", suffix=".log", delete=False) as file:
            traceback.print_exc(file=file)
        _say(f"internal error: {type(error).__name__}: {error} (traceback in {file.name}; please report it)")
        sys.exit(70)


def _say(line: str) -> None:
    print(" ".join(line.split()), file=sys.stderr)
