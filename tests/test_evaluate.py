"""Scoring a run and comparing methods: small runs end to end, tables against hand-made numbers."""

import csv
import dataclasses
import math
import statistics
from collections import Counter
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import baselines
import evaluate
import finetune
import train
from common.errors import UserError
from common.files import load_tensors, read_json, write_json
from common.randomness import batch_rows, step_generator
from evaluation import figures, generated, tables
from evaluation.features import Extractor
from evaluation.grids import DPI
from gates import ArchSpace, binarize
from macs import example_inputs, measure_macs, module_macs, retained, skeleton
from prune_unet import cut_expert, load_expert
from router import PromptEncoder, PromptRouter
from sample import APTPPipeline, Sampled, comparison
from settings import Finetuning, Pruning
from targets.images import load_target

SMALL = evaluate.Config(
    methods="dense,random",
    budget=0.7,
    num_experts=2,
    limit=24,
    images=4,
    steps=2,
    finetune_steps=1,
    warmup_steps=1,
    joint_steps=1,
    device="cpu",
)


@pytest.fixture(scope="module", autouse=True)
def few_distances():
    """Distances to the teacher over 8 rows of a split, not over 512."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "DISTANCE_ROWS", 8)
        yield


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison of two methods that need no training."""
    folder = tmp_path_factory.mktemp("compare")
    evaluate.evaluate(dataclasses.replace(SMALL, out=folder))
    return folder


def test_every_cell_is_an_ordinary_run_at_the_budget(compared):
    assert sorted(path.name for path in compared.iterdir() if path.is_dir()) == [
        "dense-0",
        "dense-0@2",
        "random-0",
        "random-0@2",
    ]
    pipeline = APTPPipeline.from_pretrained(compared / "random-0@2", "cpu")
    summary = read_json(compared / "random-0@2" / "summary.json")
    assert summary["method"] == "random" and summary["num_experts"] == 1
    assert 0.7 * 0.99 <= summary["macs_ratio_mean"] <= 0.7
    assert pipeline.route(["a giraffe", "a bus"]) == [0, 0]
    _, meta = load_expert(finetune.expert_path(pipeline.run, 0))
    assert meta["settings"]["steps"] == 2  # as many as both of APTP's experts together
    dense = APTPPipeline.from_pretrained(compared / "dense-0@2", "cpu")
    codes = finetune.load_codes(dense.run, dense.space)
    assert codes.shape[0] == 1 and codes.min() == 1
    assert not dense.is_finetuned(0)
    weights = dense.teacher.unet.state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in dense.unet(0).state_dict().items())


def test_the_dense_cell_generates_what_the_teacher_generates(compared):
    run = compared / "dense-0@2"
    pipeline = APTPPipeline.from_pretrained(run, "cpu")
    data = load_target("emoji", "validation")
    routed, teacher = (
        generated.generate(
            pipeline,
            run / "report" / "images",
            data.captions,
            "validation",
            [0, 1],
            SMALL.sampling(),
            expert,
        )
        for expert in (None, -1)
    )
    assert routed.experts == [0, 0] and teacher.experts == [-1, -1]
    difference = routed.images([0, 1]) - teacher.images([0, 1])
    assert difference.abs().max() < 1.5 / 127.5  # one level of a colour, from rounding


def test_tables_hold_the_cells_scores(compared):
    cells = read_json(compared / "metrics.json")["cells"]
    assert {(cell["method"], cell["split"]) for cell in cells} == {
        (method, split) for method in ("dense", "random") for split in ("train", "validation")
    }
    for cell in cells:
        own = read_json(compared / f"{cell['method']}-0@2" / "report" / "metrics.json")["rows"]
        match = [
            row for row in own if (row["method"], row["split"]) == (cell["method"], cell["split"])
        ]
        assert match[0]["frechet"] == cell["frechet"] and cell["steps_in_all"] == 2
        assert 0 <= cell["r1"] <= cell["r5"] <= 1
    text = (compared / "tables.md").read_text(encoding="utf-8")
    assert "Table 1" in text and "nan" not in text
    assert {row[0] for row in cells_of(text)[1:]} == {"dense", "random"}
    with (compared / "tables.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 and {row["table"] for row in rows} == {"Table 1"}


def cells_of(text: str) -> list[list[str]]:
    """The rows of a Markdown table, without the line below its head."""
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows if set("".join(row)) - set("-: ")]


