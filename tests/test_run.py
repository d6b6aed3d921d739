"""Runs: what a method is given, and the folder that it leaves."""

import copy
import dataclasses
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import ROWS
from diffusers import PNDMScheduler
from safetensors.torch import load_file, save_file
from small_data import make_coco, make_folder
from small_pipelines import add_half_precision

import run
import train
from common.errors import UserError
from common.files import load_tensors, read_json, save_tensors, write_json
from macs import meet_budget
from settings import resolve
from targets.images import load_target
from teacher.model import load_teacher

B = 6  # rows a batch


# ---- noised rows ----


# ---- results ----


def test_a_routers_codes_are_written_as_they_meet_the_budget(setup_of, smallest, tmp_path):
    setup = setup_of(smallest, out=tmp_path)
    captions = SimpleNamespace(captions=["a giraffe"] * ROWS)
    encoder = Mock(return_value=setup.z)
    encoder.name = "none"
    setup = dataclasses.replace(setup, data=captions, validation=captions, encoder=encoder)
    router = setup.start_router()
    router.start_codes(setup.z)
    run.write_results(setup, router, {})
    codes = load_tensors(tmp_path / "codes.safetensors")[0]["codes"].float()
    shares = torch.bincount(router.route(setup.z), minlength=len(codes)) / ROWS
    expected = meet_budget(router.codes, shares, setup.macs, setup.cfg.budget)
    assert torch.equal(codes, expected)


# ---- a run's target ----


def test_a_run_whose_rows_have_changed_is_refused_in_one_line():
    settings = {"target": "emoji", "seed": 0, "limit": 12, "data_dir": None}
    assigned = {"train": [0] * 12}
    assert len(run.load_split(Path("run"), settings, assigned, "train", 64)) == 12
    assigned["train"].append(1)
    with pytest.raises(UserError, match=r"emoji: 12 rows; .* 13 rows of train.*train\.py"):
        run.load_split(Path("run"), settings, assigned, "train", 64)


def reverse(lines: list[str]) -> list[str]:
    return lines[::-1]


def caption(lines: list[str]) -> list[str]:
    return [line.replace("picture 3", "picture 4") for line in lines]


def rename(lines: list[str]) -> list[str]:
    return [line.replace("3.jpg", "30.jpg") for line in lines]


@pytest.mark.parametrize("change", [reverse, caption, rename])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_rows_of_another_order_caption_or_name_are_refused(tmp_path, split, change):
    """Their number is the same; files that were only copied or moved are no change."""
    rows = [(f"{split}/{k}.jpg", f"picture {k}") for k in range(5)]
    make_folder(tmp_path / "a", [*rows, ("train/9.jpg", "x"), ("validation/8.jpg", "y")])
    settings = {"target": str(tmp_path / "a"), "seed": 0, "limit": None, "data_dir": None}
    hashes = {split: load_target(settings["target"], split).identity(states=False)}
    assigned = {split: [0] * 6, "data": hashes}
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    settings["target"] = str(tmp_path / "b")
    assert len(run.load_split(Path("run"), settings, assigned, split, 64)) == 6
    path = tmp_path / "b" / "metadata.jsonl"
    path.write_text("\n".join(change(path.read_text().splitlines())))
    shutil.copyfile(tmp_path / "a" / split / "3.jpg", tmp_path / "b" / split / "30.jpg")
    with pytest.raises(UserError, match=rf"6 rows of {split} .* not those of the run.*train\.py"):
        run.load_split(Path("run"), settings, assigned, split, 64)


@pytest.mark.parametrize("target", ["coco", "folder"])
def test_a_target_that_was_moved_is_found_where_it_is_said_to_be(tmp_path, monkeypatch, target):
    """A run made with relative paths knows them from another working directory, too."""
    monkeypatch.chdir(tmp_path)
    make_coco(Path("data"))
    make_folder(Path("data"), [("train/1.jpg", "a"), ("validation/2.jpg", "b")])
    named = "coco" if target == "coco" else "data"
    cfg = resolve(run.Pruning(target=named, data_dir=Path("data"), out=Path("out")))
    settings, assigned = run.as_json(cfg), {"validation": [0] * (6 if target == "coco" else 1)}
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")

    def load(now: Path | None = None) -> list[str]:
        return run.load_split(Path("r"), settings, assigned, "validation", 64, now).captions

    found = load()
    (tmp_path / "data").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"data.*r/config\.json names it; --data-dir says where"):
        load()
    assert load(Path("..") / "moved") == found
    with pytest.raises(UserError, match="gone") as refused:
        load(Path("gone"))
    assert "config.json" not in str(refused.value)


