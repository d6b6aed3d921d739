"""Scoring one run: small runs end to end, images on disk, tables against hand-made numbers."""

import dataclasses
import math
import shutil
import statistics
from collections import Counter
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import small_processes
import torch
from PIL import Image
from small_data import make_folder

import evaluate
import finetune
import run as run_module
import train
from common.errors import UserError
from common.files import read_json, write_json
from common.randomness import batch_rows
from evaluate import retained
from evaluation import figures, generated, tables
from evaluation.extractors import Extractor
from evaluation.grids import DPI
from gates import binarize
from macs import measure_macs, module_macs
from prune_unet import cut_expert, example_inputs, find_units, meta_copy
from router import PromptEncoder, PromptRouter
from sample import APTPPipeline, Sampled, comparison
from settings import Finetuning, Pruning

SMALL = evaluate.Config(images=4, steps=2, device="cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two experts, two steps long."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    cfg = Pruning(
        budget=0.7, num_experts=2, warmup_steps=1, joint_steps=1, batch_size=4, limit=24, out=folder
    )
    train.train(dataclasses.replace(cfg, device="cpu"))
    return folder


def cells_of(text: str) -> list[list[str]]:
    """The rows of a Markdown table, without the line below its head."""
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows if set("".join(row)) - set("-: ")]


@pytest.fixture(scope="module")
def scored(run):
    """Its scores; four images are generated as batches of three and of one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "DISTANCE_ROWS", 8)
        return evaluate.score(dataclasses.replace(SMALL, exchanged=True, batch_size=3), run)


def test_a_run_with_experts_is_scored_and_reported(run, scored):
    assert scored == read_json(run / "report" / "metrics.json")
    rows = {(row["method"], row["split"]): row for row in scored["rows"]}
    assert {method for method, _ in rows} == {"aptp", "aptp-exchanged", "dense", "autoencoder"}
    for split in ("train", "validation"):
        assert rows["dense", split]["macs_ratio"] == 1
        assert rows["aptp", split]["macs_ratio"] < 1 and rows["aptp", split]["images"] == 4
        ratios = [expert["macs_ratio"] for expert in read_json(run / "summary.json")["experts"]]
        both = [rows[name, split]["macs_ratio"] for name in ("aptp", "aptp-exchanged")]
        assert sum(both) == pytest.approx(sum(ratios))  # with two experts, the wrong is the other
        assert rows["autoencoder", split]["frechet"] >= 0
        assert len(rows["aptp", split]["captions"]["distance"]) == 8
        assert [len(row["captions"]["r1"]) for key, row in rows.items() if key[1] == split] == [
            4
        ] * 4
    labels = [(entry["split"], entry["label"]) for entry in scored["nmi"]]
    assert labels == [(x, y) for x in ("train", "validation") for y in ("group", "style")]
    assert (run / "report" / "report.html").exists()
    assert len(list((run / "report").glob("*.png"))) >= 6


EVALUATE = """
import os, sys
from pathlib import Path
import evaluate

os.environ["RANK"] = "0" if os.fork() else "1"  # libraries are loaded once
evaluate.DISTANCE_ROWS = 8
evaluate.write_report = lambda run, inputs: run
evaluate.shown_to_each = lambda *_: ()
how = {"images": 4, "steps": 2, "batch_size": 3, "device": "cpu"}
evaluate.evaluate(evaluate.Config(run=Path(sys.argv[1]), **how))
"""


def test_two_processes_score_as_one_does(run, scored, tmp_path):
    """The first says so, and the second nothing."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("report"))
    said, errors = small_processes.start(EVALUATE, folder, several=False)[0].communicate(
        timeout=300
    )
    assert said.count("wrote ") == said.count("### Scores") == 1, errors
    images = sorted((folder / "report" / "images").rglob("*.png"))
    assert len(images) == 2 * 2 * 4
    for path in images:
        pixels = [
            np.asarray(Image.open(made)).astype(int)
            for made in (path, run / path.relative_to(folder))
        ]
        assert np.abs(pixels[0] - pixels[1]).max() <= 1, path
    found = read_json(folder / "report" / "metrics.json")
    assert found["nmi"] == scored["nmi"]
    rows = [row for row in scored["rows"] if row["method"] != "aptp-exchanged"]
    for one, two in zip(rows, found["rows"], strict=True):
        assert set(one) == set(two)
        for name in set(one) - {"seconds", "captions"}:
            assert one[name] == two[name] or one[name] == pytest.approx(two[name], rel=1e-3), name


