"""Pre-training of the pocket teacher: resumable; its losses, and what its batches are made of."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from common.errors import UserError
from common.files import load_tensors, read_json
from targets.images import load_target
from teacher.parts import AutoencoderDC
from teacher.pipelines import load_pocket
from teacher.pocket import pretrain
from teacher.pocket.autoencoder import (
    VAE_CONFIG,
    augment,
    mixed_precision,
    reconstruction_psnr,
    vae_loss,
)
from teacher.pocket.training import Training, learning_rate

TINY = pretrain.Config(
    vae_steps=3, vae_batch_size=2, unet_steps=3, unet_batch_size=4, save_every=1, limit=12
)
SMALL_UNET = pretrain.UNET_CONFIG | {"block_out_channels": (32, 32, 32), "layers_per_block": 1}
SMALL_VAE = VAE_CONFIG | {
    f"{half}_{name}": value
    for half in ("encoder", "decoder")
    for name, value in (("block_out_channels", (16,) * 4), ("layers_per_block", (0, 1, 1, 1)))
}


@pytest.fixture
def small(monkeypatch) -> None:
    """Models of the pocket teacher's kind, with a twentieth of the weights at most."""
    monkeypatch.setattr(pretrain, "UNET_CONFIG", SMALL_UNET)
    monkeypatch.setattr(pretrain, "VAE_CONFIG", SMALL_VAE)


@pytest.mark.usefixtures("small")
def test_a_stopped_training_ends_as_the_undisturbed_one(tmp_path, monkeypatch):
    def config(name: str) -> pretrain.Config:
        return dataclasses.replace(TINY, out=tmp_path / name, assets=tmp_path / f"{name}-assets")

    pretrain.pretrain(config("whole"))
    update = Training.update

    for stop in (2, 1):  # in the autoencoder's third step, then in the U-Net's second
        calls: list[int] = []

        def stopping(self, loss, rate, images, calls=calls, stop=stop):
            calls.append(1)
            if len(calls) > stop:
                raise KeyboardInterrupt
            update(self, loss, rate, images)

        monkeypatch.setattr(Training, "update", stopping)
        with pytest.raises(KeyboardInterrupt):
            pretrain.pretrain(config("stopped"))
    monkeypatch.setattr(Training, "update", update)
    pretrain.pretrain(config("stopped"))
    for name in ("vae.safetensors", "unet.safetensors"):
        whole, stopped = (load_tensors(tmp_path / run / name) for run in ("whole", "stopped"))
        assert whole[1] == stopped[1]
        assert whole[1]["step"] == 3
        assert all(torch.equal(whole[0][key], stopped[0][key]) for key in whole[0])
    pipe, _ = load_pocket(tmp_path / "stopped-assets")
    assert pipe(["a giraffe"], num_inference_steps=1).images[0].size == (64, 64)


@pytest.mark.usefixtures("small")
def test_a_finished_teacher_is_trained_on(tmp_path):
    first = dataclasses.replace(TINY, out=tmp_path / "out", assets=tmp_path / "first")
    pretrain.pretrain(first)
    folders = {"out": tmp_path / "more", "assets": tmp_path / "second", "initial": first.assets}
    begun = dataclasses.replace(first, **folders, unet_lr=1e-30)
    pretrain.pretrain(begun)  # steps so small are nothing in half precision
    for part in ("vae", "unet"):
        before, after = (
            load_file(folder / part / "diffusion_pytorch_model.safetensors")
            for folder in (first.assets, begun.assets)
        )
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        configs = [read_json(f / part / "config.json") for f in (first.assets, begun.assets)]
        assert configs[0] == configs[1]
    figures = [read_json(folder / "training.json") for folder in (first.assets, begun.assets)]
    assert [f["images_seen"] for f in figures] == [12, 24]
    assert [f["vae_images_seen"] for f in figures] == [6, 6]
    again = dataclasses.replace(begun, assets=first.assets, export=True)
    for _ in range(2):  # over the one that it began from, and once more: nothing counts twice
        pretrain.pretrain(again)
        assert read_json(first.assets / "training.json")["images_seen"] == 24


