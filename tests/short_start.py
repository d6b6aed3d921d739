"""Runs a script whose router starts at the importance over two batches, not 32.

    python tests/short_start.py train.py --budget 0.7 ...

Most trainings in tests are of a few steps, of which the start would be the longest part.
"""

import runpy
import sys
from pathlib import Path

START_BATCHES = 2


def shorten() -> None:
    """Have all of this process's routers start so."""
    import importance

    importance.START_BATCHES = START_BATCHES


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    shorten()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
