"""The pocket teacher: its parts fit together, and what training sees is what sampling uses."""

import dataclasses
import math
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch.nn.functional import normalize
from transformers import AutoTokenizer, BertModel

import losses
from common.errors import UserError
from common.hub import minilm_folder
from common.randomness import step_generator
from targets.images import CaptionedImages, Unreadable, load_target
from teacher.conditions import Conditions
from teacher.encoded import encode_target, latents_key, spare_memory
from teacher.model import Teacher, add_noise, load_teacher


@pytest.fixture(scope="module")
def teacher():
    return load_teacher("pocket")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "aptp"


IMAGE_IDS = np.array([4, 4, 9, 2, 9, 7, 7, 7, 2, 5, 5, 1])


def target(seed: int = 0, broken: int | None = None) -> CaptionedImages:
    """Twelve captions of six images, one of which may be unreadable."""

    def read(row: int) -> np.ndarray:
        image_id = int(IMAGE_IDS[row])
        if image_id == broken:
            raise Unreadable(f"image {image_id}: no")
        generator = np.random.default_rng(seed + image_id)
        return generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)

    captions = [f"image {image_id}, caption {row}" for row, image_id in enumerate(IMAGE_IDS)]
    nothing = [""] * len(captions)
    return CaptionedImages("toy", captions, nothing, nothing, IMAGE_IDS, read)


def test_it_is_frozen(teacher):
    parts = (teacher.unet, teacher.pipe.vae, teacher.pipe.text_encoder)
    assert not any(p.requires_grad for part in parts for p in part.parameters())
    assert teacher.resolution == 64 and teacher.latent_size == 8


def test_text_states_ignore_the_rest_of_the_batch(teacher):
    together = teacher.conditions(["a giraffe", "an outlined drawing of a left bubble", ""]).text
    assert together.shape == (3, teacher.text_tokens, 384)
    assert torch.allclose(together[:1], teacher.conditions(["a giraffe"]).text, atol=1e-5)


def test_text_states_are_minilms_own_the_sentences_first_and_padding_is_masked(teacher):
    """By transformers and sentence-transformers alone."""
    prompts = ["a giraffe, flat emoji", "", "a slice of pizza " * 20]
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    options = {"padding": "max_length", "truncation": True, "max_length": 20}
    tokens = tokenizer(prompts, return_tensors="pt", **options)
    with torch.no_grad():
        states = BertModel.from_pretrained(minilm_folder())(**tokens).last_hidden_state
    found = teacher.conditions(prompts).text
    assert torch.allclose(found[:, 1:], states[:, 1:], atol=1e-5)
    encoder = SentenceTransformer(str(minilm_folder()), device="cpu")
    encoder.max_seq_length = 20
    sentences = encoder.encode(prompts, convert_to_tensor=True, normalize_embeddings=True)
    assert torch.allclose(normalize(found[:, 0], dim=-1), sentences, atol=1e-5)


def test_latents_are_standardised_and_decode_to_the_image(teacher):
    data = load_target("emoji", "train", limit=128)
    latents = teacher.encode_images(data.images(range(128)))
    assert latents.shape == (128, teacher.unet.config.in_channels, 8, 8)
    assert latents.mean().abs() < 0.15 and abs(latents.std() - 1) < 0.15
    images = load_target("emoji", "validation", limit=64).images(range(64))
    error = (teacher.decode_latents(teacher.encode_images(images)) - images) / 2
    assert -10 * math.log10(error.square().mean()) > 18  # PSNR in dB


def test_it_predicts_better_than_nothing_and_better_with_the_right_caption(teacher):
    """v-prediction.

    The error is below the target's own size, and rises when captions are exchanged.
    """
    data = load_target("emoji", "train", limit=96)
    x0, conditions = (
        teacher.encode_images(data.images(range(96))),
        teacher.conditions(data.captions),
    )
    batch, text = add_noise(teacher, x0, conditions, step_generator(0, "test")), conditions.text

    def error(states: torch.Tensor) -> float:
        with torch.no_grad():
            output = teacher.unet(**(batch.inputs() | {"encoder_hidden_states": states})).sample
        return losses.denoising_loss(output, batch.target).mean().item()

    right, wrong = error(text), error(text.roll(48, 0))
    assert right < 0.8 * batch.target.square().mean().item()
    assert right < wrong


WAYS = {"kept": {}, "made on demand": {"in_memory": 0}}


