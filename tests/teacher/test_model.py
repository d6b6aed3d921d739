"""The teacher as others use it: its images, and what the shipped one's model card says."""

import itertools
import re
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from diffusers import PNDMScheduler
from safetensors.torch import load_file

from common.errors import UserError
from common.files import read_json
from teacher.model import Teacher, check_steps
from teacher.pipelines import SCHEDULE, minilm_tokenizer
from teacher.shapes import ASSETS


def test_a_teacher_generates_from_each_prompts_own_seed_and_gets_its_unet_back():
    """With a stand-in for the diffusers pipeline."""
    asked, encoding = [], []

    class Scheduler:
        config = SimpleNamespace(num_train_timesteps=1000, steps_offset=1)

    class Pipe:
        unet = SimpleNamespace(config=SimpleNamespace(sample_size=4))
        scheduler = Scheduler()
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


def possible(steps, schedule):
    try:
        check_steps(schedule.config, steps)
    except UserError:
        return False
    return True


def test_possible_steps_begin_at_noise():
    """By PNDM's own timesteps: what they leave out is a step, and a tenth of all at most."""
    schedule = PNDMScheduler(**SCHEDULE)
    for steps in range(1, 1100):
        schedule.set_timesteps(min(steps, 1000))  # with more, it divides 1000 to nothing
        first = int(schedule.timesteps[0])
        wanted = 1 < steps <= 1000 and 900 - 1000 // steps < first < 1000
        assert possible(steps, schedule) == wanted, steps
    assert all(possible(steps, schedule) for steps in range(2, 102))


@pytest.mark.parametrize(
    ("steps", "others"),
    [(1, "2"), (334, "333 or 450"), (501, "500 or 900"), (1000, "999"), (1001, "999")],
)
def test_other_numbers_of_steps_are_one_line_before_anything_is_encoded(steps, others):
    pipe = SimpleNamespace(scheduler=PNDMScheduler(**SCHEDULE))  # which encodes no prompt
    with pytest.raises(UserError, match=f"--steps {steps} .*choose {others}$"):
        Teacher("x", pipe, 2.5).generate(["a"], [1], steps)


@pytest.mark.parametrize("steps", [*range(2, 101), 300, 333, 500, 999])
def test_the_true_noise_leads_back_to_the_image(steps):
    """From the first timestep to the first alpha, whatever steps PNDM puts together."""
    schedule = PNDMScheduler(**SCHEDULE)
    schedule.set_timesteps(steps)
    k, ts = 1000 // steps, schedule.timesteps.tolist()
    assert ts[-1] == 1 and len(ts) == steps + 1 and ts[1] == ts[2] == ts[0] - k
    assert {a - b for a, b in itertools.pairwise(ts[2:])} <= {k}
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, 0)
    x0, noise = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).double()
    x = abar[ts[0]].sqrt() * x0 + (1 - abar[ts[0]]).sqrt() * noise
    for t in ts:
        x = schedule.step(noise, t, x).prev_sample
    assert torch.allclose(x, abar[0].sqrt() * x0 + (1 - abar[0]).sqrt() * noise, atol=1e-3)


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


def test_captions_that_the_text_encoder_cuts_off_are_counted():
    """By tokens, [CLS] and [SEP] among them: 18 words of one token each just fit into 20."""
    teacher = Teacher("x", SimpleNamespace(tokenizer=minilm_tokenizer(20)), 1.0)
    fits, long = " ".join(["red"] * 18), " ".join(["red"] * 19)
    assert teacher.cut_off([fits, long, "a giraffe", long + " bus"]) == 2
