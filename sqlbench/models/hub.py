"""Checkpoints by their name on the Hugging Face hub, kept in its own cache (``HF_HOME``)."""

from __future__ import annotations

import re
from pathlib import Path

from sqlbench.errors import ModelError

_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def is_hub_name(model: str) -> bool:
    """Tell whether a model is named ``owner/name`` and no file here has that name."""
    return _NAME.fullmatch(model) is not None and not Path(model).exists()


def hub_checkpoint(name: str) -> Path:
    """Return the folder of a model of the hub, downloaded with a progress bar, or from the cache without a network.

    Raises:
        ModelError: the model does not exist for this user, or the hub cannot be reached and the cache lacks it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_FILES, ignore_patterns=["*/*"]))
    except GatedRepoError:
        todo = f"Accept its terms at https://huggingface.co/{name}, then run 'hf auth login'."
    except RepositoryNotFoundError:
        todo = "Neither a folder here nor the hub has this name: check it, or run 'hf auth login' if it is private."
    except LocalEntryNotFoundError:
        todo = (
            "No folder here has this name and the hub cannot be reached: connect to the network, or run "
            f"'hf download {name} --local-dir FOLDER' on another machine and give --model FOLDER."
        )
    except Exception as error:  # the disk is full, the hub is out of order
        todo = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}. Rerun the command later."
    raise ModelError(f"Cannot download the model: {name}. {todo}")
