from __future__ import annotations

import contextlib
import http.server
import json
import socket
import sqlite3
import threading
import zipfile
from pathlib import Path

import pytest

from sqlbench.data.audit import read_audit
from sqlbench.data.tasks import DataSet
from sqlbench.database.engine import open_database
from sqlbench.errors import DataError
from sqlbench_data.imports import SUBSET, import_release
from sqlbench_data.spider import download_spider

SHOP = "CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT); INSERT INTO item VALUES (1, 'nut'), (2, 'bolt');"


def row(db_id: str, query: str, question: str = "What?") -> dict:
    return {"db_id": db_id, "question": question, "query": query}


def make_release(root: Path, *, dev: list[dict] | None = None) -> Path:
    """A release in the official layout: two databases, one of them for the test split."""
    for folder, name in (("database", "shop"), ("test_database", "shop"), ("test_database", "depot")):
        path = root / folder / name / f"{name}.sqlite"
        path.parent.mkdir(parents=True)
        with sqlite3.connect(path) as connection:
            connection.executescript(SHOP)
        connection.close()
        (path.parent / "schema.sql").write_text(SHOP)
    files = {
        "train_spider.json": [row("shop", "SELECT name FROM item"), row("shop", "SELECT count(*) FROM item")],
        "train_others.json": [row("shop", "SELECT id FROM item ORDER BY id")],
        "dev.json": dev or [row("shop", "SELECT name FROM item WHERE id = 1")],
        "test.json": [row("depot", "SELECT max(id) FROM item")],
        "tables.json": [{"db_id": "shop", "table_names": ["item"]}],
        "test_tables.json": [{"db_id": "shop", "table_names": ["item"]}, {"db_id": "depot", "table_names": ["item"]}],
    }
    for name, rows in files.items():
        (root / name).write_text(json.dumps(rows), encoding="utf-8")
    return root


def pack(folder: Path, archive: Path, top: str = "spider_data/") -> Path:
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            file.write(path, top + path.relative_to(folder).as_posix())
        file.writestr(f"__MACOSX/{top}._dev.json", b"\x00")
    return archive


