"""The comparison: its cells, what a variant changes, and going on after a kill."""

import csv
import dataclasses
import json
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from small_data import make_folder

import compare
import evaluate
import finetune
from common.errors import UserError
from common.files import load_tensors, read_json, write_json
from compare import parse_method, parse_tuning, read_cells
from evaluation.tables import write_tables
from macs import measure_macs
from prune_unet import load_expert
from run import as_json
from sample import APTPPipeline
from targets.images import load_target

SMALL = compare.Config(
    methods="dense,random",
    budget=0.7,
    num_experts=2,
    limit=24,
    images=4,
    steps=2,
    tuning="1",
    warmup_steps=1,
    joint_steps=1,
    batch_size=16,
    device="cpu",
)


@pytest.fixture(scope="module", autouse=True)
def few_rows():
    """Distances over 8 rows of a split, experts refitted on 8 images, MACs in the place of time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "DISTANCE_ROWS", 8)
        patch.setattr("run.time_experts", lambda unet, codes, cost, place: cost(codes))
        patch.setattr(compare, "finetuning_of", lambda _: finetune.Finetuning(refit_images=8))
        yield


def cells_of(text: str) -> list[list[str]]:
    """The rows of a Markdown table, without the line below its head."""
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows if set("".join(row)) - set("-: ")]


def snapshot(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


# ---- methods and variants ----


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("aptp", {}),
        ("aptp:no-center", {"center": False}),
        ("aptp:experts-16", {"num_experts": 16}),
        ("aptp:num-experts-16", {"num_experts": 16}),
        ("aptp:lr-0.5", {"lr": 0.5}),
        ("aptp:predictor-rate-1", {"predictor_rate": 1.0}),
        ("aptp:eps-1e-3", {"eps": 0.001}),
        ("aptp:transport", {"distill": False}),
        ("aptp:contrastive", {"transport": False, "distill": False}),
        ("aptp:depth-paper+no-importance-start", {"depth": "paper", "importance_start": False}),
        ("aptp:random-clusters", {}),
        ("uni-arch:depth-none", {"num_experts": 1, "depth": "none"}),
        ("bksdm", {"num_experts": 1}),
        ("routed-sp", {}),
        ("routed-obs", {}),
    ],
)
def test_a_variant_changes_what_it_names_and_nothing_else(name, changed, tmp_path):
    plain = as_json(parse_method("aptp").settings(SMALL, 3, tmp_path))
    own = as_json(parse_method(name).settings(SMALL, 3, tmp_path))
    assert {k: v for k, v in own.items() if v != plain[k]} == changed
    assert plain["seed"] == 3 and plain["budget"] == 0.7 and plain["limit"] == 24


def test_every_switch_of_the_method_is_a_variant():
    """Whatever switches train.py has: turned over by the words of its command line."""
    for field in dataclasses.fields(compare.Pruning):
        if isinstance(field.default, bool) and field.name not in compare.OF_ALL:
            word = ("no-" if field.default else "") + field.name.replace("_", "-")
            assert parse_method(f"aptp:{word}").changes == {field.name: not field.default}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"methods": "aptp,magic"}, ("magic is unknown", "uni-arch")),
        ({"methods": " , "}, ("names none",)),
        ({"methods": "aptp:magic"}, ("aptp:magic", "no setting", "no-center", "by-group")),
        ({"methods": "aptp:no-center+"}, ("no setting",)),
        ({"methods": "aptp:center"}, ("center is no setting",)),  # it is on already
        ({"methods": "aptp:experts-many"}, ("experts-many",)),
        ({"methods": "aptp:experts-0"}, ("--num-experts 0",)),
        ({"methods": "aptp:budget-0.5"}, ("no setting",)),  # one for all methods
        ({"methods": "sp:by-group"}, ("no setting",)),  # nothing is learned of clusters
        ({"protocol": "none"}, ("none is unknown", "both")),
        ({"metrics": "vibes"}, ("vibes is unknown",)),
        ({"images": 1}, ("--images 1",)),
    ],
)
def test_nonsense_is_one_line_before_anything_is_loaded(options, words, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "prepare", lambda cfg: pytest.fail("something was loaded"))
    with pytest.raises(UserError) as refused:
        compare.compare(dataclasses.replace(SMALL, out=tmp_path / "out", **options))
    line = str(refused.value)
    assert "\n" not in line and all(word in line for word in words), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("distances_only", [False, True])
def test_a_target_of_one_image_will_do_where_no_image_is_scored(
    tmp_path, monkeypatch, distances_only
):
    rows = [*((f"train/{k}.jpg", "x") for k in range(4)), ("validation/9.jpg", "y")]
    make_folder(tmp_path / "data", rows)
    monkeypatch.setattr("run.load_teacher", Mock(side_effect=UserError("loaded")))
    where = {"target": str(tmp_path / "data"), "out": tmp_path / "out"}
    words = "loaded" if distances_only else "validation split of data has 1 image"
    with pytest.raises(UserError, match=words):
        compare.compare(dataclasses.replace(SMALL, distances_only=distances_only, **where))


# ---- cells with images ----


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison of two methods that need no training."""
    folder = tmp_path_factory.mktemp("compare")
    compare.compare(dataclasses.replace(SMALL, out=folder))
    return folder


