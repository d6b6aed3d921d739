"""Kept cells as the tables of the page."""

import shlex
import shutil

import numpy as np
import pytest

import compare
from common.errors import UserError
from common.files import read_json, write_json
from compare import parse_tuning
from docs import results
from settings import read_with_preset


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A folder in the place of docs/results/."""
    monkeypatch.setattr(results, "RESULTS", tmp_path / "kept")
    (tmp_path / "kept").mkdir()
    return tmp_path / "runs"


def finish(folder, method, seed, distance, tuning="cut", hits=(1, 0), steps=0):
    """A cell as compare.py leaves it."""
    captions = {"distance": [distance] * 2, "r1": list(hits)}
    scores = [
        {"method": method, "split": split, "macs_ratio": 0.5, "captions": captions}
        | {"distance": distance, "r1": 0.5}
        for split in ("train", "validation")
    ]
    where = {"method": method, "seed": seed, "tuning": tuning, "steps_in_all": steps}
    costs = {"processor_seconds": {"pruning": 60.0, "tuning": 7.0}, "latency_ratio": 0.6}
    costs["num_experts"] = 1 if method == "uni-arch" else 8
    cell = where | costs | {"scores": scores}
    write_json(folder / f"{method}-{seed}@{tuning}" / "cell.json", cell)


def lines_of(table):
    """The lines of a Markdown table, each a list of its words, its head left out."""
    lines = [line for line in table.splitlines() if line.startswith("|")][2:]
    return [[word.strip() for word in line.strip("|").split("|")] for line in lines]


def test_cells_are_kept_in_one_file(kept):
    """A cell that was made anew takes the place of the old one; others stay."""
    half, short = kept / "compare-emoji-0.5", kept / "compare-emoji-short-0.64"
    finish(half, "sp", 0, 0.4)
    finish(half, "aptp", 0, 0.1)
    finish(short, "aptp", 0, 0.3)
    assert results.keep(kept) == 3
    finish(half, "aptp", 0, 0.2)
    finish(half, "aptp", 1, 0.4)
    shutil.rmtree(short)
    assert results.keep(kept) == 3 and len(results.kept_cells()) == 4
    page = "a\n<!-- table scores: 0.5 of the MACs -->\nold\n<!-- end -->\nb\n"
    page += "<!-- table as cut: 0.64 of the MACs, short -->\n<!-- end -->"
    text = results.filled(page)
    assert results.filled(text) == text and text.startswith("a\n<!--") and "old" not in text
    own, other = text.split("\nb\n")
    first, second = lines_of(own)
    assert first[:8] == ["aptp", "cut", "0", "2", "0.50", "0.60", "67", "0.3000 ± 0.1414"]
    assert second[:8] == ["sp", "cut", "0", "1", "0.50", "0.60", "67", "0.4000"]
    assert lines_of(other)[0][5] == "0.3000"


def test_distances_alone_do_not_replace_scored_images(kept):
    folder = kept / "compare-emoji-0.5"
    cell = folder / "aptp-0@cut" / "cell.json"

    def distance() -> float:
        (found,) = results.kept_cells().values()
        return found["scores"][0]["distance"]

    for value, images, expected in (
        (0.1, False, 0.1),
        (0.2, False, 0.2),
        (0.3, True, 0.3),
        (0.4, False, 0.3),
        (0.5, True, 0.5),
    ):
        finish(folder, "aptp", 0, value)
        made = read_json(cell)
        if not images:
            made["scores"] = [{k: v for k, v in row.items() if k != "r1"} for row in made["scores"]]
            write_json(cell, made)
        results.keep(kept)
        assert distance() == expected


def test_a_cell_with_fewer_sets_of_images_does_not_replace_one_with_more(kept):
    """Such as wrong experts' images, in a folder of their own."""
    finish(kept / "wrong" / "compare-emoji-0.5", "aptp", 0, 0.1)
    path = kept / "wrong" / "compare-emoji-0.5" / "aptp-0@cut" / "cell.json"
    cell = read_json(path)
    cell["scores"] += [row | {"method": "aptp-exchanged"} for row in cell["scores"]]
    cell["scores"][0]["captions"]["r5"] = [1.0, 0.0]  # which is not compared
    write_json(path, cell)
    finish(kept / "z" / "compare-emoji-0.5", "aptp", 0, 0.2)
    assert results.keep(kept) == 1
    (found,) = results.kept_cells().values()
    assert [row["distance"] for row in found["scores"]] == [0.1] * 4
    assert set(found["scores"][0]["captions"]) == {"distance", "r1"}


def test_a_table_that_does_not_exist_is_refused(kept):
    with pytest.raises(UserError, match=r"--keep runs"):
        results.filled("")
    finish(kept / "compare-emoji-0.5", "aptp", 0, 0.1)
    results.keep(kept)
    with pytest.raises(UserError, match=r"no table scores: 0\.9.*0\.5 of the MACs"):
        results.filled("<!-- table scores: 0.9 of the MACs -->\n<!-- end -->")


