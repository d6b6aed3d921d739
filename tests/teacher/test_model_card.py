"""The model card's figures: what is scored, how free words are judged, what is written."""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from evaluation.grids import save_figure
from targets.emoji import render, split_drawings
from targets.images import load_target
from teacher.model import Teacher
from teacher.pocket import model_card
from teacher.shapes import ASSETS

WANTED = {
    *("psnr_val", "r1_train", "r5_train", "r1_val", "r5_val", "frechet_train", "frechet_val"),
    *("frechet_real", "guidance", "images_seen"),
}


def test_the_guidance_scale_is_not_chosen_on_scored_captions():
    scored, trial = model_card.split_rows(100, 40, 25)
    assert len(set(scored)) == 40 and len(set(trial)) == 25
    assert not set(scored) & set(trial) and max(scored + trial) < 100
    scored, trial = model_card.split_rows(5, 40, 3)  # nothing is left over
    assert scored == [0, 1, 2, 3, 4] and len(trial) == 3


def test_of_equal_guidance_scales_the_strongest_is_taken():
    assert model_card.best_guidance({"2": 0.6, "10": 0.6, "3": 0.6, "12": 0.5}) == 10
    assert model_card.best_guidance({"2": 0.7, "3": 0.6}) == 2


def test_what_would_do_is_told_by_whole_words():
    drawings = split_drawings("train")
    would = model_card.would_do(("key", "heart"), drawings)
    names = {drawing.name for drawing, good in zip(drawings, would, strict=True) if good}
    assert {"key", "heart with arrow"} <= names
    assert not {"monkey", "monkey face", "keyboard", "hearts"} & names


@pytest.mark.parametrize("prompt", model_card.FREE_PROMPTS)
def test_each_free_prompt_can_be_met_but_not_by_chance_alone(prompt):
    drawings = split_drawings("train")
    good = model_card.would_do(model_card.FREE_PROMPTS[prompt], drawings)
    assert 0 < sum(good) < 0.05 * len(drawings)


def test_there_are_24_prompts_without_the_names_of_what_would_do():
    assert len(model_card.FREE_PROMPTS) == 24
    named = [
        prompt
        for prompt, names in model_card.FREE_PROMPTS.items()
        if any(f" {name} " in f" {prompt} " for name in names)
    ]
    assert not named


def test_landing_counts_own_images_and_exchanged_ones():
    """Three prompts, the third without anything that would do."""
    cosine = torch.tensor([[0.9, 0.8, 0.1, 0.0], [0.3, 0.4, 0.1, 0.2], [0.0, 0.0, 0.0, 0.0]])
    good = torch.tensor([[1, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]]).bool()
    found = model_card.landing(cosine, good, (1, 2, 3))
    assert found == {
        "free_1": 0.5,  # the first image is nearest to what would do, the second is not
        "free_1_exchanged": 0.0,
        "free_2": 0.5,
        "free_2_exchanged": 0.5,  # the second image has the first's among its nearest two
        "free_3": 1.0,
        "free_3_exchanged": 1.0,
        "free_auc": 0.5,  # of pairs: 3 of 3, 0 of 4
        "free_auc_exchanged": pytest.approx((2 / 3 + 0) / 2),  # 2 of 3, 0 of 4
    }


def test_landing_says_only_what_it_can():
    cosine, good = torch.rand(2, 5), torch.zeros(2, 5).bool()
    assert model_card.landing(cosine, good, (1,)) == {}  # nothing would do
    good[0, 2] = True
    assert model_card.landing(cosine, good, (5,)).keys() == {"free_5", "free_auc"}  # no other


@pytest.mark.parametrize("told", [True, False])
def test_landing_tells_reading_from_not_reading(told):
    """Also where one real image is near everything."""
    generator = torch.Generator().manual_seed(0)
    good = torch.eye(40).bool().repeat(1, 5)
    cosine = 0.2 * torch.randn(40, 200, generator=generator) + told * good
    cosine[:, 7] = 9
    found = model_card.landing(cosine, good, (2,))
    if told:
        assert found["free_2"] > 0.95 and found["free_auc"] > 0.95
    else:
        assert abs(found["free_2"] - found["free_2_exchanged"]) < 0.08
        assert abs(found["free_auc"] - found["free_auc_exchanged"]) < 0.08


