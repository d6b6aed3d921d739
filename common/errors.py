"""Errors that a user can mend, said in one line: `UserError`, and what every command runs in."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something that the user can mend.

    Its text is one line: what is wrong, the value, what is allowed, what to do.
    """


def command_line(main: Callable[[], None]) -> None:
    """Run a script's `main`.

    A `UserError` becomes one line on stderr and exit code 2, Ctrl-C exit code 130.
    """
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # so that `finally` blocks run on `kill`
    quiet_libraries()
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        print(
            f"error: {error}: check that the disk has room and the path can be written",
            file=sys.stderr,
        )
        sys.exit(2)


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars and load reports out of the scripts' output."""
    import transformers.utils.logging
    from diffusers.utils import logging

    for library in (transformers.utils.logging, logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