def test_what_is_done_is_not_done_again(compared, monkeypatch):
    def fail(*arguments, **options):
        raise AssertionError("it was done before")

    monkeypatch.setattr(APTPPipeline, "__call__", fail)
    monkeypatch.setattr(finetune, "finetuning_step", fail)
    before = (compared / "tables.md").read_bytes()
    evaluate.evaluate(dataclasses.replace(SMALL, out=compared))
    assert (compared / "tables.md").read_bytes() == before


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        for name, value in attrs:
            assert name not in ("src", "href") or value.startswith(("data:", "#")), (tag, value)


def test_a_run_with_experts_is_scored_and_reported(tmp_path):
    run = tmp_path / "run"
    cfg = Pruning(
        budget=0.7, num_experts=2, warmup_steps=1, joint_steps=1, batch_size=4, limit=24, out=run
    )
    train.train(dataclasses.replace(cfg, device="cpu"))
    scored = evaluate.score(dataclasses.replace(SMALL, methods=None, exchanged=True), run)
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
    labels = [(entry["split"], entry["label"]) for entry in scored["nmi"]]
    assert labels == [(x, y) for x in ("train", "validation") for y in ("group", "style")]
    page = run / "report" / "report.html"
    Tags().feed(page.read_text(encoding="utf-8"))
    assert len(list((run / "report").glob("*.png"))) >= 6
    # another expert, other images
    pipeline, sampling = APTPPipeline.from_pretrained(run, "cpu"), SMALL.sampling()

    def identity(expert: int | None, sampling=sampling) -> str:
        return generated.identity(pipeline, sampling, expert)

    routed, teacher = identity(None), identity(-1)
    assert routed == identity(None) != teacher
    finetune.finetune(Finetuning(run=run, steps=1, batch_size=4, device="cpu"))
    assert identity(None) != routed and identity(-1) == teacher
    for change in ({"seed": 1}, {"steps": 3}, {"guidance": 1.5}):
        assert identity(-1, dataclasses.replace(sampling, **change)) != teacher
    routed = identity(None)
    next(pipeline.teacher.pipe.vae.parameters()).data.add_(0.01)  # another teacher of that name
    assert identity(-1) != teacher and identity(None) != routed


def test_free_prompts_get_a_pickscore_of_their_own(compared, tmp_path, monkeypatch):
    """With a stand-in network: brightness of the image against length of the prompt."""

    def look(images: torch.Tensor) -> torch.Tensor:
        return torch.stack([images.mean((1, 2, 3)) + 2, torch.ones(len(images))], dim=1)

    def read(captions: list[str]) -> torch.Tensor:
        return torch.tensor([[1.0, len(caption)] for caption in captions])

    stand_in = Extractor("x", torch.device("cpu"), lambda images: images, look, read, scale=10.0)
    monkeypatch.setattr(evaluate, "load_extractor", lambda name, device: stand_in)
    (tmp_path / "prompts.txt").write_text("a giraffe\na long red bus\n", encoding="utf-8")
    pipeline = APTPPipeline.from_pretrained(compared / "random-0@2", "cpu")
    cfg = dataclasses.replace(SMALL, metrics="paper", prompts_file=tmp_path / "prompts.txt")
    own, dense = evaluate.free_prompts(pipeline, "random", cfg)
    assert (own["method"], dense["method"]) == ("random", "dense")
    assert own["images"] == 2 and own["split"] == "prompts" and dense["macs_ratio"] == 1
    folder = next((pipeline.run / "report" / "images").glob("prompts-routed-*"))
    scores = []
    for row, prompt in enumerate(("a giraffe", "a long red bus")):
        with Image.open(folder / f"{row:06d}.png") as image:
            bright = np.asarray(image).mean() / 127.5 - 1 + 2
        dot = bright + len(prompt)
        scores.append(10 * dot / math.hypot(bright, 1) / math.hypot(1, len(prompt)))
    assert own["pick_score"] == pytest.approx(statistics.fmean(scores), rel=1e-4)


def test_every_image_has_a_seed_of_its_own():
    seeds = {generated.image_seed(seed, row) for seed in range(3) for row in range(500)}
    assert len(seeds) == 1500
    assert generated.image_seed(1, 7) == generated.image_seed(1, 7)


