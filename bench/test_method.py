"""What the method adds to a training step, and its transport against POT's. `make bench`.

`--bench-unet pocket` tries the code in seconds; the figures to quote are those of SD 2.1's shape.
How the step grows with experts and prompts is shown on the pocket teacher's shape, whose batches
are large enough to have 64 experts in them; beside a larger U-Net the router weighs less.
"""

import copy
from types import SimpleNamespace

import numpy as np
import ot
import pytest
import torch

import losses
from bench.costs import random_unet
from finetune import finetuning_step
from gates import gumbel_noise
from macs import measure_macs, meet_budget
from prune_unet import (
    BlockRecorder,
    attach_gates,
    cut_expert,
    example_inputs,
    find_units,
    meta_copy,
)
from router import PromptRouter
from settings import Finetuning, Pruning
from sinkhorn import sinkhorn
from teacher.conditions import Conditions
from teacher.model import Noised
from teacher.shapes import CLIP_TOKENS, PIXELS, load_shape
from train import PruningStep

EXPERTS = 8
PROMPT_DIM = 768  # all-mpnet-base-v2
PROMPTS = 64  # a step on the pocket teacher's shape


def noised(unet, size, latent_size, tokens, device):
    """A noised batch. The values do not matter to the clock, as long as they are ordinary."""
    one = example_inputs(unet, latent_size, tokens, device)
    how = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    sample = torch.randn(size, *one["sample"].shape[1:], **how)
    conditions = Conditions(torch.randn(size, *one["encoder_hidden_states"].shape[1:], **how))
    if "added_cond_kwargs" in one:  # SDXL's: pooled text, and sizes
        pooled, sizes = (one["added_cond_kwargs"][key] for key in ("text_embeds", "time_ids"))
        pooled = torch.randn(size, *pooled.shape[1:], **how)
        conditions = Conditions(conditions.text, pooled, sizes.expand(size, -1))
    t = torch.randint(1000, (size,), **how)
    return Noised(sample, t, conditions, torch.randn(sample.shape, **how))