@pytest.mark.parametrize("way", WAYS)
def test_rows_are_what_the_teacher_makes_of_them(teacher, cache, way, monkeypatch):
    """However they are kept, and in whatever order they are read."""
    monkeypatch.setattr("teacher.encoded.PART", 4)
    data = target()
    encoded = encode_target(teacher, data, **WAYS[way])
    rows = torch.tensor([3, 11, 0, 5, 5, 2, 9])
    for some in (rows, rows.flip(0), torch.arange(12)):
        latents, conditions = encoded.batch(some)
        assert torch.allclose(latents, teacher.encode_images(data.images(some)), atol=1e-5)
        states = teacher.conditions([data.captions[row] for row in some.tolist()]).text
        assert torch.allclose(conditions.text, states, atol=1e-5)
        assert torch.equal(encoded.conditions[some].text, conditions.text)
        assert torch.equal(encoded.latents[some], latents)
        assert latents.dtype == torch.float32


def test_an_image_that_broke_after_the_check_is_one_line(teacher, cache):
    with pytest.raises(UserError, match=r"image 9: no; .*--verify"):
        encode_target(teacher, target(broken=9))
    assert not list(cache.rglob("*.safetensors"))


@pytest.mark.parametrize("way", WAYS)
def test_each_distinct_caption_is_encoded_once(teacher, cache, way, monkeypatch):
    """Where conditions are kept; else once in a batch. 256 at a time, whatever the resolution."""
    seen = []

    def encode(self, prompts, frames=None):
        seen.append(list(prompts))
        return Conditions(torch.tensor([[[float(prompt[1:])]] for prompt in prompts]))

    monkeypatch.setattr(Teacher, "conditions", encode)
    data = dataclasses.replace(target(), captions=[f"n{row // 2}" for row in range(12)])
    encoded = encode_target(teacher, data, **WAYS[way])
    for _ in range(2):
        found = encoded.conditions[torch.tensor([11, 0, 1, 10, 4])]
        assert found.text.flatten().tolist() == [5, 0, 0, 5, 2]
    assert [sorted(each) for each in seen] == (
        [[f"n{k}" for k in range(6)]] if way == "kept" else [["n0", "n2", "n5"]] * 2
    )


def test_memory_is_shared_by_the_processes_of_a_machine(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr("psutil.virtual_memory", lambda: Mock(available=800))
    assert spare_memory() == 200
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert spare_memory() == 25


def test_each_image_is_encoded_once_and_kept(teacher, cache, monkeypatch):
    seen = []

    def encode(self, images):
        seen.append(len(images))
        return original(self, images)

    original = Teacher.encode_images
    monkeypatch.setattr(Teacher, "encode_images", encode)
    monkeypatch.setattr("teacher.encoded.PART", 4)
    rows = torch.arange(12)
    first = encode_target(teacher, target())
    assert sum(seen) == 6
    again = encode_target(teacher, target())
    assert sum(seen) == 6
    assert torch.equal(first.latents[rows], again.latents[rows])
    part = next(cache.iterdir()) / "000001.safetensors"
    part.unlink()  # and not cut in place: the rows above are read from it
    part.write_bytes(b"")
    repaired = encode_target(teacher, target())
    assert sum(seen) == 8 and torch.equal(repaired.latents[rows], first.latents[rows])


def test_each_image_alone_decides_which_latents_are_read(teacher):
    """Not eight of them; captions do not matter, nor how often an image is in the rows."""

    def key(edited: int | None = None, **changes: Any) -> str:
        def stamp(image_id: int) -> tuple[str, str]:
            return f"{image_id}.jpg", f"{1 + (image_id == edited)}"

        nothing = [""] * 40
        data = CaptionedImages("toy", nothing, nothing, nothing, np.arange(40), blank, stamp=stamp)
        return latents_key(teacher, dataclasses.replace(data, **changes))

    def blank(row: int) -> np.ndarray:
        return np.zeros((64, 64, 3), np.uint8)

    assert len({key(), *(key(edited) for edited in range(40))}) == 41
    assert key() == key(captions=["x"] * 40)


def test_other_images_sizes_and_autoencoders_have_latents_of_their_own(teacher, cache):
    def encode(some: Teacher, data: CaptionedImages) -> None:
        encode_target(some, data)

    encode(teacher, target())
    encode(teacher, target())
    assert len(list(cache.iterdir())) == 1
    encode(teacher, target(seed=100))  # the same captions
    assert len(list(cache.iterdir())) == 2
    encode(load_teacher("pocket", resolution=32), target())
    assert len(list(cache.iterdir())) == 3
    other = load_teacher("pocket")
    next(other.pipe.vae.encoder.parameters()).add_(0.01)
    encode(other, target())
    assert len(list(cache.iterdir())) == 4