def test_intervals_are_those_of_means_of_independent_captions():
    """Against the closed form: one seed, and seeds alike but for a shift."""
    draw = np.random.default_rng(1)
    captions = draw.normal(0.3, 1.0, 400)
    mean, low, high = results.interval(captions[None])
    error = captions.std() / 20
    assert mean == pytest.approx(captions.mean())
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.1 * error)
    shifts = np.linspace(-2, 2, 30)
    _, low, high = results.interval(captions + shifts[:, None])
    wider = np.hypot(error, shifts.std() / 30**0.5)
    assert high - low == pytest.approx(2 * 1.96 * wider, rel=0.1)


def test_only_methods_tuned_alike_are_compared(kept):
    folder = kept / "compare-emoji-0.5"
    finish(folder, "aptp", 0, 0.1, "refit+100", (1, 1), steps=800)
    finish(folder, "uni-arch", 0, 0.3, "refit-4096+800", (1, 0), steps=800)
    finish(folder, "uni-arch", 1, 0.9, "refit-4096+800", (0, 0), steps=800)  # a seed too many
    finish(folder, "sp", 0, 0.3, "800", steps=800)
    finish(folder, "norm", 0, 0.3, "refit-4096+100", steps=100)
    results.keep(kept)
    found = lines_of(results.filled("<!-- table differences: 0.5 of the MACs -->\n<!-- end -->"))
    (line,) = found
    assert line[:4] == ["aptp", "refit+100", "uni-arch, refit-4096+800", "1"]
    assert line[4:6] == ["**-0.2000 [-0.2000, -0.2000]**"] * 2
    assert line[6].startswith("+0.500 [+0.000")  # not clear


def test_a_score_that_fewer_seeds_have_says_so(kept):
    folder = kept / "compare-emoji-0.5"
    for method, distance in (("aptp", 0.1), ("uni-arch", 0.3)):
        for seed in (0, 1):
            finish(folder, method, seed, distance, "refit")
    path = folder / "aptp-1@refit" / "cell.json"
    cell = read_json(path)
    for row in cell["scores"]:
        del row["captions"]["r1"]
    write_json(path, cell)
    results.keep(kept)
    (line,) = lines_of(results.filled("<!-- table differences: 0.5 of the MACs -->\n<!-- end -->"))
    assert line[3] == "2" and line[4] == "**-0.2000 [-0.2000, -0.2000]**"
    assert line[6] == "+0.000 [+0.000, +0.000] (1)"


def test_two_comparisons_are_held_against_each_other(kept):
    """Method by method, over the seeds that both have: here seed 1 alone."""
    for seed, distance in ((0, 0.9), (1, 0.1)):
        finish(kept / "compare-emoji-cost-latency-0.5", "aptp", seed, distance, "refit")
    for method, seed in (("aptp", 1), ("aptp", 2), ("sp", 1)):
        finish(kept / "compare-emoji-0.5", method, seed, 0.4, "refit", (0, 0))
    results.keep(kept)
    which = "0.5 of the latency less 0.5 of the MACs"
    found = lines_of(results.filled(f"<!-- table differences: {which} -->\n<!-- end -->"))
    (line,) = found
    assert line[:4] == ["aptp", "refit", "aptp, refit", "1"]
    assert line[4] == "**-0.3000 [-0.3000, -0.3000]**" and line[6].startswith("+0.500")


def test_figures_show_what_was_refitted_on_as_many_images(kept):
    for budget in ("cost-latency-0.5", "0.5", "depth-paper-0.5"):
        finish(kept / f"compare-emoji-{budget}", "aptp", 0, 0.2, "refit")
    for tuning in ("refit", "refit-4096"):
        finish(kept / "compare-emoji-0.64", "uni-arch", 0, 0.3, tuning)
    results.keep(kept)
    axes = results.by_latency(results.comparisons()).axes
    labels = [f"{name}" for name in axes[0].get_legend_handles_labels()[1]]
    assert sorted(labels) == [
        *("aptp, budget of MACs", "aptp, budget of MACs, depth paper", "aptp, budget of latency"),
        "uni-arch, budget of MACs",
    ]
    assert all(len(ax.containers) == 4 for ax in axes)


@pytest.mark.parametrize("path", results.PAGES, ids=lambda path: path.name)
def test_a_page_is_that_of_the_cells(path):
    page = path.read_text(encoding="utf-8")
    assert results.MARK.search(page) and results.filled(page) == page


def cells_of(line: str) -> set[tuple[str, str, int, str]]:
    """Comparison, method, seed and tuning of all cells that a line of cells.txt makes."""
    cfg = read_with_preset(compare.Config, shlex.split(line), "")
    name = cfg.out.name if cfg.out else f"compare-emoji-{cfg.budget:g}"
    experts = {cell["method"]: cell["num_experts"] for cell in results.kept_cells().values()}
    return {
        (name, method, seed, str(parse_tuning(tuning).of_method(experts[method], 8, protocol)))
        for method in cfg.methods.split(",")
        for seed in range(cfg.seed, cfg.seed + cfg.seeds)
        for tuning in cfg.tuning.split(",")
        for protocol in compare.PROTOCOLS[cfg.protocol]
    }


def test_one_command_makes_all_cells():
    lines = (results.RESULTS / "cells.txt").read_text(encoding="utf-8").splitlines()
    assert set().union(*map(cells_of, lines)) == set(results.kept_cells())
