"""What ends a script: one line, an exit code, and no traceback; whatever the terminal can show."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError, command_line, system_error

ROOT = Path(__file__).resolve().parents[2]


def ended_by(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code and stderr of a script that raises `error`."""

    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as stopped:
        command_line(main)
    return stopped.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "says", "never"),
    [
        (errno.ENOSPC, ["No space left", "free some room"], "permission"),
        (errno.EACCES, ["Permission denied", "change the permissions"], "room"),
        (errno.EROFS, ["Read-only file system", "that can be written"], "room"),
        (errno.ENOENT, ["No such file", "check the path"], "room"),
        (errno.EMFILE, ["Too many open files", "ulimit -n"], "room"),
        (errno.EIO, [os.strerror(errno.EIO)], "room"),  # nothing is known to help
    ],
)
def test_an_error_of_the_system_is_said_as_what_it_is(number, says, never, capsys):
    code, line = ended_by(OSError(number, os.strerror(number), "/data/x.bin"), capsys)
    assert code == 2 and line.startswith("error: /data/x.bin: ") and line.count("\n") == 1
    assert all(word in line for word in says) and never not in line


def test_an_error_without_a_file_names_none():
    assert system_error(OSError(errno.EIO, "Input/output error")) == "Input/output error"


def test_other_errors_keep_their_traceback(capsys):
    with pytest.raises(OSError, match="of a library"):
        command_line(lambda: (_ for _ in ()).throw(OSError("of a library")))


def test_a_user_error_and_ctrl_c(capsys):
    assert ended_by(UserError("no"), capsys) == (2, "error: no\n")
    assert ended_by(KeyboardInterrupt(), capsys) == (130, "stopped; what was finished is kept\n")


SCRIPT = """
import os, sys
from common import errors
def main():
    assert not {"diffusers", "transformers"} & {*sys.modules}  # to load them takes seconds
    print(sys.argv[1], os.fsdecode(b"caf\\xe9"))
    for _ in range(int(sys.argv[2])):
        print("a line")
    raise errors.UserError(f"no file {sys.argv[1]}")
errors.command_line(main)
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_letters_that_the_terminal_does_not_have(encoding):
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    environment |= {"PYTHONUTF8": "1"}  # for the arguments
    command = [sys.executable, "-c", SCRIPT, "ü一", "0"]
    ended = subprocess.run(command, env=environment, capture_output=True, timeout=60)
    shown = "ü一".encode(encoding, "backslashreplace")
    assert ended.returncode == 2 and ended.stdout == shown + b" caf\\udce9\n"
    assert ended.stderr == b"error: no file " + shown + b"\n"


def test_a_reader_that_has_seen_enough():
    """As `python -m targets emoji | head -1`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, "x", "100000"]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert isinstance(process.stdout, io.BufferedReader)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141