def test_a_stopped_generation_goes_on_and_asks_for_nothing_twice(tmp_path):
    """With a stand-in pipeline, stopped after the first of its three batches."""
    asked: list[tuple[str, int, int]] = []

    class Pipeline:
        stop = True

        def identity(self, expert: int | None) -> list[str]:
            return ["x"]

        def route(self, prompts: list[str]) -> list[int]:
            return [int(prompt[-1]) % 2 for prompt in prompts]

        def __call__(self, prompts, *, seeds, expert, num_inference_steps, guidance_scale):
            assert len(prompts) <= 2 and (num_inference_steps, guidance_scale) == (3, 1.5)
            if self.stop and asked:
                raise KeyboardInterrupt
            asked.extend((p, seed, expert) for p, seed in zip(prompts, seeds, strict=True))
            colours = [(int(prompt[-1]), 0, 0) for prompt in prompts]
            return SimpleNamespace(images=[Image.new("RGB", (8, 8), colour) for colour in colours])

    captions, rows = [f"prompt {k}" for k in range(7)], [1, 2, 3, 5, 6]
    sampling, pipeline = generated.Sampling(3, 1.5, seed=4, batch_size=2), Pipeline()
    with pytest.raises(KeyboardInterrupt):
        generated.generate(pipeline, tmp_path, captions, "train", rows, sampling, None)
    pipeline.stop = False
    images = generated.generate(pipeline, tmp_path, captions, "train", rows, sampling, None)
    assert sorted(asked) == [
        (f"prompt {row}", generated.image_seed(4, row), row % 2) for row in rows
    ]
    assert images.experts == [1, 0, 1, 1, 0] and len(images) == 5 and min(images.seconds) >= 0
    assert [image.getpixel((0, 0)) for image in map(images.image, rows)] == [
        (row, 0, 0) for row in rows
    ]
    assert images.costs([0.2, 0.6])["macs_ratio"] == pytest.approx((3 * 0.6 + 2 * 0.2) / 5)
    wrong = generated.Exchanged(pipeline, 2)  # a control: the other expert, images of its own
    others = generated.generate(wrong, tmp_path, captions, "train", rows, sampling, None)
    assert others.experts == [0, 1, 0, 0, 1] and others.folder != images.folder
    assert {entry[:2] for entry in asked[5:]} == {entry[:2] for entry in asked[:5]}  # same seeds


def test_retained_is_what_the_cut_experts_blocks_cost(unet):
    space = ArchSpace.from_unet(unet)
    macs = measure_macs(unet, space, latent_size=8, text_tokens=5)
    generator = torch.Generator().manual_seed(0)
    code = binarize(torch.randn(space.size, generator=generator), space)
    names, kept = retained(torch.stack([torch.ones(space.size), code]), macs)
    removable = {layer.name: code[layer.start] == 0 for layer in space.depth_layers}

    def by_module(model) -> Counter[str]:
        model = model.to("meta")
        return module_macs(model, example_inputs(model, 8, 5))

    dense, cut = by_module(skeleton(unet)), by_module(cut_expert(unet, code, space))
    for name, share in zip(names, kept[:, 1], strict=True):
        parts = ("conv_shortcut", "proj_in", "proj_out")  # no unit belongs to these
        fixed = 0 if name in removable else sum(dense[f"{name}.{part}"] for part in parts)
        assert share == pytest.approx((cut[name] - fixed) / (dense[name] - fixed), abs=1e-12)
        assert (share == 0) == removable.get(name, False)
    assert True in removable.values() and False in removable.values()
    assert (kept[:, 0] == 1).all()


def test_blocks_stand_in_the_order_of_computation(unet, make_inputs):
    space = ArchSpace.from_unet(unet)
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


