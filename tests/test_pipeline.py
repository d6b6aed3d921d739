"""The three stages on the embedded default, end to end.

Train, fine-tune, sample; stopped and resumed; asked for nonsense.
"""

import dataclasses
import json
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from small_data import make_coco, make_folder

import evaluate
import finetune
import sample
import train
from common.errors import UserError, command_line
from common.files import load_tensors, read_json, save_tensors, write_json
from macs import measure_macs, module_macs
from prune_unet import example_inputs, find_units, load_expert
from run import Setup, prepare
from settings import Finetuning, Pruning, resolve
from targets.images import load_target
from teacher.model import PRECISIONS, load_teacher

SMALL = Pruning(
    budget=0.7,
    num_experts=3,
    warmup_steps=2,
    joint_steps=3,
    batch_size=6,
    limit=48,
    save_minutes=0,
    device="cpu",
)
FILES = ("router.safetensors", "codes.safetensors", "assignments.json")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of five training steps and of five fine-tuning steps for expert 1."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    train.train(dataclasses.replace(SMALL, out=folder))
    finetune.finetune(
        Finetuning(run=folder, expert=1, refit_images=16, steps=5, batch_size=4, device="cpu")
    )
    return folder


def copy_run(run: Path, folder: Path) -> None:
    for name in (*FILES, "summary.json", "config.json"):
        (folder / name).write_bytes((run / name).read_bytes())


def test_summary_has_what_others_rely_on(run):
    summary = read_json(run / "summary.json")
    assert summary["target"] == "emoji" and summary["teacher"] == "pocket"
    assert summary["budget"] == 0.7 and summary["num_experts"] == 3
    for split in ("train", "validation"):
        assert len(summary[f"usage_{split}"]) == 3
        assert sum(summary[f"usage_{split}"]) == pytest.approx(1, abs=1e-5)
    assert set(summary["seconds"]) == {"encode", "importance", "warmup", "joint"}
    assert [expert["id"] for expert in summary["experts"]] == [0, 1, 2]


def test_mean_macs_over_training_prompts_meet_the_budget(run):
    summary, teacher = read_json(run / "summary.json"), load_teacher("pocket")
    space = find_units(teacher.unet, SMALL.depth)
    macs = measure_macs(teacher.unet, space, latent_size=8, text_tokens=teacher.text_tokens)
    assert summary["units"] == space.size and summary["macs_dense"] == macs.dense
    ratios = macs(finetune.load_codes(run, space)) / macs.dense
    assignment = torch.tensor(read_json(run / "assignments.json")["train"])
    mean = ratios[assignment].mean().item()
    assert 0.7 * 0.99 <= mean <= 0.7 + 1e-6
    assert summary["macs_ratio_mean"] == pytest.approx(mean, abs=1e-6)
    assert [e["macs_ratio"] for e in summary["experts"]] == pytest.approx(ratios.tolist())


def test_assignments_say_which_rows_they_are_of(run):
    assigned = read_json(run / "assignments.json")
    for split, limit in (("train", SMALL.limit), ("validation", None)):
        rows = load_target("emoji", split, limit=limit)
        assert len(assigned[split]) == len(rows)
        assert assigned["data"][split] == rows.identity(states=False)


def test_metrics_have_one_row_a_step(run):
    rows = np.genfromtxt(run / "metrics.csv", delimiter=",", names=True)
    assert rows["step"].tolist() == [0, 1, 2, 3, 4]
    assert all(np.isfinite(rows[name]).all() for name in train.TERMS)
    assert np.allclose(rows["cost_ratio"], SMALL.budget, rtol=0.01)
    assert not (run / "checkpoint.safetensors").exists()


def test_only_experts_of_their_own_files_stay_in_memory(run, monkeypatch):
    """The others are cut out of weights that are there anyway, for each group of prompts."""
    pipeline = sample.APTPPipeline.from_pretrained(run)
    read, load = [], sample.load_expert
    monkeypatch.setattr(
        sample, "load_expert", lambda path, *args: read.append(path.stem) or load(path, *args)
    )
    experts = [0, 1, 2, -1, 1, 0]
    for _ in range(2):
        pipeline(["a"] * 6, expert=experts, num_inference_steps=2, batch_size=2)
    assert set(pipeline.experts) == {-1, 1} and read == ["1"]
    assert pipeline.unet(1) is pipeline.unet(1) and pipeline.unet(0) is not pipeline.unet(0)


