"""One training step with a real tracking backend: metrics arrive there, keys do not arrive in the run folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from pocket import NANO_PATH
from sqlbench.data.tasks import DataSet
from sqlbench_lab.sweep import SMALLEST
from sqlbench_train.estimate import Shape
from sqlbench_train.launch import train
from sqlbench_train.metrics import read_rows

pytestmark = pytest.mark.training

KEY = "fade" * 10


@pytest.fixture(scope="module")
def tracked(pocket: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    steps = [*SMALLEST, "trainer.total_training_steps=1"]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_API_KEY", "OPENAI_API_KEY", "HF_TOKEN"):
            patch.setenv(name, KEY)
        results = tmp_path_factory.mktemp("results")
        return train("laptop", "r", pocket.root, results=results, overrides=steps, track="tensorboard")


def test_tensorboard_has_the_metrics_of_the_run_folder(tracked: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tracked / "tensorboard"))
    events.Reload()
    rows = read_rows(tracked / "metrics.jsonl")
    for name in ("sqlbench/ex", "actor/grad_norm"):
        (event,) = events.Scalars(name)
        assert event.step == 1 and event.value == pytest.approx(rows[1][name], rel=1e-6)
    assert {e.step for e in events.Scalars("sqlbench/val_ex")} == {0, 1}


def test_no_key_of_the_environment_is_in_the_run_folder(tracked: Path) -> None:
    files = [path for path in tracked.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


def test_a_checkpoint_is_as_large_as_estimated(tracked: Path) -> None:
    shape = Shape.of(str(NANO_PATH))
    assert shape is not None
    actor = tracked / "checkpoints/global_step_1/actor"
    for file, size in (("model_*.pt", 4), ("optim_*.pt", 8), ("huggingface/*.safetensors", 4)):
        (path,) = actor.glob(file)
        assert path.stat().st_size == pytest.approx(size * shape.parameters, rel=0.02)
