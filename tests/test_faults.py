"""What goes wrong while a run is made: kills, a full disk, NaN, Ctrl-C, damaged files.

Runs are made by `python tests/test_faults.py FOLDER`, which loads libraries, teacher and target
once and forks a process for each run: it takes seconds less, and can be killed at any moment.
`KILLS=20 pytest tests/test_faults.py -k moments` tries that many random moments.
"""

import ast
import contextlib
import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from safetensors.torch import save_file
from short_start import shorten
from small_data import make_folder
from tqdm import tqdm

import finetune
import train
from common import files
from common.errors import UserError, command_line, quiet_libraries
from common.files import load_tensors, save_tensors
from run import prepare
from settings import Pruning, read_with_preset, resolve

ROOT = Path(__file__).resolve().parent.parent
KILLS = int(os.environ.get("KILLS", "2"))
ARGUMENTS = {
    "budget": "0.7",
    "num-experts": "3",
    "warmup-steps": "2",
    "joint-steps": "4",
    "batch-size": "4",
    "limit": "48",
    "save-minutes": "0",
    "device": "cpu",
}
RESULTS = ("router.safetensors", "codes.safetensors", "assignments.json", "metrics.csv")
TUNING = {
    "expert": "1",
    "refit-images": "16",
    "steps": "4",
    "batch-size": "4",
    "save-minutes": "0",
    "device": "cpu",
}


# ---- faults, each set up in the process that is to have it ----


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def on_call(owner: Any, name: str, wanted: int, fault: Callable[..., Any]) -> None:
    """Call `fault`, with the function's own arguments, in place of call number `wanted` from 0."""
    function, calls = getattr(owner, name), []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == wanted + 1:
            return fault(*arguments, **options)
        return function(*arguments, **options)

    setattr(owner, name, counted)


