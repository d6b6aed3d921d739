"""What the method costs beside the same work without it, as ratios inside one run.

Targets, on this project's two-core machine: gates 1.05, pruning step 1.10, Sinkhorn 1.0.
"""

from types import SimpleNamespace

import numpy as np
import ot
import torch

import losses
from gates import ArchSpace
from prune_unet import BlockRecorder, attach_gates, example_inputs, measure_macs
from router import PromptRouter
from sinkhorn import sinkhorn
from teacher import Noised
from train import Config, PruningStep

TOKENS = 77


def test_open_gates_against_the_stock_unet(unet, latent_size, compare):
    inputs = example_inputs(unet, latent_size, TOKENS, "cpu")
    space = ArchSpace.from_unet(unet)
    ones = torch.ones(1, space.size)

    @torch.no_grad()
    def stock():
        unet(**inputs)

    @torch.no_grad()
    def gated():
        handle = attach_gates(unet, space)
        handle.set_gates(ones)
        unet(**inputs)
        handle.detach()

    compare(gated, stock)


def test_pruning_step_against_a_dense_step(unet, latent_size, compare):
    """Both: teacher forward, student forward, backward through all activations."""
    space = ArchSpace.from_unet(unet)
    macs = measure_macs(unet, space, latent_size=latent_size, text_tokens=TOKENS)
    inputs = example_inputs(unet, latent_size, TOKENS, "cpu")
    batch = Noised(
        inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"], inputs["sample"]
    )
    batch = Noised(*(torch.cat([part, part]) for part in vars(batch).values()))
    z = torch.nn.functional.normalize(torch.randn(2, 384), dim=-1)
    router = PromptRouter(384, space.size, 2)
    recorder = BlockRecorder(unet)

    def dense():
        with torch.no_grad():
            teacher = unet(**batch.inputs()).sample
        teacher_blocks = recorder.take()
        sample = batch.sample.clone().requires_grad_(True)
        student = unet(**(batch.inputs() | {"sample": sample})).sample
        distillation = losses.distillation_loss(student, teacher, recorder.take(), teacher_blocks)
        (losses.denoising_loss(student, batch.target) + distillation).mean().backward()

    def pruning():
        handle = attach_gates(unet, space)
        step = PruningStep(Config(num_experts=2), SimpleNamespace(unet=unet), router, handle, macs)
        draw = torch.Generator().manual_seed(0)
        step(z, batch, draw, warmup=False)["loss"].backward()
        step.blocks.detach()
        recorder.take()
        handle.detach()

    compare(pruning, dense, rounds=5)
    recorder.detach()


def test_sinkhorn_against_pot(compare):
    """N = 16 codes, B = 1024 prompts, three iterations of each."""
    N, B, eps = 16, 1024, 0.05
    scores = torch.randn(N, B, generator=torch.Generator().manual_seed(0)).mul_(0.3)
    cost = -scores.double().numpy()
    rows, columns = np.full(N, 1 / N), np.full(B, 1 / B)

    def pot():
        ot.sinkhorn(
            rows, columns, cost, eps, method="sinkhorn_log", numItermax=3, stopThr=0, warn=False
        )

    compare(lambda: sinkhorn(scores, eps, 3), pot, rounds=200)
