"""Kept cells and the ladder as tables."""

import shutil

import pytest

from common.errors import UserError
from common.files import write_json
from docs import results


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A folder in the place of docs/results/."""
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    return tmp_path


def make(folder, name, r1, experts=8):
    write_json(folder / name / "summary.json", {"num_experts": experts})
    row = {"method": name.split("-")[0], "split": "train", "distance": 0.2, "r1": r1}
    write_json(folder / name / "report" / "metrics.json", {"rows": [row]})


def lines_of(text, title):
    """The lines of the table with a title, each a list of its words, its head left out."""
    own = text.split(f"### {title}\n")[1].split("###")[0].strip().splitlines()
    return [[word.strip() for word in line.strip("|").split("|")] for line in own[2:]]


def test_each_comparison_has_a_table_of_its_own(kept):
    for folder, r1 in (
        ("compare-emoji-0.5", 0.5),
        ("compare-emoji-0.64", 0.6),
        ("compare-emoji-16-experts-0.5", 0.7),
        ("compare-emoji-4-experts-0.5", 0.8),
    ):
        make(kept / folder, "aptp-0@100", r1, experts=4 if "4-" in folder else 8)
    make(kept / "compare-emoji-0.5", "aptp-1@100", 0.7)
    text = results.tables(results.cells())
    titles = [line for line in text.splitlines() if line.startswith("###")]
    assert titles == [
        "### 0.64 of the MACs",
        "### 0.5 of the MACs",
        "### 0.5 of the MACs: 4 experts",
        "### 0.5 of the MACs: 16 experts",
    ]
    (line,) = lines_of(text, "0.5 of the MACs")
    assert line[:4] == ["aptp", "train", "2", "800"] and line[-1] == "0.600 ± 0.141"
    assert lines_of(text, "0.5 of the MACs: 4 experts")[0][3:] == ["400", "0.2000", "0.800"]


def test_a_ladder_has_one_seed_and_then_means_over_several(kept):
    seeds = (("a", 0, 0.4), ("a", 1, 0.1), ("a", 2, 0.1), ("b", 0, 0.3), ("c", 1, 0.2))
    for row, seed, distance in seeds:
        values = {"row": row, "seed": seed, "distance": distance, "soft_ratio": 0.5}
        write_json(kept / "ladder-0.5" / f"{row}-{seed}.json", values)
    one, several = results.ladders()  # c was measured with seed 1 only: in neither
    title = "Ladder at 0.5 of the MACs, training captions"
    assert [line[:3] for line in lines_of(one, f"{title}, seed 0")] == [
        ["b", "1", "0.3000"],
        ["a", "1", "0.4000"],
    ]
    (line,) = lines_of(several, f"{title}, means over seeds")
    assert line == ["a", "3", "0.2000 ± 0.1732", "", "", "0.500 ± 0.000", "", ""]


def test_cells_of_comparisons_are_kept_in_one_file(kept, tmp_path):
    """A cell that was made anew takes the place of the old one; others stay."""

    def finish(name, method, seed, distance):
        row = {"method": method, "split": "train", "distance": distance, "captions": {"r1": [1]}}
        where = {"method": method, "seed": seed, "finetune_steps": 0, "steps_in_all": 0}
        cell = where | {"scores": [row], "soft_ratio": 0.5}
        write_json(tmp_path / "runs" / name / f"{method}-{seed}" / "cell.json", cell)

    finish("compare-emoji-0.5", "sp", 0, 0.4)
    finish("compare-emoji-0.5", "aptp", 0, 0.1)
    finish("compare-emoji-short-0.64", "aptp", 0, 0.3)
    assert results.keep(tmp_path / "runs") == 3
    finish("compare-emoji-0.5", "aptp", 0, 0.2)
    finish("compare-emoji-0.5", "aptp", 1, 0.4)
    shutil.rmtree(tmp_path / "runs" / "compare-emoji-short-0.64")
    assert results.keep(tmp_path / "runs") == 3
    assert len((kept / "cells.jsonl").read_text().splitlines()) == 4
    text = results.tables(results.cells())
    lines = lines_of(text, "0.5 of the MACs")
    assert [(line[0], line[2], line[-1]) for line in lines] == [
        ("aptp", "2", "0.3000 ± 0.1414"),
        ("sp", "1", "0.4000"),
    ]
    assert lines_of(text, "0.64 of the MACs: short")[0][-1] == "0.3000"


def test_no_cell_is_an_error(kept):
    with pytest.raises(UserError, match=r"--keep runs"):
        results.cells()