def test_every_cell_is_an_ordinary_run_at_the_budget(compared):
    folders = sorted(path.name for path in compared.iterdir() if path.is_dir())
    assert folders == ["dense-0", "random-0", "random-0@2"]
    pipeline = APTPPipeline.from_pretrained(compared / "random-0@2", "cpu")
    summary = read_json(compared / "random-0@2" / "summary.json")
    assert summary["method"] == "random" and summary["num_experts"] == 1
    assert 0.7 * 0.99 <= summary["macs_ratio_mean"] <= 0.7
    assert pipeline.route(["a giraffe", "a bus"]) == [0, 0]
    _, meta = load_expert(finetune.expert_path(pipeline.run, 0))
    assert meta["settings"]["steps"] == 2  # as many as both of APTP's experts together
    dense = APTPPipeline.from_pretrained(compared / "dense-0", "cpu")
    codes = finetune.load_codes(dense.run, dense.space)
    assert codes.shape[0] == 1 and codes.min() == 1
    assert not dense.is_finetuned(0)
    weights = dense.teacher.unet.state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in dense.unet(0).state_dict().items())


def test_cells_hold_the_scores_of_sets_and_of_captions(compared):
    lines = (compared / "cells.jsonl").read_text(encoding="utf-8").splitlines()
    cells = {cell["method"]: cell for cell in map(json.loads, lines)}
    assert set(cells) == {"dense", "random"} and len(lines) == 2
    assert cells["random"]["steps_in_all"] == 2 and cells["dense"]["steps_in_all"] == 0
    for method, run in (("dense", "dense-0"), ("random", "random-0@2")):
        scores = read_json(compared / run / "report" / "metrics.json")["rows"]
        assert cells[method]["scores"] == scores and len(scores) == 2
        for row in cells[method]["scores"]:
            single = row["captions"]
            assert {len(single[name]) for name in ("r1", "r5", "style")} == {4}
            assert len(single["distance"]) == 8 and 0 <= row["r1"] <= row["r5"] <= 1
            for name, values in single.items():
                assert row[name] == pytest.approx(sum(values) / len(values), rel=5e-3)


def test_tables_are_made_from_the_cells(compared):
    text = (compared / "tables.md").read_text(encoding="utf-8")
    assert "Table 1" in text and "nan" not in text
    assert {row[0] for row in cells_of(text)[1:]} == {"dense", "random"}
    times = {
        row[0]: float(row[cells_of(text)[0].index("latency ratio")]) for row in cells_of(text)[1:]
    }
    assert times == {"random": pytest.approx(0.7, abs=0.01), "dense": 1}
    with (compared / "tables.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 and {row["table"] for row in rows} == {"Table 1"}
    by_hand = {
        (row["method"], row["split"]): row["frechet"]
        for cell in read_cells(compared).values()
        for row in cell["scores"]
    }
    for row in rows:
        assert float(row["frechet"]) == by_hand[row["method"], row["split"]]


def test_what_is_done_is_not_done_again(compared, monkeypatch):
    def fail(*arguments, **options):
        raise AssertionError("it was done before")

    for where, name in (
        (APTPPipeline, "from_pretrained"),
        (finetune, "finetuning_step"),
        (compare, "prepare"),
    ):
        monkeypatch.setattr(where, name, fail)
    files = ("tables.md", "tables.csv", "cells.jsonl")
    before = [(compared / name).read_bytes() for name in files]
    compare.compare(dataclasses.replace(SMALL, out=compared))
    compare.compare(dataclasses.replace(SMALL, out=compared, methods="random"))
    compare.compare(dataclasses.replace(SMALL, out=compared, distances_only=True))
    assert [(compared / name).read_bytes() for name in files] == before


@pytest.mark.parametrize(
    ("options", "words"), [({"images": 5}, "images: 4, now 5"), ({"lr": 0.5}, "lr: 0.1, now 0.5")]
)
def test_a_comparison_with_other_settings_is_refused(compared, options, words):
    with pytest.raises(UserError, match=words):
        compare.compare(dataclasses.replace(SMALL, out=compared, **options))


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "aptp-0@100").mkdir()  # such as a comparison of an earlier version
    with pytest.raises(UserError, match="holds no comparison; choose another --out"):
        compare.compare(dataclasses.replace(SMALL, out=tmp_path))


