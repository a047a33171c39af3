"""Fixtures that every test may use: the folder of real data, a small pocket data set, a quiet environment."""

from __future__ import annotations

import gc
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from sqlbench.data.tasks import DataSet

REPO = Path(__file__).resolve().parent.parent

# Set before any library is imported: one thread a process, no network, no key that the tests did not set themselves.
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", TQDM_MININTERVAL="5")
for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "CUDA_VISIBLE_DEVICES"):
    os.environ.pop(name, None)


@pytest.fixture(scope="session")
def repo() -> Path:
    """Root of the repository."""
    return REPO


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real data sets beside the repository; a test that needs it is skipped where it is absent."""
    folder = REPO.parent / "shared" / "data"
    if not (folder / "INDEX.md").is_file():
        pytest.skip(f"no real data: {folder} is absent (see data/README.md)")
    return folder


@pytest.fixture(scope="module", autouse=True)
def heap() -> Iterator[None]:
    """Free SQLite connections that tests left open: the heap limit is the process's."""
    from sqlbench.database.engine import close_idle

    yield
    gc.collect()
    close_idle()


@pytest.fixture(scope="session")
def pocket(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    """The embedded data set, written once a session; read it, do not change it."""
    from pocket.dataset import write_pocket
    from sqlbench.data.tasks import DataSet

    root = tmp_path_factory.mktemp("pocket") / "pocket"
    write_pocket(root, progress=False)
    return DataSet(root)


@pytest.fixture(scope="session")
def spider(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real Spider release, imported and audited once a session."""
    from sqlbench_data.imports import import_release

    out = tmp_path_factory.mktemp("spider") / "spider"
    import_release("spider", shared / "spider_data.zip", out)
    return out


@pytest.fixture(scope="session")
def shared_root(shared: Path) -> Path:
    """The folder above `shared`."""
    return shared.parent


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """Address of a PostgreSQL server of the tests' own, as its superuser.

    Started by root it runs as another user, who must be able to read its folder: pytest closes its own folders to
    others whenever a session of it starts.
    """
    with tempfile.TemporaryDirectory(prefix="pg-", ignore_cleanup_errors=True) as folder:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                import pgserver

            server = pgserver.get_server(folder, cleanup_mode="stop")
        except Exception as error:
            pytest.skip(f"no PostgreSQL can be started here: {type(error).__name__}: {error}")
        yield server.get_uri()
        server.cleanup()