def test_what_is_no_teacher_is_not_trained_on(tmp_path):
    with pytest.raises(UserError, match=r"--initial .*holds no training\.json; give a folder"):
        pretrain.pretrain(dataclasses.replace(TINY, out=tmp_path, initial=tmp_path))


def test_the_autoencoder_s_loss_is_the_sum_of_its_parts():
    """Moments against torch.distributions, gradients against differences of slices."""
    torch.manual_seed(0)
    images = torch.rand(6, 3, 64, 64) * 2 - 1
    vae = AutoencoderDC(**VAE_CONFIG)
    cfg = pretrain.Config(square_weight=2, edge_weight=3, moment_weight=7, latent_noise=0)
    with torch.no_grad():
        losses = vae_loss(vae, images, torch.Generator().manual_seed(0), cfg)
        with mixed_precision():
            latents = vae.encode(images).latents.float()
            output = vae.decode(latents).sample.float()
    error = output - images
    across = (error[..., 1:] - error[..., :-1]).abs().mean()
    down = (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    deviation = latents.transpose(0, 1).flatten(1).var(1).mean().sqrt()
    normal = torch.distributions.Normal
    expected = sum(
        torch.distributions.kl_divergence(normal(channel.mean(), deviation), normal(0.0, 1.0))
        for channel in latents.transpose(0, 1)
    ) / len(latents[0])
    assert losses["moments"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert losses["loss"].item() == pytest.approx(
        (error.abs().mean() + 2 * (error**2).mean() + 3 * (across + down) + 7 * expected).item(),
        rel=1e-4,
    )


def test_psnr_of_a_known_error():
    class Black(torch.nn.Module):
        def encode(self, images):
            return SimpleNamespace(latents=images)

        def decode(self, latents):
            return SimpleNamespace(sample=torch.full_like(latents, -1.0))

    picture = np.full((64, 64, 3), 255, np.uint8)
    picture[:32] = 0  # half the pixels are reproduced, half are off by the whole range
    data = dataclasses.replace(load_target("emoji", "train", limit=4), read=lambda row: picture)
    assert reconstruction_psnr(Black(), data) == pytest.approx(10 * math.log10(2))


def test_noisy_timesteps_come_as_often_as_asked():
    generator = torch.Generator().manual_seed(0)
    t = pretrain.sample_timesteps(200_000, 1000, pretrain.Config(noisy_share=0.4), generator)
    assert t.min() >= 0 and t.max() <= 999
    shares = [((t >= a) & (t < a + 100)).float().mean().item() for a in range(0, 1000, 100)]
    assert shares == pytest.approx([0.06] * 7 + [0.06 + 0.4 / 3] * 3, abs=0.003)


def test_captions_are_a_row_s_own_and_sometimes_empty():
    choices = [torch.tensor([1, 2, 3]), torch.tensor([4]), torch.tensor([5, 6])]
    padded = torch.nn.utils.rnn.pad_sequence(choices, batch_first=True)
    encoded = pretrain.TrainingSet(torch.empty(3), torch.empty(7), padded, torch.tensor([3, 1, 2]))
    rows = torch.arange(3).repeat(5000)
    numbers = encoded.captions(rows, 0.2, torch.Generator().manual_seed(0))
    for row, own in enumerate(choices):
        found = numbers[rows == row]
        counts = torch.bincount(found, minlength=7)
        assert set(found.tolist()) == {0, *own.tolist()}
        assert counts[0] / len(found) == pytest.approx(0.2, abs=0.02)
        assert (counts[own] / len(found)).tolist() == pytest.approx(
            [0.8 / len(own)] * len(own), abs=0.025
        )


def test_text_states_give_way_to_the_sentence_s_in_part_or_whole():
    text = torch.rand(4, 20, 6, generator=torch.Generator().manual_seed(0))
    text[3, 0] = 3 * text[1, 0] + 0.01  # of all sentence states the most like the first caption's
    encoded = pretrain.TrainingSet(torch.empty(4), text, torch.empty(4), torch.empty(4))
    captions = torch.arange(4).repeat(2000)
    cfg = pretrain.Config(sentence_share=0.25, text_noise=0.5)
    noisy = encoded.states(captions, cfg, torch.Generator().manual_seed(0))
    exact = dataclasses.replace(cfg, text_noise=0)
    states = encoded.states(captions, exact, torch.Generator().manual_seed(0))
    assert (noisy - states).mean().abs() < 0.01
    assert (noisy - states).std().item() == pytest.approx(0.5, abs=0.01)
    kept = (states == text[captions])[:, 1:].all(2).float().mean(1)  # share of a caption's tokens
    alone = (states == states[:, :1]).all(2).all(1)
    assert torch.equal(alone, kept == 0)
    assert alone.float().mean().item() == pytest.approx(0.25 + 0.25 / 20, abs=0.02)
    for bound in (0.2, 0.5, 0.8):  # in a quarter 0, 1, ... or 19 tokens are kept, all as often
        share = (kept <= bound).float().mean().item()
        assert share == pytest.approx(0.25 + 0.25 * (int(19 * bound) + 1) / 20, abs=0.02)
    assert (kept == 1).float().mean().item() == pytest.approx(0.5 + 0.25 / 20, abs=0.02)
    assert torch.equal(states[~alone, 0], text[captions[~alone], 0])
    for caption, near in ((1, 3), (3, 1)):  # a sentence alone goes up to half way to its nearest
        way = text[near, 0] - text[caption, 0]
        gone = states[alone & (captions == caption), 0] - text[caption, 0]
        part = (gone @ way) / (way @ way)
        assert torch.allclose(gone, part[:, None] * way, atol=1e-5)
        assert 0 <= part.min() < 0.02 and 0.48 < part.max() < 0.5
    assert torch.equal(states[alone & (captions == 0), 0].unique(dim=0), text[:1, 0])


def test_muon_moves_kernels_along_the_polar_factor_of_their_gradient(tmp_path):
    """First step, against the singular value decomposition; AdamW's own is the gradient's sign."""
    torch.manual_seed(0)
    model = torch.nn.Conv2d(6, 8, 3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    (model(torch.randn(64, 6, 5, 5)) ** 2).mean().backward()
    gradient = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    training = Training(model, tmp_path / "t.safetensors", 0.9, frozenset({"weight"}))
    training.update(sum((p * gradient[n]).sum() for n, p in model.named_parameters()), 1e-3, 1)
    moved = {name: (p.detach() - before[name]) / 1e-3 for name, p in model.named_parameters()}
    signs = -gradient["bias"].sign() - 0.01 * before["bias"]
    assert torch.allclose(moved["bias"], signs, atol=1e-3)
    u, _, v = torch.linalg.svd(gradient["weight"].flatten(1), full_matrices=False)
    step = -(moved["weight"] + 0.01 * before["weight"]).flatten(1) / (0.2 * math.sqrt(54))
    assert torch.cosine_similarity(step.flatten(), (u @ v).flatten(), dim=0) > 0.97
    values = torch.linalg.svdvals(step)  # Muon's five Newton-Schulz steps end near 1, not at it
    assert values.min() > 0.5 and values.max() < 1.3
    assert all(p.grad is None for p in model.parameters())  # the next step begins anew


def test_turned_drawings_are_drawings_turned():
    images = torch.rand(64, 3, 8, 8)
    turned = augment(images, torch.Generator().manual_seed(0))
    seen = set()
    for image, result in zip(images, turned, strict=True):
        ways = {
            (k, flip): (image.rot90(k, (1, 2)).flip(2) if flip else image.rot90(k, (1, 2)))
            for k in range(4)
            for flip in (False, True)
        }
        found = [way for way, picture in ways.items() if torch.equal(picture, result)]
        assert len(found) == 1
        seen |= set(found)
    assert len(seen) == 8


def test_the_teacher_has_layers_to_prune():
    config = pretrain.UNET_CONFIG
    assert config["layers_per_block"] >= 2
    assert sum("CrossAttn" in block for block in config["down_block_types"]) >= 2
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    assert 10e6 < sum(p.numel() for p in unet.parameters()) < 15e6


def test_learning_rate_warms_up_and_decays():
    rates = [learning_rate(step, 1000, 1.0, warmup=100) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01) and max(rates) == 1.0
    assert rates[100:600] == [1.0] * 500
    assert rates[800] == pytest.approx(0.5) and rates[-1] == 0.01
