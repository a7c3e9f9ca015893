"""A file under its final name is whole and the right one, whatever the network does."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from fedlora_mini.data.fetch import content_digest, download, expect_sha256, members, mirror, obtain, safe_name
from fedlora_mini.errors import FedloraError

BODY = bytes(range(256)) * 12_000  # 3 MB
CHECK = expect_sha256(hashlib.sha256(BODY).hexdigest())


def test_a_download_arrives(server, tmp_path: Path) -> None:
    server.body = BODY
    assert download(server.url, tmp_path / "a.zip", CHECK).read_bytes() == BODY
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["a.zip"]


def test_an_interrupted_transfer_resumes_where_it_stopped(server, tmp_path: Path) -> None:
    server.body, server.drop_after = BODY, [1_500_000, 700_000]
    assert download(server.url, tmp_path / "a.zip", CHECK, pause=0).read_bytes() == BODY
    assert server.ranges[0] is None and server.ranges[1] == "bytes=1500000-" and server.ranges[2] == "bytes=2200000-"


def test_a_later_run_resumes_the_part_of_an_earlier_one(server, tmp_path: Path) -> None:
    (tmp_path / "a.zip.part").write_bytes(BODY[:1000])
    server.body = BODY
    assert download(server.url, tmp_path / "a.zip", CHECK).read_bytes() == BODY
    assert server.ranges == ["bytes=1000-"]


def test_a_complete_part_is_not_fetched_again(server, tmp_path: Path) -> None:
    (tmp_path / "a.zip.part").write_bytes(BODY)
    server.body = BODY
    assert download(server.url, tmp_path / "a.zip", CHECK).read_bytes() == BODY


def test_a_server_that_ignores_range_is_started_over(server, tmp_path: Path) -> None:
    server.body, server.honour_range, server.drop_after = BODY, False, [1_000_000]
    assert download(server.url, tmp_path / "a.zip", CHECK, pause=0).read_bytes() == BODY


def test_a_corrupt_download_is_refused_and_never_left(server, tmp_path: Path) -> None:
    server.body = BODY[:-1] + b"x"
    with pytest.raises(FedloraError, match=r"refused and deleted.*corrupt"):
        download(server.url, tmp_path / "a.zip", CHECK)
    assert not list(tmp_path.glob("a.zip*"))


def test_a_stale_part_of_another_file_is_refused_and_the_next_run_is_clean(server, tmp_path: Path) -> None:
    (tmp_path / "a.zip.part").write_bytes(b"\0" * 5000)
    server.body = BODY
    with pytest.raises(FedloraError, match="refused"):
        download(server.url, tmp_path / "a.zip", CHECK)
    assert download(server.url, tmp_path / "a.zip", CHECK).read_bytes() == BODY


def test_without_progress_it_gives_up_and_keeps_what_came(server, tmp_path: Path) -> None:
    server.body, server.drop_after = BODY, [2_000_000, 0, 0, 0, 0, 0]
    with pytest.raises(FedloraError, match="2,000,000 bytes are kept"):
        download(server.url, tmp_path / "a.zip", CHECK, attempts=3, pause=0)
    assert not (tmp_path / "a.zip").exists() and (tmp_path / "a.zip.part").stat().st_size == 2_000_000


def test_a_missing_page_is_one_clear_error(server, tmp_path: Path) -> None:
    server.status = 404
    with pytest.raises(FedloraError, match="HTTP 404"):
        download(server.url, tmp_path / "a.zip", CHECK)


def test_a_source_is_a_file_a_folder_or_a_url(server, tmp_path: Path, own_home: Path) -> None:
    server.body = BODY
    shelf = tmp_path / "shelf" / "set" / "a.zip"
    shelf.parent.mkdir(parents=True)
    shelf.write_bytes(BODY)
    assert obtain("set/a.zip", "http://unused", CHECK, source=shelf) == shelf
    assert obtain("set/a.zip", "http://unused", CHECK, source=tmp_path / "shelf") == shelf
    assert obtain("set/a.zip", "http://unused", CHECK, source=shelf.parent) == shelf
    assert obtain("set/a.zip", "http://unused", CHECK, source=server.url) == own_home / "set" / "a.zip"
    assert obtain("set/a.zip", "http://unused", CHECK) == own_home / "set" / "a.zip"
    with pytest.raises(FedloraError, match="no file"):
        obtain("set/a.zip", "http://unused", CHECK, source=tmp_path / "nowhere.zip")
    shelf.write_bytes(b"rubbish")
    with pytest.raises(FedloraError, match="corrupt"):
        obtain("set/a.zip", "http://unused", CHECK, source=shelf)


def test_the_local_copy_is_found_through_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.zip").write_bytes(BODY)
    assert mirror("set/a.zip") is None
    monkeypatch.setenv("FEDLORA_DATA_MIRROR", str(tmp_path))
    assert obtain("set/a.zip", "http://unused", CHECK) == tmp_path / "set" / "a.zip"


@pytest.mark.parametrize("name", ["../evil.png", "/etc/passwd", "a/../../b", "..\\b.png", "C:\\b.png"])
def test_an_archive_that_climbs_out_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(FedloraError, match="unsafe"):
        safe_name(name)
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr(name, b"x")
    with zipfile.ZipFile(tmp_path / "z.zip") as archive, pytest.raises(FedloraError, match="unsafe"):
        members(archive, "images")


def test_the_content_digest_does_not_depend_on_the_packing(tmp_path: Path) -> None:
    files = {"set/b.png": b"B", "set/a.png": b"A", "README": b"r"}
    with zipfile.ZipFile(tmp_path / "one.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    with zipfile.ZipFile(tmp_path / "two.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in reversed(files.items()):
            archive.writestr("repository-1234567/" + name, data)
    with zipfile.ZipFile(tmp_path / "three.zip", "w") as archive:
        archive.writestr("set/a.png", b"A")
        archive.writestr("set/b.png", b"C")
    one, two, three = (content_digest(tmp_path / f"{n}.zip", "set", ".png") for n in ("one", "two", "three"))
    assert one == two != three
    (tmp_path / "four.zip").write_bytes(b"not a zip")
    with pytest.raises(FedloraError, match="not a readable zip"):
        content_digest(tmp_path / "four.zip", "set")
