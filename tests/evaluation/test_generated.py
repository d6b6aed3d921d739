"""Images that two processes generate together, of which one is killed, and the job started anew."""

import os
import signal
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image
from small_processes import start

from common.processes import rank, start_processes, world_size
from evaluation.generated import Sampling, generate

CAPTIONS = [f"caption {k}" for k in range(12)]
ROWS, EXPERTS = [1, 2, 3, 5, 6, 7, 8, 9, 11], [1, 0, 1, 1, 0, 2, 2, 0, 1]
PROCESS = (
    "import sys; sys.path[:0] = 'tests/evaluation', 'tests'; import test_generated as t; t.main()"
)


def stand_in(folder: Path, dies_at: int | None = None) -> None:
    """Generate; an image's colours are its row, its expert, and which ones were made with it.

    Args:
        dies_at: number of the call in which process 1 is killed.
    """
    calls: list[list[str]] = []

    def pipeline(prompts, *, expert, **_):
        calls.append(prompts)
        if rank() == 1 and len(calls) == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        together = zlib.crc32("".join(prompts).encode()) % 256
        colours = [
            (int(prompt.split()[1]), i, together) for prompt, i in zip(prompts, expert, strict=True)
        ]
        return SimpleNamespace(images=[Image.new("RGB", (8, 8), colour) for colour in colours])

    made = generate(pipeline, folder, CAPTIONS, ROWS, EXPERTS, Sampling(batch_size=2))
    assert made.rows == ROWS and made.experts == EXPERTS and len(made.seconds) == len(ROWS)
    print(len(calls), world_size())


def main() -> None:
    start_processes(torch.device("cpu"))
    stand_in(Path(sys.argv[1]), int(sys.argv[2]))


def colours_of(folder: Path) -> dict[str, tuple[int, ...]]:
    found = {}
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            found[path.name] = image.getpixel((0, 0))
    return found


def test_two_processes_generate_what_one_does_and_outlive_a_dead_one(tmp_path):
    """Five batches: three for process 0, two for process 1, which is killed in its second."""
    stand_in(tmp_path / "one")
    one = colours_of(tmp_path / "one")
    assert len(one) == len(ROWS)
    first, second = start(PROCESS, tmp_path / "two", 2)
    second.communicate(timeout=120)
    assert second.returncode == -signal.SIGKILL
    first.communicate(timeout=120)  # it is told that the other is gone
    assert first.returncode != 0
    left = colours_of(tmp_path / "two")
    assert len(left) == 7 and left.items() <= one.items()  # in the same batches, too
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "two").glob("*.png")}
    answers = [process.communicate(timeout=120) for process in start(PROCESS, tmp_path / "two", 9)]
    assert [said for said, _ in answers] == ["1 2\n", "0 2\n"], answers
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert colours_of(tmp_path / "two") == one
