"""sample.py with what users of diffusers expect, beside the published pipeline."""

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file
from small_runs import PROMPTS, routed_pipeline, tiny_run
from test_lora import KINDS, make_adapter
from torch import Generator

import sample
from common.errors import UserError
from sample import APTPPipeline, Config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("sample"), "sd1", "all")


def pixels(images):
    return np.stack([np.asarray(image) for image in images]).astype(int)


def test_negatives_sizes_and_loras_are_those_of_the_published_pipeline(run, tmp_path):
    """LoRAs are merged here and sliced there; expert 1 is fine-tuned, the others are not."""
    ends = sum(KINDS.values(), ())
    own, pipe = APTPPipeline.from_pretrained(run, "cpu"), routed_pipeline(run, tmp_path / "router")
    plain = own(PROMPTS, num_inference_steps=3)
    for k, weight in enumerate((0.5, 1.5)):
        adapter = make_adapter(own.teacher.unet, ends, seed=k)
        save_file(adapter, file := tmp_path / f"{k}.safetensors")
        pipe.load_lora_weights(adapter, adapter_name=f"a{k}")
        own.load_lora_weights(file, weight)
    pipe.set_adapters(["a0", "a1"], [0.5, 1.5])
    found = own(PROMPTS, num_inference_steps=3, negative="blue", size=(16, 24))
    assert {*found.experts} == {0, 1, 2}
    theirs = pipe(
        list(PROMPTS),
        negative_prompt=["blue"] * len(PROMPTS),
        generator=[Generator().manual_seed(k) for k in range(len(PROMPTS))],
        num_inference_steps=3,
        height=16,
        width=24,
    )
    assert np.abs(pixels(found.images) - pixels(theirs.images)).max() <= 1
    changed = own(PROMPTS, num_inference_steps=3)
    assert np.abs(pixels(plain.images) - pixels(changed.images)).max() > 5


def test_on_the_command_line(run, tmp_path):
    save_file(
        make_adapter(APTPPipeline.from_pretrained(run, "cpu").teacher.unet, ("to_q",)),
        tmp_path / "a.safetensors",
    )
    options = {"run": run, "steps": 2, "device": "cpu", "prompts": ("a dog",), "out": tmp_path}
    lora = {"lora": (tmp_path / "a.safetensors",), "lora_weights": (0.5,)}
    sample.sample(Config(**options, negative="blue", width=32, height=16, **lora))
    with Image.open(tmp_path / "a-dog-0.png") as image:
        assert image.size == (32, 16)


@pytest.mark.parametrize(
    ("ends", "words"), [(("attn1.to_q",), "not in this teacher"), (("conv1",), "does not fit")]
)
def test_a_lora_of_another_model_is_refused_in_one_line(run, tmp_path, ends, words):
    own = APTPPipeline.from_pretrained(run, "cpu")
    adapter = make_adapter(own.teacher.unet, ends)
    other = {
        key.replace("attn1", "attn7"): value.repeat(3, 3, *[1] * (value.ndim - 2))
        for key, value in adapter.items()
    }
    save_file(other, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=words) as error:
        own.load_lora_weights(tmp_path / "lora.safetensors")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"--lora .*gone.*does not fit"):
        own.load_lora_weights(tmp_path / "gone.safetensors")


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"width": 20}, "--width 20"), ({"lora_weights": (1.0,)}, "--lora-weights has 1")],
)
def test_what_cannot_be_is_refused(run, tmp_path, settings, words):
    with pytest.raises(UserError, match=words):
        sample.sample(Config(run=run, prompts=("a dog",), device="cpu", out=tmp_path, **settings))
