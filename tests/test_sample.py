"""Sampling: names of files, what a pipeline accepts, and what a stop leaves."""

import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from small_pipelines import write_pipeline

import sample
from common.errors import UserError
from sample import APTPPipeline
from teacher.model import Teacher, load_teacher

# letters whose cases, spellings or marks meet, other scripts, and what is no letter
LETTERS = "aA1 -!./\\:*\n\0\ud800ıIİiſsSßẞǅéÉe\u0301ﬁfΣσςα한ᄒ各紅नमस्ते😀²Ⅷ"  # noqa: RUF001
PROMPTS = st.one_of(
    *(st.text(letters, max_size=3) for letters in ("ıIİi", "ſsßẞ", "éÉe\u0301", "ΣσςA! ")),  # noqa: RUF001
    st.text(LETTERS),
    st.text(),
    st.text(max_size=3).map(lambda text: text * 70),
)


def same_file(name: str) -> set[str]:
    """What file systems that fold case or spelling make of a name."""
    cases = [name, name.lower(), name.upper(), name.casefold(), name.lower().upper()]
    return {unicodedata.normalize(form, case) for case in cases for form in ("NFC", "NFD")}


@example(["一只长颈鹿", "红色的狗"])
@example(["a red dog", "A red dog!", "a red dog 2", "a-red-dog-2"])
@example(["x" * 60 + "a", "x" * 60 + "b", "😀", "!"])
@settings(max_examples=300)
@given(st.lists(PROMPTS, min_size=2, max_size=8, unique=True))
def test_prompts_of_one_call_have_names_of_their_own(prompts):
    rows = [(prompt, seed) for prompt in prompts for seed in (0, 10, 2**62)]
    names = sample.file_names(rows)
    forms = [form for name in names for form in same_file(name)]
    assert len(set(forms)) == len(forms)
    for name in names:
        assert len(f".{name}.12345678.tmp".encode()) <= 255  # as `replacing` writes it
        assert not set(name) & set('<>:"/\\|?*\0') and name.isprintable()


def test_a_name_is_the_prompts_letters():
    rows = [("A giraffe, flat!", 0), ("一只长颈鹿", 3), ("Żółw śpi", 0), ("नमस्ते", 1), ("?!", 2)]
    names = ["a-giraffe-flat-0", "一只长颈鹿-3", "żółw-śpi-0", "नमस्ते-1", "prompt-2"]
    assert sample.file_names(rows) == [f"{name}.png" for name in names]
    assert sample.file_names([("a dog", 1), ("a dog", 1)]) == ["a-dog-1.png"] * 2  # one image
    assert sample.file_names([("x" * 99, 0)]) == ["x" * 60 + "-0.png"]


# ---- what a pipeline accepts ----


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Teacher:
    return load_teacher(str(write_pipeline(tmp_path_factory.mktemp("sd") / "sd1", "sd1")))


@pytest.fixture
def pipeline(teacher, tmp_path) -> APTPPipeline:
    """Two experts, both the teacher's U-Net; a prompt's length routes it."""
    absent: Any = None
    made = APTPPipeline(tmp_path, teacher, absent, absent, [0.5, 0.7])
    made.route = lambda prompts: [len(prompt) % 2 for prompt in prompts]
    made.experts |= {0: teacher.unet, 1: teacher.unet}
    return made


def noise(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image).astype(int) for image in images])


def alike(images: list[Image.Image], others: list[Image.Image]) -> bool:
    """The same up to rounding, which differs with the batch."""
    return bool(np.abs(pixels(images) - pixels(others)).max() <= 1)


PROMPTS_OF_BOTH = ["a giraffe", "a dog", "two dogs", "dogs"]


