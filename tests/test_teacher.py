"""The pocket teacher: its parts fit together, and what training sees is what sampling uses."""

import pytest
import torch

import losses
from data import load_target
from pretrain import reconstruction_psnr
from runfolder import UserError, step_generator
from teacher import ASSETS, add_noise, load_teacher


@pytest.fixture(scope="module")
def teacher():
    return load_teacher("pocket")


def test_it_is_frozen_and_small(teacher):
    parts = (teacher.unet, teacher.pipe.vae, teacher.pipe.text_encoder)
    assert not any(p.requires_grad for part in parts for p in part.parameters())
    assert teacher.resolution == 64 and teacher.latent_size == 8
    size = sum(file.stat().st_size for file in (ASSETS / "pocket").rglob("*") if file.is_file())
    assert size <= 35e6


def test_text_states_ignore_the_rest_of_the_batch(teacher):
    together = teacher.encode_text(["a giraffe", "an outlined drawing of a left speech bubble", ""])
    assert together.shape == (3, teacher.text_tokens, 384)
    assert torch.allclose(together[:1], teacher.encode_text(["a giraffe"]), atol=1e-5)


def test_latents_are_standardised_and_decode_to_the_picture(teacher):
    data = load_target("emoji", "train", limit=128)
    latents = teacher.encode_images(data.images(range(128)))
    assert latents.shape == (128, 8, 8, 8)
    assert latents.mean().abs() < 0.15 and abs(latents.std() - 1) < 0.15
    validation = load_target("emoji", "validation", limit=64)
    assert reconstruction_psnr(teacher.pipe.vae, validation) > 18


def test_it_predicts_better_than_nothing_and_better_with_the_right_caption(teacher):
    """v-prediction.

    The error is below the target's own size, and rises when captions are exchanged.
    """
    data = load_target("emoji", "train", limit=96)
    x0, text = teacher.encode_images(data.images(range(96))), teacher.encode_text(data.captions)
    batch = add_noise(teacher, x0, text, step_generator(0, "test"))

    def error(states: torch.Tensor) -> float:
        with torch.no_grad():
            output = teacher.unet(**(batch.inputs() | {"encoder_hidden_states": states})).sample
        return losses.denoising_loss(output, batch.target).mean().item()

    right, wrong = error(text), error(text.roll(48, 0))
    assert right < 0.8 * batch.target.square().mean().item()
    assert right < wrong


def test_noised_samples_follow_the_schedule(teacher):
    """x_0 = sqrt(abar) x_t - sqrt(1 - abar) v, from the definitions of x_t and v."""
    x0 = torch.randn(16, 8, 8, 8)
    batch = add_noise(teacher, x0, torch.zeros(16, 1, 384), step_generator(0, "test"))
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, 0)[batch.t].float()[:, None, None, None]
    assert torch.allclose(
        abar.sqrt() * batch.sample - (1 - abar).sqrt() * batch.target, x0, atol=1e-4
    )


def test_unknown_teacher():
    with pytest.raises(UserError, match=r"dalle.*pocket"):
        load_teacher("dalle")
