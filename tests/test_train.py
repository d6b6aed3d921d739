"""The pruning step against Eq. 15 written in one piece, and the same step shared out."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
import torch
from conftest import conditions_of, tiny_teacher
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F

import train
from common.files import load_tensors
from common.randomness import step_generator
from gates import gumbel_noise
from macs import CostModel, measure_macs
from prune_unet import attach_gates, find_units
from router import PromptRouter
from settings import Pruning
from teacher.conditions import Conditions
from teacher.model import Noised, add_noise

ROOT = Path(__file__).resolve().parent.parent
B, N, DZ = 7, 3, 12
BUDGET = 0.6
PRINTED = dict.fromkeys(("hold_budget", "own_keys", "center", "normalise_blocks"), False) | {
    "block_weight": 1.0
}


class Batch(NamedTuple):
    """A tiny U-Net, a router whose codes differ, and what a step is given."""

    unet: UNet2DConditionModel
    router: PromptRouter
    macs: CostModel
    noised: Noised
    z: Tensor  # (B, DZ)

    def step(self, cfg: Pruning) -> train.PruningStep:
        gates = attach_gates(self.unet, self.macs.space)
        return train.PruningStep(
            cfg, SimpleNamespace(unet=self.unet), self.router, gates, self.macs
        )

    @property
    def noise(self) -> Tensor:
        return gumbel_noise((B, self.macs.space.size), generator=torch.Generator().manual_seed(5))


def stop(step: train.PruningStep) -> None:
    """Remove a step's hooks."""
    step.detach()


@pytest.fixture
def make_batch(smallest, make_inputs):
    """make_batch(unet, ...): with options of the router."""

    def make(unet: UNet2DConditionModel = smallest, **options: Any) -> Batch:
        torch.manual_seed(0)
        space = find_units(unet)
        router = PromptRouter(DZ, space.size, N, **options)
        with torch.no_grad():
            router.codes.add_(torch.randn_like(router.codes) - 1)
            router.predictor.weight.mul_(4)
            router.mean_z.copy_(0.2 * torch.randn(DZ))
            router.keys.copy_(router.codes - router.predictor.bias + torch.randn_like(router.codes))
        inputs = make_inputs(unet, B, seed=1)
        noised = Noised(
            inputs["sample"],
            inputs["timestep"],
            conditions_of(inputs),
            torch.randn(inputs["sample"].shape),
        )
        macs = measure_macs(unet, space, latent_size=8, text_tokens=5)
        return Batch(unet, router, macs, noised, torch.randn(B, DZ))

    return make


# ---- Eq. 15, from the paper ----


def mean_square(x: Tensor) -> Tensor:
    """Of each sample, (B, ...) -> (B,)."""
    return (x**2).flatten(1).mean(1)


def blocks_and_output(unet: UNet2DConditionModel, noised: Noised) -> tuple[list[Tensor], Tensor]:
    """What the blocks and the U-Net put out."""
    found: list[Tensor] = []
    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    hooks = [
        block.register_forward_hook(
            lambda _, __, out: found.append(out[0] if isinstance(out, tuple) else out)
        )
        for block in blocks
        if block is not None
    ]
    output = unet(**noised.inputs()).sample
    for hook in hooks:
        hook.remove()
    return found, output


def transported(router: PromptRouter, e: Tensor, cfg: Pruning) -> Tensor:
    """Eq. 20 of embeddings (P, D): the plan as a plain loop in double precision."""
    b = router.predictor.bias
    A, E = (router.keys if router.own_keys else router.codes - b).double(), (e - b).double()
    A, E = (A - A.mean(0), E) if router.center else (A + b, E + b)
    Q = torch.exp(F.cosine_similarity(A[:, None], E[None], dim=2) / cfg.eps)  # (N, P)
    for _ in range(cfg.sinkhorn_iterations):
        Q = Q / Q.sum(1, keepdim=True)
        Q = Q / Q.sum(0)
    return Q.argmax(0)