# ---- cells without images, and kills ----

ALONE = dataclasses.replace(SMALL, tuning="cut", distances_only=True)
VARIANTS = ("aptp", "aptp:by-group", "aptp:random-clusters", "uni-arch")


@pytest.fixture(scope="module")
def ablations(tmp_path_factory):
    """Controls and one code, as cut; killed three times on the way."""
    folder = tmp_path_factory.mktemp("ablations")
    cfg = dataclasses.replace(ALONE, out=folder, methods=",".join(VARIANTS))
    done = []
    for name, number in (("write_results", 2), ("measured_ratio", 1), ("distances_of", 5)):
        with pytest.MonkeyPatch.context() as patch:
            original, calls = getattr(compare, name), []

            def killed(*args, original=original, calls=calls, number=number, **kwargs):
                calls.append(args)
                if len(calls) == number:
                    raise KeyboardInterrupt
                return original(*args, **kwargs)

            patch.setattr(compare, name, killed)
            with pytest.raises(KeyboardInterrupt):
                compare.compare(cfg)
        done.append((len(read_cells(folder)), snapshot(folder)))
    compare.compare(cfg)
    return folder, done


def test_a_killed_comparison_goes_on_where_it_was(ablations):
    """Killed in the second method's pruning, before its time, and in the fourth's first scores."""
    folder, [(first, _), (second, _), (third, before)] = ablations
    assert (first, second, third) == (1, 1, 3)  # cells that the kills left
    after = snapshot(folder)
    assert before.items() <= after.items() and len(read_cells(folder)) == 4
    alone = dataclasses.replace(ALONE, out=folder / "again", methods="aptp:by-group")
    compare.compare(alone)  # the method in whose pruning the kill came, undisturbed
    codes = [
        load_tensors(path / "aptp-by-group-0" / "codes.safetensors")[0]["codes"]
        for path in (folder, folder / "again")
    ]
    assert torch.equal(*codes)


def test_cells_without_images_say_what_codes_are_worth(ablations):
    """Where a control gives the experts, they are the experts, whatever the router says."""
    folder, _ = ablations
    cells = {key[0]: cell for key, cell in read_cells(folder).items()}
    assert list(cells) == ["aptp", "aptp:by-group", "aptp:random-clusters", "uni-arch"]
    data = load_target("emoji", "train", limit=24)
    for name, cell in cells.items():
        assert cell["soft_ratio"] == pytest.approx(0.7, rel=0.01)
        assert sum(cell["shares"]) == pytest.approx(1) and cell["tuning"] == "cut"
        assert ("agreement" in cell) == (name == "aptp")
        assert cell["processor_seconds"]["pruning"] > 0
        train, validation = cell["scores"]
        assert train["split"] == "train" and validation["split"] == "validation"
        assert train["distance"] > 0 and "r1" not in train
        assert ("distance_exchanged" in train) == (cell["num_experts"] > 1)
        assert train["macs_ratio"] == pytest.approx(0.7, rel=0.01)
        assert cell["latency_ratio"] == pytest.approx(train["macs_ratio"])  # by the prompts' shares
    groups = sorted(set(data.groups))
    assert cells["aptp:by-group"]["shares"] == pytest.approx(
        [data.groups.count(group) / 24 for group in groups]
    )
    assigned = read_json(folder / "aptp-by-group-0" / "assignments.json")
    assert [groups[i] for i in assigned["train"]] == data.groups
    held_out = load_target("emoji", "validation")
    known = [k for k, group in enumerate(held_out.groups) if group in groups]
    assert known and all(groups[assigned["validation"][k]] == held_out.groups[k] for k in known)
    text = (folder / "tables.md").read_text(encoding="utf-8")
    rows = cells_of(text[text.index("As cut") :])
    distances = [float(row[rows[0].index("distance ↓")]) for row in rows[1:]]
    assert len(distances) == 4 and distances == sorted(distances)


def test_cells_outlive_their_run_folders(ablations, tmp_path):
    folder, _ = ablations
    (tmp_path / "cells.jsonl").write_bytes((folder / "cells.jsonl").read_bytes())
    assert read_cells(tmp_path) == read_cells(folder)
    newer = read_cells(folder)["aptp", 0, "cut"] | {"perplexity": 9.0}
    write_json(tmp_path / "aptp-0" / "cell.json", newer)
    assert read_cells(tmp_path)["aptp", 0, "cut"] == newer and len(read_cells(tmp_path)) == 4
    (tmp_path / "cells.jsonl").write_text('{"method": "aptp", "se')
    with pytest.raises(UserError, match=r"cells\.jsonl is damaged; delete it"):
        read_cells(tmp_path)