@pytest.mark.parametrize("transport_rows", [None, 0, 14])  # older runs have no such setting
def test_last_batch_against_the_transport_by_hand(transport_rows):
    """With the tensors of an older run's router, where codes are compared with embeddings."""
    router, encoder = PromptRouter(384, 11, 3), PromptEncoder()
    generator = torch.Generator().manual_seed(1)
    shapes = {"predictor.weight": (11, 384), "predictor.bias": (11,), "codes": (3, 11)}
    shapes |= {"mean_z": (384,)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors["mean_z"] /= 20
    router.load(tensors)
    pipeline = SimpleNamespace(router=router, encoder=encoder)
    settings = {"warmup_steps": 2, "joint_steps": 30, "batch_size": 6, "seed": 0}
    settings |= {"eps": 0.05, "sinkhorn_iterations": 3}
    settings |= {} if transport_rows is None else {"transport_rows": transport_rows}
    captions = [f"a thing with {k} sides" for k in range(20)]
    rows, experts = evaluate.last_batch(pipeline, settings, captions)
    assert len(rows) == len(set(rows)) == 6 and set(rows) <= set(range(20))
    assert rows == batch_rows(20, 6, seed=0, step=31).tolist()  # the last of 2 + 30 steps
    order = torch.randperm(20, generator=step_generator(0, "train", 31)).tolist()
    others = order[:8] if transport_rows else []  # balanced with 8 others, to 14 in all
    z = encoder([captions[row] for row in rows + others]).double().numpy()
    weight, _, codes, mean_z = (tensor.double().numpy() for tensor in tensors.values())
    e = (z - mean_z) @ weight.T  # centred: the bias cancels
    A = codes - codes.mean(0)
    cosine = (A / np.linalg.norm(A, axis=1, keepdims=True)) @ (
        e / np.linalg.norm(e, axis=1, keepdims=True)
    ).T
    Q = np.exp(cosine / 0.05)
    for _ in range(3):
        Q /= Q.sum(1, keepdims=True) * 3
        Q /= Q.sum(0, keepdims=True) * Q.shape[1]
    assert experts == Q.argmax(0)[:6].tolist()


def cell(method: str, seed: int, **scores: float) -> dict:
    return {"method": method, "split": "validation", "seed": seed, "steps_in_all": 8, **scores}


def test_means_and_deviations_are_over_seeds():
    rows = [cell("norm", 0, r1=0.5), cell("norm", 1, r1=0.7), cell("norm", 2, r1=0.9)]
    (line,) = tables.aggregate([*rows])
    assert line["r1"] == pytest.approx(0.7) and line["seeds"] == 3
    assert line["r1_std"] == pytest.approx(statistics.stdev([0.5, 0.7, 0.9]))
    (single,) = tables.aggregate(rows[:1])
    assert single["r1"] == 0.5 and math.isnan(single["r1_std"])
    assert cells_of(tables.markdown("T", [line])) == [
        ["method", "split", "seeds", "fine-tuning steps", "R@1 ↑"],
        ["norm", "validation", "3", "8", "0.700 ± 0.200"],
    ]
    assert cells_of(tables.markdown("T", [single]))[1][2:] == ["1", "8", "0.500"]


def test_tables_3_and_5_come_with_their_cells(tmp_path):
    def make(method: str, steps: int, r1: float) -> None:
        run = tmp_path / f"{method}-0@{steps}"
        experts = 2 if method in evaluate.APTP else 1
        write_json(run / "summary.json", {"num_experts": experts})
        row = {"method": method, "split": "validation", "r1": r1, "frechet": 1.0}
        others = [row | {"method": name} for name in ("autoencoder", f"{method}-exchanged")]
        write_json(run / "report" / "metrics.json", {"rows": [row, *others]})

    make("uni-arch", 100, 0.4)
    make("aptp", 50, 0.6)
    tables.write_tables(tmp_path, evaluate.METHODS)
    text = (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert "Table 3" not in text and "Table 5" not in text and "autoencoder" not in text
    wanted = ["aptp", "aptp-exchanged", "uni-arch", "uni-arch-exchanged"]
    assert [row[0] for row in cells_of(text)[1:]] == wanted
    make("contrastive", 50, 0.3)
    make("aptp", 100, 0.7)
    tables.write_tables(tmp_path, evaluate.METHODS)
    text = (tmp_path / "tables.md").read_text(encoding="utf-8")
    third = text[text.index("Table 3") : text.index("Table 5")]
    names = [row[0] for row in cells_of(third)[1:]]
    assert names[:2] == ["uni-arch", "contrastive"] and set(names) == {
        "uni-arch",
        "contrastive",
        "aptp",
    }


def test_nonsense_is_refused_in_one_line(tmp_path):
    for options, words in (
        ({"methods": "aptp,magic"}, "magic is unknown"),
        ({"methods": " , "}, "names none"),
        ({"images": 1}, "--images 1"),
        ({"methods": None, "prompts_file": tmp_path / "p"}, "add --metrics paper"),
        ({"metrics": "vibes"}, "vibes is unknown"),
        ({"methods": None, "run": tmp_path / "gone"}, "gone does not exist"),
    ):
        with pytest.raises(UserError, match=words) as refused:
            evaluate.evaluate(dataclasses.replace(SMALL, **options))
        assert "\n" not in str(refused.value)


def test_bksdm_runs_in_its_own_space(compared, tmp_path):
    cfg = Pruning(budget=0.7, limit=24, batch_size=8, out=tmp_path / "bksdm", device="cpu")
    evaluate.prune("bksdm", cfg)
    tensors, meta = load_tensors(tmp_path / "bksdm" / "codes.safetensors")
    pipeline = APTPPipeline.from_pretrained(tmp_path / "bksdm", "cpu")
    assert meta["depth"] == "all" and pipeline.space.depth == "all"
    macs = measure_macs(pipeline.teacher.unet, pipeline.space, latent_size=8, text_tokens=20)
    ratio = macs(tensors["codes"]).item() / macs.dense
    assert 0.7 * 0.99 <= ratio <= 0.7 + 1e-9
