"""T(a) in seconds, against clocks whose times are known; and the budget met in them."""

import dataclasses
import json
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import latency
import run
import train
from baselines import METHODS
from common.errors import UserError
from common.files import read_json, write_json
from evaluation.report import latency_table
from evaluation.tables import print_experts
from gates import binarize
from latency import Place, latency_model, measure_table, meet_in_time, read_table
from macs import measure_macs, meet_budget
from prune_unet import cut_in_place, find_units, meta_copy
from settings import Pruning
from teacher.shapes import load_shape, with_random_weights

SEEDS = st.integers(0, 2**31)
TINY = Place("cpu", "fp32", batch=1, pixels=64, latent_size=8, text_tokens=5)
POCKET = Place("cpu", "fp32", batch=2, pixels=64, latent_size=8, text_tokens=20)
LAUNCH = 2e-5  # seconds of each convolution and linear layer, whatever its width


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# ---- clocks whose times are known ----


def macs_clock(modules, call, place):
    """A nanosecond for each MAC."""
    args, kwargs = call
    found = []
    for module in modules:
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as count:
            module(*args, **kwargs)
        found.append(1e-9 * count.get_total_flops() / 2)
    return found


def seconds_of(module: nn.Module, step: int) -> float:
    """Of each layer with weights: a launch, and a time for each tile of `step` x `step` weights."""
    total = 0.0
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            tiles = [math.ceil(size / step) for size in layer.weight.shape[:2]]
            total += LAUNCH + 1e-9 * step**2 * math.prod(tiles)
    return total


def clock_of(step: int):
    """Linear in each width where `step` is 1, a staircase else."""
    return lambda modules, call, place: [seconds_of(module, step) for module in modules]


def noisy_clock(seed: int):
    """Times that have nothing to do with what is timed; parts may take longer than the whole."""
    draw = torch.Generator().manual_seed(seed)
    return lambda modules, call, place: (torch.rand(len(modules), generator=draw) + 0.1).tolist()


def seconds_of_experts(unet, space, codes, step):
    """What experts really take by that clock, (N,)."""
    found = []
    for code in codes:
        expert = meta_copy(unet)
        cut_in_place(expert, space, code)
        found.append(seconds_of(expert, step))
    return torch.tensor(found, dtype=torch.float64)


@pytest.fixture(scope="module")
def shape():
    return load_shape("pocket")


@pytest.fixture(scope="module")
def table_of(shape):
    """table_of(step): the pocket U-Net's, by the clock of that step."""
    made = {step: measure_table(shape, POCKET, clock_of(step)) for step in (1, 16)}
    return made.__getitem__


# ---- T(a) ----


def test_times_in_proportion_to_macs_give_macs(unet):
    """Soft gates and binary ones; one table for every depth."""
    table = measure_table(unet, TINY, macs_clock)
    for depth in ("paper", "all", "none"):
        space = find_units(unet, depth)
        macs = measure_macs(unet, space, latent_size=8, text_tokens=5)
        cost = latency_model(unet, space, table)
        soft = random(6, space.size, seed=1).double()
        codes = torch.cat([soft, binarize(soft - 0.5, space), torch.ones(1, space.size)])
        assert torch.allclose(cost(codes), 1e-9 * macs(codes), rtol=1e-9)
        assert cost.floor / cost.dense == pytest.approx(macs.floor / macs.dense)


@pytest.mark.parametrize(("step", "error"), [(1, 1e-6), (16, 0.03)])
def test_experts_take_what_the_table_says(shape, table_of, step, error):
    """To rounding where times are linear in widths; a staircase is met between its steps."""
    space = find_units(shape, "all")
    cost = latency_model(shape, space, table_of(step))
    codes = binarize(random(12, space.size, seed=0) - torch.linspace(0.1, 0.8, 12)[:, None], space)
    truth = seconds_of_experts(shape, space, codes, step)
    assert truth.min() < 0.6 * truth.max()
    assert torch.allclose(cost(codes), truth, rtol=error)
    assert cost.dense == pytest.approx(seconds_of(shape, step))
    smallest = seconds_of_experts(shape, space, cost.smallest()[None], step)
    assert cost.floor == pytest.approx(smallest.item())


@given(seed=SEEDS)
@settings(max_examples=8)
def test_no_gate_makes_an_expert_faster(smallest, seed):
    """Whatever the clock says; and the dense model is what was timed."""
    space = find_units(smallest, "all")
    table = measure_table(smallest, TINY, noisy_clock(seed))
    cost = latency_model(smallest, space, table)
    code = random(space.size, seed=seed).double().requires_grad_()
    cost(code).backward()
    assert (code.grad >= 0).all()
    binary = binarize(code.detach() - 0.5, space)
    opened = torch.maximum(binary, torch.eye(space.size))  # one more gate open in each row
    assert (cost(opened) >= cost(binary) * (1 - 1e-12)).all()
    whole = next(v for k, v in table["curves"].items() if k.startswith("UNet2D"))["seconds"]
    assert cost.dense == pytest.approx(max(whole[1], sum(whole) / 2))
    assert cost.floor >= 0


