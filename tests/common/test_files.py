"""Text is read in one way; what is written has a name of its own, and kills leave nothing."""

import codecs
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import files
from common.errors import UserError
from common.files import (
    one_line,
    read_json,
    read_lines,
    read_text,
    remove_leftovers,
    replacing,
    write_json,
)

ROOT = Path(__file__).resolve().parents[2]
LINE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\ufeff"))


# ---- text ----


@given(
    lines=st.lists(LINE, max_size=5),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    mark=st.sampled_from([b"", codecs.BOM_UTF8]),
    closed=st.booleans(),
)
def test_lines_are_those_that_were_written(tmp_path_factory, lines, end, mark, closed):
    """Whatever ends them, with or without a mark; U+2028, U+0085 and others end no line."""
    path = tmp_path_factory.getbasetemp() / "lines.txt"
    if not closed and lines and not lines[-1]:
        lines = [*lines[:-1], "x"]  # an empty last line that is not ended is none
    path.write_bytes(mark + (end.join(lines) + end * (closed and bool(lines))).encode())
    assert list(read_lines(path)) == lines
    assert read_text(path) == "\n".join(lines)


def test_bytes_that_are_not_utf8_are_named_with_their_line(tmp_path):
    path = tmp_path / "prompts.txt"
    for content, words in (
        (b"one\r\ntwo\r\ncaf\xe9\r\n", "line 3: byte 0xe9"),
        ("a giraffe".encode("utf-16"), "line 1: byte 0xff"),
        (b"\xed\xb2\x80", "line 1: byte 0xed"),  # a surrogate, which UTF-8 does not allow
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"prompts\.txt, {words} is not UTF-8; save"):
            read_text(path)


def test_a_text_that_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"cannot read .*none\.txt: No such file .*; check the"):
        read_text(tmp_path / "none.txt")
    with pytest.raises(UserError, match=r"Is a directory; "):
        read_text(tmp_path)

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)  # root may read everything
    with pytest.raises(UserError, match=r"a\.txt: Permission denied; change the permissions"):
        read_text(tmp_path / "a.txt")


@given(st.text())
def test_one_line_shows_all_that_it_holds(text):
    line = one_line(text)
    assert line == one_line(line) == " ".join(line.split())
    assert not [
        c for c in line if c in "\0\r\n\t\x1f\x7f\x9f\u2028\ufeff" or "\ud800" <= c < "\ue000"
    ]
    visible = [c for c in text if c.isprintable() and not c.isspace()]
    assert [c for c in line if c.isprintable() and c not in " ?"] == [
        c for c in visible if c != "?"
    ]


def test_what_joins_letters_stays():
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467"  # a family is three emoji, joined
    assert one_line(f" {family}\0\ufeff\u2028of  three\r\n") == f"{family} of three"


def test_json_with_a_mark_and_with_names_that_are_not_utf8(tmp_path):
    path = tmp_path / "a.json"
    value = {"data_dir": os.fsdecode(b"/data/caf\xe9"), "caption": "一只长颈鹿"}
    write_json(path, value)
    assert read_json(path) == value == json.loads(path.read_bytes())
    assert "一只长颈鹿" in path.read_text(encoding="utf-8")
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())  # as an editor may save it
    assert read_json(path) == value


# ---- written whole or not at all ----


def test_two_writers_with_the_same_number_do_not_meet(tmp_path, monkeypatch):
    """As in two containers that share a folder, where both may be process 1."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    path = tmp_path / "a.json"
    with replacing(path) as first:
        with replacing(path) as second:
            first.write_text("1")
            second.write_text("2")
        assert path.read_text() == "2"
    assert path.read_text() == "1" and list(tmp_path.iterdir()) == [path]


WRITER = """
import sys, time
from pathlib import Path
from common.files import replacing
with replacing(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    print("writing", flush=True)
    time.sleep(600)
"""


def test_what_a_killed_writer_left_goes_and_what_a_living_one_writes_stays(tmp_path):
    (tmp_path / ".a.json.4711.tmp").mkdir()  # of an earlier version
    command = [sys.executable, "-c", WRITER, str(tmp_path / "a.json")]
    options = {
        "cwd": ROOT,
        "stdout": subprocess.PIPE,
        "env": os.environ | {"PYTHONPATH": str(ROOT)},
    }
    process = subprocess.Popen(command, **options)
    assert process.stdout.readline() == b"writing\n"
    with replacing(tmp_path / "a.json") as temporary:  # of this process
        temporary.write_text("whole")
        remove_leftovers(tmp_path)
        assert len(list(tmp_path.glob(".a.json.*.tmp"))) == 2 and temporary.exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    remove_leftovers(tmp_path, "b.json")
    assert len(list(tmp_path.iterdir())) == 2
    remove_leftovers(tmp_path, "a.json")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.skipif(files.fcntl is None, reason="needs locks")
def test_a_folder_that_goes_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    """Another process may take it for a leftover in the moment before its writer locks it."""
    locked = files.locked

    def remover(folder: Path, wait: bool):
        monkeypatch.setattr(files, "locked", locked)  # next time, it comes in time
        remove_leftovers(folder.parent)
        return locked(folder, wait)

    monkeypatch.setattr(files, "locked", remover)
    write_json(tmp_path / "a.json", {"x": 1})
    assert read_json(tmp_path / "a.json") == {"x": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
