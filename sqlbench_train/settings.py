"""Settings of trainings, prompt evolution and serving a policy."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from sqlbench.config import (
    POCKET,
    RESULTS,
    Agent,
    Cache,
    Data,
    Host,
    Model,
    Overrides,
    Overwrite,
    OwnData,
    Port,
    Profile,
    Results,
    RolloutConfig,
    Run,
    SchemaConfig,
    Settings,
    Track,
)


class TrainConfig(Settings):
    """Train with GRPO through verl; resumes from the last checkpoint."""

    run: Run
    overrides: Overrides = Field([])
    profile: Profile = "laptop"
    data: OwnData = None
    model: str | None = Field(None, description="Policy to start from: nano, or a checkpoint folder.")
    recipe: str | None = Field(None, description="Named settings on top of the profile: seed, as the published run.")
    control: str | None = Field(None, description="Uninformative rewards: coin flips, or permuted within each task.")
    prompts: str | None = Field(None, description="Short for sqlbench.prompts=nano, chat or a .toml file.")
    seed: int | None = Field(None, description="Short for sqlbench.seed=N.")
    query_timeout: float | None = Field(None, description="Short for sqlbench.query_timeout=SECONDS.")
    track: Track = None
    results: Results = RESULTS
    dry_run: bool = Field(False, description="Print the resolved config and what it needs.")
    overwrite: Overwrite = False


class SftConfig(SchemaConfig):
    """Fine-tune a policy on right answers; resumes where it was interrupted."""

    data: Data = POCKET
    run: Run
    model: str = Field("nano", description="Policy to start from: nano, or a checkpoint folder.")
    source: Path | None = Field(None, description="Run whose right rollouts are imitated, instead of gold queries.")
    split: str = Field("train", description="The split whose tasks are used, with either source.")
    steps: int = Field(300, ge=1, description="Optimizer steps.")
    batch_size: int = Field(32, ge=1, description="Answers per step.")
    lr: float = Field(2e-4, ge=0, description="Learning rate of AdamW, constant.")
    seed: int = Field(1, description="Seed of the order of the answers.")
    profile: Profile = "laptop"
    results: Results = RESULTS
    overwrite: Overwrite = False


class EvolveConfig(RolloutConfig):
    """Rewrite a model's prompts with GEPA and keep what held-out tasks prove better; resumes where interrupted."""

    data: Data = POCKET
    split: str = Field("train", description="The split whose tasks are reflected on or held out.")
    model: Model = "nano"
    reflection: str | None = Field(None, description="Model that rewrites the prompts: openai:NAME, or else --model.")
    cache: Cache = None
    budget: int = Field(400, ge=1, description="Rollouts to spend; the last rewrite is finished.")
    held_out: int = Field(40, ge=1, description="Tasks that decide which prompts are better.")
    run: Run
    agent: Agent = "self-correcting"
    prompts: str | None = Field(None, description="Prompts to start from if not the model's own.")
    seed: int = Field(0, description="Seed of the held-out tasks and of GEPA's choices.")
    profile: Profile = "laptop"
    results: Results = RESULTS
    overwrite: Overwrite = False


class ServeConfig(Settings):
    """Serve a policy to any OpenAI client."""

    model: str = Field(description="nano, a checkpoint folder, or the folder of a training run.")
    port: Port = 8000
    host: Host = "127.0.0.1"
    engine: str | None = Field(None, description="vllm or transformers; vllm by default where it is installed.")