def test_another_expert_means_other_images(run):
    pipeline, sampling = APTPPipeline.from_pretrained(run, "cpu"), SMALL.sampling()

    def folder(expert: int | None, sampling=sampling) -> str:
        return generated.folder_name("train", "who", sampling, pipeline.fingerprint(expert))

    routed, teacher = folder(None), folder(-1)
    assert routed == folder(None) != teacher
    finetune.finetune(Finetuning(run=run, refit_images=16, steps=1, batch_size=4, device="cpu"))
    assert folder(None) != routed and folder(-1) == teacher
    for change in ({"seed": 1}, {"steps": 3}, {"guidance": 1.5}):
        assert folder(-1, dataclasses.replace(sampling, **change)) != teacher
    routed = folder(None)
    next(pipeline.teacher.pipe.vae.parameters()).data.add_(0.01)  # another teacher of that name
    assert folder(-1) != teacher and folder(None) != routed


@pytest.mark.parametrize("change", ["guidance", "scheduler", "size"])
def test_a_teacher_that_samples_in_another_way_means_other_images(run, change):
    pipeline = APTPPipeline.from_pretrained(run, "cpu")
    before = [pipeline.fingerprint(expert) for expert in (None, -1)]
    assert before == [pipeline.fingerprint(expert) for expert in (None, -1)]
    if change == "scheduler":
        pipeline.teacher.pipe.scheduler.register_to_config(beta_end=0.02)
    else:
        options = {"guidance": {"guidance_scale": 3.0}, "size": {"pixels": 32}}[change]
        pipeline.teacher = dataclasses.replace(pipeline.teacher, **options)
    assert not {*map(tuple, before)} & {tuple(pipeline.fingerprint(i)) for i in (None, -1)}


def test_free_prompts_get_a_pickscore_of_their_own(run, tmp_path, monkeypatch):
    """With a stand-in network: brightness of the image against length of the prompt."""

    def look(images: torch.Tensor) -> torch.Tensor:
        return torch.stack([images.mean((1, 2, 3)) + 2, torch.ones(len(images))], dim=1)

    def read(captions: list[str]) -> torch.Tensor:
        return torch.tensor([[1.0, len(caption)] for caption in captions])

    stand_in = Extractor("x", torch.device("cpu"), lambda images: images, look, read, scale=10.0)
    monkeypatch.setattr(evaluate, "load_extractor", lambda name, device: stand_in)
    (tmp_path / "prompts.txt").write_text("a giraffe\na long red bus\n", encoding="utf-8")
    pipeline = APTPPipeline.from_pretrained(run, "cpu")
    cfg = dataclasses.replace(SMALL, metrics="paper", prompts_file=tmp_path / "prompts.txt")
    made = evaluate.free_prompts(pipeline, "aptp", cfg)
    own, dense = evaluate.prompt_scores(pipeline, made, cfg.prompts_file)
    assert (own["method"], dense["method"]) == ("aptp", "dense")
    assert own["images"] == 2 and own["split"] == "prompts" and dense["macs_ratio"] == 1
    folder = next((pipeline.run / "report" / "images").glob("prompts-routed-*"))
    scores = []
    for row, prompt in enumerate(("a giraffe", "a long red bus")):
        with Image.open(folder / f"{row:06d}.png") as image:
            bright = np.asarray(image).mean() / 127.5 - 1 + 2
        dot = bright + len(prompt)
        scores.append(10 * dot / math.hypot(bright, 1) / math.hypot(1, len(prompt)))
    assert own["pick_score"] == pytest.approx(statistics.fmean(scores), rel=1e-4)


