"""The ``sqlbench`` command: every sub-command calls one function of the library.

Whatever goes wrong ends in one line on standard error: ``error: ...`` and status 1 for what a user can act on (2 for an
option that is wrong in itself), status 130 for an interruption, and for a defect of sqlbench the place where its
traceback was written. ``SQLBENCH_DEBUG=1`` shows tracebacks instead. Heavy libraries are imported by the command that
needs them.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn, cast

import typer

from sqlbench.config import MOST_ROWS
from sqlbench.database.types import LONGEST_QUERY
from sqlbench.errors import DataError, SqlbenchError
from sqlbench.streams import harden

LONGEST_STOP = 4
"""Seconds in which an interrupted command may end by itself."""


def _group(text: str) -> typer.Typer:
    return typer.Typer(
        help=text, no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
    )


app = _group("Train and evaluate a self-correcting text-to-SQL agent.")
data_app = _group("Make and audit data sets.")
nano_app = _group("The embedded policy.")
app.add_typer(data_app, name="data")
app.add_typer(nano_app, name="nano")

Data = Annotated[Path, typer.Option(help="Data set folder, or module:attribute.")]
Run = Annotated[str, typer.Option(help="Name of the run: results/<profile>/<run>/.")]
Results = Annotated[Path, typer.Option(help="Folder of all results.")]
Profile = Annotated[str, typer.Option(help="laptop or gpu.")]
Seed = Annotated[int, typer.Option(help="Equal seeds give equal results.")]
Track = Annotated[str | None, typer.Option(help="Send metrics to wandb, mlflow or tensorboard too.")]
Model = Annotated[
    str,
    typer.Option(help="nano, a folder, a Hugging Face name (owner/name), openai:NAME, or module:attribute."),
]
Agent = Annotated[str, typer.Option(help="self-correcting, resampling, published, or module:attribute of your own.")]
Reward = Annotated[str, typer.Option(help="execution-match, runs (a control), or module:attribute of your own.")]
QueryTimeout = Annotated[
    float, typer.Option(min=0.01, max=LONGEST_QUERY, help="Seconds a query may take, gold or not.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Discard what the run folder holds.")]
Request = Annotated[
    str | None,
    typer.Option(help="Request fields for an endpoint, a JSON object; null leaves one out. Also SQLBENCH_REQUEST."),
]
POCKET, SEALED = Path("data/pocket"), Path("data/sealed")
RESULTS = Path("results")
UsageError = cast(type[Exception], typer.BadParameter.__base__)
"""A command line that makes no sense; typer has no public name for it."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
"""A disk on which nothing can be written, for one reason or another."""


@data_app.command("pocket")
def data_pocket(
    out: Annotated[Path | None, typer.Option(help="Folder to write; by default data/pocket or data/sealed.")] = None,
    seed: Seed = 1,
    sealed: Annotated[bool, typer.Option("--sealed", help="Write the sealed split instead; open it once.")] = False,
) -> None:
    """Write the embedded data set: generated databases, questions, splits, gold audit."""
    from pocket.dataset import write_pocket
    from sqlbench.data.audit import audit_dataset

    out = out or (SEALED if sealed else POCKET)
    write_pocket(out, seed=seed, sealed=sealed)
    typer.echo(audit_dataset(out).summary())
    typer.echo(f"wrote {out}")


@data_app.command("spider")
def data_spider(
    source: Annotated[Path | None, typer.Option("--from", help="A Spider release, zipped or unpacked.")] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch the public archive first.")] = False,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("data/spider"),
    seed: Seed = 0,
    query_timeout: QueryTimeout = 5.0,
) -> None:
    """Import a Spider release: splits, databases, tables.json, gold audit."""
    from sqlbench.data.spider import download_spider, import_spider

    if download == (source is not None):
        raise DataError("say where the release is: either --from ZIP_OR_FOLDER or --download")
    audit = import_spider(source or download_spider(out.parent), out, seed=seed, query_timeout=query_timeout)
    typer.echo(audit.summary())
    typer.echo(f"wrote {out}")


@data_app.command("audit")
def data_audit(data: Data = POCKET, query_timeout: QueryTimeout = 5.0) -> None:
    """Run every gold query of a data set and list the tasks that cannot be scored."""
    from sqlbench.data.audit import audit_dataset

    typer.echo(audit_dataset(data, query_timeout).summary())