def content(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    return make_release(tmp_path_factory.mktemp("release"))


def test_zip_and_folder_give_the_same_bytes(release, tmp_path):
    import_release("spider", release, tmp_path / "a")
    import_release("spider", pack(release, tmp_path / "z.zip"), tmp_path / "b")
    import_release("spider", pack(release, tmp_path / "flat.zip", top=""), tmp_path / "c")
    assert content(tmp_path / "a") == content(tmp_path / "b") == content(tmp_path / "c")


def test_the_layout_is_that_of_every_data_set(release, tmp_path):
    import_release("spider", release, tmp_path / "out")
    data = DataSet(tmp_path / "out")
    assert data.splits() == ["dev", "dev_500", "test", "train"]
    assert [t.gold for t in data.load("train")][-1] == "SELECT id FROM item ORDER BY id"  # train_others.json
    assert [t.task_id for t in data.load("train")] == ["train-00000", "train-00001", "train-00002"]
    assert data.load("test")[0].scorable and data.database("depot").is_file()
    assert {t["db_id"] for t in json.loads((data.root / "tables.json").read_text())} == {"shop", "depot"}
    about = json.loads((data.root / "dataset.json").read_text())
    assert about["name"] == "spider" and about["headline"] == "dev_500" and about["counts"]["train"] == 3
    assert read_audit(data.root).splits["train"].scorable == 3


def test_a_release_without_test_and_others_imports_too(release, tmp_path):
    small = make_release(tmp_path / "small")
    for name in ("train_others.json", "test.json", "test_tables.json"):
        (small / name).unlink()
    import_release("spider", small, tmp_path / "out")
    assert DataSet(tmp_path / "out").splits() == ["dev", "dev_500", "train"]


def test_dev_500_is_a_seeded_sample_of_the_scorable_dev_tasks(tmp_path):
    dev = [row("shop" if i % 10 else "gone", "SELECT name FROM item", f"Question {i}?") for i in range(600)]
    release = make_release(tmp_path / "release", dev=dev)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        import_release("spider", release, tmp_path / name, seed=seed)
    chosen = {name: [t.task_id for t in DataSet(tmp_path / name).load("dev_500")] for name in "abc"}
    assert chosen["a"] == chosen["b"] != chosen["c"]
    assert len(set(chosen["a"])) == SUBSET and chosen["a"] == sorted(chosen["a"])
    assert all(t.scorable and t.db_id == "shop" for t in DataSet(tmp_path / "a").load("dev_500"))
    assert len(DataSet(tmp_path / "a").load("dev")) == 600


def no_release(tmp_path: Path) -> Path:
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as file:
        file.writestr("readme.txt", "hello")
    return tmp_path / "other.zip"


def cut_short(tmp_path: Path) -> Path:
    whole = pack(make_release(tmp_path / "r"), tmp_path / "whole.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    return tmp_path / "cut.zip"


def bad_member(tmp_path: Path) -> Path:
    archive = pack(make_release(tmp_path / "r"), tmp_path / "bad.zip")
    raw = bytearray(archive.read_bytes())
    at = raw.find(b"SQLite format 3\x00")
    raw[at + 4000] ^= 0xFF  # the member's checksum no longer holds
    archive.write_bytes(raw)
    return archive


def with_password(tmp_path: Path) -> Path:
    archive = pack(make_release(tmp_path / "r"), tmp_path / "secret.zip")
    raw = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as file:
        for info in file.infolist():  # bit 0 of the flags, after signature and version
            raw[info.header_offset + 6] |= 1
    at = -1
    while (at := raw.find(b"PK\x01\x02", at + 1)) >= 0:
        raw[at + 8] |= 1
    archive.write_bytes(raw)
    return archive


def leading_outside(tmp_path: Path) -> Path:
    archive = pack(make_release(tmp_path / "r"), tmp_path / "evil.zip")
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("spider_data/database/../../../evil.sqlite", b"x")
    return archive


def not_json(tmp_path: Path) -> Path:
    (make_release(tmp_path / "r") / "dev.json").write_text("{not json")
    return tmp_path / "r"


def no_query(tmp_path: Path) -> Path:
    return make_release(tmp_path / "r", dev=[{"db_id": "shop", "question": "What?"}])


def database_outside(tmp_path: Path) -> Path:
    return make_release(tmp_path / "r", dev=[row("../../shop", "SELECT 1")])


def damaged_database(tmp_path: Path) -> Path:
    (make_release(tmp_path / "r") / "database/shop/shop.sqlite").write_bytes(b"not a database" * 100)
    return tmp_path / "r"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: p / "nothing.zip", "No such file"),
        (no_release, "Not a Spider release"),
        (cut_short, "Not an intact zip"),
        (bad_member, "Not an intact zip"),
        (with_password, "is encrypted"),
        (leading_outside, "leads outside"),
        (not_json, "Not JSON"),
        (no_query, "row 1 of dev.json"),
        (database_outside, "row 1 of dev.json"),
        (damaged_database, "Cannot read database"),
    ],
)
def test_a_bad_source_is_one_line_and_leaves_nothing_behind(tmp_path, make, says):
    source = make(tmp_path)
    before = {p for p in tmp_path.rglob("*")}
    with pytest.raises(DataError) as caught:
        import_release("spider", source, tmp_path / "out")
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert {p for p in tmp_path.rglob("*")} == before