@pytest.fixture(scope="module")
def batch(unet, request, device):
    """At the paper's training resolution, as many as a step has, unless the user chooses."""
    pixels = request.config.getoption("--bench-pixels") or 256
    size = request.config.getoption("--bench-batch") or (64 if device.type == "cuda" else 2)
    return noised(unet, size, pixels // PIXELS, CLIP_TOKENS, device)


@pytest.fixture(scope="module")
def stock(unet):
    """The same U-Net, with the same weights in memory, that no hook was ever attached to."""
    twin = meta_copy(unet)
    twin.load_state_dict(unet.state_dict(), assign=True)
    return twin.requires_grad_(False)


def test_forward_with_open_gates(compare, unet, stock, batch, request):
    gates = attach_gates(unet)
    gates.set_gates(torch.ones(len(batch.sample), gates.space.size, device=batch.sample.device))

    def forward(model):
        with torch.no_grad():
            return model(**batch.inputs()).sample

    compare(
        "forward with open gates / stock U-Net",
        lambda: forward(unet),
        lambda: forward(stock),
        target=1.05,
        rounds=request.config.getoption("--bench-rounds"),
    )
    gates.detach()


def stepper(unet, num_experts, batch):
    """stepper(...)(): one pruning step on `batch`, forward and backward. And its gates."""
    latent_size, tokens = batch.sample.shape[-1], batch.conditions.text.shape[1]
    gates = attach_gates(unet)
    macs = measure_macs(unet, gates.space, latent_size=latent_size, text_tokens=tokens)
    router = PromptRouter(PROMPT_DIM, gates.space.size, num_experts).to(batch.sample.device)
    cfg = Pruning(num_experts=num_experts)
    step = PruningStep(cfg, SimpleNamespace(unet=unet), router, gates, macs)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(len(batch.sample), PROMPT_DIM, generator=generator).to(batch.sample.device)
    noise = gumbel_noise((len(z), gates.space.size), generator=generator, device=z.device)

    def pruning():
        router.zero_grad()
        step(z, batch, noise, warmup=False)["loss"].backward()

    return pruning, step


def test_pruning_step(compare, unet, stock, batch, request):
    """Eq. 15 forward and backward, against the same two forwards and image losses without gates."""
    pruning, step = stepper(unet, EXPERTS, batch)
    recorder = BlockRecorder(stock)
    sample = batch.sample.clone().requires_grad_()  # so that backward runs through every activation

    def dense():
        sample.grad = None
        with torch.no_grad():
            teacher_output = stock(**batch.inputs()).sample
        teacher_blocks = recorder.take()
        output = stock(**{**batch.inputs(), "sample": sample}).sample
        blocks = recorder.take()
        denoising = losses.denoising_loss(output, batch.target)
        distillation = losses.distillation_loss(
            output,
            teacher_output,
            blocks,
            teacher_blocks,
            normalise=step.cfg.normalise_blocks,
            block_weight=step.cfg.block_weight,
        )
        (denoising + step.cfg.lambda_distill * distillation).mean().backward()

    compare(
        "pruning step / dense step",
        pruning,
        dense,
        target=1.10,
        rounds=request.config.getoption("--bench-rounds"),
    )
    step.detach()
    recorder.detach()


def test_finetuning_step(compare, unet, batch, request, device):
    """Eq. 30, forward and backward: shared weights through the gates, and an expert of their own.

    Experts have half of the MACs.
    """
    cfg, teacher = Finetuning(), SimpleNamespace(unet=unet, dtype=unet.dtype, device=device)
    space, size = find_units(unet), batch.sample.shape[-1]
    macs = measure_macs(unet, space, latent_size=size, text_tokens=CLIP_TOKENS)
    logits = torch.randn(1, space.size, generator=torch.Generator().manual_seed(0))
    code = meet_budget(logits, torch.ones(1), macs, 0.5)[0]  # (D,)
    codes = code.expand(len(batch.sample), -1)
    students = copy.deepcopy(unet), cut_expert(unet, code, space)
    gates = attach_gates(students[0], space)
    teachers = BlockRecorder(unet)
    steps, recorders = [], [teachers]
    for student, own in zip(students, ((gates, codes), None), strict=True):
        student.requires_grad_(True)
        recorders.append(BlockRecorder(student))
        how = teacher, student, (teachers, recorders[-1]), batch, cfg, own
        steps.append(lambda how=how: finetuning_step(*how))
    compare(
        "fine-tuning step of shared weights / of an expert of 0.5 of the MACs",
        *steps,
        target=None,
        rounds=request.config.getoption("--bench-rounds"),
    )
    for recorder in recorders:
        recorder.detach()


@pytest.fixture(scope="module")
def pocket_step(device):
    """pocket_step(num_experts, prompts): a step on a U-Net of the pocket teacher's shape."""
    shape = load_shape("pocket")

    def make(num_experts, prompts):
        batch = noised(shape, prompts, shape.config.sample_size, 20, device)
        return stepper(random_unet(shape, device), num_experts, batch)[0]

    return make


@pytest.mark.parametrize(("num_experts", "target"), [(8, None), (64, 1.1)])
def test_step_with_more_experts(compare, pocket_step, num_experts, target, request):
    compare(
        f"pruning step with {num_experts} experts / with 2, pocket shape, {PROMPTS} prompts",
        pocket_step(num_experts, PROMPTS),
        pocket_step(2, PROMPTS),
        target=target,
        rounds=request.config.getoption("--bench-rounds"),
    )


@pytest.mark.parametrize("fewer", [8, 32])
def test_step_with_more_prompts(compare, pocket_step, fewer, request):
    """A step's cost should grow as its prompts do, or more slowly."""
    compare(
        f"pruning step of {PROMPTS} prompts / {PROMPTS // fewer} times one of {fewer}, pocket",
        pocket_step(EXPERTS, PROMPTS),
        pocket_step(EXPERTS, fewer),
        scale=PROMPTS / fewer,
        target=None,
        rounds=request.config.getoption("--bench-rounds"),
    )


def test_sinkhorn_against_pot(compare):
    """N = 16 experts, B = 1024 prompts, the paper's eps and iterations."""
    N, B, eps, iterations = 16, 1024, 0.05, 3
    scores = 2 * torch.rand(N, B, generator=torch.Generator().manual_seed(0)) - 1
    rows, columns, cost = np.full(N, 1 / N), np.full(B, 1 / B), -scores.double().numpy()

    def pot():  # which scales its first marginal last: the transposed problem takes our steps
        return ot.sinkhorn(columns, rows, cost.T, eps, numItermax=iterations, warn=False)

    assert np.allclose(sinkhorn(scores, eps, iterations), pot().T, rtol=1e-4, atol=1e-12)
    compare(
        "sinkhorn / POT, 16 experts, 1024 prompts",
        lambda: sinkhorn(scores, eps, iterations),
        pot,
        target=1.0,
        rounds=300,
    )