def test_a_stopped_training_does_not_go_on_with_other_rows(setup_of, smallest, tmp_path):
    setup = setup_of(smallest, out=tmp_path, importance_start=False)
    setup = dataclasses.replace(setup, identities={"train": "these"})
    train.optimise(setup)
    train.optimise(setup)
    with pytest.raises(UserError, match=r"data: these, now those"):
        train.optimise(dataclasses.replace(setup, identities={"train": "those"}))
    pipe = copy.copy(setup.teacher.pipe)
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, beta_end=0.03)
    with pytest.raises(UserError, match=r"teacher: \w+, now \w+"):
        train.optimise(
            dataclasses.replace(setup, teacher=dataclasses.replace(setup.teacher, pipe=pipe))
        )


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """A folder whose teacher a run was pruned on, and the run."""
    folder = tmp_path_factory.mktemp("teachers")
    load_teacher("pocket").pipe.save_pretrained(folder / "own")
    write_json(folder / "own" / "teacher.json", {"guidance_scale": 2.0, "resolution": 64})
    teacher = load_teacher(str(folder / "own"))
    summary = {"teacher": teacher.name, "teacher_hash": teacher.identity}
    write_json(folder / "run" / "summary.json", summary)
    return folder


def change_json(path: Path, **values) -> None:
    write_json(path, read_json(path) | values)


def change_weights(path: Path) -> None:
    weights = load_file(path)
    next(iter(weights.values())).view(-1)[0] += 0.01
    save_file(weights, path, {"format": "pt"})


SCHEDULER = Path("scheduler") / "scheduler_config.json"
U_NET = Path("unet") / "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("file", "change"),
    [
        (U_NET, change_weights),
        (SCHEDULER, partial(change_json, beta_end=0.03)),
        (SCHEDULER, partial(change_json, prediction_type="epsilon")),
    ],
)
def test_a_teacher_that_has_changed_is_refused_in_one_line(teachers, tmp_path, file, change):
    """In each of its places; the codes are of the one that was pruned."""
    shutil.copytree(teachers / "own", tmp_path / "own")
    here = teachers / "run", str(tmp_path / "own"), torch.device("cpu")
    assert run.load_run_teacher(*here).name == str(tmp_path / "own")
    change(tmp_path / "own" / file)
    words = r"own is not the teacher of .*run any more.*train\.py"
    with pytest.raises(UserError, match=words) as refused:
        run.load_run_teacher(*here)
    assert "\n" not in str(refused.value)


def test_a_teacher_is_the_same_in_each_precision_and_another_guidance(teachers, tmp_path):
    """So are its published files in fp16; guidance and size mean other images alone."""
    shutil.copytree(teachers / "own", tmp_path / "own")
    here = teachers / "run", str(tmp_path / "own"), torch.device("cpu")
    assert run.load_run_teacher(*here, precision="bf16").dtype == torch.bfloat16
    change_json(tmp_path / "own" / "teacher.json", guidance_scale=3.0)
    assert run.load_run_teacher(*here).guidance_scale == 3
    add_half_precision(tmp_path / "own")
    (tmp_path / "own" / U_NET).unlink()
    assert run.load_run_teacher(*here).dtype == torch.float32


def test_a_router_of_another_version_is_refused_in_one_line(setup_of, smallest, tmp_path):
    router = setup_of(smallest).start_router()
    meta = {**router.settings(), "prompt_encoder": "none"}
    path = tmp_path / "router.safetensors"
    save_tensors(path, router.state_dict(), meta)
    again, encoder = run.load_router(tmp_path, torch.device("cpu"))
    assert torch.equal(again.codes, router.codes) and encoder == "none"
    older = {name: t for name, t in router.state_dict().items() if name != "codes"}
    for tensors, settings in ((older, meta), (router.state_dict(), meta | {"shared": True})):
        save_tensors(path, tensors, settings)
        with pytest.raises(UserError, match=r"another version.*train\.py"):
            run.load_router(tmp_path, torch.device("cpu"))


def test_fewer_prompts_than_experts_are_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(run, "load_teacher", Mock(side_effect=AssertionError))
    with pytest.raises(UserError, match=r"5 training prompts.*--num-experts"):
        run.prepare(run.Pruning(limit=5))
