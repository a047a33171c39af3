"""One error type per boundary that sqlbench crosses; a text says what failed, the value, and what to do.

Texts have the form ``<What failed>: <value>. <What to do>.``

Four rules hold everywhere:

- *Vocabulary.* Only the classes below cross a module boundary on purpose. Each also inherits the standard
  exception it stands for, so plain ``except ValueError`` keeps working.
- *Rollout errors are data.* A failed model call or database inside a rollout is written on its trajectory
  (``Trajectory.error``) and never cancels its neighbours.
- *Failed is not wrong.* A failed rollout has ``reward=None`` and is counted apart; a wrong one has reward 0.
- *Surfacing.* The command line turns a ``SqlbenchError`` into one line on standard error and exit status 1.
"""

from __future__ import annotations


class SqlbenchError(Exception):
    """Root of all errors that a user can act on."""


class DataError(SqlbenchError, ValueError):
    """A data set, archive, task file or run folder is missing, malformed or not what it claims to be."""


class DatabaseError(SqlbenchError, RuntimeError):
    """A database cannot be opened or introspected (a failing *query* is a `QueryResult`, not an error)."""


class ModelError(SqlbenchError, RuntimeError):
    """A model, checkpoint or endpoint cannot be loaded or reached, or answers garbage."""


class PromptTooLongError(ModelError):
    """A prompt has more tokens than are allowed; prompts are never cut.

    The first prompt of a rollout holds no answers of the policy, so the rollout failed. Later prompts hold them, so
    the rollout is wrong: reward 0 with the reason ``overlong``.
    """


class TrainingError(SqlbenchError, RuntimeError):
    """A training run cannot be composed, started or resumed, or had to be stopped."""


class RunError(SqlbenchError, RuntimeError):
    """A run folder cannot be written, is in use, or already holds a finished run."""


class PluginError(SqlbenchError, ValueError):
    """A part named by ``module:attribute`` cannot be imported, or is of another kind (`sqlbench.interfaces`)."""


class NotebookError(SqlbenchError, RuntimeError):
    """A notebook run was refused (unknown parameter, wrong type) or a cell failed."""


class ServerError(SqlbenchError, RuntimeError):
    """A server cannot be started, or cannot do what a request asks of it."""