def test_a_stopped_generation_goes_on_and_asks_for_nothing_twice(tmp_path):
    """With a stand-in pipeline, stopped after the first of its three batches."""
    asked: list[tuple[str, int, int]] = []
    calls: list[list[int]] = []

    def pipeline(prompts, *, seeds, expert, num_inference_steps, guidance_scale):
        assert len(prompts) <= 2 and (num_inference_steps, guidance_scale) == (3, 1.5)
        calls.append(expert)
        if len(calls) == 2:
            raise KeyboardInterrupt
        asked.extend(zip(prompts, seeds, expert, strict=True))
        colours = [(int(prompt[-1]), i, 0) for prompt, i in zip(prompts, expert, strict=True)]
        return SimpleNamespace(images=[Image.new("RGB", (8, 8), colour) for colour in colours])

    captions, rows, experts = [f"prompt {k}" for k in range(7)], [1, 2, 3, 5, 6], [1, 0, 1, 1, 0]
    sampling = generated.Sampling(3, 1.5, seed=4, batch_size=2)
    what = (captions, rows, experts, sampling)
    with pytest.raises(KeyboardInterrupt):
        generated.generate(pipeline, tmp_path / "a", *what)
    images = generated.generate(pipeline, tmp_path / "a", *what)
    assert sorted(asked) == [
        (f"prompt {row}", generated.image_seed(4, row), i)
        for row, i in zip(rows, experts, strict=True)
    ]
    assert calls == [[0, 0], [1, 1], [1, 1], [1]]  # few experts in a call: large batches for each
    assert images.experts == experts and len(images) == 5
    assert [image.getpixel((0, 0)) for image in map(images.image, rows)] == [
        (row, i, 0) for row, i in zip(rows, experts, strict=True)
    ]
    assert images.costs([0.2, 0.6])["macs_ratio"] == pytest.approx((3 * 0.6 + 2 * 0.2) / 5)
    del asked[:]
    others = [1, 0, 0, 1, 0]  # one prompt by another expert, and one with other words
    changed = [*captions[:6], "other 6"]
    generated.generate(pipeline, tmp_path / "a", changed, rows, others, sampling)
    assert [(prompt, i) for prompt, _, i in asked] == [("prompt 3", 0), ("other 6", 0)]


def test_seconds_an_image_add_up_to_the_time_that_was_spent(tmp_path, monkeypatch):
    """By a clock that the stand-in moves on by an expert's number for each image, and one more."""
    now = [0.0]
    monkeypatch.setattr(generated.time, "time", lambda: now[0])

    def pipeline(prompts, *, expert, **settings):
        now[0] += sum(i + 1 for i in expert)
        return SimpleNamespace(images=[Image.new("RGB", (8, 8)) for _ in prompts])

    experts = [0, 2, 2, 1, 0, 2, 1]
    sampling = generated.Sampling(batch_size=3)
    images = generated.generate(pipeline, tmp_path, ["x"] * 7, list(range(7)), experts, sampling)
    assert images.costs([1.0] * 3)["seconds"] == pytest.approx(sum(i + 1 for i in experts) / 7)


def test_the_same_prompts_through_each_expert(tmp_path):
    def pipeline(prompts, *, seeds, expert, **settings):
        assert set(seeds) == {7}
        colours = [(ord(p), i + 1, 0) for p, i in zip(prompts, expert, strict=True)]
        return SimpleNamespace(images=[Image.new("RGB", (8, 8), colour) for colour in colours])

    sampling = generated.Sampling(seed=7)
    found = generated.through_each_expert(pipeline, ["a", "b"], sampling, [0.4, 0.8])
    shown = [(e.prompt, e.expert, e.macs_ratio) for e in found]
    assert shown == [("a", 0, 0.4), ("b", 0, 0.4), ("a", 1, 0.8), ("b", 1, 0.8)]
    for example in found:
        letter = ord(example.prompt)
        assert example.image.getpixel((0, 0)) == (letter, example.expert + 1, 0)
        assert example.teacher.getpixel((0, 0)) == (letter, 0, 0)