def half_a_file(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Dies half way through a write, also as safetensors does it: under a name of its own."""
    save_file(tensors, path, metadata)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    path.with_name(".tmp1A2b3C").write_bytes(whole[: len(whole) // 2])
    die()


def no_room(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """The system takes no more bytes of a file, which to a program is what a full disk is."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    save_file(tensors, path, metadata)


def nan_output(step: int) -> None:
    """The gated U-Net's output is NaN in one step, as its gates are."""
    image_losses = train.PruningStep.image_losses

    def not_a_number(self: Any, a: torch.Tensor, *arguments: Any) -> Any:
        return image_losses(self, a * float("nan"), *arguments)

    on_call(train.PruningStep, "image_losses", step, not_a_number)


FAULTS: dict[str, Callable[[], None]] = {
    "": lambda: None,
    "killed before config.json is in place": lambda: on_call(
        files.os, "replace", 0, lambda *_: die()
    ),
    "killed half way through a checkpoint": lambda: on_call(files, "save_file", 1, half_a_file),
    "killed half way through the next one": lambda: on_call(files, "save_file", 2, half_a_file),
    "killed before the summary": lambda: on_call(files, "save_file", 8, half_a_file),
    "killed before the checkpoint goes": lambda: on_call(Path, "unlink", 0, lambda *_, **__: die()),
    "disk full": lambda: on_call(files, "save_file", 2, no_room),
    "NaN": lambda: nan_output(5),
}


# ---- runs, forked ----


def serve(folder: Path) -> None:
    """For each line `[script, arguments, fault]` of stdin, fork a process that runs it.

    Prints its number and, once it is over, its exit status.
    """
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is shared by forks, and stays held by one killed
    tqdm.monitor_interval = 0
    quiet_libraries()
    shorten()
    setup = prepare(resolve(settings(folder / "none")))
    setup = replace(setup, validation=setup.validation.take(range(8)))
    print("ready", flush=True)
    for line in sys.stdin:
        script, arguments, fault = json.loads(line)
        child = os.fork()
        if child == 0:
            errors = os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(errors, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            # a shell's background job, and all that it starts, would ignore Ctrl-C
            signal.signal(signal.SIGINT, signal.default_int_handler)
            unpickled = watch_unpickling()
            train.prepare = lambda cfg: replace(setup, cfg=cfg)
            finetune.load_teacher = lambda *_, **__: setup.teacher
            finetune.encode_target = lambda *_, **__: setup.encoded
            FAULTS[fault]()
            sys.argv = [f"{script}.py", *arguments]
            code: Any = 0
            try:
                command_line({"train": train.main, "finetune": finetune.main}[script], goes_on=True)
            except SystemExit as stopped:
                code = stopped.code
            os._exit(99 if unpickled else code)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def watch_unpickling() -> list[str]:
    """A list that grows with each class or function that a pickle asks for."""
    asked: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "pickle.find_class":
            asked.append(str(arguments))

    sys.addaudithook(hook)
    return asked


def settings(out: Path) -> Pruning:
    return read_with_preset(Pruning, options(ARGUMENTS, out=out), None)


def options(values: dict[str, str], **paths: Path) -> list[str]:
    return [f"--{name}={value}" for name, value in {**values, **paths}.items()]


def said(errors: str) -> list[str]:
    """The lines of a run's stderr, without its progress bars."""
    lines = re.split(r"[\r\n]+", errors)
    return [line for line in lines if line.strip() and not re.search(r"\d+%\|", line)]


@dataclass
class Forks:
    """The server's other end."""

    questions: IO[str]
    answers: IO[str]
    folder: Path

    def start(self, out: Path, fault: str = "", script: str = "train") -> int:
        """Start a run and give the number of its process."""
        arguments = options(ARGUMENTS, out=out) if script == "train" else options(TUNING, run=out)
        print(json.dumps([script, arguments, fault]), file=self.questions, flush=True)
        return int(self.answers.readline())

    def end(self) -> tuple[int, list[str]]:
        """The run's exit status and what it said on stderr, without progress bars."""
        code = int(self.answers.readline())
        return code, said((self.folder / "stderr").read_text(encoding="utf-8"))

    def run(self, out: Path, fault: str = "", script: str = "train") -> tuple[int, list[str]]:
        self.start(out, fault, script)
        return self.end()


@pytest.fixture(scope="module")
def forks(tmp_path_factory) -> Iterator[Forks]:
    if not hasattr(os, "fork"):
        pytest.skip("this system does not fork")
    folder = tmp_path_factory.mktemp("faults")
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    server = subprocess.Popen(
        [sys.executable, __file__, str(folder)],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert server.stdin and server.stdout and server.stdout.readline() == "ready\n"
    yield Forks(server.stdin, server.stdout, folder)
    server.stdin.close()
    server.wait()


@pytest.fixture(scope="module")
def undisturbed(forks) -> tuple[Path, float]:
    """A run that nothing happened to, and the seconds it took."""
    clock, folder = time.time(), forks.folder / "undisturbed"
    assert forks.run(folder)[0] == 0
    assert len((folder / "metrics.csv").read_text().splitlines()) == 7
    codes = load_tensors(folder / "codes.safetensors")[0]["codes"]
    assert codes.unique(dim=0).shape[0] > 1
    return folder, time.time() - clock


def steps_done(run: Path) -> int:
    """The steps in a run's log."""
    log = run / "metrics.csv"
    return max(0, len(log.read_text().splitlines()) - 1) if log.exists() else 0


def same(run: Path, other: Path) -> None:
    """The same results, bit for bit, and nothing left lying about."""
    for name in RESULTS:
        assert (run / name).read_bytes() == (other / name).read_bytes(), name
    names = [sorted(path.name for path in folder.iterdir()) for folder in (run, other)]
    assert names[0] == names[1]


def test_killed_at_random_moments(forks, undisturbed):
    """Each moment in a run of its own, which the same command then finishes."""
    whole, seconds = undisturbed
    draw = random.Random(time.time_ns())
    for kill in range(KILLS):
        folder, moment = forks.folder / f"killed-{kill}", draw.uniform(0, 0.9 * seconds)
        child = forks.start(folder)
        time.sleep(moment)
        with contextlib.suppress(ProcessLookupError):  # it may be over
            os.kill(child, signal.SIGKILL)
        killed = forks.end()[0] != 0
        state = "killed" if killed else "over"
        print(f"{state} at {moment:.2f} s, {steps_done(folder)} steps done")
        assert forks.run(folder)[0] == 0
        same(folder, whole)


def test_killed_and_stopped_while_it_trains(forks, undisturbed):
    """A run that went on where it was killed is stopped by Ctrl-C, which is one line."""
    folder = forks.folder / "killed-and-stopped"
    stopped = 130, ["stopped; run the same command again to go on"]
    for steps, sent, ends in (
        (3, signal.SIGKILL, (-signal.SIGKILL, [])),
        (5, signal.SIGINT, stopped),
    ):
        child = forks.start(folder)
        deadline = time.time() + 120
        while time.time() < deadline and steps_done(folder) < steps:
            time.sleep(0.005)
        os.kill(child, sent)
        assert forks.end() == ends
        # one state may be in a thread, to be written, and one step after it be done
        assert load_tensors(folder / "checkpoint.safetensors")[1]["step"] >= steps - 2
    assert forks.run(folder)[0] == 0
    same(folder, undisturbed[0])


@pytest.mark.parametrize("fault", [name for name in FAULTS if name.startswith("killed")])
def test_killed_at_a_bad_moment(forks, undisturbed, fault):
    folder = forks.folder / fault.replace(" ", "-")
    assert forks.run(folder, fault)[0] == -signal.SIGKILL
    names = [{path.name for path in run.iterdir()} for run in (folder, undisturbed[0])]
    assert names[0] - names[1]  # a checkpoint, or a half-written file
    assert forks.run(folder)[0] == 0
    same(folder, undisturbed[0])


@pytest.mark.parametrize(
    ("fault", "step", "words"),
    [
        ("disk full", 2, ["checkpoint.safetensors", "could not be written", "room"]),
        ("NaN", 5, ["nan", "step 5", "checkpoint.safetensors", "--lr"]),
    ],
)
def test_a_fault_is_one_line_and_leaves_the_last_checkpoint(forks, undisturbed, fault, step, words):
    folder = forks.folder / fault.replace(" ", "-")
    code, lines = forks.run(folder, fault)
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    assert all(word in lines[0] for word in words), lines[0]
    assert load_tensors(folder / "checkpoint.safetensors")[1]["step"] == step
    assert not list(folder.glob(".*.tmp"))
    assert forks.run(folder)[0] == 0
    same(folder, undisturbed[0])


def test_a_killed_finetuning_ends_as_the_undisturbed_one(forks, undisturbed):
    folder = forks.folder / "finetuned"
    shutil.copytree(undisturbed[0], folder)
    path = finetune.expert_path(folder, 1)
    assert forks.run(folder, script="finetune")[0] == 0
    once, log = path.read_bytes(), path.with_suffix(".csv").read_text()
    path.unlink()
    for fault in ("killed half way through a checkpoint", "killed before the checkpoint goes"):
        assert forks.run(folder, fault, "finetune")[0] == -signal.SIGKILL
        assert len(list(path.parent.iterdir())) > 2
    assert forks.run(folder, script="finetune")[0] == 0
    assert path.read_bytes() == once and path.with_suffix(".csv").read_text() == log
    assert sorted(p.name for p in path.parent.iterdir()) == ["1.csv", "1.safetensors"]


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs Linux's /dev/full")
def test_a_disk_that_fills_up_under_the_log_is_one_line(tmp_path, capsys):
    log = files.MetricsLog(tmp_path / "metrics.csv", ["loss"], 0)
    log.close()
    # closing it fails, too
    with contextlib.suppress(OSError), Path("/dev/full").open("a", encoding="utf-8") as full:
        log.writer, log.file = csv.writer(full), full
        with pytest.raises(SystemExit) as stopped:
            command_line(lambda: log.write(0, {"loss": 1.0}))
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1, lines
    assert "No space left" in lines[0] and "room" in lines[0]


# ---- surroundings ----


def test_odd_surroundings(tmp_path):
    """No home, a folder whose name is not UTF-8, captions that a Latin-1 terminal cannot show."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    with contextlib.suppress(OSError):  # some file systems have no such names
        folder.mkdir()
    folder = folder if folder.exists() else tmp_path / "caf"
    make_folder(folder, [(f"{k}.jpg", f"第{k}只长颈鹿 ü") for k in range(30)])
    unset = ("XDG_CACHE_HOME", "LANG", "LC_ALL", "LC_CTYPE", "PYTHONUTF8")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"HOME": "/dev/null", "TMPDIR": str(tmp_path), "PYTHONIOENCODING": "latin-1"}
    command = [sys.executable, "-m", "targets", folder]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=120)
    assert ended.returncode == 0, ended.stderr.decode("latin-1")
    assert rb"\u53ea\u957f\u9888\u9e7f " + "ü".encode("latin-1") in ended.stdout
    assert rb"caf\udce9: " in ended.stdout or folder.name == "caf"
    assert list((tmp_path / f"aptp-{os.getuid()}" / "unreadable").iterdir())


# ---- damaged files ----


def damaged(whole: bytes) -> dict[str, bytes]:
    """A file cut short, and with one bit of its header or its data turned over."""
    flipped = {}
    for where, place in (("header", 40), ("data", len(whole) - 1000)):
        altered = bytearray(whole)
        altered[place] ^= 4
        flipped[where] = bytes(altered)
    return {"short": whole[:-100], "empty": b"", **flipped}


@pytest.mark.parametrize("script", ["train", "finetune"])
def test_a_damaged_checkpoint_is_refused_by_name(forks, undisturbed, script):
    folder, fault = forks.folder / f"damaged-{script}", "killed half way through a checkpoint"
    if script == "train":
        name = "checkpoint.safetensors"
    else:  # whose first file is that of the refitted weights
        shutil.copytree(undisturbed[0], folder)
        name, fault = "experts/1.checkpoint.safetensors", "killed half way through the next one"
    assert forks.run(folder, fault, script)[0] == -signal.SIGKILL
    whole = (folder / name).read_bytes()
    for content in damaged(whole).values():
        (folder / name).write_bytes(content)
        code, lines = forks.run(folder, script=script)
        assert code == 2 and len(lines) == 1, lines
        assert f"{folder / name} is damaged" in lines[0], lines[0]


def test_no_bit_of_a_file_can_turn_over_unnoticed(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"x": torch.arange(3.0)}, {"step": 3})
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in range(8):
            altered = bytearray(whole)
            altered[place] ^= 1 << bit
            path.write_bytes(altered)
            with pytest.raises(UserError, match=r"a\.safetensors is damaged"):
                load_tensors(path)


# ---- nothing is unpickled ----

PICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
SAFELY = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}


def unsafe(source: str) -> list[str]:
    """What of a module's source could unpickle a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found += [name for name in names if name.split(".")[0] in PICKLERS]
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func).replace("numpy.", "np.")
        given = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
        if call in SAFELY and given.get(SAFELY[call][0]) is not SAFELY[call][1]:
            found.append(call)
        if given.get("trust_remote_code"):
            found.append(call)
    return found


@pytest.mark.parametrize("header", [None, "x", "[]", "3", "{}", '{"meta": {}}'])
def test_a_file_of_another_program_is_refused(tmp_path, header):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(2)}, path, None if header is None else {"header": header})
    with pytest.raises(UserError, match=r"a\.safetensors is damaged"):
        load_tensors(path)
    assert files.checksum(path) is None


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib.x import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "numpy.load(path)",
        "np.load(path, allow_pickle=flag)",
        "f(trust_remote_code=True)",
    ],
)
def test_an_unsafe_line_would_be_found(source):
    assert unsafe(source)


def test_no_module_unpickles():
    rooms = ("common", "targets", "teacher", "evaluation", "bench", "docs")
    modules = [
        *ROOT.glob("*.py"),
        *(path for room in rooms for path in (ROOT / room).rglob("*.py")),
    ]
    assert len(modules) > 40 and ROOT / "teacher" / "model.py" in modules
    found = {
        str(path.relative_to(ROOT)): unsafe(path.read_text(encoding="utf-8")) for path in modules
    }
    assert not {name: calls for name, calls in found.items() if calls}


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
