"""Commands that change the agent, and the one that serves a policy."""

from __future__ import annotations

from sqlbench.config import Request
from sqlbench.options import command, send_request
from sqlbench_train.settings import EvolveConfig, ServeConfig, SftConfig, TrainConfig


@command("train")
def _train(settings: TrainConfig) -> None:
    from sqlbench_train.launch import train

    folder = train(settings)
    if not settings.dry_run:
        print(f"wrote {folder}")


@command("sft")
def _sft(settings: SftConfig) -> None:
    from sqlbench_train.sft import sft

    print(f"wrote {sft(settings)}")


@command("evolve")
def _evolve(settings: EvolveConfig, request: Request = None) -> None:
    from sqlbench_train.evolve import PROMPTS, evolve

    send_request(request)
    print(f"{evolve(settings)}\nwrote {settings.results / settings.profile / settings.run / PROMPTS}")


@command("serve")
def _serve(settings: ServeConfig) -> None:
    from sqlbench_train.serve import serve

    serve(settings)