def test_the_other_style_is_of_the_same_concept_and_was_trained_on():
    validation = split_drawings("validation")
    held_out = [validation[row] for row in (0, 7, -1)]
    trained = {drawing.code: drawing for drawing in split_drawings("train")}
    for drawing, pixels in zip(held_out, model_card.other_style(held_out), strict=True):
        other = trained[drawing.code]
        assert other.style != drawing.style
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), render(other.svg, 64))


def test_a_teacher_generates_from_each_prompts_own_seed_and_gets_its_unet_back():
    """With a stand-in for the diffusers pipeline."""
    asked, encoding = [], []

    class Pipe:
        unet = SimpleNamespace(config=SimpleNamespace(sample_size=4))
        scheduler = object()
        vae_scale_factor = 8
        image_processor = SimpleNamespace(postprocess=lambda images, kind: images.tolist())

        def encode_prompt(self, prompt, *, do_classifier_free_guidance, **options):
            encoding.append(prompt)
            time.sleep(0.01)
            assert encoding == [prompt]  # texts are encoded by one thread at a time
            encoding.remove(prompt)
            codes = torch.tensor([ord(one) for one in prompt])
            return codes, -codes if do_classifier_free_guidance else None

        def __call__(self, *, generator, prompt_embeds, **options):
            if not len(prompt_embeds):
                raise KeyboardInterrupt
            noise = [torch.randn(2, generator=one).tolist() for one in generator]
            asked.append((self.unet, self.scheduler, options, noise))
            return SimpleNamespace(images=prompt_embeds)

    class Undecoded(Teacher):
        device = torch.device("cpu")

        def decode_latents(self, latents):
            return latents

    pipe, expert = Pipe(), object()
    teacher, own = Undecoded("x", pipe, 2.5), pipe.unet
    assert teacher.generate(("a", "b"), (5, 6), 7) == [ord("a"), ord("b")]
    teacher.generate(("b",), (6,), 7, 0.0, expert)
    with pytest.raises(KeyboardInterrupt):
        teacher.generate((), (), 7, unet=expert)
    assert pipe.unet is own
    first, second = asked
    assert first[0] is own and second[0] is expert
    assert len({first[1], second[1], pipe.scheduler}) == 3  # a scheduler keeps its last steps
    size = {"height": 32, "width": 32, "num_inference_steps": 7, "output_type": "latent"}
    assert first[2].pop("negative_prompt_embeds").tolist() == [-ord("a"), -ord("b")]
    assert second[2].pop("negative_prompt_embeds") is None
    assert first[2] == size | {"guidance_scale": 2.5}
    assert second[2] == size | {"guidance_scale": 0.0}
    assert first[3][1] == second[3][0] != first[3][0]
    with ThreadPoolExecutor(4) as pool:
        made = pool.map(lambda seed: teacher.generate(("a", "b"), (seed, 6), 7), range(8))
        assert list(made) == [[ord("a"), ord("b")]] * 8