@given(seed=SEEDS)
@settings(max_examples=6)
def test_the_gradient_is_that_of_finite_differences(shape, table_of, seed):
    space = find_units(shape, "all")
    cost = latency_model(shape, space, table_of(16))
    code = random(space.size, seed=seed).double().requires_grad_()
    cost(code).backward()
    small = 1e-5 * torch.eye(space.size, dtype=torch.float64)
    around = (cost(code.detach() + small) - cost(code.detach() - small)) / 2e-5
    assert torch.allclose(code.grad, around, rtol=1e-4, atol=1e-9 * cost.dense)
    assert (code.grad > 0).float().mean() > 0.9


# ---- budgets ----


@pytest.mark.parametrize(("step", "budget"), [(1, 0.64), (16, 0.5), (16, 0.78)])
def test_experts_meet_the_budget_in_measured_time(shape, table_of, step, budget, monkeypatch):
    """To a per cent, though the table was told of a machine that saves a fifth less."""
    space = find_units(shape, "all")
    cost = latency_model(shape, space, table_of(step)).with_savings(0.8)
    logits, shares = torch.randn(3, space.size), torch.tensor([0.5, 0.3, 0.2])
    found, summary, experts = meet_in_time(
        shape,
        cost,
        table_of(step),
        device="cpu",
        budget=budget,
        logits=logits,
        shares=shares,
        clock=clock_of(step),
    )
    truth = seconds_of_experts(shape, space, found, step)
    ratio = (shares.double() @ truth).item() / seconds_of(shape, step)
    assert ratio == pytest.approx(budget, rel=0.01)
    assert summary["latency_ratio_mean"] == pytest.approx(ratio)
    assert [e["latency_measured"] for e in experts] == pytest.approx(truth.tolist())
    for expert in experts:
        assert expert["latency_predicted"] == pytest.approx(expert["latency_measured"], rel=0.03)


def test_every_method_meets_the_budget_in_measured_time(shape, table_of, setup_of, monkeypatch):
    """Whichever way the table errs about the smallest expert, so about all; three have one code."""
    monkeypatch.setattr(run, "meet_in_time", partial(meet_in_time, clock=clock_of(16)))
    torch.manual_seed(0)
    unet = with_random_weights(shape, torch.device("cpu"), torch.float32)
    given = setup_of(unet, 0.64, "all")
    smallest, dense = next(iter(table_of(16)["curves"].values()))["seconds"]
    for error in (0.1, 2.5):
        table = altered(table_of(16), {"seconds": [error * smallest, dense]})
        cost = latency_model(shape, given.space, table)
        setup = dataclasses.replace(given, cost=cost, table=table)
        for method in ("norm", "bksdm"):
            scores = METHODS[method](setup, setup.start_router())
            codes, summary, experts = run.final_codes(setup, scores, torch.tensor([0.5, 0.3, 0.2]))
            truth = seconds_of_experts(shape, setup.space, codes, 16)
            assert truth.tolist() == pytest.approx([0.64 * dense] * 3, rel=0.02)  # whole units
            assert truth.tolist() == pytest.approx([e["latency_measured"] for e in experts])
            assert summary["latency_ratio_mean"] == pytest.approx(truth[0].item() / dense)


# ---- the clock itself ----


def test_a_machine_that_changes_its_speed_does_not_move_ratios(monkeypatch):
    speed = iter(range(10**6))

    def turn(seconds, times, device):  # slower by a per mille with each turn
        return seconds * times * (1 + next(speed) / 1000)

    monkeypatch.setattr(latency, "prepare_run", lambda module, call, place: (module, 1))
    monkeypatch.setattr(latency, "turn", turn)
    half, quarter, whole = latency.time_in_turns([0.02, 0.01, 0.04], ((), {}), TINY)
    assert half / whole == pytest.approx(0.5, rel=0.005)
    assert quarter / whole == pytest.approx(0.25, rel=0.005)


def test_the_clock_tells_wide_from_narrow_and_leaves_the_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.device("meta"):
            modules = [nn.Linear(512, 8), nn.Linear(512, 4096)]
            call = ((torch.zeros(64, 512),), {})
        narrow, wide = latency.time_in_turns(modules, call, TINY)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert 0 < 4 * narrow < wide < 1


# ---- tables as files ----


def test_a_table_is_read_as_it_was_written(shape, table_of, tmp_path):
    write_json(tmp_path / "t.json", table_of(16))
    again = read_table(str(tmp_path / "t.json"))
    assert again == table_of(16)
    assert {"device", "torch", "diffusers"} <= again["machine"].keys()
    assert {"precision", "batch", "pixels", "runtime"} <= again["place"].keys()
    assert len(again["curves"]) < 40  # distinct shapes, of 62 parts
    assert all(len(curve["kept"]) <= 8 for curve in again["curves"].values())


