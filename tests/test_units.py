"""What `python -m bench.units` and `python -m bench.kinds` print."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import LAYOUTS
from diffusers import UNet2DConditionModel

from bench import kinds, units
from common.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def test_command_prints_one_json_object(monkeypatch, capsys):
    command = ["units.py", "--unet", "sd21", "--resolution", "768", "--json"]
    monkeypatch.setattr(sys, "argv", command)
    units.main()
    found = json.loads(capsys.readouterr().out)
    counts = [found[key] for key in ("units", "groups", "heads", "ff", "depth")]
    assert counts == [1620, 704, 390, 512, 14]
    assert found["unet"] == "sd21" and found["resolution"] == 768
    assert found["params"] == 865_910_724
    assert round(found["macs"] / 1e9, 2) == 1074.55
    assert abs(found["macs_paper"] / 1384.2e9 - 1) < 0.002
    assert all(type(found[key]) is int for key in ("macs", "macs_paper", "params"))
    assert 0 < found["floor"] < 1


def test_command_prints_a_table_whose_rows_add_up(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["units.py", "--unet", "pocket", "--depth", "none"])
    units.main()
    lines = capsys.readouterr().out.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("level"))
    total = next(i for i, line in enumerate(lines) if line.startswith("total"))
    rows = [line.replace(",", "").split() for line in lines[header + 1 : total + 1]]
    for column in range(1, 7):  # counts and parameters
        assert sum(int(row[column]) for row in rows[:-1]) == int(rows[-1][column])
    assert int(rows[-1][5]) == 0  # no depth units
    assert abs(sum(float(row[7]) for row in rows[:-1]) - float(rows[-1][7])) < 0.1
    assert "lowest budget" in lines[total + 1]


# ---- kinds of operators ----


@pytest.fixture
def small(tmp_path) -> str:
    UNet2DConditionModel(**LAYOUTS["sd2"]).save_config(tmp_path)
    return str(tmp_path)


def test_kinds_add_up_to_the_whole_and_experts_stand_beside_it(small, monkeypatch, capsys):
    command = ["kinds.py", "--unet", small, "--device", "cpu", "--rounds", "1", "--budget", "0.6"]
    monkeypatch.setattr(sys, "argv", command)
    threads = torch.get_num_threads()
    kinds.main()
    assert torch.get_num_threads() == threads
    _, heads, _, *rows = (
        [word.strip() for word in line.split("|")] for line in capsys.readouterr().out.splitlines()
    )
    assert heads[1:-1] == ["kind", "dense", "share", "depth none", "depth paper", "depth all"]
    *found, whole = rows
    assert {row[1] for row in found} == {*kinds.KINDS, kinds.REST}  # none is empty; no GPU's gap
    assert whole[1] == kinds.WHOLE and float(whole[3]) == 1
    assert sum(float(row[3]) for row in found) == pytest.approx(1, abs=0.01)
    total = sum(float(row[2].removesuffix(" ms")) for row in found)
    assert total == pytest.approx(float(whole[2].removesuffix(" ms")), abs=0.05)
    assert all(float(ratio) >= 0 for row in rows for ratio in row[4:-1])


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("aten::cudnn_convolution", "convolutions"),
        ("aten::mkldnn_convolution", "convolutions"),
        ("aten::_scaled_dot_product_flash_attention", "attention"),
        ("aten::_softmax", "attention"),
        ("aten::native_group_norm", "normalisation"),
        ("aten::addmm", "matrix products"),
        ("aten::bmm", "matrix products"),
        ("aten::silu", "activations"),
        ("aten::add_", "sums and products"),
        ("aten::cat", "copies, upsampling"),
        ("aten::copy_", "copies, upsampling"),
        ("aten::upsample_nearest2d", "copies, upsampling"),
        ("aten::expand", kinds.REST),
        ("cudaLaunchKernel", kinds.REST),
    ],
)
def test_an_operator_has_a_kind(operator, kind):
    assert kinds.kind_of(operator) == kind


def test_shares_and_ratios_are_medians_over_rounds_of_what_took_turns():
    rounds = [
        {"dense": {"attention": 2 * slow, kinds.WHOLE: 4 * slow}, "all": {"attention": 1 * slow}}
        for slow in (1.0, 2.0, 30.0)
    ]
    rounds = [{k: kinds.Counter(v) for k, v in taken.items()} for taken in rounds]
    assert kinds.table(rounds)[0] == ["attention", "4000.00 ms", "0.500", "0.50"]


def test_a_budget_that_widths_alone_cannot_meet_is_refused(small):
    cfg = kinds.Config(unet=small, device="cpu", budget=0.01)
    with pytest.raises(UserError, match=r"--budget 0.01 cannot be reached"):
        kinds.measure(cfg)
