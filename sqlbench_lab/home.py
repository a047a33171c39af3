"""Temporary folders for Jupyter, used if the user's own cannot be written."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

FOLDERS = ("JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR", "MPLCONFIGDIR")
"""Environment variables that name the folders, for this process and the kernels that it starts."""


def ensure_folders() -> None:
    """Use temporary folders, and say so, if Jupyter's own cannot be written; remove them when this process ends."""
    from jupyter_core.paths import jupyter_config_dir, jupyter_data_dir, jupyter_runtime_dir

    try:
        for folder in map(Path, (jupyter_data_dir(), jupyter_runtime_dir(), jupyter_config_dir())):
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        home = tempfile.mkdtemp(prefix="sqlbench-home-")
        atexit.register(shutil.rmtree, home, ignore_errors=True)
        print(
            f"Cannot write {folder}: {error.strerror}. Using the temporary folder {home}.", file=sys.stderr, flush=True
        )
        os.environ.update({name: f"{home}/{name}" for name in FOLDERS})