def test_a_folder_that_holds_something_is_not_overwritten(release, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="not empty"):
        import_release("spider", release, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_an_import_that_is_interrupted_does_not_look_complete(release, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("sqlbench_data.imports.write_split", interrupt)
    with pytest.raises(KeyboardInterrupt):
        import_release("spider", release, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def web(tmp_path):
    """A web server over a folder; yields the folder and its address."""
    folder = tmp_path / "www"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_download_is_recorded_and_not_repeated(release, tmp_path, web):
    folder, url = web
    pack(release, folder / "spider.zip")
    first = download_spider(tmp_path / "got", url=f"{url}/spider.zip")
    record = (tmp_path / "got" / "spider_data.zip.sha256").read_text()
    (folder / "spider.zip").unlink()
    assert download_spider(tmp_path / "got", url=f"{url}/spider.zip") == first
    assert len(record.split()[0]) == 64 and record.split()[1] == first.name
    import_release("spider", first, tmp_path / "out")
    first.write_bytes(b"something else")
    with pytest.raises(DataError, match=r"Checksum in .* does not match"):
        download_spider(tmp_path / "got", url=f"{url}/spider.zip")


def test_an_archive_that_changed_is_refused(release, tmp_path, web):
    folder, url = web
    pack(release, folder / "spider.zip")
    download_spider(tmp_path / "got", url=f"{url}/spider.zip").unlink()
    pack(release, folder / "spider.zip", top="other/")
    with pytest.raises(DataError, match="Archive changed"):
        download_spider(tmp_path / "got", url=f"{url}/spider.zip")


@pytest.mark.parametrize("served", [b"<html>quota exceeded</html>", None])
def test_a_host_that_does_not_give_the_archive_is_named(tmp_path, web, served):
    folder, url = web
    if served is not None:
        (folder / "spider.zip").write_bytes(served)
    with pytest.raises(DataError, match=r"127\.0\.0\.1.*by hand and pass it with --from"):
        download_spider(tmp_path / "got", url=f"{url}/spider.zip")


@pytest.mark.parametrize(
    "answer", [b"no HTTP at all\r\n\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfff\r\nabc"]
)
def test_a_host_that_talks_nonsense_is_named(tmp_path, answer):
    (tmp_path / "spider_data.zip").write_bytes(b"fetched, but the program was killed before it had noted the checksum")
    (tmp_path / "spider_data.zip.sha256").touch()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            line, _ = server.accept()
            with line:
                line.recv(10_000)
                line.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(DataError, match=r"Cannot download Spider from 127\.0\.0\.1: \w"):
            download_spider(tmp_path, url=f"http://127.0.0.1:{server.getsockname()[1]}/x")


def test_without_network_the_way_out_is_named(tmp_path):
    with pytest.raises(DataError, match=r"Connect to the network, or download the archive from .* by hand"):
        download_spider(tmp_path, url="http://127.0.0.1:9/spider.zip", timeout=2)


@pytest.mark.slow
def test_the_real_release_is_imported_whole_and_its_holes_are_found(spider):
    audit, data = read_audit(spider), DataSet(spider)
    train, dev = audit.splits["train"], audit.splits["dev"]
    assert (dev.tasks, dev.with_rows, dev.scorable, dev.zero_rows) == (1034, 972, 972, 93)
    assert (train.tasks, train.with_rows, train.scorable) == (7000, 6608, 6605)
    assert dev.excluded == {"database_without_rows": 62}
    assert train.excluded == {"database_without_rows": 182, "gold_error": 3, "missing_database": 210}
    assert audit.databases_without_rows == {"baseball_1": 82, "music_2": 100, "wta_1": 62}
    assert audit.missing_databases == {"chinook_1": 84, "soccer_1": 14, "store_1": 112}
    assert len(data.load("dev_500")) == SUBSET and len(data.load("train")) == 7000


@pytest.mark.slow
def test_one_constant_query_earns_what_it_should_on_the_real_release(spider):
    floor = read_audit(spider).splits["dev"].constant_floor
    assert floor["reference_no_rows"] == pytest.approx(49 / 972)  # 93 of 1,034 before the audit
    assert floor["strict_no_rows"] == 0
    assert 0 < floor["strict"] <= floor["reference"]


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_in_a_log_beside_a_database_is_imported(tmp_path, packed):
    release = make_release(tmp_path / "release", dev=[row("shop", "SELECT name FROM item WHERE id = 3")])
    path = release / "database/shop/shop.sqlite"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("PRAGMA journal_mode = wal")
        writer.execute("INSERT INTO item VALUES (3, 'washer')")
        assert path.with_name("shop.sqlite-wal").stat().st_size
        import_release("spider", pack(release, tmp_path / "z.zip") if packed else release, tmp_path / "out")
    data = DataSet(tmp_path / "out")
    assert [p.name for p in data.database("shop").parent.iterdir()] == ["shop.sqlite"]
    assert open_database(data.database("shop")).execute(data.load("dev")[0].gold).rows == [("washer",)]


def test_a_log_of_what_is_no_database_is_refused_in_one_line(tmp_path):
    release = make_release(tmp_path / "release")
    (release / "database/shop/shop.sqlite").write_bytes(b"not a database" * 100)
    (release / "database/shop/shop.sqlite-wal").write_bytes(b"nor a log")
    with pytest.raises(DataError, match=r"Cannot merge database/shop/shop\.sqlite and") as caught:
        import_release("spider", release, tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