@nano_app.command("train")
def nano_train(
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write.")],
    minutes: Annotated[float, typer.Option(min=0.01, help="Time budget, as if --threads processors were free.")] = 10.0,
    seed: Seed = 0,
    threads: Annotated[int, typer.Option(min=1, max=256, help="Processors to use.")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Train the embedded policy from nothing."""
    from pocket.nano import train_nano

    train_nano(out, minutes=minutes, seed=seed, threads=threads, device=device)
    typer.echo(f"wrote {out}")


@app.command("eval")
def eval_(
    run: Run,
    data: Data = POCKET,
    split: Annotated[str, typer.Option(help="A split, or 'headline'.")] = "headline",
    model: Model = "nano",
    agent: Agent = "self-correcting",
    reward: Reward = "execution-match",
    profile: Profile = "laptop",
    results: Results = RESULTS,
    max_turns: Annotated[int, typer.Option(min=1, help="Queries the agent may write.")] = 3,
    table_info_truncate: Annotated[int, typer.Option(min=1, help="Characters of schema in a prompt.")] = 2048,
    sample_rows: Annotated[int, typer.Option(min=0, max=MOST_ROWS, help="Rows of each table in the schema.")] = 0,
    execution_truncate: Annotated[int, typer.Option(min=1, help="Characters of a result in a prompt.")] = 2048,
    strict: Annotated[bool, typer.Option(help="Close the reference evaluator's holes.")] = True,
    query_timeout: QueryTimeout = 5.0,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    samples: Annotated[
        int, typer.Option(min=1, help="Rollouts a task, for avg@n, pass@k, majority and best of n.")
    ] = 1,
    seed: Annotated[int | None, typer.Option(help="Of a local model's samples; 0 by default.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of an answer at most.")] = None,
    timeout: Annotated[float | None, typer.Option(min=0.01, help="Seconds a call to an endpoint may take.")] = None,
    request: Request = None,
    prompts: Annotated[str | None, typer.Option(help="Prompt family if not the model's own: nano or chat.")] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Rollouts at a time.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many tasks.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Run the agent over a split and write trajectories and a summary; goes on where it was interrupted."""
    from sqlbench.evaluation import evaluate
    from sqlbench.profiles import find_profile

    find_profile(profile)
    _send(request)
    summary = evaluate(
        data,
        split,
        model,
        run,
        agent=agent,
        reward=reward,
        results=results,
        profile=profile,
        max_turns=max_turns,
        table_info_truncate=table_info_truncate,
        sample_rows=sample_rows,
        execution_truncate=execution_truncate,
        strict=strict,
        query_timeout=query_timeout,
        temperature=temperature,
        samples=samples,
        seed=seed,
        max_tokens=max_tokens,
        timeout=timeout,
        prompts=prompts,
        concurrency=concurrency,
        limit=limit,
        overwrite=overwrite,
    )
    typer.echo(f"{summary.text()}\nwrote {results / profile / run}")


@app.command("train")
def train(
    run: Run,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value for verl, passed on unchanged.")] = None,
    profile: Profile = "laptop",
    data: Annotated[
        Path | None, typer.Option(help="Data set folder, or module:attribute; the profile's own by default.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Policy to start from: nano, or a checkpoint folder.")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Named settings between profile and key=value: seed, as the published run.")
    ] = None,
    results: Results = RESULTS,
    seed: Annotated[int | None, typer.Option(help="Short for sqlbench.seed=N.")] = None,
    query_timeout: Annotated[float | None, typer.Option(help="Short for sqlbench.query_timeout=SECONDS.")] = None,
    control: Annotated[
        str | None,
        typer.Option(help="Rewards to learn nothing from: coin flips, or permuted within each task's rollouts."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved config and what it needs.")] = False,
    track: Track = None,
    overwrite: Overwrite = False,
) -> None:
    """Train with GRPO through verl; resumes from the last checkpoint."""
    from sqlbench.training.launch import train as launch

    short = {"seed": seed, "query_timeout": query_timeout}
    given = [*(overrides or []), *(f"sqlbench.{key}={value}" for key, value in short.items() if value is not None)]
    folder = launch(
        profile,
        run,
        data,
        model,
        given,
        results=results,
        recipe=recipe,
        control=control,
        overwrite=overwrite,
        dry_run=dry_run,
        track=track,
    )
    if not dry_run:
        typer.echo(f"wrote {folder}")


@app.command("score")
def score(
    data: Annotated[Path, typer.Option(help="Data set folder.")],
    pairs: Annotated[Path, typer.Option(help="JSON lines with db_id, gold, pred (.jsonl or .jsonl.gz).")],
    out: Annotated[Path, typer.Option(help="JSON lines to write: one verdict a pair.")],
    keep_distinct: Annotated[bool, typer.Option("--keep-distinct", help="Do not drop DISTINCT.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Close the reference evaluator's holes.")] = False,
    query_timeout: QueryTimeout = 10.0,
) -> None:
    """Score pairs of gold and predicted queries, by default with the reference evaluator's verdicts."""
    from sqlbench.scoring import score_pairs

    counts = score_pairs(data, pairs, out, keep_distinct=keep_distinct, strict=strict, query_timeout=query_timeout)
    typer.echo(", ".join(f"{count} {what}" for what, count in counts.items()))
    typer.echo(f"wrote {out}")


@app.command("ablate")
def ablate(
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value for verl, for every training.")] = None,
    grid: Annotated[
        str | None, typer.Option(help="short (default), full or smoke; seed (default of the profile gpu).")
    ] = None,
    profile: Profile = "laptop",
    data: Annotated[Path | None, typer.Option(help="Data set folder; the profile's own by default.")] = None,
    run: Annotated[str | None, typer.Option(help="Name of the run; the grid's name by default.")] = None,
    results: Results = RESULTS,
    only: Annotated[str | None, typer.Option(help="One cell by name.")] = None,
    parallel: Annotated[int, typer.Option(min=1, help="Cells trained at the same time.")] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what there is to do; with --only, the cell's config and needs.")
    ] = False,
    track: Track = None,
) -> None:
    """Run or resume a grid of trainings and write the accuracy and efficiency tables."""
    from sqlbench.ablation import ablate as run_grid

    cells = run_grid(
        profile,
        grid,
        overrides or (),
        data=data,
        run=run,
        results=results,
        only=only,
        dry_run=dry_run,
        parallel=parallel,
        track=track,
    )
    typer.echo(cells.to_string(index=False))


@app.command("notebooks")
def notebooks(
    profile: Annotated[str, typer.Option(help="laptop, gpu or smoke.")] = "laptop",
    run: Annotated[str, typer.Option(help="Name of the run.")] = "demo",
    parameters: Annotated[
        list[str] | None, typer.Option("--parameter", "-p", help="name=value for the parameters cells; repeatable.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="A notebook by number or name; repeatable.")] = None,
    folder: Annotated[Path, typer.Option(help="Where the notebooks are.")] = Path("notebooks"),
    results: Results = RESULTS,
    force: Annotated[bool, typer.Option("--force", help="Run again what is done.")] = False,
) -> None:
    """Execute the ordered notebooks and keep them with their results."""
    from sqlbench.notebooks import run_notebooks

    done = run_notebooks(
        profile, run, only=only or (), parameters=parameters or (), folder=folder, results=results, force=force
    )
    typer.echo(done.text())


@app.command("env")
def env(
    data: Data = POCKET,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen on; the default is this machine alone.")] = "127.0.0.1",
    split: Annotated[str, typer.Option(help="Whose tasks are served.")] = "train",
    model: Model = "nano",
    reward: Reward = "execution-match",
    request: Request = None,
    query_timeout: QueryTimeout = 5.0,
) -> None:
    """Serve the task as an OpenEnv environment."""
    from sql_env.server.app import serve

    _send(request)
    serve(data, port, host, split, model, reward, query_timeout)


@app.command("serve")
def serve_(
    model: Annotated[str, typer.Option(help="nano, a checkpoint folder, or the folder of a training run.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen on; the default is this machine alone.")] = "127.0.0.1",
    engine: Annotated[
        str | None, typer.Option(help="vllm or transformers; vllm by default where it is installed.")
    ] = None,
) -> None:
    """Serve a policy to any OpenAI client."""
    from sqlbench.serve import serve

    serve(model, port, host, engine)


@app.command("chat")
def chat(
    data: Data = POCKET,
    model: Model = "nano",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8866,
    run: Run = "chat",
    results: Results = RESULTS,
    reflection: Annotated[
        str | None, typer.Option(help="Endpoint for prompt evolution, openai:NAME; --model's own by default.")
    ] = None,
    agent: Agent = "self-correcting",
    request: Request = None,
) -> None:
    """Serve the chat as a web page, on this machine alone."""
    from sqlbench.data.tasks import open_dataset
    from sqlbench.interfaces import is_plugin, load_plugin
    from sqlbench.models import open_model, policy_folder
    from sqlbench.models.checkpoint import check_checkpoint
    from sqlbench.runs import run_path
    from sqlbench.widgets.page import serve_chat

    _send(request)
    if data == POCKET and not data.exists():
        data_pocket()
    open_dataset(data)
    load_plugin("agent", agent)
    if model.startswith("openai:") or is_plugin(model):
        open_model(model)
    else:  # the page loads it; whether it is there can be said now
        check_checkpoint(policy_folder(model))
    folder = run_path(results, "laptop", run)
    folder.mkdir(parents=True, exist_ok=True)
    serve_chat(data, model, folder, port, reflection, agent)


def _send(request: str | None) -> None:
    """Hand request fields to the models of this process and of those it starts, as the environment would."""
    if request is not None:
        from sqlbench.models.chat import REQUEST, read_request

        read_request(request)
        os.environ[REQUEST] = request


@app.command("graph")
def graph() -> None:
    """Print the agent's state machine as mermaid text."""
    from sqlbench.agent.graph import draw

    typer.echo(draw())


@app.command("checks")
def checks() -> None:
    """Print what can run on this machine."""
    from sqlbench.checks import capabilities, versions

    typer.echo(", ".join(f"{name} {version}" for name, version in versions().items()))
    for what, runs, missing in capabilities().itertuples(index=False):
        typer.echo(f"{what:<35}{runs:<5}{missing}".rstrip())


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the ``sqlbench`` command."""
    debug = os.environ.get("SQLBENCH_DEBUG") == "1"
    harden()
    stop_when_told()
    try:
        status = app(arguments, prog_name="sqlbench", standalone_mode=False)
        if status == 130:
            _interrupted()
        sys.exit(status or 0)
    except UsageError as error:
        _explain(error)
        sys.exit(2)
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
            _say(f"error: cannot {what} {where}; mend that and give the same command again")
            sys.exit(1)
        with tempfile.NamedTemporaryFile("w", prefix="sqlbench-error-", suffix=".log", delete=False) as file:
            traceback.print_exc(file=file)
        _say(f"internal error: {type(error).__name__}: {error} (traceback in {file.name}; please report it)")
        sys.exit(70)


def stop_when_told() -> None:
    """See to it that this process ends within seconds of Ctrl-C, also where the exception for it is lost.

    Python drops an exception that is raised while an object is being cleared away, as at the end of every task of an
    event loop and of every import: it is raised again. Some libraries catch it: the process then leaves by itself. That
    costs nothing that was written.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        timer = threading.Timer(LONGEST_STOP, _interrupted)
        timer.daemon = True
        timer.start()
        signal.default_int_handler(number, frame)

    def again(dropped: sys.UnraisableHookArgs) -> None:
        if dropped.exc_type is KeyboardInterrupt:
            threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()  # right now, it would be dropped here
        else:
            usual(dropped)

    usual = sys.unraisablehook
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a background job of a shell ignores it
        signal.signal(signal.SIGINT, interrupt)
        sys.unraisablehook = again


def _explain(error: Any) -> None:
    """Say what is wrong with a command line, with the value where typer leaves it out; help where it is bare."""
    from pydantic import ValidationError

    text = error.format_message()
    if error.ctx and text == error.ctx.get_help():
        print(text, file=sys.stderr)
        return
    if isinstance(error.__cause__, ValidationError):
        text += f", not {error.__cause__.errors()[0]['input']!r}"
    command = error.ctx.command_path if error.ctx else "sqlbench"
    _say(f"error: {text[0].lower()}{text[1:].rstrip('.')}; see '{command} --help'")


def _interrupted() -> NoReturn:
    _say("interrupted; for eval, train, ablate and notebooks the same command goes on where it stopped")
    sys.stdout.flush()
    os._exit(130)  # without waiting for threads: a batch of answers takes seconds


def _say(line: str) -> None:
    print(" ".join(line.split()), file=sys.stderr)
