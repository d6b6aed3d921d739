"""Downloads from a loopback server: cut, killed, wrong, without Range, and once more."""

import hashlib
import io
import os
import shutil
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_data import make_coco, write

from common.errors import UserError
from targets import __main__ as command
from targets import download as module
from targets.download import FILES, RemoteFile, download
from targets.images import load_target

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Server:
    """What it serves and how; the Range headers that it was sent, per file."""

    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    drop_after: list[int] = field(default_factory=list)  # the next answers end after so many bytes
    errors: list[int] = field(default_factory=list)  # status codes of the next answers
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    address: str = ""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        name, wanted = handler.path.lstrip("/"), handler.headers.get("Range")
        self.asked.append((name, wanted))
        if self.errors:
            handler.send_error(self.errors.pop(0))
            return
        content = self.files[name]
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.ranges else 0
        handler.send_response(206 if start else 200)
        if start:
            full = len(content)
            handler.send_header("Content-Range", f"bytes {start}-{full - 1}/{full}")
        handler.send_header("Content-Length", str(len(content) - start))
        handler.end_headers()
        end = start + self.drop_after.pop(0) if self.drop_after else len(content)
        for position in range(start, min(end, len(content)), 4096):
            handler.wfile.write(content[position : min(position + 4096, end)])


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    served = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.answer(self)

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    served.address = f"http://127.0.0.1:{http.server_port}"
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda _: None))
    yield served
    http.shutdown()
    http.server_close()
    thread.join()


@pytest.fixture
def offer(server, monkeypatch):
    """Put content on the server, as the only file of `coco`; an archive if `members` is given."""

    def offer(name: str, content: bytes, members: str | None = None) -> RemoteFile:
        server.files[name] = content
        digest = hashlib.sha256(content).hexdigest()
        remote = RemoteFile(f"{server.address}/{name}", name, len(content), digest, members)
        monkeypatch.setitem(FILES, "coco", (remote,))
        return remote

    return offer


CONTENT = os.urandom(300_000)


@pytest.mark.parametrize(
    ("part", "drop_after", "ranges", "asked"),
    [
        (None, [], True, [0]),
        (None, [100_000, 50_000, 0], True, [0, 100_000, 150_000, 150_000]),
        (None, [100_000], False, [0, 100_000]),  # and everything is sent again
        (299_999, [], True, [299_999]),
        (300_000, [], True, []),
    ],
)
def test_a_file_is_fetched_once_and_from_where_its_part_ends(
    tmp_path, server, offer, part, drop_after, ranges, asked
):
    """Whether a connection was dropped, or an earlier process left a part behind."""
    offer("a.tsv", CONTENT)
    folder = tmp_path / "new" / "folder"
    if part is not None:
        write(folder / "a.tsv.part", CONTENT[:part])
    server.drop_after, server.ranges = drop_after, ranges
    for _ in range(2):
        download("coco", folder)
        assert (folder / "a.tsv").read_bytes() == CONTENT
        assert [path.name for path in folder.iterdir()] == ["a.tsv"]
    wanted = [f"bytes={start}-" if start else None for start in asked]
    assert server.asked == [("a.tsv", start) for start in wanted]


@pytest.mark.parametrize(
    "served",
    [CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]), CONTENT + b"more", CONTENT[:1000] + CONTENT],
)
def test_other_content_is_refused_and_deleted(served, tmp_path, server, offer):
    offer("a.tsv", CONTENT)
    server.files["a.tsv"] = served
    with pytest.raises(UserError, match=r"a\.tsv sent .* not the published file.*try again"):
        download("coco", tmp_path)
    assert not list(tmp_path.iterdir())
    server.files["a.tsv"] = CONTENT
    download("coco", tmp_path)
    assert (tmp_path / "a.tsv").read_bytes() == CONTENT


def test_a_damaged_part_does_not_survive(tmp_path, server, offer):
    offer("a.tsv", CONTENT)
    (tmp_path / "a.tsv.part").write_bytes(bytes(1000))
    with pytest.raises(UserError, match="not the published file"):
        download("coco", tmp_path)
    download("coco", tmp_path)
    assert (tmp_path / "a.tsv").read_bytes() == CONTENT


def test_a_server_that_keeps_sending_nothing(tmp_path, server, offer):
    offer("a.tsv", CONTENT)
    server.drop_after = [5000] + [0] * 20
    with pytest.raises(UserError, match=r"stops sending.*same command"):
        download("coco", tmp_path)
    assert len(server.asked) == 1 + module.ATTEMPTS
    assert (tmp_path / "a.tsv.part").read_bytes() == CONTENT[:5000]


def test_answers_that_are_no_files(tmp_path, server, offer, monkeypatch):
    remote = offer("a.tsv", CONTENT)
    monkeypatch.setitem(FILES, "coco", (replace(remote, url="http://127.0.0.1:1/a.tsv"),))
    with pytest.raises(UserError, match=r"^http://127\.0\.0\.1:1/a\.tsv cannot be reached.*$"):
        download("coco", tmp_path)
    offer("a.tsv", CONTENT)
    server.errors = [404]
    with pytest.raises(UserError, match=r"a\.tsv answers 404"):
        download("coco", tmp_path)
    server.errors = [503, 500]  # which pass
    download("coco", tmp_path)
    assert (tmp_path / "a.tsv").read_bytes() == CONTENT


def test_a_disk_without_room(tmp_path, server, offer, monkeypatch):
    offer("a.zip", CONTENT, "a/")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=500_000))
    with pytest.raises(UserError, match=r"a\.zip needs 0\.0 GB in .* room for"):
        download("coco", tmp_path)
    assert not server.asked