# ---- the budget while training ----


@pytest.fixture(scope="module", params=["emoji", "coco"])
def setup(request, tmp_path_factory):
    """Some rows of a target, and the pocket teacher."""
    out = tmp_path_factory.mktemp(request.param)
    cfg = dataclasses.replace(SMALL, out=out, warmup_steps=1, joint_steps=2, lr_warmup=0)
    if request.param == "coco":
        make_coco(out / "coco")
        here = {"data_dir": out / "coco", "teacher": "pocket", "prompt_encoder": "minilm"}
        cfg = dataclasses.replace(cfg, target="coco", micro_batch=4, lr=0.05, **here)
    return prepare(resolve(cfg))


def metrics_of(setup: Setup, out: Path, **settings) -> np.ndarray:
    """The metrics of a training with other settings."""
    out.mkdir()
    cfg = dataclasses.replace(setup.cfg, out=out, **settings)
    train.optimise(dataclasses.replace(setup, cfg=cfg))
    return np.genfromtxt(out / "metrics.csv", delimiter=",", names=True)


@pytest.mark.parametrize("budget", [0.35, 0.9])
def test_soft_gates_cost_the_budget_in_every_step(setup, tmp_path, budget):
    """In warm-up and joint phase, with steps so large that logits move far between them."""
    rows = metrics_of(setup, tmp_path / "run", budget=budget, lr=0.5)
    assert len(rows) == 3
    assert np.allclose(rows["cost_ratio"], budget, rtol=0.01)


@pytest.mark.parametrize(("captions", "experts"), [(["a dog"], 1), (["a dog"] * 4, 2)])
def test_targets_of_one_prompt_or_equal_ones(tmp_path, captions, experts):
    rows = [*((f"train/{k}.jpg", text) for k, text in enumerate(captions)), ("test/9.jpg", "x")]
    make_folder(tmp_path / "data", rows)
    here = {"target": str(tmp_path / "data"), "out": tmp_path / "run", "limit": None}
    cfg = dataclasses.replace(SMALL, num_experts=experts, warmup_steps=1, joint_steps=1, **here)
    summary = train.train(cfg)
    assert summary["macs_ratio_mean"] == pytest.approx(0.7, rel=0.01)
    finetune.finetune(Finetuning(run=cfg.out, refit_images=4, steps=1, batch_size=2, device="cpu"))
    assert len(list((cfg.out / "experts").glob("*.safetensors"))) == experts


# ---- what comes of it ----


def test_a_finetuned_expert_is_the_cut_network_trained(run):
    expert, meta = load_expert(finetune.expert_path(run, 1))
    summary = read_json(run / "summary.json")
    assert meta["expert"] == 1 and meta["settings"]["steps"] == 5
    assert sum(p.numel() for p in expert.parameters()) == summary["experts"][1]["params"]
    teacher = load_teacher("pocket")
    inputs = example_inputs(teacher.unet, 8, teacher.text_tokens, "cpu")
    ratio = module_macs(expert, inputs)[""] / module_macs(teacher.unet, inputs)[""]
    assert ratio == pytest.approx(summary["experts"][1]["macs_ratio"])
    weight = teacher.unet.conv_in.weight
    assert (
        0 < (expert.conv_in.weight - weight).abs().max() < 0.01
    )  # five steps away from the teacher's


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_expert_is_tuned_on_its_own_prompts_from_the_teachers_own_weights(
    run, tmp_path, monkeypatch, precision
):
    """The prompts that routing sends to it; float32 weights, whatever the precision."""
    folder, given, encoded = tmp_path / "run", {}, []
    folder.mkdir()
    copy_run(run, folder)

    def finetune_expert(task, i):
        given[i] = {"rows": task.rows_of(i), "code": task.codes[i], **vars(task)}

    monkeypatch.setattr(finetune, "finetune_expert", finetune_expert)
    monkeypatch.setattr(finetune, "first_and_last", lambda *_: (1.0, 1.0))
    monkeypatch.setattr(finetune, "encode_target", lambda teacher, data: encoded.append(data))
    finetune.finetune(Finetuning(run=folder, steps=5, precision=precision, device="cpu"))
    captions, pipeline = encoded[0].captions, sample.APTPPipeline.from_pretrained(run, "cpu")
    own = {i: [captions[row] for row in options["rows"]] for i, options in given.items()}
    assert sorted(caption for rows in own.values() for caption in rows) == sorted(captions)
    for i, prompts in own.items():
        assert set(pipeline.route(prompts)) == {i}
    weights = load_teacher("pocket").unet.state_dict()
    codes = load_tensors(run / "codes.safetensors")[0]["codes"]
    for i, options in given.items():
        assert torch.equal(options["code"], codes[i].float())
        assert options["teacher"].dtype == PRECISIONS[precision]
        for name, weight in options["dense"].state_dict().items():
            assert weight.dtype == torch.float32 and torch.equal(weight, weights[name])


