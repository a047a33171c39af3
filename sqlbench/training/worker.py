"""The process that runs verl: ``python -m sqlbench.training.worker CONFIG PARENT FOLDER``, started by `launch`.

It dies with its parent, and Ray's processes die with it. verl's task runner runs in this process instead of in an actor
of its own, and the local rollout server is started first: both only to start sooner.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Any

PR_SET_PDEATHSIG = 1


class InThisProcess:
    """Has the shape of a Ray actor class whose one method ``run`` is called once, and calls it right here."""

    def __init__(self, run: Any) -> None:
        self._run = run

    @property
    def run(self) -> InThisProcess:  # noqa: D102
        return self

    def remote(self, *arguments: Any) -> Any:
        """Without arguments: the "actor". With: the result of the call, as a Ray object."""
        if not arguments:
            return self
        import ray

        return ray.put(self._run(*arguments))


def start_local_server(config: Any) -> Any:
    """Start the rollout server that `LocalReplica` will look up, while this process still imports verl."""
    import ray

    from sqlbench.training.local_server import SERVER_CONCURRENCY, LocalServer, server_name

    rollout = config.actor_rollout_ref.rollout
    actor = ray.remote(LocalServer).options(
        name=server_name(0), num_cpus=0, max_concurrency=max(SERVER_CONCURRENCY, rollout.max_num_seqs)
    )
    return actor.remote(
        config.actor_rollout_ref.model.path,
        response_length=rollout.response_length,
        max_model_len=rollout.max_model_len or rollout.prompt_length + rollout.response_length,
        max_batch=rollout.max_num_seqs,
        dtype=rollout.dtype,
        **rollout.engine_kwargs.local,
    )


def main(config_file: str, parent: int, folder: str) -> None:
    """Train as the resolved configuration says, with everything that Ray writes in `folder`."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the launching process is gone")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    import ray
    from omegaconf import OmegaConf

    config = OmegaConf.load(config_file)
    if config.ray_kwargs.ray_init.get("address") == "local":
        config.ray_kwargs.ray_init["_temp_dir"] = folder
    server = None
    if config.trainer.device == "cpu":
        options = OmegaConf.to_container(config.ray_kwargs.ray_init)
        ray.init(**{key: value for key, value in options.items() if key != "runtime_env"})  # type: ignore[union-attr]
        if config.actor_rollout_ref.rollout.name == "local":
            server = start_local_server(config)

    from verl.trainer.main_ppo import TaskRunnerV1, run_ppo
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    import sqlbench.training.trainer  # noqa: F401 (registers the trainer mode)

    validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    runner = TaskRunnerV1.__ray_metadata__.modified_class()
    try:
        run_ppo(config, task_runner_class=InThisProcess(runner.run))
    finally:
        del server
        ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
