"""The way of a user with COCO and a teacher of their own, command by command, on small data."""

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from small_data import write
from small_pipelines import write_pipeline

import evaluate
import finetune
import sample
import train
from common.errors import command_line
from common.files import read_json
from settings import PRESETS
from targets.images import load_target
from teacher.model import load_teacher

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {f"{script.__name__}.py": script for script in (train, finetune, sample, evaluate)}
SHORT = {
    "num-experts": 2,
    "warmup-steps": 1,
    "joint-steps": 2,
    "batch-size": 6,
    "micro-batch": 4,
    "lr": 0.05,
    "prompt-encoder": "minilm",
}


def small_coco(folder: Path) -> None:
    """COCO 2014's layout, of emoji: not square, larger than the teacher's 64 px, two captions each,
    one image damaged and one missing.
    """
    for split, year in (("train", "train2014"), ("validation", "val2014")):
        emoji = load_target("emoji", split, limit=10)
        (folder / year).mkdir(parents=True)
        images, notes = [], []
        for k, caption in enumerate(emoji.captions):
            name = f"COCO_{year}_{k:012d}.jpg"
            picture = Image.fromarray(emoji.read(k)).resize((96, 80))
            picture.save(folder / year / name, quality=95)
            images.append({"id": 500 + k, "file_name": name, "width": 96, "height": 80})
            notes += [
                {"id": 2 * k + j, "image_id": 500 + k, "caption": text}
                for j, text in enumerate((caption, f"A picture of {caption}."))
            ]
        if split == "train":
            write(folder / year / "COCO_train2014_000000000003.jpg", b"\xff\xd8\xff not a JPEG")
            (folder / year / "COCO_train2014_000000000007.jpg").unlink()
        content = json.dumps({"images": images, "annotations": notes})
        write(folder / "annotations" / f"captions_{year}.json", content)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("walk")
    small_coco(folder / "coco")
    for split in ("train", "validation"):  # checks the images, so that no command shows that bar
        load_target("coco", split, data_dir=folder / "coco")
    load_teacher("pocket").pipe.save_pretrained(folder / "sd")
    write_pipeline(folder / "sdxl", "sdxl")
    return folder


