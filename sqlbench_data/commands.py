"""Commands that import data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from sqlbench.config import QueryTimeout, Seed
from sqlbench.errors import DataError
from sqlbench.options import command

Source = Annotated[Path, Field(description="The release, zipped or unpacked.", json_schema_extra={"flags": ["--from"]})]
Out = Annotated[Path, Field(description="Folder to write.")]
Column = Annotated[str | None, Field(description="Its column, if it has another name.")]


@command("data spider")
def data_spider(
    source: Annotated[
        Path | None,
        Field(description="A Spider release, zipped or unpacked.", json_schema_extra={"flags": ["--from"]}),
    ] = None,
    download: Annotated[bool, Field(description="Fetch the public archive first.")] = False,
    out: Out = Path("data/spider"),
    seed: Seed = 0,
    query_timeout: QueryTimeout = 5.0,
) -> None:
    """Import a Spider release: splits, databases, tables.json, gold audit."""
    from sqlbench_data.imports import import_release
    from sqlbench_data.spider import download_spider

    if download == (source is not None):
        raise DataError("No release given. Give either --from ZIP_OR_FOLDER or --download.")
    source = source or download_spider(out.parent)
    imported = import_release("spider", source, out, seed=seed, query_timeout=query_timeout)
    print(f"{imported.summary()}\nwrote {out}")


def _release(name: str, text: str, seconds: float) -> None:
    """Add the command that imports a release of one layout."""

    def run(source: Source, out: Out = Path("data") / name, query_timeout: QueryTimeout = seconds) -> None:
        from sqlbench_data.imports import import_release

        print(f"{import_release(name, source, out, query_timeout=query_timeout).summary()}\nwrote {out}")

    run.__doc__ = text
    command(f"data {name}")(run)


_release("bird", "Import BIRD: train, dev or mini-dev, zipped or unpacked.", 30.0)
_release("spider2-lite", "Import the part of Spider 2.0-lite that is on SQLite and has gold queries.", 30.0)
_release("agent-lightning", "Import the Spider folder of Agent Lightning: Parquet files and databases.", 5.0)


@command("data import")
def data_import(
    file: Annotated[Path, Field(description="CSV, TSV, JSON, JSON lines or Parquet.", json_schema_extra={"flags": []})],
    db: Annotated[str, Field(description="SQLite file, address, or folder or zip archive of <db_id>.sqlite.")],
    out: Annotated[Path | None, Field(description="Folder to write; by default data/ and the file's name.")] = None,
    split: Annotated[str, Field(description="Name of the split, without a column of that name.")] = "dev",
    question: Column = None,
    gold: Column = None,
    db_id: Column = None,
    evidence: Column = None,
    hardness: Column = None,
    query_timeout: QueryTimeout = 5.0,
) -> None:
    """Import questions with gold queries from a file of your own; usual names of columns are recognised."""
    from sqlbench_data.imports import import_table

    out = out or Path("data") / file.stem
    columns = {"question": question, "gold": gold, "db_id": db_id, "evidence": evidence, "hardness": hardness}
    imported = import_table(file, db, out, split=split, query_timeout=query_timeout, **columns)
    print(f"{imported.summary()}\nwrote {out}")