# ---- archives ----


def zipped(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return content.getvalue()


@pytest.fixture
def coco(tmp_path, server, monkeypatch) -> Path:
    """COCO's three archives, small, on the server; gives a folder for them."""
    make_coco(tmp_path / "made", images=6, captions=2, validation=3)
    write(tmp_path / "made" / "train2014" / "filler.jpg", CONTENT)
    remotes = []
    for remote in FILES["coco"]:
        files = {
            str(path.relative_to(tmp_path / "made")): path.read_bytes()
            for path in sorted((tmp_path / "made").rglob("*.j*"))
        }
        top = f"{str(remote.members).partition('/')[0]}/"
        files = {top: b""} | {name: c for name, c in files.items() if name.startswith(top)}
        if "annotations" in top:
            files["annotations/instances_train2014.json"] = b"not wanted"
        content = zipped(files)
        server.files[remote.name] = content
        digest = hashlib.sha256(content).hexdigest()
        url = f"{server.address}/{remote.name}"
        remotes.append(replace(remote, url=url, size=len(content), sha256=digest))
    monkeypatch.setitem(FILES, "coco", tuple(remotes))
    return tmp_path / "D"


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_coco_from_nothing_to_rows(coco, server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["targets", "coco", "--download", "--data-dir", str(coco)])
    command.main()
    assert capsys.readouterr().out.count("complete") == 3
    got = contents(coco)
    expected = contents(tmp_path / "made")
    assert {name: got[name] for name in expected} == expected
    assert got.keys() - expected.keys() == {f"{remote.name}.json" for remote in FILES["coco"]}
    assert len(load_target("coco", "train", data_dir=coco)) == 12
    server.asked.clear()
    command.main()
    assert not server.asked and contents(coco) == got


def test_what_was_lost_is_fetched_again(coco, server):
    download("coco", coco)
    server.asked.clear()
    lost = coco / "val2014" / "COCO_val2014_000000000007.jpg"
    whole = lost.read_bytes()
    for damage in (lambda: lost.unlink(), lambda: lost.write_bytes(whole[:-1])):
        damage()
        download("coco", coco)
        assert lost.read_bytes() == whole
    assert [name for name, _ in server.asked] == ["val2014.zip"] * 2


def test_stopped_while_unpacking(coco, server, monkeypatch):
    copy, copied = shutil.copyfileobj, []

    def stop_at_four(member, file, size):
        if len(copied) == 4:
            file.write(member.read(10))
            raise KeyboardInterrupt
        copied.append(member.name)
        copy(member, file, size)

    monkeypatch.setattr(module.shutil, "copyfileobj", stop_at_four)
    with pytest.raises(KeyboardInterrupt):
        download("coco", coco)
    asked = len(server.asked)
    done = {path: path.stat().st_mtime_ns for path in (coco / "val2014").iterdir()}
    assert len(done) == 2  # two files of captions, then two images
    copied.clear()
    monkeypatch.setattr(
        module.shutil, "copyfileobj", lambda m, f, s: copied.append(m.name) or copy(m, f, s)
    )
    download("coco", coco)
    assert len(copied) == 1 + 7  # the third image of val2014, then train2014
    assert all(path.stat().st_mtime_ns == before for path, before in done.items())
    assert len(server.asked) == asked + 1  # train2014.zip


@pytest.mark.parametrize(
    "name", ["train2014/../../evil.jpg", "train2014/a\\..\\evil.jpg", "train2014/.."]
)
def test_an_archive_that_leads_out_of_its_folder_is_refused(name, tmp_path, offer):
    offer("a.zip", zipped({"train2014/a.jpg": b"a", name: b"evil"}), "train2014/")
    with pytest.raises(UserError, match="leads out of its folder"):
        download("coco", tmp_path / "D" / "E")
    assert not list(tmp_path.rglob("evil*"))


def test_a_damaged_archive_is_named(tmp_path, offer):
    content = zipped({"train2014/a.jpg": b"some content" * 99})
    broken = content.replace(b"some content" * 5, b"some_content" * 5, 1)
    for damaged in (broken, content[:-30], b"no zip"):
        offer("a.zip", damaged, "train2014/")
        with pytest.raises(UserError, match=r"a\.zip is damaged"):
            download("coco", tmp_path)
        assert not (tmp_path / "train2014" / "a.jpg").exists()
        (tmp_path / "a.zip").unlink()


def test_cc3m_says_how_to_get_the_images(tmp_path, server, monkeypatch, capsys):
    remotes = []
    for remote in FILES["cc3m"]:
        server.files[remote.name] = f"a caption\thttp://x of {remote.name}\n".encode()
        content = server.files[remote.name]
        digest = hashlib.sha256(content).hexdigest()
        url = f"{server.address}/{remote.name}"
        remotes.append(replace(remote, url=url, size=len(content), sha256=digest))
    monkeypatch.setitem(FILES, "cc3m", tuple(remotes))
    download("cc3m", tmp_path)
    out = capsys.readouterr().out
    for tsv, split in (
        ("Train_GCC-training.tsv", "train"),
        ("Validation_GCC-1.1.0-Validation.tsv", "validation"),
    ):
        assert (tmp_path / tsv).read_bytes() == server.files[tsv]
        line = next(line for line in out.splitlines() if f"{tsv})" in line)
        assert f"--output_folder {tmp_path}/{split}" in line and "img2dataset" in line
    with pytest.raises(UserError, match=r"train/.*--download"):
        load_target("cc3m", "train", data_dir=tmp_path)
