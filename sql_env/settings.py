"""Settings of the environment."""

from __future__ import annotations

from pydantic import Field

from sqlbench.config import POCKET, Data, Host, Model, Port, QueryTimeout, Reward, Settings


class EnvConfig(Settings):
    """Serve the task as an OpenEnv environment."""

    data: Data = POCKET
    port: Port = 8000
    host: Host = "127.0.0.1"
    split: str = Field("train", description="Split whose tasks are served.")
    model: Model = "nano"
    reward: Reward = "execution-match"
    query_timeout: QueryTimeout = 5.0
