"""The teacher as others use it: its images, and what the shipped one's model card says."""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from common.files import read_json
from teacher.model import Teacher
from teacher.shapes import ASSETS


def test_a_teacher_generates_from_each_prompts_own_seed_and_gets_its_unet_back():
    """With a stand-in for the diffusers pipeline."""
    asked, encoding = [], []

    class Pipe:
        unet = SimpleNamespace(config=SimpleNamespace(sample_size=4))
        scheduler = object()
        vae_scale_factor = 8
        image_processor = SimpleNamespace(postprocess=lambda images, kind: images.tolist())

        def encode_prompt(self, prompt, *, do_classifier_free_guidance, **options):
            encoding.append(prompt)
            time.sleep(0.01)
            assert encoding == [prompt]  # texts are encoded by one thread at a time
            encoding.remove(prompt)
            codes = torch.tensor([ord(one) for one in prompt])
            return codes, -codes if do_classifier_free_guidance else None

        def __call__(self, *, generator, prompt_embeds, **options):
            if not len(prompt_embeds):
                raise KeyboardInterrupt
            noise = [torch.randn(2, generator=one).tolist() for one in generator]
            asked.append((self.unet, self.scheduler, options, noise))
            return SimpleNamespace(images=prompt_embeds)

    class Undecoded(Teacher):
        device = torch.device("cpu")

        def decode_latents(self, latents):
            return latents

    pipe, expert = Pipe(), object()
    teacher, own = Undecoded("x", pipe, 2.5), pipe.unet
    assert teacher.generate(("a", "b"), (5, 6), 7) == [ord("a"), ord("b")]
    teacher.generate(("b",), (6,), 7, 0.0, expert)
    with pytest.raises(KeyboardInterrupt):
        teacher.generate((), (), 7, unet=expert)
    assert pipe.unet is own
    first, second = asked
    assert first[0] is own and second[0] is expert
    assert len({first[1], second[1], pipe.scheduler}) == 3  # a scheduler keeps its last steps
    size = {"height": 32, "width": 32, "num_inference_steps": 7, "output_type": "latent"}
    assert first[2].pop("negative_prompt_embeds").tolist() == [-ord("a"), -ord("b")]
    assert second[2].pop("negative_prompt_embeds") is None
    assert first[2] == size | {"guidance_scale": 2.5}
    assert second[2] == size | {"guidance_scale": 0.0}
    assert first[3][1] == second[3][0] != first[3][0]
    with ThreadPoolExecutor(4) as pool:
        made = pool.map(lambda seed: teacher.generate(("a", "b"), (seed, 6), 7), range(8))
        assert list(made) == [[ord("a"), ord("b")]] * 8


def test_the_model_card_states_what_is_shipped():
    folder = ASSETS / "pocket"
    card, figures = (folder / "README.md").read_text("utf-8"), read_json(folder / "metrics.json")
    for part in ("unet", "vae"):
        weights = load_file(folder / part / "diffusion_pytorch_model.safetensors").values()
        assert {weight.dtype for weight in weights} == {torch.float16}
        count = f"{sum(weight.numel() for weight in weights) / 1e6:.1f} M"
        assert re.search(rf"^\| `{part}/` .*\| {count} \|$", card, re.M), count
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert size <= 35e6
    notice = (ASSETS.parent / "NOTICE.md").read_text("utf-8")
    licence = "CC BY-SA 4.0"
    assert f"**Licence.** {licence}" in card
    assert re.search(rf"^\| pocket teacher .*\| {licence} \|$", notice, re.M)
    assert figures["guidance"] == read_json(folder / "teacher.json")["guidance_scale"]
