"""The ``sqlbench`` command: every sub-command calls one function of the library.

The options of a sub-command are the fields of its settings (`sqlbench.config`). Every failure ends in one line on
standard error. One that a user can act on prints ``error: ...`` with status 1 (2 for an invalid option). An
interruption has status 130. A defect of sqlbench prints the path of its traceback. ``SQLBENCH_DEBUG=1`` shows
tracebacks instead. Heavy libraries are imported by the command that needs them.
"""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import traceback
from importlib.metadata import entry_points
from typing import Annotated

from pydantic import Field

from sqlbench.config import POCKET, Data, EvalConfig, ExportConfig, Request, ScoreConfig
from sqlbench.database.types import LONGEST_QUERY
from sqlbench.errors import SqlbenchError
from sqlbench.interrupt import leave, stop_when_told
from sqlbench.options import command, run_command, send_request
from sqlbench.streams import harden

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
"""Error numbers of a disk that cannot be written."""
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
"""Commands by their title in the help, which lists all others under ``More``."""
AuditTimeout = Annotated[
    float | None,
    Field(ge=0.01, le=LONGEST_QUERY, description="Seconds a gold query may take; the import's, or 5, by default."),
]


for package in entry_points(group="sqlbench.commands"):
    package.load()  # adds its commands


@command("data audit")
def data_audit(data: Data = POCKET, query_timeout: AuditTimeout = None) -> None:
    """Run every gold query of a data set and list the tasks that cannot be scored."""
    from sqlbench.data.audit import audit_dataset

    print(audit_dataset(data, query_timeout).summary())


@command("eval")
def _eval(settings: EvalConfig, request: Request = None) -> None:
    from sqlbench.evaluation import evaluate
    from sqlbench.profiles import find_profile

    find_profile(settings.profile)
    send_request(request)
    print(f"{evaluate(settings).text()}\nwrote {settings.results / settings.profile / settings.run}")


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
    """Run the ``sqlbench`` command."""
    debug = os.environ.get("SQLBENCH_DEBUG") == "1"
    harden()
    stop_when_told()
    try:
        run_command(GROUPS, arguments, SECTIONS)
        sys.stdout.flush()  # a full disk shows here
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
        # An error without a file name comes from a full disk, or from a machine without a temporary folder.
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