def command(*arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `python SCRIPT ...`."""
    line = [sys.executable, *map(str, arguments)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def here(monkeypatch, capfd) -> Callable[..., tuple[int, str, str]]:
    """here("train.py", ...): what `python train.py ...` does, in this process, which has imported.

    Gives its exit status, stdout and stderr.
    """

    def run(script: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        code: Any = 0
        try:
            command_line(SCRIPTS[script].main)
        except SystemExit as stopped:
            code = stopped.code
        return code or 0, *capfd.readouterr()

    return run


@pytest.mark.parametrize(("teacher", "pixels"), [("sd", 64), ("sdxl", 16)])
def test_prune_finetune_draw_and_score_on_coco(place, here, teacher, pixels):
    """With `sd`, the first and the last command in processes of their own."""
    run = place / f"run-{teacher}"
    where = ("--data-dir", place / "coco", "--teacher", place / teacher, "--device", "cpu")
    short = [f"--{name}={value}" for name, value in SHORT.items()]
    steps = (
        ("train.py", "--target", "coco", "--budget", 0.78, *where, *short, "--out", run),
        (
            "finetune.py",
            "--run",
            run,
            "--steps",
            1,
            "--batch-size",
            3,
            "--refit-images",
            8,
            "--device",
            "cpu",
        ),
        ("sample.py", "a giraffe", "--run", run, "--steps", 2, "--device", "cpu"),
        ("evaluate.py", "--run", run, "--images", 4, "--steps", 2, "--device", "cpu"),
    )
    outputs = {}
    for step in steps:
        alone = teacher == "sd" and step[0] in ("train.py", "evaluate.py")
        code, output, errors = command("tests/short_start.py", *step) if alone else here(*step)
        assert code == 0, errors[-2000:]
        outputs[step[0]] = output + errors
    summary = read_json(run / "summary.json")
    assert summary["target"] == "coco" and summary["teacher"] == str(place / teacher)
    assert 0.78 * 0.99 <= summary["macs_ratio_mean"] <= 0.78 + 1e-6
    with (run / "metrics.csv").open() as file:  # the soft gates', in every step
        ratios = [float(row["cost_ratio"]) for row in csv.DictReader(file)]
    assert ratios == pytest.approx([0.78] * 3, rel=0.01)
    # 10 images of two captions; the missing one and the damaged one have no rows
    assert len(read_json(run / "assignments.json")["train"]) == 16
    assert "1 unreadable image skipped" in outputs["train.py"]
    with Image.open(run / "samples" / "a-giraffe-0.png") as image:
        assert image.size == (pixels, pixels)
    rows = read_json(run / "report" / "metrics.json")["rows"]
    scores = {(row["method"], row["split"]): row for row in rows}
    assert scores["aptp", "validation"]["frechet"] > 0 and "r1" not in scores["aptp", "validation"]
    assert (run / "report" / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--target", "imagenet"), ("imagenet", "emoji")),
        (("--teacher", "dalle"), ("dalle", "pocket")),
        (("--budget", "0.05"), ("0.05", "left")),
        (("--device", "warp"), ("warp", "cpu")),
        (("--target", "coco"), ("--data-dir", "targets coco --download", "emoji needs nothing")),
        (("--target", "coco", "--data-dir", "gone"), ("gone", "--download", "emoji")),
        (("--resolution", "60"), ("60",)),
        (("--prompt-encoder", "gone/encoder"), ("gone/encoder", "minilm")),
    ],
)
def test_what_is_missing_is_said_in_one_line(place, here, arguments, words):
    code, _, errors = here("train.py", "--device", "cpu", "--out", place / "none", *arguments)
    lines = errors.strip().splitlines()
    assert code == 2 and len(lines) == 1, errors
    assert all(word in lines[0] for word in words), lines[0]
    assert not (place / "none").exists()


def test_that_the_teacher_is_missing_is_said_in_one_line(place, here):
    """The last of them to be found, after the data."""
    test_what_is_missing_is_said_in_one_line(
        place,
        here,
        ("--target", "coco", "--data-dir", place / "coco"),
        ("sd2-community", "hf download"),
    )


def test_the_plan_of_a_preset_needs_neither_weights_nor_data(here):
    code, output, errors = here("train.py", "--preset", "coco-base", "--dry-run")
    assert code == 0, errors
    # 3 forwards x 1024 images x steps x 90.55 GMACs, and 2 x that / 125 TFLOP/s
    preset = PRESETS["coco-base"]
    steps = preset.warmup_steps + preset.joint_steps
    macs = 3 * 1024 * steps * 90.552e9
    assert f"{macs / 1e15:.1f} P in all" in output
    assert f"{2 * macs / 125e12 / 3600:.1f} hours" in output
    assert "41.3 hours" in output and "8 experts" in output
    # 82,783 latents of 4 x 32 x 32 float32, 414,113 text states of 77 x 1024 float32
    assert "82,783 images" in output and "1.26 GiB of latents" in output
    assert f"{414113 * 77 * 1024 * 4 / 2**30:.3g} GiB a process" in output
    assert "136.4 G MACs an image" in output and "22.6 G, once" in output
    code, output, errors = here("train.py", "--preset", "coco-as-printed", "--dry-run")
    assert code == 0, errors
    assert "500 + 2500 steps" in output and "834.5 P in all" in output


def test_the_plan_of_sdxl_counts_the_budget_at_its_own_size(here):
    code, output, errors = here("train.py", "--preset", "coco-sdxl", "--dry-run")
    assert code == 0, errors
    assert "2567.5 M parameters" in output and "untested at full size" in output
    assert "G MACs at 1024 px" in output and "steps at 512 px" in output
