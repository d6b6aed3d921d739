"""Errors that a user can mend, said in one line: `UserError`, and what every command runs in."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from collections.abc import Callable

ADVICE = {  # what helps against an error of the system; others are only named
    errno.ENOSPC: "free some room on the disk",
    errno.EDQUOT: "free some room within the disk quota",
    errno.EFBIG: "the system or its disk takes no larger file; check `ulimit -f` and the room",
    errno.EACCES: "change the permissions, or choose another path",
    errno.EPERM: "change the permissions, or choose another path",
    errno.EROFS: "choose a path on a file system that can be written",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path: a part of it is a file",
    errno.EISDIR: "check the path: it is a folder",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit of open files with `ulimit -n`",
}


class UserError(Exception):
    """Something that the user can mend.

    Its text is one line: what is wrong, the value, what is allowed, what to do.
    """


def command_line(main: Callable[[], None], goes_on: bool = False) -> None:
    """Run a script's `main`.

    A `UserError`, or an error of the system, becomes one line on stderr and exit code 2, Ctrl-C
    exit code 130. Letters that the terminal does not have are printed as escapes.

    Args:
        goes_on: whether the same command goes on where Ctrl-C has stopped it.
    """
    # so that `finally` blocks run on `kill`
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    quiet_libraries()
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        advice = "run the same command again to go on" if goes_on else "what was finished is kept"
        print(f"stopped; {advice}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output has seen enough, as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is flushed at the end
        sys.exit(141)
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        print(f"error: {system_error(error)}", file=sys.stderr)
        sys.exit(2)


def system_error(error: OSError) -> str:
    """An error of the system in one line: the file, what the system says, and what helps."""
    where = "" if error.filename is None else f"{error.filename}: "
    advice = f"; {ADVICE[error.errno]}" if error.errno in ADVICE else ""
    return f"{where}{error.strerror or error}{advice}"


def quiet_libraries() -> None:
    """Keep the progress bars and load reports of libraries that are loaded out of the output."""
    for name in ("transformers.utils.logging", "diffusers.utils.logging"):
        if (logging := sys.modules.get(name)) is not None:  # to load them takes seconds
            logging.set_verbosity_error()
            logging.disable_progress_bar()
