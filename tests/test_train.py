"""The pruning step against Eq. 15 written in one piece, and the same step shared out."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

import losses
import train
from common.files import load_tensors
from common.randomness import step_generator
from gates import ArchSpace, gumbel_sigmoid
from macs import measure_macs
from prune_unet import attach_gates
from router import PromptRouter
from settings import Pruning
from teacher.blocks import BlockRecorder
from teacher.model import Noised, add_noise, load_teacher

ROOT = Path(__file__).resolve().parent.parent
B, N, DZ = 7, 3, 12


@pytest.fixture
def problem(unet, make_inputs):
    """A router whose codes differ, and a batch on a tiny U-Net."""
    if unet.config.addition_embed_type:
        pytest.skip("a pruning step is conditioned on text states alone")
    torch.manual_seed(0)
    space = ArchSpace.from_unet(unet)
    router = PromptRouter(DZ, space.size, N)
    with torch.no_grad():
        router.codes.copy_(1 + torch.randn_like(router.codes))
        router.predictor.weight.mul_(4)
    inputs = make_inputs(unet, B, seed=1)
    batch = Noised(
        inputs["sample"],
        inputs["timestep"],
        inputs["encoder_hidden_states"],
        torch.randn(inputs["sample"].shape),
    )
    macs = measure_macs(unet, space, latent_size=8, text_tokens=5)
    return unet, space, router, macs, batch, torch.randn(B, DZ)


def eq_15(problem, cfg: Pruning, warmup: bool) -> torch.Tensor:
    """The objective of one batch as one differentiable expression."""
    unet, space, router, macs, batch, z = problem
    draw = torch.Generator().manual_seed(5)
    e = router(z)
    e_prime = gumbel_sigmoid(e, cfg.gumbel_temp, generator=draw)
    experts, a = None, e_prime
    if not warmup:
        A = gumbel_sigmoid(router.codes, cfg.gumbel_temp, generator=draw)
        experts = router.transport(e, cfg.eps, cfg.sinkhorn_iterations)
        a = A[experts]
    recorder = BlockRecorder(unet)
    teacher = unet(**batch.inputs()).sample
    teacher_blocks = recorder.take()
    gates = attach_gates(unet, space)
    gates.set_gates(a)
    student = unet(**batch.inputs()).sample
    distance = losses.distillation_loss(student, teacher, recorder.take(), teacher_blocks)
    gates.detach()
    recorder.detach()
    return losses.pruning_loss(
        losses.denoising_loss(student, batch.target),
        distance,
        losses.resource_loss(macs(a).mean(), cfg.budget * macs.dense),
        losses.contrastive_loss(z, e_prime, cfg.contrast_temp),
        experts,
        N,
        cfg.lambda_distill if cfg.distill else 0.0,
        cfg.lambda_res,
        cfg.lambda_cont,
    )


def gradients(router: PromptRouter, loss: torch.Tensor) -> list[torch.Tensor]:
    router.zero_grad()
    loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in router.parameters()]


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"micro_batch": 3}, {"micro_batch": 1}, {"distill": False}], ids=str
)
def test_a_step_in_parts_is_eq_15_in_one_piece(problem, options, warmup):
    unet, space, router, macs, batch, z = problem
    cfg = Pruning(num_experts=N, budget=0.6, lambda_cont=1.0, **options)
    expected = eq_15(problem, cfg, warmup)
    wanted = gradients(router, expected)
    gates = attach_gates(unet, space)
    step = train.PruningStep(cfg, SimpleNamespace(unet=unet), router, gates, macs)
    terms = step(z, batch, torch.Generator().manual_seed(5), warmup=warmup)
    assert terms["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    for own, oracle in zip(gradients(router, terms["loss"]), wanted, strict=True):
        assert torch.allclose(own, oracle, atol=1e-5 * oracle.abs().max().item() + 1e-9)
    gates.detach()
    step.blocks.detach()


def test_checkpointed_steps_have_the_same_gradients(problem):
    unet, space, router, macs, batch, z = problem
    gates = attach_gates(unet, space)
    step = train.PruningStep(
        Pruning(num_experts=N, micro_batch=4),
        SimpleNamespace(unet=unet),
        router,
        gates,
        macs,
    )
    found = []
    for checkpointing in (False, True):
        (
            unet.enable_gradient_checkpointing
            if checkpointing
            else unet.disable_gradient_checkpointing
        )()
        terms = step(z, batch, torch.Generator().manual_seed(5), warmup=False)
        found.append(gradients(router, terms["loss"]))
    unet.disable_gradient_checkpointing()
    for plain, checkpointed in zip(*found, strict=True):
        assert torch.allclose(plain, checkpointed, atol=1e-6 * plain.abs().max().item() + 1e-9)
    gates.detach()
    step.blocks.detach()


def test_without_transport_prompts_take_their_nearest_code(problem):
    _, _, router, _, _, z = problem
    e = router(z)
    experts, a = router.assign(e, transport=False)
    assert torch.equal(experts, router.nearest(e)) and torch.equal(a, router.codes[experts])
    crowded = e[:1].repeat(B, 1)  # seven times the same prompt
    assert router.assign(crowded, transport=False)[0].unique().numel() == 1
    assert router.assign(crowded + 1e-3 * torch.randn(B, e.shape[1]))[0].unique().numel() > 1


def test_a_samples_noise_does_not_depend_on_how_the_batch_is_shared_out():
    teacher = load_teacher("pocket")
    x0 = torch.randn(B, teacher.unet.config.in_channels, 8, 8)
    text = torch.randn(B, 20, 384)
    whole = add_noise(teacher, x0, text, step_generator(0, "train", 3))
    for rank in range(2):
        own = torch.arange(rank, B, 2)
        part = add_noise(teacher, x0[own], text[own], step_generator(0, "train", 3), own, B)
        for name in ("sample", "t", "text", "target"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[own]), name
    assert not torch.equal(whole.sample[0] - x0[0], whole.sample[1] - x0[1])


def test_two_processes_do_what_one_does_and_outlive_a_dead_one(tmp_path):
    """A batch of 7 over 2 processes; one of them is killed half way, and the job started again."""
    cfg = Pruning(
        budget=0.7,
        num_experts=N,
        warmup_steps=2,
        joint_steps=4,
        batch_size=B,
        limit=40,
        save_every=1,
        device="cpu",
        out=tmp_path / "one",
    )
    train.train(cfg)
    out = tmp_path / "two"
    names = "budget num_experts warmup_steps joint_steps batch_size limit save_every device"
    fields = {name.replace("_", "-"): getattr(cfg, name) for name in names.split()} | {"out": out}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "train.py", *(f"--{key}={value}" for key, value in fields.items())]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
    )
    log, deadline = out / "metrics.csv", time.time() + 240
    while time.time() < deadline and job.poll() is None:
        if log.exists() and len(log.read_text().splitlines()) > 3:
            break
        time.sleep(0.05)
    psutil.Process(job.pid).children()[-1].send_signal(signal.SIGKILL)
    _, errors = job.communicate(timeout=120)
    assert job.returncode != 0 and b"SIGKILL" in errors
    assert not (out / "summary.json").exists()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=environment, timeout=400)
    one, two = (
        np.genfromtxt(folder / "metrics.csv", delimiter=",", names=True)
        for folder in (cfg.out, out)
    )
    for name in ("step", *train.TERMS):
        assert np.allclose(one[name], two[name], rtol=1e-4), name
    for name in ("assignments.json", "codes.safetensors"):
        assert (cfg.out / name).read_bytes() == (out / name).read_bytes(), name
    routers = [load_tensors(folder / "router.safetensors")[0] for folder in (cfg.out, out)]
    for name, value in routers[0].items():  # six steps' learning rates add up to 0.1
        assert torch.allclose(value, routers[1][name], atol=1e-3), name