def test_a_small_measurement(tmp_path, monkeypatch):
    """A few captions, one step: everything is written, nothing of the shipped teacher changes."""
    limited = {split: load_target("emoji", split, limit=24) for split in ("train", "validation")}
    monkeypatch.setattr(model_card, "load_target", lambda name, split: limited[split])
    before = {path: path.read_bytes() for path in (ASSETS / "pocket").glob("*.json")}
    cfg = model_card.Config(
        train_images=4,
        validation_images=3,
        guidances=(1.0, 2.0),
        trial_images=2,
        steps=1,
        assets=tmp_path / "assets",
        out=tmp_path / "out",
    )
    shutil.copytree(ASSETS / "pocket", tmp_path / "assets")
    model_card.measure(cfg)
    found = json.loads((tmp_path / "assets" / "metrics.json").read_text(encoding="utf-8"))
    assert found.keys() >= WANTED | {"free_1", "free_auc", "style_val", "r1_val_autoencoder"}
    assert {"r1_val_other_style", "style_val_other_style"} <= found.keys()
    assert found["r1_by_guidance"].keys() == {"1", "2"}
    assert found["guidance"] in (1.0, 2.0)
    assert 0 <= found["r1_train"] <= found["r5_train"] <= 1
    assert found["images_train"] == 4 and found["images_val"] == 3
    settings = json.loads((tmp_path / "assets" / "teacher.json").read_text(encoding="utf-8"))
    assert settings == {"guidance_scale": found["guidance"], "resolution": 64}
    for name in ("grid_train", "grid_val", "grid_free"):
        with Image.open(tmp_path / "assets" / f"{name}.png") as image:
            assert image.width > 300 and min(image.convert("L").getdata()) < 100  # not blank
    images = sorted((tmp_path / "out" / "report" / "images").rglob("*.png"))
    assert len(images) == 2 * 2 + 4 + 3 + 24  # trials, both splits, free words
    times = [path.stat().st_mtime_ns for path in images]
    model_card.measure(cfg)  # nothing is generated again
    assert [path.stat().st_mtime_ns for path in images] == times
    monkeypatch.setattr(model_card, "FREE_PROMPTS", {"a fish": ("fish",)})
    model_card.measure(cfg)  # but another prompt is
    changed = [
        path for path, time in zip(images, times, strict=True) if path.stat().st_mtime_ns != time
    ]
    assert [path.name for path in changed] == ["000000.png"] and "free" in str(changed[0].parent)
    assert before == {path: path.read_bytes() for path in (ASSETS / "pocket").glob("*.json")}


def test_a_grid_shows_its_images_over_their_titles(tmp_path):
    colours = ["#ff0000", "#00ff00", "#0000ff"]
    rows = [[Image.new("RGB", (64, 64), colour)] * 2 for colour in colours]
    figure = model_card.grid(["a", "b", "c"], rows, columns=2)
    words = {text.get_text(): text.get_position() for text in figure.axes[0].texts}
    assert words["a"][1] == words["b"][1] < words["c"][1] and words["a"][0] < words["b"][0]
    save_figure(figure, tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as image:
        pixels = image.convert("RGB").getcolors(maxcolors=10**6)
    counts = {colour: count for count, colour in pixels}
    shown = [counts[colour] for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    assert min(shown) > 1000 and max(shown) < 1.2 * min(shown)


def test_images_keep_their_pixels():
    image = torch.randint(0, 256, (3, 8, 8), generator=torch.Generator().manual_seed(0))
    pillow = model_card.to_image(image / 127.5 - 1)
    assert list(pillow.getdata())[9] == tuple(image[:, 1, 1].tolist())


@pytest.mark.parametrize(
    "change",
    [
        {"train_images": 1},
        {"validation_images": 0},
        {"trial_images": 0},
        {"guidances": ()},
        {"steps": 0},
        {"batch_size": 0},
    ],
    ids=str,
)
def test_bad_settings_are_refused(change, tmp_path):
    cfg = model_card.Config(**{"out": tmp_path} | change)
    with pytest.raises(UserError, match=next(iter(change)).replace("_", "-")):
        model_card.measure(cfg)


def test_the_shipped_teacher_carries_its_figures():
    found = json.loads((ASSETS / "pocket" / "metrics.json").read_text(encoding="utf-8"))
    training = json.loads((ASSETS / "pocket" / "training.json").read_text(encoding="utf-8"))
    settings = json.loads((ASSETS / "pocket" / "teacher.json").read_text(encoding="utf-8"))
    assert found.keys() >= WANTED
    assert found["images_seen"] == training["images_seen"]
    assert found["guidance"] == settings["guidance_scale"]
    weights = sum(path.stat().st_size for path in (ASSETS / "pocket").rglob("*"))
    assert weights <= 35e6