def test_steps_are_equal_for_each_expert_or_in_all(tmp_path, monkeypatch):
    """With stand-ins: 8 experts for 100 steps each are as many as one for 800."""
    made = []
    monkeypatch.setattr(
        compare,
        "prune",
        lambda method, cfg, *_, **__: 1 if method.base == "dense" else cfg.num_experts,
    )
    monkeypatch.setattr(compare, "tuned", lambda run, tuning, cfg: run)
    monkeypatch.setattr(
        compare, "measure", lambda cfg, run, name, seed, tuning: made.append((name, seed, tuning))
    )
    cfg = dataclasses.replace(SMALL, num_experts=8, tuning="cut,refit+100,shared+9", seeds=2)
    cfg = dataclasses.replace(cfg, methods="aptp,sp,aptp:experts-4,aptp:experts-10,dense")
    cfg = dataclasses.replace(cfg, protocol="both", seed=5)
    compare.compare(dataclasses.replace(cfg, out=tmp_path / "out"))
    wanted = {
        "aptp": ("cut", "refit+100", "shared+9"),
        "sp": ("cut", "refit+100", "refit-4096+800", "shared+9"),
        "aptp:experts-4": ("cut", "refit+100", "refit-1024+200", "shared+9"),
        "aptp:experts-10": ("cut", "refit+100", "refit-409+80", "shared+9"),
        "dense": ("cut",),
    }
    one = [(name, tuning) for name, tunings in wanted.items() for tuning in tunings]
    found = [(name, seed, str(tuning)) for name, seed, tuning in made]
    assert found == [(name, seed, tuning) for seed in (5, 6) for name, tuning in one]


@pytest.mark.parametrize("name", ["cut", "refit", "refit-64", "100", "refit-64+3", "shared+8"])
def test_a_tuning_has_one_name(name):
    assert str(parse_tuning(name)) == name


@pytest.mark.parametrize("name", ["shared", "refit-", "+100", "100+refit", "refit+shared+3", "-1"])
def test_an_unknown_tuning_is_refused(name):
    with pytest.raises(UserError, match=r"--tuning .* is unknown; write cut, refit"):
        parse_tuning(name)


# ---- tables ----


def cell(method: str, steps: int, experts: int, r1: float) -> dict:
    row = {"method": method, "split": "validation", "r1": r1, "frechet": 1.0, "captions": {}}
    wrong = row | {"method": f"{method}-exchanged"}
    where = {"seed": 0, "budget": 0.5, "tuning": str(steps), "steps_in_all": steps * experts}
    where["processor_seconds"] = {"pruning": 2.0}
    return {"method": method, **where, "scores": [row, wrong]}


def test_tables_3_and_5_come_with_their_cells(tmp_path):
    cells = [cell("aptp", 50, 2, 0.6), cell("uni-arch", 100, 1, 0.4)]
    write_tables(tmp_path, cells)
    text = (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert "Table 3" not in text and "Table 5" not in text
    wanted = ["aptp", "aptp-exchanged", "uni-arch", "uni-arch-exchanged"]
    assert [row[0] for row in cells_of(text)[1:]] == wanted
    cells += [cell("aptp:contrastive", 50, 2, 0.3), cell("aptp", 100, 2, 0.7)]
    write_tables(tmp_path, cells)
    text = (tmp_path / "tables.md").read_text(encoding="utf-8")
    third = text[text.index("Table 3") : text.index("Table 5")]
    names = [row[0] for row in cells_of(third)[1:]]
    assert names == ["uni-arch", "aptp:contrastive", "aptp", "aptp"]


def test_bksdm_runs_in_its_own_space(tmp_path):
    method = parse_method("bksdm")
    compare.prune(method, method.settings(SMALL, 0, tmp_path / "bksdm"), {})
    tensors, meta = load_tensors(tmp_path / "bksdm" / "codes.safetensors")
    pipeline = APTPPipeline.from_pretrained(tmp_path / "bksdm", "cpu")
    assert meta["depth"] == "all" and pipeline.space.depth == "all"
    macs = measure_macs(pipeline.teacher.unet, pipeline.space, latent_size=8, text_tokens=20)
    ratio = macs(tensors["codes"]).item() / macs.dense
    assert 0.7 * 0.99 <= ratio <= 0.7 + 1e-9