def test_finished_work_is_not_done_again(run, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    train.train(dataclasses.replace(SMALL, out=run))
    finetune.finetune(
        Finetuning(run=run, expert=1, refit_images=16, steps=5, batch_size=4, device="cpu")
    )
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert "complete" in capsys.readouterr().out


def test_processes_share_out_the_experts(run, tmp_path, monkeypatch):
    """Each takes every second expert, and makes it as one process does."""
    folder, made = tmp_path / "run", []
    folder.mkdir()
    copy_run(run, folder)
    monkeypatch.setattr(finetune, "start_processes", lambda device: device)
    monkeypatch.setattr(finetune, "is_finished", lambda *_: False)  # as when all start together
    monkeypatch.setenv("WORLD_SIZE", "2")
    for number in (1, 0):
        monkeypatch.setenv("RANK", str(number))
        before = set(folder.glob("experts/*.safetensors"))
        finetune.finetune(
            Finetuning(run=folder, refit_images=16, steps=5, batch_size=4, device="cpu")
        )
        made.append({p.name for p in set(folder.glob("experts/*.safetensors")) - before})
    assert made == [{"1.safetensors"}, {"0.safetensors", "2.safetensors"}]
    assert finetune.expert_path(folder, 1).read_bytes() == (
        finetune.expert_path(run, 1).read_bytes()
    )


def test_processes_beyond_the_experts_say_so(run, monkeypatch, capsys):
    """Of three experts one is done: the third of three processes has none, the others one each."""
    made = []
    monkeypatch.setattr(finetune, "prepare", lambda *_: Mock(experts=torch.zeros(3)))
    monkeypatch.setattr(finetune, "is_finished", lambda path, *_: path.stem == "1")
    monkeypatch.setattr(finetune, "finetune_expert", lambda _, i: made.append(i))
    monkeypatch.setattr(finetune, "first_and_last", lambda *_: (1.0, 1.0))
    monkeypatch.setenv("WORLD_SIZE", "3")
    for number in range(3):
        monkeypatch.setenv("RANK", str(number))
        finetune.finetune(Finetuning(run=run, device="cpu"))
    assert made == [0, 2]
    assert "process 2 has no expert: 2 for 3 processes" in capsys.readouterr().out


def test_sampling_is_routed_grouped_and_repeatable(run, tmp_path):
    pipeline = sample.APTPPipeline.from_pretrained(run, "cpu")
    prompts = ["a giraffe", "a red apple", "a bus", "the japan flag"]
    drawn = pipeline(prompts, num_inference_steps=3)
    assert [image.size for image in drawn.images] == [(64, 64)] * 4
    assert drawn.experts == pipeline.route(prompts)
    assert drawn.macs_ratios == [pipeline.ratios[i] for i in drawn.experts]
    alone = pipeline(prompts[2:3], seeds=[2], num_inference_steps=3)
    difference = np.asarray(alone.images[0]).astype(int) - np.asarray(drawn.images[2])
    assert np.abs(difference).max() <= 1
    teacher = pipeline(prompts[:1], expert=-1, num_inference_steps=3)
    assert teacher.experts == [-1] and teacher.macs_ratios == [1.0]


def test_the_command_line_draws_files(run, tmp_path, capsys):
    cfg = sample.Config(
        prompts=("a giraffe",),
        run=run,
        out=tmp_path,
        num_images=2,
        steps=2,
        compare=True,
        device="cpu",
    )
    drawn = sample.sample(cfg)
    with (
        Image.open(tmp_path / "a-giraffe-0.png") as first,
        Image.open(tmp_path / "a-giraffe-1.png") as second,
    ):
        assert first.size == second.size == (64, 64)
        assert np.array_equal(np.asarray(first), np.asarray(drawn.images[0]))
        assert not np.array_equal(np.asarray(first), np.asarray(second))
    assert (tmp_path / "comparison.png").exists()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "a-giraffe-0.png" in lines[0] and "MACs ratio" in lines[0]


def test_processes_share_out_the_prompts_of_a_file(run, tmp_path, monkeypatch):
    """Three for the first and two for the second, the images of one process."""
    prompts = ("a giraffe", "a red apple", "a bus", "the japan flag", "a key")
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    cfg = sample.Config(run=run, prompts_file=tmp_path / "prompts.txt", steps=2, device="cpu")
    sample.sample(dataclasses.replace(cfg, out=tmp_path / "one"))
    monkeypatch.setattr(sample, "start_processes", lambda device: device)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for number, own in ((1, prompts[1::2]), (0, prompts[::2])):
        monkeypatch.setenv("RANK", str(number))
        assert sample.sample(dataclasses.replace(cfg, out=tmp_path / "two")).prompts == [*own]
    for path in (tmp_path / "one").iterdir():
        pixels = [
            np.asarray(Image.open(made)).astype(int)
            for made in (path, tmp_path / "two" / path.name)
        ]
        assert np.abs(pixels[0] - pixels[1]).max() <= 1
    with pytest.raises(UserError, match="one sheet"):
        sample.sample(dataclasses.replace(cfg, compare=True))


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """Call a script's main with arguments.

    It must print one line that holds the given words and exit with 2.
    """

    def call(module: ModuleType, arguments: list[str], *words: str) -> None:
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *arguments])
        with pytest.raises(SystemExit) as stopped:
            command_line(module.main)
        lines = capsys.readouterr().err.strip().splitlines()
        assert stopped.value.code == 2 and len(lines) == 1, lines
        assert lines[0].startswith("error: ") and all(word in lines[0] for word in words), lines[0]

    return call