def contrastive(z: Tensor, e: Tensor, tau: float) -> Tensor:
    """Eqs. 13 and 14 of vectors that are centred or not, with the sign that is minimised."""
    r, s = (torch.softmax(F.cosine_similarity(x[:, None], x[None], dim=2) / tau, 1) for x in (z, e))
    not_s = torch.log(1 - s.clamp(max=1 - 1e-6))
    return -(r * s.log() + (1 - r) * not_s).sum() / B**2


class Objective(NamedTuple):
    loss: Tensor
    log_T: Tensor
    lambda_res: float


def eq_15(batch: Batch, cfg: Pruning, *, warmup: bool) -> Objective:
    """Eq. 15 of one batch, differentiable straight through the U-Net."""
    unet, router, macs, noised, z = batch
    D = macs.space.size
    draw = torch.Generator().manual_seed(5)

    def gumbel(rows: int) -> Tensor:
        return -torch.log(-torch.log(torch.rand(rows, D, generator=draw, dtype=torch.float64)))

    noise = gumbel(B).float()
    e, experts = router(z), None
    a = e_prime = torch.sigmoid((e + noise) / cfg.gumbel_temp)
    if not warmup:
        experts = transported(router, e, cfg)
        a = torch.sigmoid((router.codes[experts] + noise) / cfg.gumbel_temp)

    teacher_blocks, teacher = blocks_and_output(unet, noised)
    gates = attach_gates(unet, macs.space)
    gates.set_gates(a)
    blocks, output = blocks_and_output(unet, noised)
    gates.detach()
    per_sample = mean_square(output - noised.target)
    if cfg.distill:
        distances = [mean_square(s - t) for s, t in zip(blocks, teacher_blocks, strict=True)]
        if cfg.normalise_blocks:
            sizes = [mean_square(t) for t in teacher_blocks]
            distances = [d / n / len(sizes) for d, n in zip(distances, sizes, strict=True)]
        per_sample = per_sample + cfg.lambda_distill * (
            mean_square(output - teacher) + cfg.block_weight * sum(distances)
        )
    if experts is None:
        image = per_sample.mean()
    else:
        own = [per_sample[experts == i] for i in range(N)]
        image = sum(x.mean() for x in own if len(x)) / N
    log_T = torch.log(macs(a).mean() / (cfg.budget * macs.dense))
    resource, lambda_res = log_T.abs(), cfg.lambda_res
    if cfg.hold_budget:
        trained = [p for p in router.parameters() if p.requires_grad]
        of_image, of_T = (
            torch.cat(
                [
                    g.flatten()
                    for g in torch.autograd.grad(
                        term, trained, retain_graph=True, materialize_grads=True
                    )
                ]
            )
            for term in (image, log_T)
        )
        resource, lambda_res = log_T, max(0.0, -(of_image * of_T).sum() / (of_T**2).sum())
    loss = image + lambda_res * resource
    compared = e_prime - e_prime.sum(0) / B if cfg.center else e_prime
    if warmup or not cfg.own_keys:  # with keys that stay, embeddings are not trained any more
        loss = loss + cfg.lambda_cont * contrastive(z, compared, cfg.contrast_temp)
    return Objective(loss, log_T, float(lambda_res))


def gradients(router: PromptRouter, loss: Tensor) -> dict[str, Tensor]:
    router.zero_grad()
    loss.backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in router.named_parameters()
    }


def check_same(found: dict[str, Tensor], wanted: dict[str, Tensor], rtol: float = 1e-5) -> None:
    for name, oracle in wanted.items():
        assert torch.allclose(found[name], oracle, atol=rtol * oracle.abs().max().item() + 1e-9)


# ---- one step ----


