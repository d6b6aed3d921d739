"""Published folders, loaded in a process of its own, elsewhere, without this repository."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from elsewhere import ALONE
from PIL import Image
from small_runs import PROMPTS, tiny_run, write_run

from common.errors import UserError
from common.files import read_json, write_json
from prune_unet import cut_expert
from sample import APTPPipeline
from sharing import publish
from sharing.pruned_unet import RoutedUNet
from sharing.publish import Config

ROOT = Path(__file__).resolve().parent.parent.parent
RUNS = ("sdxl-all", "sd2-paper", "pocket")
COPIED = ("pipeline", "prompt_router", "pruned_unet")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    tiny_run(folder, "sdxl", "all")
    tiny_run(folder, "sd2", "paper", shared=True)
    write_run(folder / "run-pocket", "pocket")
    return folder


@pytest.fixture(scope="module")
def found(place, tmp_path_factory):
    """What the published folders give; `one` is expert 1 of the first run."""
    out = tmp_path_factory.mktemp("elsewhere")
    folders = [out / name for name in RUNS]
    for name, folder in zip(RUNS, folders, strict=True):
        publish.publish(Config(run=place / f"run-{name}", out=folder))
    folders += [out / "one"]
    publish.publish(Config(run=place / f"run-{RUNS[0]}", out=folders[-1], expert=1))
    (out / "prompts.json").write_text(json.dumps(PROMPTS))
    (out / "cwd").mkdir()
    line = [sys.executable, ROOT / "tests" / "sharing" / "elsewhere.py", out, *folders]
    unset = ("PYTHONPATH", "HF_MODULES_CACHE")
    here = {name: value for name, value in os.environ.items() if name not in unset}
    here |= {"HF_HOME": str(out / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        list(map(str, line)), cwd=out / "cwd", env=here, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(np.load(out / "found.npz"))


def as_bytes(images: np.ndarray) -> np.ndarray:
    return (images * 255).round().astype("uint8")


@pytest.mark.parametrize("name", RUNS)
def test_images_are_those_of_the_run_bit_for_bit(place, found, name):
    pipeline = APTPPipeline.from_pretrained(place / f"run-{name}", "cpu")
    for k, prompt in enumerate(PROMPTS[:ALONE]):
        own = pipeline([prompt], seeds=[k], num_inference_steps=3)
        assert np.array_equal(np.asarray(own.images[0]), as_bytes(found[f"{name}-{k}"])[0]), k
        assert own.experts == found[f"{name}-experts"][k]


@pytest.mark.parametrize("name", RUNS)
def test_a_batch_is_in_the_callers_order(found, name):
    assert len({*found[f"{name}-experts"]}) > 1
    for k in range(ALONE):
        alone, together = found[f"{name}-{k}"][0], found[f"{name}-images"][k]
        assert np.abs(alone - together).max() < 1e-3


def test_one_expert_is_an_ordinary_pipeline(place, found):
    pipeline = APTPPipeline.from_pretrained(place / f"run-{RUNS[0]}", "cpu")
    own = pipeline(PROMPTS[:1], expert=1, num_inference_steps=3)
    assert np.array_equal(np.asarray(own.images[0]), as_bytes(found["one-0"])[0])


# ---- the folder ----


def test_the_card_says_what_the_run_says(place, tmp_path):
    out = publish.publish(Config(run=place / "run-pocket", out=tmp_path / "new" / "folder"))
    _, front, text = (out / "README.md").read_text().split("---\n", 2)
    assert "license: cc-by-sa-4.0\n" in front and "base_model" not in front
    for expert in read_json(place / "run-pocket" / "summary.json")["experts"]:
        row = next(line for line in text.splitlines() if line.startswith(f"| {expert['id']} |"))
        assert f" {expert['macs_ratio']:.2f} " in row and expert["words"][0] in row
        assert row.endswith("| yes |") == (expert["id"] > 0)
    assert "trust_remote_code=True" in text and [p.name for p in out.parent.iterdir()] == ["folder"]


def test_the_card_has_the_latency_and_the_samples_of_a_run_that_has_them(place, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(place / "run-sd2-paper", run)
    summary = read_json(run / "summary.json")
    where = {"device": "a GPU", "precision": "bf16", "batch": 2, "pixels": 512, "runtime": "eager"}
    summary |= {"latency": where | {"dense": 0.02}, "latency_ratio_mean": 0.66}
    for row, measured in zip(summary["experts"], (0.0123, 0.0151, None), strict=True):
        row |= {"latency_ratio": 0.6, "latency_measured": measured, "latency_predicted": 0.0135}
    write_json(run / "summary.json", summary)
    (run / "report").mkdir()
    Image.new("RGB", (3000, 1500), "red").save(run / "report" / "samples.png")
    publish.publish(Config(run=run, out=out))
    card = (out / "README.md").read_text()
    assert all(f"| 0.60 | {t} |" in card for t in ("12.3 ms, measured", "13.5 ms, predicted"))
    assert "of 20 ms a forward on a GPU, bf16" in card and "(samples.webp)" in card
    assert "of the latency, depth" in card
    with Image.open(out / "samples.webp") as image:
        assert image.size == (1000, 500)


def test_a_card_does_not_tell_where_a_teacher_lies(place, tmp_path):
    run = place / f"run-{RUNS[0]}"
    out = publish.publish(Config(run=run, out=tmp_path / "one", expert=2, license="mit"))
    card = (out / "README.md").read_text()
    assert str(place) not in card and "teacher-sdxl" in card and "license: mit\n" in card
    assert "| 2 |" in card and "| 1 |" not in card


def test_an_encoder_can_stay_on_the_hub(place, tmp_path, monkeypatch):
    made = APTPPipeline.from_pretrained

    def named(*args, **options):
        pipeline = made(*args, **options)
        pipeline.encoder.name = "owner/encoder"
        return pipeline

    monkeypatch.setattr(APTPPipeline, "from_pretrained", named)
    cfg = Config(run=place / f"run-{RUNS[0]}", out=tmp_path / "x", encoder_by_name=True)
    out = publish.publish(cfg)
    assert read_json(out / "router" / "config.json")["encoder"] == "owner/encoder"
    assert not (out / "router" / "encoder").exists()


def test_a_kill_leaves_nothing_half_written(place, tmp_path, monkeypatch):
    """A killed process does not clean up; the next one does."""
    out = tmp_path / "out"

    def killed(*_, **__):
        assert not out.exists() and list(tmp_path.glob(".out.*/out/unet/*"))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(publish, "model_card", killed)
        patch.setattr(publish.shutil, "rmtree", lambda *_, **__: None)
        publish.publish(Config(run=place / "run-sd2-paper", out=out))
    assert not out.exists() and list(tmp_path.iterdir())
    publish.publish(Config(run=place / "run-sd2-paper", out=out))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ---- what is refused ----


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"out": Path()}, ("exists", "--out")),
        ({"expert": 3}, ("--expert 3", "0 to 2")),
        ({"encoder_by_name": True}, ("--encoder-by-name", "minilm")),
        ({"run": Path("gone")}, ("gone", "does not exist")),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(place, tmp_path, settings, words):
    cfg = Config(**{"run": place / f"run-{RUNS[0]}", "out": tmp_path / "out", **settings})
    with pytest.raises(UserError) as error:
        publish.publish(cfg)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["summary.json", "codes.safetensors", "router.safetensors"])
def test_an_incomplete_run_is_refused(place, tmp_path, name):
    shutil.copytree(place / f"run-{RUNS[0]}", tmp_path / "run")
    (tmp_path / "run" / name).unlink()
    with pytest.raises(UserError, match=f"{name}.*missing"):
        publish.publish(Config(run=tmp_path / "run", out=tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_copied_files_import_nothing_of_this_repository():
    from test_house import arrows

    for name in COPIED:
        assert not arrows((ROOT / "sharing" / f"{name}.py").read_text()), name


def test_the_published_u_net_has_the_weights_of_the_run(place, tmp_path):
    """Each expert's: cut out of the shared weights, fine-tuned, refitted."""
    pipeline = APTPPipeline.from_pretrained(place / "run-sd2-paper", "cpu")
    publish.write_unet(pipeline, tmp_path, None)
    unet = RoutedUNet.from_pretrained(tmp_path)
    for i in range(3):
        own, other = pipeline.unet(i).state_dict(), unet.expert(i).state_dict()
        cut = cut_expert(pipeline.teacher.unet, pipeline.codes[i], pipeline.space).state_dict()
        assert own.keys() == other.keys()
        assert all(torch.equal(own[key], other[key]) for key in own)
        assert not torch.equal(own["conv_in.weight"], cut["conv_in.weight"]) or i == 2
