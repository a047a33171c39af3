"""Download of the public Spider archive; `sqlbench_data.imports` imports it."""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

from tqdm.auto import tqdm

from sqlbench.errors import DataError
from sqlbench_data.archive import BLOCK
from sqlbench_data.layouts import LAYOUTS

SPIDER_PAGE = LAYOUTS["spider"].page
"""Page on which the authors publish the data set (CC BY-SA 4.0)."""
SPIDER_URL = (
    "https://drive.usercontent.google.com/download?id=1403EGqzIDoHMdQF4c9Bkyl7dZLZ5Wt6J&export=download&confirm=t"
)
"""The archive (about 200 MB) that `SPIDER_PAGE` links to, without the interstitial page of its host."""


def download_spider(folder: str | Path, *, url: str = SPIDER_URL, timeout: float = 30.0) -> Path:
    """Fetch the public archive into `folder` and return its path, ready for `import_release`.

    The checksum of the first download is recorded next to the archive. Every later call compares its archive with it;
    an archive that is already there and agrees is not fetched again.

    Raises:
        DataError: no network, the answer is not a zip, or the checksum differs.
    """
    folder = Path(folder)
    archive, record = folder / "spider_data.zip", folder / "spider_data.zip.sha256"
    recorded = record.read_text()[:64] or None if record.is_file() else None
    if archive.is_file() and recorded is not None:
        if _sha256(archive) != recorded:
            raise DataError(f"Checksum in {record.name} does not match: {archive}. Delete the archive and rerun.")
        return archive
    part, host = folder / "spider_data.zip.part", urlsplit(url).hostname
    by_hand = f"download the archive from {SPIDER_PAGE} by hand and pass it with --from"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=timeout) as answer, part.open("wb") as file:
            total = int(answer.headers.get("Content-Length") or 0) or None
            with tqdm(total=total, desc=archive.name, unit="B", unit_scale=True, unit_divisor=1024) as bar:
                while block := answer.read(BLOCK):
                    file.write(block)
                    bar.update(len(block))
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error) or type(error).__name__
        raise DataError(
            f"Cannot download Spider from {host}: {reason}. Connect to the network, or {by_hand}."
        ) from error
    except OSError as error:
        raise DataError(f"Cannot write {part}: {error}. Free some space, or make the folder writable.") from error
    if total is not None and part.stat().st_size != total:
        raise DataError(f"Connection broken after {part.stat().st_size} of {total} bytes. Rerun the command.")
    if not zipfile.is_zipfile(part):
        part.unlink()
        raise DataError(f"Not a zip archive (often a quota page): the answer of {host}. Wait, or {by_hand}.")
    checksum = _sha256(part)
    if recorded is not None and checksum != recorded:
        raise DataError(
            f"Archive changed: recorded {recorded[:12]}, downloaded {checksum[:12]} (kept as {part.name}). "
            f"Delete {record} and rerun to accept the new one."
        )
    part.replace(archive)
    record.write_text(f"{checksum}  {archive.name}\n")
    return archive


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
