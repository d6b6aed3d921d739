"""What the method adds to a training step, and its transport against POT's. `make bench`.

`--bench-unet pocket` tries the code in seconds; the figures to quote are those of SD 2.1's shape.
"""

from types import SimpleNamespace

import numpy as np
import ot
import pytest
import torch

import losses
from macs import example_inputs, measure_macs, skeleton
from prune_unet import BlockRecorder, attach_gates
from router import PromptRouter
from sinkhorn import sinkhorn
from teacher import Noised
from train import Config, PruningStep

BATCH = 2
EXPERTS = 8
PROMPT_DIM = 768  # all-mpnet-base-v2


@pytest.fixture(scope="module")
def batch(unet, request, device):
    """A noised batch. The values do not matter to the clock, as long as they are ordinary."""
    if unet.config.addition_embed_type:
        pytest.skip("a pruning step is conditioned on text states alone")
    latent_size = request.config.getoption("--bench-pixels") // 8
    one = example_inputs(unet, latent_size, 77, device)
    draw = torch.Generator(device).manual_seed(0)
    size = {"generator": draw, "device": device}
    sample = torch.randn(BATCH, *one["sample"].shape[1:], **size)
    text = torch.randn(BATCH, *one["encoder_hidden_states"].shape[1:], **size)
    t = torch.randint(1000, (BATCH,), **size)
    return Noised(sample, t, text, torch.randn(sample.shape, **size))


@pytest.fixture(scope="module")
def stock(unet):
    """The same U-Net, with the same weights in memory, that no hook was ever attached to."""
    twin = skeleton(unet)
    twin.load_state_dict(unet.state_dict(), assign=True)
    return twin.requires_grad_(False)


def test_forward_with_open_gates(compare, unet, stock, batch, request):
    gates = attach_gates(unet)
    gates.set_gates(torch.ones(BATCH, gates.space.size, device=batch.sample.device))

    def forward(model):
        with torch.no_grad():
            return model(**batch.inputs()).sample

    rounds = request.config.getoption("--bench-rounds")
    compare(lambda: forward(unet), lambda: forward(stock), target=1.05, rounds=rounds)
    gates.detach()


def test_pruning_step(compare, unet, stock, batch, request):
    """Eq. 15 forward and backward, against the same two forwards and image losses without gates."""
    device, latent_size = batch.sample.device, batch.sample.shape[-1]
    gates = attach_gates(unet)
    macs = measure_macs(unet, gates.space, latent_size=latent_size)
    router = PromptRouter(PROMPT_DIM, gates.space.size, EXPERTS).to(device)
    cfg = Config(num_experts=EXPERTS)
    step = PruningStep(cfg, SimpleNamespace(unet=unet), router, gates, macs)
    z = torch.randn(BATCH, PROMPT_DIM, device=device)

    def pruning() -> None:
        router.zero_grad()
        step(z, batch, torch.Generator().manual_seed(0), warmup=False)["loss"].backward()

    recorder = BlockRecorder(stock)
    sample = batch.sample.clone().requires_grad_()  # so that backward runs through every activation

    def dense() -> None:
        sample.grad = None
        with torch.no_grad():
            teacher_output = stock(**batch.inputs()).sample
        teacher_blocks = recorder.take()
        output = stock(**{**batch.inputs(), "sample": sample}).sample
        blocks = recorder.take()
        denoising = losses.denoising_loss(output, batch.target)
        distillation = losses.distillation_loss(output, teacher_output, blocks, teacher_blocks)
        (denoising + cfg.lambda_distill * distillation).mean().backward()

    compare(pruning, dense, target=1.10, rounds=request.config.getoption("--bench-rounds"))
    gates.detach()
    step.blocks.detach()
    recorder.detach()


def test_sinkhorn_against_pot(compare):
    """N = 16 experts, B = 1024 prompts, the paper's eps and iterations."""
    N, B, eps, iterations = 16, 1024, 0.05, 3
    scores = 2 * torch.rand(N, B, generator=torch.Generator().manual_seed(0)) - 1
    rows, columns, cost = np.full(N, 1 / N), np.full(B, 1 / B), -scores.double().numpy()

    def pot():  # which scales its first marginal last: the transposed problem takes our steps
        return ot.sinkhorn(columns, rows, cost.T, eps, numItermax=iterations, warn=False)

    assert np.allclose(sinkhorn(scores, eps, iterations), pot().T, rtol=1e-4, atol=1e-12)
    compare(lambda: sinkhorn(scores, eps, iterations), pot, target=1.0, rounds=300)
