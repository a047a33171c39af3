"""The self-correcting SQL task as an OpenEnv environment."""

from sql_env.client import SqlEnvClient
from sql_env.models import SqlAction, SqlObservation, SqlState

__all__ = ["SqlAction", "SqlEnvClient", "SqlObservation", "SqlState"]