def test_sample_refuses_nonsense_in_one_line(run, refused, monkeypatch, tmp_path):
    of_run = ["--run", str(run)]
    refused(sample, ["  ", *of_run], "empty")
    refused(sample, of_run, "prompt")
    (tmp_path / "none.txt").write_text("\n \n")
    refused(sample, ["--prompts-file", str(tmp_path / "none.txt"), *of_run], "none.txt")
    refused(sample, ["a giraffe", "--run", str(tmp_path / "nowhere")], "nowhere")
    refused(sample, ["a giraffe", "--expert", "7", *of_run], "7", "0 to 2")
    refused(sample, ["a giraffe", "--expert", "1", "--teacher-only", *of_run], "exclude")
    monkeypatch.chdir(tmp_path)
    refused(sample, ["a giraffe"], "train.py")
    refused(finetune, [], "train.py")


def test_an_incomplete_or_foreign_run_is_refused(run, refused, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    arguments = ["a giraffe", "--run", str(folder), "--device", "cpu"]
    refused(sample, arguments, "summary.json")
    copy_run(run, folder)
    (folder / "router.safetensors").write_bytes((run / "router.safetensors").read_bytes()[:-9])
    refused(sample, arguments, "router.safetensors", "damaged")
    copy_run(run, folder)
    save_tensors(
        folder / "codes.safetensors",
        {"codes": torch.ones(3, 1620, dtype=torch.uint8)},
        {"depth": "paper"},
    )
    refused(sample, arguments, "1620", "another teacher")
    summary = read_json(run / "summary.json")
    write_json(folder / "summary.json", summary | {"teacher": "dalle"})
    refused(sample, arguments, "dalle", f"{folder / 'summary.json'} names it; --teacher says where")
    tuning = ["--run", str(folder), "--device", "cpu"]
    refused(finetune, tuning, "dalle", f"{folder / 'summary.json'} names it; --teacher says where")
    refused(evaluate, tuning, "dalle", f"{folder / 'summary.json'} names it; --teacher says where")
    refused(sample, [*arguments, "--teacher", "gone/sd"], "error: --teacher gone/sd is no folder")
    copy_run(run, folder)
    tensors, meta = load_tensors(run / "router.safetensors")
    save_tensors(folder / "router.safetensors", tensors, meta | {"prompt_encoder": "gone/it"})
    refused(sample, arguments, "gone/it", "router.safetensors names it; --prompt-encoder says")
    del summary["teacher"]
    write_json(folder / "summary.json", summary)
    refused(sample, arguments, "summary.json", "teacher")
    refused(finetune, ["--run", str(folder)], "summary.json", "teacher")


def test_a_teacher_that_was_moved_is_found_where_it_is_said_to_be(run, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    copy_run(run, folder)
    summary = read_json(run / "summary.json")
    write_json(folder / "summary.json", summary | {"teacher": str(tmp_path / "gone")})
    load_teacher("pocket").pipe.save_pretrained(tmp_path / "here")
    now = {"run": folder, "teacher": str(tmp_path / "here"), "device": "cpu"}
    finetune.finetune(Finetuning(expert=1, refit=False, steps=1, batch_size=2, **now))
    made = sample.sample(sample.Config(prompts=("a giraffe",), expert=1, steps=2, **now))
    assert made.images[0].size == (64, 64)


def test_experts_of_another_run_are_refused(run, refused, tmp_path):
    """Copied to a run of other codes, which has a like number of them."""
    folder = tmp_path / "run"
    (folder / "experts").mkdir(parents=True)
    copy_run(run, folder)
    path = finetune.expert_path(folder, 1)
    path.write_bytes(finetune.expert_path(run, 1).read_bytes())
    arguments = ["--run", str(folder), "--device", "cpu", "--expert", "1"]
    tensors, meta = load_tensors(run / "codes.safetensors")
    save_tensors(folder / "codes.safetensors", {"codes": tensors["codes"].roll(1, 0)}, meta)
    words = (str(path), "not an expert of this run", "finetune.py")
    refused(sample, ["a giraffe", "--steps", "2", *arguments], *words)
    refused(finetune, [*arguments, "--steps", "5", "--batch-size", "4"], *words)


def test_an_expert_that_was_trained_on_other_prompts_is_refused(run, tmp_path):
    """One of the others' prompts goes to it now."""
    folder = tmp_path / "run"
    (folder / "experts").mkdir(parents=True)
    copy_run(run, folder)
    path = finetune.expert_path(folder, 1)
    path.write_bytes(finetune.expert_path(run, 1).read_bytes())
    cfg = {"refit_images": 16, "steps": 5, "batch_size": 4, "device": "cpu"}
    finetune.finetune(Finetuning(run=folder, expert=1, **cfg))
    assigned = read_json(folder / "assignments.json")
    other = next(row for row, i in enumerate(assigned["train"]) if i != 1)
    assigned["train"][other] = 1
    write_json(folder / "assignments.json", assigned)
    with pytest.raises(UserError, match=r"1\.safetensors was trained on other prompts.*delete it"):
        finetune.finetune(Finetuning(run=folder, expert=1, **cfg))


def test_other_settings_do_not_overwrite_a_run(run):
    before = (run / "summary.json").read_bytes()
    with pytest.raises(UserError, match=r"budget: 0\.7, now 0\.6"):
        train.train(dataclasses.replace(SMALL, out=run, budget=0.6))
    with pytest.raises(UserError, match="steps: 5, now 6"):
        finetune.finetune(
            Finetuning(run=run, expert=1, refit_images=16, steps=6, batch_size=4, device="cpu")
        )
    with pytest.raises(UserError, match="expert 9"):
        finetune.finetune(Finetuning(run=run, expert=9, device="cpu"))
    assert (run / "summary.json").read_bytes() == before
    assert json.loads(before)["budget"] == 0.7