def test_retained_is_what_the_cut_experts_blocks_cost(unet):
    space = find_units(unet)
    macs = measure_macs(unet, space, latent_size=8, text_tokens=5)
    generator = torch.Generator().manual_seed(0)
    code = binarize(torch.randn(space.size, generator=generator), space)
    names, kept = retained(torch.stack([torch.ones(space.size), code]), macs)
    removable = {layer.name: code[layer.start] == 0 for layer in space.depth_layers}

    def by_module(model) -> Counter[str]:
        model = model.to("meta")
        return module_macs(model, example_inputs(model, 8, 5))

    dense, cut = by_module(meta_copy(unet)), by_module(cut_expert(unet, code, space))
    for name, share in zip(names, kept[:, 1], strict=True):
        parts = ("conv_shortcut", "proj_in", "proj_out")  # no unit belongs to these
        fixed = 0 if name in removable else sum(dense[f"{name}.{part}"] for part in parts)
        assert share == pytest.approx((cut[name] - fixed) / (dense[name] - fixed), abs=1e-12)
        assert (share == 0) == removable.get(name, False)
    assert True in removable.values() and False in removable.values()
    assert (kept[:, 0] == 1).all()


def test_blocks_stand_in_the_order_of_computation(unet, make_inputs):
    space = find_units(unet)
    macs = measure_macs(unet, space, latent_size=8, text_tokens=5)
    names, _ = retained(torch.ones(1, space.size), macs)
    ran: list[str] = []
    hooks = [
        unet.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
        for name in names
    ]
    unet(**make_inputs(unet, 1))
    for hook in hooks:
        hook.remove()
    assert ran == names
    assert len({figures.block_label(name) for name in names}) == len(names)


@pytest.mark.parametrize(("prompts", "rows"), [(2, 2), (450, 400)])
def test_teacher_and_expert_are_compared_side_by_side(prompts, rows):
    def sampled(colour: str, expert: int) -> Sampled:
        images = [Image.new("RGB", (256, 256), colour)] * prompts
        names, many = [f"prompt {k}" for k in range(prompts)], range(prompts)
        return Sampled(images, names, [expert for _ in many], [0.5 for _ in many], 1.0)

    others = {"teacher": sampled("red", -1), "wrong expert": sampled("lime", 4)}
    figure = comparison(sampled("blue", 3), others)
    shown = sorted(
        (image.get_extent()[3], image.get_extent()[0], *np.asarray(image.get_array())[50, 50])
        for image in figure.axes[0].images
    )
    assert [entry[2:] for entry in shown] == [(255, 0, 0), (0, 0, 255), (0, 255, 0)] * rows
    words = [text.get_text() for text in figure.axes[0].texts]
    assert {
        "prompt 1\nexpert 3\n0.50 of the MACs",
        "teacher",
        "routed expert",
        "wrong expert",
    } <= set(words)
    assert figure.get_size_inches()[1] * DPI < 2**16  # matplotlib writes no larger ones


def test_the_last_batch_is_assigned_as_training_did():
    """The rows of the last of 2 + 30 steps; `test_router.py` shows what `assign` gives."""
    torch.manual_seed(1)
    router, encoder = PromptRouter(384, 11, 3), PromptEncoder()
    torch.nn.init.normal_(router.keys)
    settings = {"warmup_steps": 2, "joint_steps": 30, "batch_size": 6, "seed": 0}
    settings |= {"eps": 0.05, "sinkhorn_iterations": 3}
    captions = [f"a thing with {k} sides" for k in range(20)]
    pipeline = SimpleNamespace(router=router, encoder=encoder)
    rows, experts = evaluate.last_batch(pipeline, settings, captions)
    assert rows == batch_rows(20, 6, seed=0, step=31).tolist() and len(set(rows)) == 6
    e = router(encoder([captions[row] for row in rows]))
    assert experts == router.assign(e, eps=0.05, iterations=3).tolist()