def check_step(batch: Batch, *, warmup: bool, **options: Any) -> None:
    """A step's loss and the gradients of all the router's parameters are those of Eq. 15."""
    # at a tau where the contrastive loss is no constant
    cfg = Pruning(**{"num_experts": N, "budget": BUDGET, "contrast_temp": 0.5, **options})
    step = batch.step(cfg)
    terms = step(batch.z, batch.noised, batch.noise, warmup=warmup)
    found = gradients(batch.router, terms["loss"])
    stop(step)
    # with a held budget, the step has moved the router: Eq. 15 is that of where it is now
    wanted = eq_15(batch, cfg, warmup=warmup)
    assert terms["lambda_res"].item() == pytest.approx(wanted.lambda_res, rel=1e-3, abs=1e-6)
    if cfg.hold_budget:
        assert wanted.log_T.item() == pytest.approx(0, abs=1e-5)
        assert terms["cost_ratio"].item() == pytest.approx(cfg.budget, rel=1e-5)
        assert terms["resource"].item() < 1e-5
    else:
        assert wanted.log_T.abs() > 0.01
        assert terms["resource"].item() == pytest.approx(wanted.log_T.abs().item(), rel=1e-4)
    assert terms["loss"].item() == pytest.approx(wanted.loss.item(), rel=1e-5)
    check_same(found, gradients(batch.router, wanted.loss), 1e-4 if cfg.hold_budget else 1e-5)


@pytest.mark.parametrize("warmup", [True, False])
def test_a_step_in_parts_is_eq_15_in_one_piece(make_batch, unet, warmup):
    check_step(make_batch(unet), warmup=warmup, micro_batch=4)


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize(
    ("options", "of_router"),
    [
        ({"budget": 0.8, "block_weight": 0.2}, {}),
        ({"distill": False, "micro_batch": 1}, {}),
        (PRINTED, {"center": False, "own_keys": False}),
        (PRINTED | {"micro_batch": 3, "distill": False}, {}),
    ],
    ids=("with blocks", "no distillation", "as printed", "printed, in parts"),
)
def test_every_kind_of_step_is_eq_15(make_batch, options, of_router, warmup):
    check_step(make_batch(**of_router), warmup=warmup, **options)


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("budget", [0.45, 0.7, 0.9])
def test_a_held_budget_leaves_nothing_along_its_price(make_batch, warmup, budget):
    """The gradient of the trained parameters, and that of log T, are at right angles."""
    batch = make_batch()
    with torch.no_grad():  # a target that pruning only takes away from
        dense = batch.unet(**batch.noised.inputs()).sample
    batch = batch._replace(noised=dataclasses.replace(batch.noised, target=dense))
    cfg = Pruning(num_experts=N, budget=budget, lambda_cont=0.0)
    step = batch.step(cfg)
    terms = step(batch.z, batch.noised, batch.noise, warmup=warmup)
    found = gradients(batch.router, terms["loss"])
    stop(step)
    oracle = eq_15(batch, cfg, warmup=warmup)
    of_T = gradients(batch.router, oracle.log_T)
    assert oracle.lambda_res > 0
    found, of_T = (torch.cat([g.flatten() for g in gs.values()]) for gs in (found, of_T))
    assert found.norm() > 0
    assert abs((found * of_T).sum()) < 1e-4 * found.norm() * of_T.norm()


def test_the_whole_model_as_budget_moves_nothing(make_batch):
    """All gates open costs 1: no shift reaches it, and step after step would double the logits."""
    batch = make_batch()
    step = batch.step(Pruning(num_experts=N, budget=1.0))
    before = batch.router.predictor.bias.clone()
    step(batch.z, batch.noised, batch.noise, warmup=True)
    assert torch.equal(batch.router.predictor.bias, before)
    stop(step)


def test_what_processes_add_up_is_what_one_computes(make_batch):
    batch = make_batch()
    step = batch.step(Pruning(num_experts=N, micro_batch=2))
    a = torch.rand(B, batch.macs.space.size, generator=torch.Generator().manual_seed(4))
    experts = torch.tensor([0, 0, 0, 1, 2, 2, 1])
    whole = step.image_losses(a, batch.noised, experts, torch.arange(B))
    shares = [torch.arange(rank, B, 2) for rank in range(2)]
    parts = [step.image_losses(a, batch.noised.part(own), experts, own) for own in shares]
    for one, *several in zip(whole, *parts, strict=True):
        assert torch.allclose(one, sum(several), rtol=1e-4, atol=1e-6 * one.abs().max().item())
    for own, part in zip(shares, parts, strict=True):
        rest = torch.ones(B, dtype=torch.bool)
        rest[own] = False
        assert all((tensor[rest] == 0).all() and (tensor[own] != 0).any() for tensor in part)
    stop(step)


