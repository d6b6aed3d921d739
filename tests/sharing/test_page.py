"""The page: from a run and from a published folder, without a browser and in Chromium."""

import dataclasses
import shutil
import socket

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from gradio_client import Client
from small_runs import PROMPTS, tiny_run

from common.errors import UserError
from common.files import read_json, write_json
from sample import APTPPipeline
from sharing import publish
from sharing.page import SIDE, Config, Settings, build, compare, errors_shown, gallery, launch, load

HOW = (3, 2.0, 7)  # steps, guidance, seed
WIDTHS = (1280, 390)
IMAGES = f"[...document.images].filter(image => image.naturalWidth == {SIDE}).length"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    run = tiny_run(folder, "sd1", "all")
    publish.publish(publish.Config(run=run, out=folder / "all"))
    publish.publish(publish.Config(run=run, out=folder / "one", expert=2))
    return folder


@pytest.fixture(scope="module")
def model(place):
    return load(Config(run=place / "run-sd1-all", device="cpu"))


@pytest.fixture(scope="module")
def address(model):
    page = build(model)
    yield launch(page, None)[0]
    page.close()


def pixels(image):
    return np.asarray(image).astype(int)


def texts(values):
    return " ".join(value for value in values if isinstance(value, str))


# ---- without a browser ----


def test_a_run_shows_the_experts_the_teachers_and_a_wrong_experts_image(model, place):
    own = APTPPipeline.from_pretrained(place / "run-sd1-all", "cpu")
    prompt = own_caption = model.nearest(PROMPTS[0])[0][0]
    (expert,) = own.route([prompt])
    first, *rest = compare(model, f"  {prompt}\n", *HOW)
    row = read_json(place / "run-sd1-all" / "summary.json")["experts"][expert]
    assert f"Expert {expert}" in first[0] and ", ".join(row["words"]) in first[0]
    assert f"{row['macs_ratio']:.2f}" in first[0] and own_caption in first[1]
    assert model.nearest(prompt)[0] == (prompt, [0, 1, 2, 0][model.captions.index(prompt)])
    numbers = (expert, -1, (expert + 1) % 3)
    for k, (values, number) in enumerate(zip(rest, numbers, strict=True)):
        made = own([prompt], seeds=[7], expert=number, num_inference_steps=3, guidance_scale=2.0)
        image = made.images[0].resize((SIDE, SIDE), 3)
        assert np.array_equal(pixels(values[2 + k].value), pixels(image)), number