def altered(table, curve):
    changed = json.loads(json.dumps(table))
    next(iter(changed["curves"].values())).update(curve)
    return changed


def test_what_is_no_table_is_refused_in_one_line(table_of, tmp_path):
    table, path = table_of(1), tmp_path / "t.json"
    place = {key: value for key, value in table["place"].items() if key != "batch"}
    for bad in (
        {"budget": 0.5},
        [1, 2],
        table | {"place": place},
        table | {"curves": {"x": 3}},
        altered(table, {"seconds": [1.0, math.nan]}),
        altered(table, {"seconds": [1.0]}),
        altered(table, {"kept": [1, 0]}),
    ):
        path.write_text(json.dumps(bad))
        with pytest.raises(UserError, match=r"no table of latency; make one with latency\.py$"):
            read_table(str(path))
    path.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_table(str(path))
    with pytest.raises(UserError, match=r"--cost latncy is neither macs, nor latency, nor a file"):
        read_table("latncy")


def test_a_table_of_another_unet_is_refused_in_one_line(shape, table_of, smallest):
    others = smallest, load_shape("sd15")
    for other in others:
        with pytest.raises(UserError, match=r"another U-Net: it does not know [^\n]*latency\.py$"):
            latency_model(other, find_units(other), table_of(1))
    larger = table_of(1) | {"place": table_of(1)["place"] | {"latent_size": 16}}
    with pytest.raises(UserError, match="another U-Net"):
        latency_model(shape, find_units(shape), larger)


def test_a_budget_below_the_floor_is_refused_in_seconds(shape, table_of):
    cost = latency_model(shape, find_units(shape), table_of(1))
    floor = cost.floor / cost.dense
    with pytest.raises(UserError, match=rf"{floor:.3f} is left \({cost.floor:.3g} of .* seconds\)"):
        meet_budget(torch.zeros(1, cost.space.size), torch.ones(1), cost, floor - 0.01)


def test_a_run_is_not_continued_on_another_device(table_of, tmp_path):
    table = table_of(1) | {"machine": {"device": "NVIDIA X"}}
    write_json(tmp_path / "latency.json", table)
    cfg = Pruning(cost="latency", device="cpu", out=tmp_path)
    with pytest.raises(UserError, match=r"measured on NVIDIA X, but .* one thread; [^\n]*--out$"):
        run.given_table(cfg)
    named = dataclasses.replace(cfg, cost=str(tmp_path / "latency.json"), out=tmp_path / "other")
    assert run.given_table(named) == table


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"runtime": "graph"}, "graph is for cuda"), ({"device": "mps"}, "cpu and cuda")],
)
def test_what_cannot_be_timed_is_refused(smallest, changes, words):
    with pytest.raises(UserError, match=words):
        measure_table(smallest, dataclasses.replace(TINY, **changes), clock_of(1))


# ---- the whole ----


def test_pruning_for_latency_from_measurement_to_summary(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(latency, "ROUNDS", 1)
    monkeypatch.setattr(latency, "TURN", 1e-9)
    cfg = Pruning(
        budget=0.6,
        cost="latency",
        num_experts=2,
        warmup_steps=1,
        joint_steps=2,
        batch_size=4,
        limit=12,
        importance_start=False,
        device="cpu",
        out=tmp_path / "run",
    )
    summary = train.train(cfg)
    table = read_json(tmp_path / "run" / "latency.json")
    assert run.given_table(cfg) == table  # what a resumed run goes on with
    cost = latency_model(load_shape("pocket"), find_units(load_shape("pocket"), "all"), table)
    assert summary["latency"]["dense"] == pytest.approx(cost.dense)
    assert 0.3 < summary["latency_ratio_mean"] < 0.9  # one round on a busy machine
    for expert in summary["experts"]:
        assert expert["latency_measured"] / cost.dense == pytest.approx(expert["latency_ratio"])
        assert 0 < expert["latency_predicted"] < cost.dense
    capsys.readouterr()
    print_experts(summary)
    lines = capsys.readouterr().out.splitlines()
    assert "latency ratio" in lines[0] and "%)" in lines[1]
    assert lines[-1].startswith("mean latency ratio") and "one thread, fp32, batch 2" in lines[-1]
    assert [row[0] for row in latency_table(summary).cells] == ["0", "1"]

    write_json(tmp_path / "t.json", table | {"machine": {"device": "NVIDIA X"}})
    elsewhere = dataclasses.replace(cfg, cost=str(tmp_path / "t.json"), out=tmp_path / "foreign")
    summary = train.train(elsewhere)
    assert 0.594 < summary["latency_ratio_mean"] <= 0.6 + 1e-9
    print_experts(summary)
    assert "predicted, not measured here" in capsys.readouterr().out
