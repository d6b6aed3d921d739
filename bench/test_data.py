"""Whether a pruning step waits for its host. `pytest bench/test_data.py --benchmark-only`

The U-Net's part of a step is a sleep, as if a GPU did it. *Waiting for data*: the pocket teacher on
emoji with an empty cache, a sleep of 0.5 s, captions kept or encoded in every step. *Host work at
2.5 M rows*: all that the loop of `train.optimise` does beside the step's arithmetic, at SD 2.1's
1620 units, 1,024 prompts a step, and 2.5 M random embeddings of width 16 in one mapped file.
"""

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler

import train
from common.files import load_tensors, save_tensors
from macs import measure_macs
from prune_unet import find_units
from run import Setup
from settings import PAPER, Pruning
from targets.images import load_target
from teacher.conditions import Conditions
from teacher.encoded import Encoded, OnDemand, encode_target
from teacher.model import load_teacher
from teacher.shapes import load_shape

SLEEP = 0.5  # seconds of a step
STEPS = 12
PROMPTS, ROWS = 64, 512  # of emoji
MILLIONS, WIDTH = 2_500_000, 16  # embeddings


def setup_of(cfg, teacher, z, encoded, unet):
    space = find_units(unet, cfg.depth)
    cost = measure_macs(unet, space, latent_size=32)
    absent = None
    return Setup(
        cfg=cfg,
        teacher=teacher,
        space=space,
        macs=cost,
        cost=cost,
        table=None,
        data=absent,
        validation=absent,
        encoder=absent,
        z=z,
        content=torch.eye(z.shape[1]),
        encoded=encoded,
        seconds=0.0,
    )


@pytest.mark.parametrize(("kept", "in_memory"), [("kept", 2**30), ("encoded in every step", 0)])
def test_waiting_for_data(benchmark, report_ratio, tmp_path, monkeypatch, device, kept, in_memory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    teacher, clock = load_teacher("pocket", device), time.perf_counter()
    data = load_target("emoji", "train", limit=ROWS)
    drawn = time.perf_counter()
    encoded = encode_target(teacher, data, in_memory)
    first, clock = time.perf_counter() - drawn, time.perf_counter()
    encode_target(teacher, data, in_memory)
    again = time.perf_counter() - clock
    cfg = Pruning(batch_size=PROMPTS)
    setup = setup_of(cfg, teacher, torch.randn(ROWS, 384), encoded, teacher.unet)

    def waiting():
        prepared, waited = train.batches(setup, range(STEPS + 1)), 0.0
        next(prepared)
        for _ in range(STEPS):
            time.sleep(SLEEP)
            clock = time.perf_counter()
            next(prepared)
            waited += time.perf_counter() - clock
        return waited / STEPS

    seconds = benchmark.pedantic(waiting, rounds=1)
    before = f"{ROWS} images encoded before the first step in {first:.1f} s, once {again:.1f} s"
    report_ratio(f"waiting for data, captions {kept} ({before})", seconds / SLEEP, 0.02)


def test_host_work(benchmark, report_ratio, tmp_path, monkeypatch, device):
    draw = torch.Generator().manual_seed(0)
    save_tensors(tmp_path / "z.safetensors", {"rows": torch.randn(MILLIONS, WIDTH, generator=draw)})
    z = load_tensors(tmp_path / "z.safetensors")[0]["rows"]
    unet = load_shape("sd21")
    schedule = DDPMScheduler(prediction_type="v_prediction")
    teacher = SimpleNamespace(
        unet=unet,
        device=device,
        dtype=torch.float32,
        noise_schedule=lambda: schedule,
        identity="random weights",
    )
    encoded = Encoded(
        OnDemand(lambda rows: torch.zeros(len(rows), 4, 32, 32)),
        OnDemand(lambda rows: Conditions(torch.zeros(len(rows), 1, 8))),
    )
    steps = {"warmup_steps": STEPS, "joint_steps": 0}
    cfg = replace(PAPER, **steps, importance_start=False, out=tmp_path)
    setup, starts = setup_of(cfg, teacher, z, encoded, unet), []

    def sleep(step, z, batch, noise, *, warmup, experts=None):
        starts.append(time.perf_counter())
        time.sleep(SLEEP)
        return dict.fromkeys(train.TERMS, 0 * step.router.codes.sum())

    monkeypatch.setattr(train.PruningStep, "__call__", sleep)

    clock = time.perf_counter()
    benchmark.pedantic(lambda: train.optimise(setup), rounds=1)
    first, seconds = starts[0] - clock, (starts[-1] - starts[0]) / (STEPS - 1) - SLEEP
    what = f"host work at 2.5 M rows / a step of 0.5 s (before the first step {first:.2f} s)"
    report_ratio(what, seconds / SLEEP, 0.05)
