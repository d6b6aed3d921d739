"""Pre-training of the pocket teacher: resumable; standardised latents, unchanged pictures."""

import dataclasses

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

import pretrain
from data import load_target
from pipelines import load_pocket
from runfolder import load_tensors

TINY = pretrain.Config(
    vae_steps=3, vae_batch_size=2, unet_steps=3, unet_batch_size=4, save_every=1, limit=12
)


def test_a_stopped_training_ends_as_the_undisturbed_one(tmp_path, monkeypatch):
    def config(name: str) -> pretrain.Config:
        return dataclasses.replace(TINY, out=tmp_path / name, assets=tmp_path / f"{name}-assets")

    pretrain.pretrain(config("whole"))
    update = pretrain.Training.update

    for stop in (2, 1):  # in the autoencoder's third step, then in the U-Net's second
        calls: list[int] = []

        def stopping(self, loss, rate, images, calls=calls, stop=stop):
            calls.append(1)
            if len(calls) > stop:
                raise KeyboardInterrupt
            update(self, loss, rate, images)

        monkeypatch.setattr(pretrain.Training, "update", stopping)
        with pytest.raises(KeyboardInterrupt):
            pretrain.pretrain(config("stopped"))
    monkeypatch.setattr(pretrain.Training, "update", update)
    pretrain.pretrain(config("stopped"))
    for name in ("vae.safetensors", "unet.safetensors"):
        whole, stopped = (load_tensors(tmp_path / run / name) for run in ("whole", "stopped"))
        assert whole[1] == stopped[1]
        assert whole[1]["step"] == 3
        assert all(torch.equal(whole[0][key], stopped[0][key]) for key in whole[0])
    pipe, _ = load_pocket(tmp_path / "stopped-assets")
    assert pipe(["a giraffe"], num_inference_steps=1).images[0].size == (64, 64)


def test_standardising_changes_latents_but_not_reconstructions():
    torch.manual_seed(0)
    vae = AutoencoderKL(**pretrain.VAE_CONFIG).eval()
    data = load_target("emoji", "train", limit=32)
    images = data.images(range(32))
    with torch.no_grad():
        before = vae.encode(images).latent_dist
        picture = vae.decode(before.mean[:4]).sample
        pretrain.standardise_latents(vae, data, images=32)
        after = vae.encode(images).latent_dist
        assert torch.allclose(vae.decode(after.mean[:4]).sample, picture, atol=1e-4)
    ones = torch.ones(pretrain.LATENT_CHANNELS)
    assert torch.allclose(after.mean.mean((0, 2, 3)), 0 * ones, atol=1e-4)
    assert torch.allclose(after.mean.std((0, 2, 3)), ones, atol=1e-3)
    # the posterior keeps its shape: its deviation shrinks as its mean does
    scale = before.mean.std((0, 2, 3))[None, :, None, None]
    assert torch.allclose(after.std * scale, before.std, rtol=1e-3)


def test_the_teacher_has_layers_to_prune():
    config = pretrain.UNET_CONFIG
    assert config["layers_per_block"] >= 2
    assert sum("CrossAttn" in block for block in config["down_block_types"]) >= 2
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    assert 10e6 < sum(p.numel() for p in unet.parameters()) < 15e6


def test_learning_rate_warms_up_and_decays():
    rates = [pretrain.learning_rate(step, 1000, 1.0, warmup=100) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01) and max(rates) == 1.0
    assert rates[100:800] == [1.0] * 700
    assert rates[900] == pytest.approx(0.5) and rates[-1] == 0.01