@pytest.mark.parametrize("several", [False, True])
def test_generators_make_the_noise_that_they_make_in_diffusers(pipeline, several):
    """Whichever prompts share an expert: diffusers' own pipeline has all in one batch."""
    options: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 2.0}
    generator, same = (noise(1, 2, 3, 4) if several else noise(5)[0] for _ in range(2))
    size = pipeline.teacher.resolution
    wanted = pipeline.teacher.pipe(
        PROMPTS_OF_BOTH, generator=generator, height=size, width=size, **options
    ).images
    found = pipeline(PROMPTS_OF_BOTH, generator=same, batch_size=1, **options)
    assert found.experts == [1, 1, 0, 0] and alike(found.images, wanted)
    assert not alike(found.images[:1], wanted[1:2])
    if not several:  # it goes on where diffusers would go on
        assert torch.equal(generator.get_state(), same.get_state())


def test_one_prompt_is_one_prompt(pipeline):
    def first(prompts: Any, **options: Any) -> list[Image.Image]:
        made = pipeline(prompts, num_inference_steps=2, **options)
        assert made.prompts == ["a giraffe"] and len(made.images) == 1
        return made.images

    listed = first(["a giraffe"], seeds=[3])
    seeds = [3, np.int64(3), np.array([3]), (3,)]
    assert all(first("a giraffe", seeds=seed) == listed for seed in seeds)
    assert first(("a giraffe",), generator=noise(3)[0]) == listed
    assert first(np.array(["a giraffe"]), generator=noise(3), expert=np.int64(1)) == listed
    assert first("a giraffe") == first("a giraffe", seeds=0) != listed


def test_what_cannot_be_is_one_line(pipeline):
    both = ["a giraffe", "a dog"]
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ([], {}, "prompts is empty"),
        (both, {"seeds": [1]}, "1 seeds for 2 prompts"),
        (both, {"seeds": 1}, "1 seeds for 2 prompts"),
        (both, {"generator": noise(1, 2, 3)}, "3 generators for 2 prompts"),
        (both, {"expert": [0]}, "1 experts for 2 prompts"),
        (both, {"seeds": [1, 2], "generator": noise(1)[0]}, "exclude each other"),
    ]
    for prompts, options, words in cases:
        with pytest.raises(ValueError, match=words) as refused:
            pipeline(prompts, **options)
        assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="empty"):
        pipeline("")


def test_prompts_of_a_file_are_read_as_captions_are(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa giraffe\r\n\n  a\tdog \u2028 runs\0\r".encode())
    assert sample.read_prompts(path) == ["a giraffe", "a dog runs"]
    path.write_bytes(b"a giraffe\ncaf\xe9\n")
    with pytest.raises(UserError, match=r"prompts\.txt, line 2: byte 0xe9"):
        sample.read_prompts(path)
    with pytest.raises(UserError, match=r"gone\.txt"):
        sample.read_prompts(tmp_path / "gone.txt")


# ---- what a stop leaves ----


def test_images_that_are_finished_when_it_is_stopped_are_kept(pipeline, monkeypatch, tmp_path):
    """The third batch is stopped by Ctrl-C; of the first two, every image is there."""
    generate, made = pipeline.teacher.generate, []

    def stopped(self: Teacher, prompts: list[str], *rest: Any, **_: Any) -> list[Image.Image]:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append([prompt.replace(" ", "-") for prompt in prompts])
        return generate(prompts, *rest)

    monkeypatch.setattr(Teacher, "generate", stopped)
    monkeypatch.setattr(APTPPipeline, "from_pretrained", lambda *_, **__: pipeline)
    monkeypatch.setattr(sample, "slots", lambda _: 32)  # batches of two, one after the other
    monkeypatch.setattr("common.threads.slots", lambda _: 1)
    prompts = tuple(f"a dog {k:02d}" for k in range(64))
    cfg = sample.Config(prompts=prompts, run=tmp_path, out=tmp_path / "out", steps=2)
    with pytest.raises(KeyboardInterrupt):
        sample.sample(cfg)
    names = {f"{prompt}-0.png" for batch in made for prompt in batch}
    assert len(names) == 4 and {path.name for path in Path(cfg.out).iterdir()} == names
    for name in names:
        with Image.open(cfg.out / name) as image:
            image.load()