def test_checkpointed_steps_have_the_same_gradients(make_batch):
    batch = make_batch()
    step = batch.step(Pruning(num_experts=N, micro_batch=4, budget=BUDGET))
    found = []
    for switch in ("disable_gradient_checkpointing", "enable_gradient_checkpointing"):
        getattr(batch.unet, switch)()
        terms = step(batch.z, batch.noised, batch.noise, warmup=False)
        found.append(gradients(batch.router, terms["loss"]))
    batch.unet.disable_gradient_checkpointing()
    check_same(found[1], found[0])
    stop(step)


def test_a_samples_noise_is_its_own_however_the_batch_is_shared_out(smallest):
    """The noise is read back from x_t and v, which are both mixtures of it and x_0."""
    teacher, draw = tiny_teacher(smallest), torch.Generator().manual_seed(0)
    x0 = torch.randn(B, 4, 8, 8, generator=draw)
    conditions = Conditions(torch.randn(B, 5, 16, generator=draw))
    whole = add_noise(teacher, x0, conditions, step_generator(0, "train", 3))
    for rank in range(2):
        own = torch.arange(rank, B, 2)
        draw = step_generator(0, "train", 3)
        part = add_noise(teacher, x0[own], conditions[own], draw, own, B)
        for name in ("sample", "t", "target"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[own]), name
        assert torch.equal(part.conditions.text, whole.conditions.text[own])
    share = teacher.noise_schedule().alphas_cumprod[whole.t].view(B, 1, 1, 1)
    noise = (1 - share).sqrt() * whole.sample + share.sqrt() * whole.target
    clean = share.sqrt() * whole.sample - (1 - share).sqrt() * whole.target
    assert torch.allclose(clean, x0, atol=1e-4)
    alike = torch.corrcoef(torch.cat([noise.flatten(1), x0.flatten(1)])) - torch.eye(2 * B)
    assert alike.abs().max() < 0.3 and len(whole.t.unique()) > 1
    assert noise.std().item() == pytest.approx(1, abs=0.1)
    later = add_noise(teacher, x0, conditions, step_generator(0, "train", 4))
    assert not torch.equal(later.t, whole.t)


# ---- many steps ----


def test_two_processes_do_what_one_does_and_outlive_a_dead_one(tmp_path):
    """A batch of 7 over 2 processes; one of them is killed half way, and one goes on alone."""
    cfg = Pruning(
        budget=0.7,
        num_experts=N,
        warmup_steps=2,
        joint_steps=4,
        batch_size=B,
        limit=40,
        save_minutes=0,
        device="cpu",
        out=tmp_path / "one",
    )
    train.train(cfg)
    out = tmp_path / "two"
    names = "budget num_experts warmup_steps joint_steps batch_size limit save_minutes device"
    fields = {name.replace("_", "-"): getattr(cfg, name) for name in names.split()} | {"out": out}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    torchrun += ["tests/short_start.py", "train.py"]
    command = [*torchrun, *(f"--{key}={value}" for key, value in fields.items())]
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
    train.train(dataclasses.replace(cfg, out=out))
    one, two = (
        np.genfromtxt(folder / "metrics.csv", delimiter=",", names=True)
        for folder in (cfg.out, out)
    )
    for name in ("step", *train.TERMS):  # the resource loss is what rounding leaves of it
        assert np.allclose(one[name], two[name], rtol=1e-4, atol=1e-6), name
    assert np.allclose(two["cost_ratio"], cfg.budget, rtol=1e-4)
    for name in ("assignments.json", "codes.safetensors"):
        assert (cfg.out / name).read_bytes() == (out / name).read_bytes(), name
    routers = [load_tensors(folder / "router.safetensors")[0] for folder in (cfg.out, out)]
    for name, value in routers[0].items():  # six steps' learning rates add up to 0.1
        assert torch.allclose(value, routers[1][name], atol=1e-3), name
