"""Commands of the embedded data set and policy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from sqlbench.config import POCKET, Seed
from sqlbench.options import command


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


@command("nano train")
def nano_train(
    out: Annotated[Path, Field(description="Checkpoint folder to write.")],
    minutes: Annotated[float, Field(ge=0.01, description="Time budget, as if --threads processors were free.")] = 10.0,
    seed: Seed = 0,
    threads: Annotated[int, Field(ge=1, le=256, description="Processors to use.")] = 2,
    device: Annotated[str, Field(description="cpu or cuda.")] = "cpu",
) -> None:
    """Train the embedded policy from scratch."""
    from pocket.nano import train_nano

    train_nano(out, minutes=minutes, seed=seed, threads=threads, device=device)
    print(f"wrote {out}")
