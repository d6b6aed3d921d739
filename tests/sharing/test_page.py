"""The page: from a run and from a published folder, without a browser and in Chromium."""

import shutil
import socket

import gradio as gr
import numpy as np
import pytest
from browser import CHROMIUM, Browser
from gradio_client import Client
from PIL import Image
from small_runs import PROMPTS, tiny_run

from common.errors import UserError
from common.files import read_json, write_json
from sample import APTPPipeline
from sharing import publish
from sharing.page import SIDE, Config, about_model, build, compare, gallery, launch, load
from targets.images import load_target

HOW = (3, 2.0, 7)  # steps, guidance, seed
IMAGES = f"[...document.images].filter(image => image.naturalWidth == {SIDE}).length"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    run = tiny_run(folder, "sd1", "all")
    publish.publish(publish.Config(run=run, out=folder / "all"))
    publish.publish(publish.Config(run=run, out=folder / "one", expert=2))
    return folder


@pytest.fixture(scope="module")
def own(place):
    return APTPPipeline.from_pretrained(place / "run-sd1-all", "cpu")


@pytest.fixture(scope="module")
def model(place):
    return load(Config(run=place / "run-sd1-all", device="cpu"))


@pytest.fixture(scope="module")
def address(model):
    page = build(model)
    yield launch(page, None)[0]
    page.close()


def is_shown(value, own, prompt, number):
    """Whether an image of the page is that of an expert of the run."""
    made = own([prompt], seeds=[7], expert=number, num_inference_steps=3, guidance_scale=2.0)
    large = made.images[0].resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.array_equal(np.asarray(value), np.asarray(large))


# ---- without a browser ----


def test_a_run_shows_the_experts_the_teachers_and_a_wrong_experts_image(model, own, place):
    options = {"seed": 0, "limit": 4, "data_dir": None, "resolution": 16}
    prompt = load_target("emoji", "train", **options).captions[2]
    (expert,) = own.route([prompt])
    first, *rest = compare(model, f"  {prompt}\n", *HOW)
    row = read_json(place / "run-sd1-all" / "summary.json")["experts"][expert]
    assert f"Expert {expert}" in first[0] and ", ".join(row["words"]) in first[0]
    assert f"{row['macs_ratio']:.2f}, " in first[0]
    assert model.nearest(prompt)[0] == (prompt, 2) and prompt in first[1]  # it is nearest to itself
    for k, number in enumerate((expert, -1, (expert + 1) % 3)):
        shown = rest[k][2 + k]
        assert shown["label"].endswith(" s") and is_shown(shown["value"], own, prompt, number)
    *_, last = gallery(model, prompt, *HOW)
    assert [label.partition(",")[0] for _, label in last["value"]] == [
        f"expert {i}" for i in range(3)
    ]
    assert all(is_shown(image, own, prompt, i) for i, (image, _) in enumerate(last["value"]))


@pytest.mark.parametrize(("name", "count"), [("all", 2), ("one", 1)])
def test_a_published_folder_shows_what_it_holds(place, own, name, count):
    model = load(Config(folder=place / name, device="cpu"))
    assert model.nearest is None and len(model.columns) == count
    first, *rest = compare(model, PROMPTS[0], *HOW)
    (expert,) = own.route(PROMPTS[:1]) if name == "all" else (2,)
    assert f"Expert {expert}" in first[0] and not first[1] and len(rest) == count
    assert is_shown(rest[0][2]["value"], own, PROMPTS[0], expert)
    build(model)


def test_it_is_served_to_this_machine_alone_and_tells_nobody(address, capfd):
    client = Client(address, verbose=False, analytics_enabled=False)
    assert address.startswith("http://127.0.0.1:")
    assert not client.config["analytics_enabled"]
    with pytest.raises(ValueError, match="a prompt is empty"):
        client.predict("  ", *HOW, api_name="/compare")
    assert "Traceback" not in capfd.readouterr().err


def test_a_latency_is_shown_where_the_run_has_it(model):
    experts = [
        row | {"latency_ratio": 0.6, "latency_measured": 0.0123, "latency_predicted": 0.011}
        for row in model.summary["experts"]
    ]
    budgeted = {"experts": experts, "latency": {}}
    assert "of the MACs" in about_model(model)
    model = type(model)(**{**model.__dict__, "summary": model.summary | budgeted})
    assert "of the latency" in about_model(model)
    assert "12.3 ms, measured" in next(compare(model, "a dog", *HOW))[0]


# ---- in a browser ----


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on the PATH")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_a_prompt_is_typed_and_its_images_come(browser, address, width):
    browser.open(address, width)
    browser.wait("!!document.querySelector('textarea')")
    assert "Expert" not in browser.run("document.body.innerText")
    browser.type("textarea", "a giraffe")
    browser.wait(f"{IMAGES} == 3")
    browser.wait("document.body.innerText.includes('Nearest training prompts')")
    browser.run(
        "[...document.querySelectorAll('button')].find(b => /by each/.test(b.innerText)).click()"
    )
    browser.wait("document.querySelectorAll('.gallery-item').length == 3")
    assert browser.run("document.documentElement.scrollWidth") <= width
    asked = [url for url in browser.requests if not url.startswith(("data:", "blob:"))]
    assert asked and all(url.startswith((address, "about:")) for url in asked)


def test_an_error_shows_in_the_page(browser, address):
    browser.open(address, 1280)
    browser.wait("!!document.querySelector('textarea')")
    browser.type("textarea", " ")
    browser.wait("document.body.innerText.includes('a prompt is empty')")


# ---- what is refused ----


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"run": "run-sd1-all", "folder": "all"}, "--run does not go with --folder"),
        ({"folder": "all", "data_dir": "all"}, "--data-dir does not go with --folder"),
        ({"folder": "run-sd1-all"}, "is not published"),
        ({"folder": "damaged"}, "is damaged"),
        ({"run": "incomplete"}, "codes.safetensors is missing"),
        ({"run": "gone"}, "gone does not exist"),
        ({"port": 0}, "--port 0 is out of range"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(place, settings, words):
    if not (damaged := place / "damaged").exists():
        damaged.mkdir()
        shutil.copy(place / "all" / "summary.json", damaged)
        write_json(damaged / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
        shutil.copytree(place / "run-sd1-all", place / "incomplete")
        (place / "incomplete" / "codes.safetensors").unlink()
    given = {k: place / v if isinstance(v, str) else v for k, v in settings.items()}
    with pytest.raises(UserError, match=words) as error:
        load(Config(**given, device="cpu"))
    assert "\n" not in str(error.value)


def test_a_port_that_is_taken_is_refused():
    with socket.socket() as taken, gr.Blocks(analytics_enabled=False) as page:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port} is in use"):
            launch(page, port)