def cell(method: str, seed: int, **scores: float) -> dict:
    where = {"split": "validation", "tuning": "refit+8", "steps_in_all": 8}
    return where | {"method": method, "seed": seed, **scores}


def test_means_and_deviations_are_over_seeds():
    rows = [cell("norm", 0, r1=0.5), cell("norm", 1, r1=0.7), cell("norm", 2, r1=0.9)]
    (line,) = tables.aggregate([*rows])
    assert line["r1"] == pytest.approx(0.7) and line["seeds"] == 3
    assert line["r1_std"] == pytest.approx(statistics.stdev([0.5, 0.7, 0.9]))
    (single,) = tables.aggregate(rows[:1])
    assert single["r1"] == 0.5 and math.isnan(single["r1_std"])
    assert cells_of(tables.markdown("T", [line])) == [
        ["method", "split", "tuning", "steps in all", "seeds", "R@1 ↑"],
        ["norm", "validation", "refit+8", "8", "3", "0.700 ± 0.200"],
    ]
    assert cells_of(tables.markdown("T", [single]))[1][3:] == ["8", "1", "0.500"]


def test_nonsense_is_refused_in_one_line(tmp_path):
    for options, words in (
        ({"images": 1}, "--images 1"),
        ({"prompts_file": tmp_path / "p"}, "add --metrics paper"),
        ({"metrics": "vibes"}, "vibes is unknown"),
        ({"run": tmp_path / "gone"}, "gone does not exist"),
    ):
        with pytest.raises(UserError, match=words) as refused:
            evaluate.evaluate(dataclasses.replace(SMALL, **options))
        assert "\n" not in str(refused.value)


def test_a_target_of_too_few_images_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    make_folder(
        tmp_path / "data", [("train/1.jpg", "a"), ("train/2.jpg", "b"), ("test/3.jpg", "c")]
    )
    summary = dict.fromkeys(run_module.NEEDED["summary.json"], 64)
    write_json(tmp_path / "summary.json", summary)
    settings = {
        "seed": 0,
        "depth": "paper",
        "limit": None,
        "data_dir": None,
    }
    write_json(tmp_path / "config.json", settings | {"target": str(tmp_path / "data")})
    write_json(tmp_path / "assignments.json", {"train": [0, 0], "validation": [0]})
    monkeypatch.setattr(APTPPipeline, "from_pretrained", Mock(side_effect=AssertionError))
    with pytest.raises(UserError, match="validation split of data has 1 image"):
        evaluate.evaluate(dataclasses.replace(SMALL, run=tmp_path))


def test_real_images_are_read_at_the_size_that_the_suite_asks_for(run, monkeypatch):
    """Never larger than the teacher's own, and the autoencoder's at that."""
    seen: list[tuple[str, int]] = []

    class Suite:
        pixels = 32

        def __init__(self, device: torch.device) -> None:
            pass

        def compared_with(self, real):
            return real

        def features(self, images) -> None:
            pass

        def __call__(self, images, real) -> dict[str, float]:
            seen.append((type(images).__name__, real.images([0]).shape[-1]))
            assert images.images([0]).shape[-1] == 64
            return {}

    monkeypatch.setattr(evaluate, "DISTANCE_ROWS", 2)
    monkeypatch.setattr(evaluate, "write_report", lambda *_: None)
    monkeypatch.setattr(evaluate, "shown_to_each", lambda *_: ())
    monkeypatch.setitem(evaluate.SUITES, "paper", Suite)
    evaluate.score(dataclasses.replace(SMALL, images=2, metrics="paper"), run)
    assert seen == [("GeneratedImages", 32), ("GeneratedImages", 32), ("Reconstructed", 32)] * 2
    del seen[:]
    Suite.pixels = 256
    evaluate.score(dataclasses.replace(SMALL, images=2, metrics="paper", dense=False), run)
    assert seen == [("GeneratedImages", 64)] * 2
